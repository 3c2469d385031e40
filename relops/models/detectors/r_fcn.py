"""R-FCN (Dai et al., https://arxiv.org/abs/1605.06409), which scores regions by a vote of position-sensitive maps."""

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
    """Region heads that consist of convolutions only (section 2).

    A region is divided into k x k parts, where k is the argument `parts`. Each class and each of the four deltas has
    one map per part. The value of a part is the mean of its map within the part, and the value of the region is the
    mean over all parts.

    The heads use the second of the backbone's two maps. In each image, the losses are computed from the num_samples
    regions with the largest loss, among all proposals and ground-truth boxes (online hard example mining).
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
        rois, row_index = present_rows(samples.boxes, samples.classes >= 0)
        logits, deltas = self.predict(maps, rois)
        return self.hardest_losses(logits, deltas, samples, targets, row_index)


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
    """Build R-FCN: a fully convolutional detector that scores regions with position-sensitive maps.

    The region proposal network of the detector (Dai et al., https://arxiv.org/abs/1605.06409) uses the third stage of
    the backbone. The position-sensitive maps are computed from the fourth stage, which is dilated to keep the stride of
    16.

    Args:
        num_classes: Number of object classes, without the background.
        backbone: Name of the backbone: "resnet18", "resnet34", "resnet50", "resnet101", "lr_net26" or "lr_net50".
            ResNets accept a suffix that selects the normalization: "-bn" (batch normalization), "-frozen" (batch
            normalization with constant statistics and weights) or "-gn" (group normalization). After the normalization,
            a ResNet also accepts "-dcn" (deformable convolutions in the last stage) or "-dcnv2" (modulated deformable
            convolutions in all stages except the first). A number at the end of any name sets the width, that is, the
            number of channels of the stem (64 by default), as in "resnet18-gn-32" and "lr_net26-32".
        channels: Number of channels of the 3x3 convolution of the region proposal network (RPN).
        hidden: Number of output channels of the 1x1 convolution between the backbone and the position-sensitive maps.
        frozen_stages: Number of backbone stages that are not trained, counted from the input.
        num_samples: Number of regions per image from which the losses "classes" and "boxes" are computed: those with
            the largest loss.
        roi: Pooling of the position-sensitive maps: "pool" for PS RoI pooling, as published, or "align" for PS
            RoIAlign.
        parts: Number k of parts along each side of a region. A region is divided into k x k parts.
        stride: Stride of both feature maps in pixels: 16, as published, or 8 for small images. With 8, the backbone has
            one stage fewer.
        scales: Scales of the anchors. An anchor of scale s has an area of (s * stride)^2 pixels.
        min_size: Minimum width and height of proposals, in pixels. Smaller proposals are removed.

    Returns:
        A `TwoStageDetector`. In training mode, `detector(images, sizes, targets)` returns a dict of the scalar losses
        "rpn_objectness", "rpn_boxes", "classes" and "boxes". In evaluation mode, `detector(images, sizes)` returns
        `Detections` with at most 100 objects per image. `images` is [N,3,H,W], `sizes` is [N,2] with the height and
        width of each image without padding (None if there is no padding), and `targets` is a `Targets`.

    Raises:
        ValueError: If `backbone` is not a valid name, or if group normalization does not support its width.
        ValueError: If `stride` is not 16 or 8.
        ValueError: If `roi` is unknown.

    Example:
        >>> import torch, relops
        >>> model = relops.models.r_fcn(
        ...     3, backbone="resnet18", channels=32, hidden=64, parts=3, scales=(1, 2), min_size=4
        ... )
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
