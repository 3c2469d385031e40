"""HyperNet (Kong et al., https://arxiv.org/abs/1604.00600), which needs only a few proposals per image."""

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

CANDIDATE_STRIDE = 16  # the distance between candidate boxes, in pixels
SIZE = 13  # the height and width of pooled regions


class PooledProposalHead(nn.Module):
    """The layers that predict the scores and deltas of candidate boxes from their pooled features (section 3.2).

    A 3x3 convolution reduces the number of channels before pooling, as in the fast version of the paper (section 3.4).
    This reduction makes it cheap to score thousands of candidates.
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
        """Return the log-odds [N,A] and the deltas [N,A,4] for the anchors [A,4] on one map."""
        x = F.relu(self.conv(maps[0]))
        N, A = len(x), len(anchors[0])
        rois = as_rows(anchors[0].expand(N, A, 4))
        x = F.relu(self.fc(roi_pool(x, rois, SIZE, self.scale).flatten(1)))
        return [self.cls_logits(x).view(N, A)], [self.bbox_pred(x).view(N, A, 4)]


class ConvFCHead(nn.Sequential):
    """A 3x3 convolution on the pooled features, followed by two fully connected layers (section 3.3)."""

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
    """Build HyperNet: proposals and detections from one fine feature map that fuses several stages.

    Both stages of the detector (Kong et al., https://arxiv.org/abs/1604.00600) pool regions from a fused feature map
    with a stride of 4.

    The candidates for proposals are boxes of several sizes and three aspect ratios at every 16th pixel of the image.
    Candidates that extend beyond the image are also used for training. Their pooled features are zero outside of the
    image, so they differ from the features of all other candidates. In evaluation mode, at most 100 proposals per image
    are kept.

    Args:
        num_classes: Number of object classes, without the background.
        backbone: Name of the backbone: "resnet18", "resnet34", "resnet50", "resnet101", "lr_net26", "lr_net50", "vgg16"
            or "zf". All except LR-Nets accept a suffix that selects the normalization: "-bn" (batch normalization),
            "-frozen" (batch normalization with constant statistics and weights) or "-gn" (group normalization). After
            the normalization, a ResNet also accepts "-dcn" (deformable convolutions in the last stage) or "-dcnv2"
            (modulated deformable convolutions in all stages except the first). For ResNets and LR-Nets, a number at the
            end of the name sets the width, that is, the number of channels of the stem (64 by default), as in
            "resnet18-gn-32" and "lr_net26-32".
        channels: Number of output channels of the convolution in the detection head.
        hidden: Width of the two fully connected layers of the detection head.
        dropout: Dropout probability after each of the two fully connected layers.
        frozen_stages: Number of backbone stages that are not trained, counted from the input.
        num_samples: Number of regions per image that are sampled for the losses of the second stage.
        sizes: Sizes of the candidates in pixels. A candidate of size s has an area of s^2.

    Returns:
        A `TwoStageDetector`. In training mode, `detector(images, sizes, targets)` returns a dict of the scalar losses
        "rpn_objectness", "rpn_boxes", "classes" and "boxes". In evaluation mode, `detector(images, sizes)` returns
        `Detections` with at most 100 objects per image. `images` is [N,3,H,W], `sizes` is [N,2] with the height and
        width of each image without padding (None if there is no padding), and `targets` is a `Targets`.

    Raises:
        ValueError: If `backbone` is not a valid name, or if group normalization does not support its width.
        ValueError: If `dropout` is not between 0 and 1.

    Example:
        >>> import torch, relops
        >>> model = relops.models.hypernet(3, backbone="resnet18", channels=16, hidden=64, sizes=(16, 32))
        >>> images = torch.rand(1, 3, 64, 64)
        >>> targets = relops.models.Targets(torch.tensor([[[8.0, 8.0, 40.0, 48.0]]]), torch.tensor([[2]]))
        >>> losses = model.train()(images, None, targets)
        >>> sorted(losses)
        ['boxes', 'classes', 'rpn_boxes', 'rpn_objectness']
        >>> with torch.no_grad():
        ...     detections = model.eval()(images)
        >>> detections.boxes.shape
        torch.Size([1, 100, 4])
    """
    if backbone.startswith(("vgg16", "zf")):
        body = make_body(backbone, frozen_stages)
    else:
        body = make_body(backbone, frozen_stages, stages=3)
    # The fused map combines the first, the middle and the last stage. In VGG-16 and ZF, the first stage is finer than
    # the fused map. In ResNets and LR-Nets, no stage is finer.
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
