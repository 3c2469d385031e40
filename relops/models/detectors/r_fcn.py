"""R-FCN (Dai et al., https://arxiv.org/abs/1605.06409): the second stage is a vote of position-sensitive maps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from relops._checks import check_choice
from relops._dtypes import to_compute_dtype
from relops.models.backbones.build import make_body
from relops.models.backbones.stages import StageBackbone
from relops.models.detectors.two_stage import TwoStageDetector
from relops.models.initialization import zero_bias
from relops.models.parts.anchors import paper_anchors
from relops.models.parts.padding import present_rows
from relops.models.parts.roi_heads import RoIHeads
from relops.models.parts.rpn import Proposals, make_rpn
from relops.models.structures import Targets
from relops.ops.ps_roi_align import ps_roi_align
from relops.ops.ps_roi_pool import ps_roi_pool


class PositionSensitiveHeads(RoIHeads):
    """Maps for each of parts x parts, of each class and of four deltas. A part of a region is averaged in its own maps
    only, and the mean of all parts is the region's score (section 2). All that is learned is convolution.

    The backbone gives two maps; the second one is looked at. Losses are of the num_samples regions of an image whose
    loss is largest (online hard example mining), of all proposals.
    """

    def __init__(self, channels: int, hidden: int, num_classes: int, stride: int, parts: int, roi: str, **options: Any):
        super().__init__(nn.Identity(), nn.Identity(), nn.Identity(), **options)
        check_choice("models", "roi", roi, ("pool", "align"))
        self.parts, self.scale = parts, 1 / stride
        self.pool = ps_roi_pool if roi == "pool" else functools.partial(ps_roi_align, sampling_ratio=2)
        reduce = nn.Conv2d(channels, hidden, 1)
        self.reduce = nn.Sequential(reduce, nn.ReLU(inplace=True))
        self.cls_maps = nn.Conv2d(hidden, (num_classes + 1) * parts**2, 1)
        self.box_maps = nn.Conv2d(hidden, 4 * parts**2, 1)
        nn.init.kaiming_normal_(reduce.weight, mode="fan_out", nonlinearity="relu")
        for layer in (self.cls_maps, self.box_maps):
            nn.init.normal_(layer.weight, std=0.01)
            zero_bias(layer)

    def predict(self, maps: list[Tensor], rois: Tensor) -> tuple[Tensor, Tensor]:
        x = self.reduce(maps[1])
        votes = [self.pool(layer(x), rois, self.parts, self.scale) for layer in (self.cls_maps, self.box_maps)]
        logits, deltas = (to_compute_dtype(vote.mean((2, 3))) for vote in votes)
        return logits, deltas

    def losses(self, maps: list[Tensor], proposals: Proposals, sizes: Tensor, targets: Targets) -> dict[str, Tensor]:
        samples = self.regions(proposals, targets)
        rois, place = present_rows(samples.boxes, samples.classes >= 0)
        logits, deltas = self.predict(maps, rois)
        return self.hardest_losses(logits, deltas, samples, targets, place)


def r_fcn(
    num_classes: int,
    *,
    backbone: str = "resnet101-frozen",
    channels: int = 512,
    hidden: int = 1024,
    frozen_stages: int = 0,
    num_samples: int = 128,
    roi: str = "pool",
    parts: int = 7,
    stride: int = 16,
    scales: Sequence[float] = (8, 16, 32),
    min_size: float = 16,
) -> TwoStageDetector:
    """R-FCN: the RPN on a ResNet's third stage, the votes on its fourth, dilated to the same stride of 16.

    Args:
        num_classes: without the background.
        backbone: a ResNet, as in `make_body`.
        channels: of the RPN's convolution.
        hidden: channels between the backbone and the position-sensitive maps.
        frozen_stages: of the backbone, not trained.
        num_samples: the regions of largest loss of an image, that losses are of.
        roi: "pool" (published) or "align".
        parts: k, of k x k parts of a region.
        stride: of both maps: 16, or, for small images, 8, with a stage less.
        scales: of anchors, in strides.
        min_size: of proposals, in pixels.
    """
    if stride not in (8, 16):
        raise ValueError(f"relops.models: stride must be 16 or 8, got {stride}")
    stages = 4 if stride == 16 else 3
    maps = StageBackbone(make_body(backbone, frozen_stages, stages=stages, dilated=True), [stages - 2, stages - 1])
    rpn = make_rpn(
        maps.channels[0],
        channels,
        [paper_anchors(stride, scales=scales)],
        maps.strides[:1],
        loss="softmax",
        levels=1,
        pre_nms=(6000, 6000),
        post_nms=(300, 300),
        min_size=min_size,
        ignore_outside=True,
    )
    roi_heads = PositionSensitiveHeads(
        maps.channels[1],
        hidden,
        num_classes,
        maps.strides[1],
        parts,
        roi,
        num_samples=num_samples,
        beta=1.0,
        nms_threshold=0.3,
    )
    return TwoStageDetector(maps, rpn, roi_heads)
