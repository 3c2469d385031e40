"""HyperNet (Kong et al., https://arxiv.org/abs/1604.00600): few, good proposals from fused maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from relops.models.backbones.build import make_body
from relops.models.backbones.hyper import HyperBackbone
from relops.models.detectors.two_stage import TwoStageDetector
from relops.models.initialization import zero_bias
from relops.models.parts.anchors import Anchors, centered_anchors
from relops.models.parts.padding import as_rows
from relops.models.parts.roi_heads import BoxPredictor, RegionPool, RoIHeads, TwoFCHead
from relops.models.parts.rpn import RPN
from relops.ops.roi_pool import roi_pool

CANDIDATE_STRIDE = 16  # pixels from a candidate to the next
SIZE = 13  # height and width that regions are pooled to


class PooledProposalHead(nn.Module):
    """Scores and deltas of candidate boxes from their pooled features (section 3.2).

    A 3x3 convolution to few channels comes before pooling, as in the paper's fast version (section 3.4), so that
    thousands of candidates cost little.
    """

    CHANNELS = 4

    def __init__(self, in_channels: int, hidden: int, stride: int) -> None:
        super().__init__()
        self.scale = 1 / stride
        self.conv = nn.Conv2d(in_channels, self.CHANNELS, 3, 1, 1)
        self.fc = nn.Linear(self.CHANNELS * SIZE**2, hidden)
        self.cls_logits = nn.Linear(hidden, 1)
        self.bbox_pred = nn.Linear(hidden, 4)
        for layer in (self.conv, self.fc):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            zero_bias(layer)
        for layer in (self.cls_logits, self.bbox_pred):
            nn.init.normal_(layer.weight, std=0.01)
            zero_bias(layer)

    def forward(self, maps: list[Tensor], anchors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Log-odds [N,A] and deltas [N,A,4] of the anchors [A,4] of one map."""
        x = F.relu(self.conv(maps[0]))
        N, A = len(x), len(anchors[0])
        rois = as_rows(anchors[0].expand(N, A, 4))
        x = F.relu(self.fc(roi_pool(x, rois, SIZE, self.scale).flatten(1)))
        return [self.cls_logits(x).view(N, A)], [self.bbox_pred(x).view(N, A, 4)]


class ConvFCHead(nn.Sequential):
    """A 3x3 convolution of the pooled features, and two fully connected layers (section 3.3)."""

    def __init__(self, in_channels: int, channels: int, hidden: int, dropout: float) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, 3, 1, 1),
            nn.ReLU(inplace=True),
            TwoFCHead(channels * SIZE**2, hidden, dropout),
        )


def hypernet(
    num_classes: int,
    *,
    backbone: str = "vgg16",
    channels: int = 63,
    hidden: int = 4096,
    dropout: float = 0.25,
    frozen_stages: int = 0,
    num_samples: int = 128,
    sizes: Sequence[float] = (32, 64, 128, 256, 512),
) -> TwoStageDetector:
    """HyperNet: proposals and detections both from regions pooled of one fused map at a stride of 4.

    Candidates are boxes of several sizes and three ratios, every 16 pixels. Those that leave the image
    are learned from, too: a pooled part outside of it looks like nothing inside. A hundred proposals are left at
    inference.

    Args:
        num_classes: without the background.
        backbone: as in `make_body`.
        channels: of the convolution of the detection head.
        hidden: of its fully connected layers.
        dropout: behind those.
        frozen_stages: of the backbone, not trained.
        num_samples: regions an image that losses are of.
        sizes: of candidates, in pixels.
    """
    if backbone.startswith(("vgg16", "zf")):
        body = make_body(backbone, frozen_stages)
    else:
        body = make_body(backbone, frozen_stages, stages=3)
    # The first, the middle and the last: finer than the map, of its size, coarser (ResNets have none that is finer).
    maps = HyperBackbone(body, [0, len(body.strides) // 2, len(body.strides) - 1])
    cells = [[box for size in sizes for box in centered_anchors(size)]]
    rpn = RPN(
        PooledProposalHead(maps.channels[0], 256, maps.STRIDE),
        Anchors(cells, maps.strides, CANDIDATE_STRIDE // maps.STRIDE),
        pre_nms=(2000, 1000),
        post_nms=(200, 100),
    )
    roi_heads = RoIHeads(
        RegionPool("pool", SIZE, maps.strides),
        ConvFCHead(maps.channels[0], channels, hidden, dropout),
        BoxPredictor(hidden, num_classes),
        num_samples=num_samples,
        beta=1.0,
        nms_threshold=0.3,
    )
    return TwoStageDetector(maps, rpn, roi_heads)
