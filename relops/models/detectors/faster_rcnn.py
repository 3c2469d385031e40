"""Faster R-CNN (Ren et al., https://arxiv.org/abs/1506.01497), as published and on a feature pyramid."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from relops._checks import check_choice
from relops.models.backbones.base import Backbone
from relops.models.backbones.build import make_body
from relops.models.backbones.pyramid import PyramidBackbone
from relops.models.backbones.stages import StageBackbone
from relops.models.detectors.two_stage import TwoStageDetector
from relops.models.parts.anchors import centered_anchors, paper_anchors
from relops.models.parts.roi_heads import BoxPredictor, RegionPool, RoIHeads, TwoFCHead
from relops.models.parts.rpn import RPN, Proposals, make_rpn
from relops.models.structures import Detections, Targets


def single_map(backbone: str, frozen_stages: int, stride: int) -> tuple[StageBackbone, int]:
    """A backbone up to its last map of that stride, 16 or 8, and the size that regions of it are pooled to."""
    if stride not in (8, 16):
        raise ValueError(f"relops.models: stride must be 16 or 8, got {stride}")
    if backbone.startswith("zf"):
        if stride != 16:
            raise ValueError(f"relops.models: stride of zf must be 16, got {stride}")
        return StageBackbone(make_body(backbone, frozen_stages), [2]), 6
    stages = stride.bit_length() - (0 if backbone.startswith("vgg16") else 2)
    return StageBackbone(make_body(backbone, frozen_stages, stages=stages), [stages - 1]), 7


class AlternatingFasterRCNN(TwoStageDetector):
    """Faster R-CNN by the paper's 4-step alternating training (section 3.2).

    1 an RPN with a backbone of its own; 2 a Fast R-CNN, with another, on that RPN's proposals; 3 the RPN on the second
    backbone, which no longer changes; 4 the Fast R-CNN's heads, likewise, on the new proposals. Then both share it.
    """

    phases = (("rpn", 1 / 3), ("fast_rcnn", 1 / 6), ("rpn, shared", 1 / 3), ("fast_rcnn, shared", 1 / 6))
    PROPOSALS = 2000

    def __init__(self, backbone: Backbone, rpn: RPN, roi_heads: RoIHeads) -> None:
        super().__init__(backbone, rpn, roi_heads)
        self.first_backbone = copy.deepcopy(backbone)
        self.phase = len(self.phases) - 1
        self.trained = {name: p.requires_grad for name, p in self.named_parameters()}

    def start_phase(self, phase: int) -> None:
        self.phase = phase
        if phase == 0:
            self.first_backbone.load_state_dict(self.backbone.state_dict())
        learning = (("first_backbone", "rpn"), ("backbone", "roi_heads"), ("rpn",), ("roi_heads",))[phase]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.trained[name] and name.split(".")[0] in learning)
        self.train(self.training)

    def train(self, mode: bool = True) -> AlternatingFasterRCNN:
        super().train(mode)
        if mode and self.phase >= 2:
            self.backbone.eval()  # statistics of normalization are part of what is shared
        return self

    def forward(
        self, images: Tensor, sizes: Tensor | None = None, targets: Targets | None = None
    ) -> dict[str, Tensor] | Detections:
        sizes = self.checked_sizes(images, sizes)
        if not self.training:
            maps, proposals = self._regions(images, sizes)
            return self.roi_heads.detect(maps, proposals, sizes)
        targets = self.checked_targets(images, targets)
        if self.phase in (0, 2):
            return self.rpn((self.first_backbone if self.phase == 0 else self.backbone)(images), sizes, targets)[1]
        maps, proposals = self._regions(images, sizes, most=self.PROPOSALS)
        return self.roi_heads.losses(maps, proposals, sizes, targets)

    def _regions(self, images: Tensor, sizes: Tensor, most: int | None = None) -> tuple[list[Tensor], Proposals]:
        """Maps of the second stage and proposals, from the first backbone as long as the RPN is its."""
        maps = self.backbone(images)
        from_maps = maps if self.phase >= 2 else self.first_backbone(images)
        return maps, self.rpn([x.detach() for x in from_maps], sizes, most=most)[0]

    def propose(self, images: Tensor, sizes: Tensor | None = None, most: int | None = None) -> Proposals:
        return self._regions(images, self.checked_sizes(images, sizes), most)[1]


def faster_rcnn(
    num_classes: int,
    *,
    backbone: str = "vgg16",
    channels: int = 512,
    hidden: int = 4096,
    training: str = "approximate",
    rpn_loss: str = "softmax",
    balance: float | None = None,
    roi: str = "pool",
    order: str = "filter_first",
    dropout: float = 0.5,
    num_samples: int = 128,
    frozen_stages: int = 0,
    stride: int = 16,
    scales: Sequence[float] = (8, 16, 32),
    min_size: float = 16,
) -> TwoStageDetector:
    """Faster R-CNN as published: one map at a stride of 16, anchors of three scales and three ratios.

    Args:
        num_classes: without the background.
        backbone: as in `make_body`. The paper's are vgg16 (with frozen_stages=2) and zf (channels 256).
        channels: of the RPN's convolution.
        hidden: of the two fully connected layers.
        training: "approximate" joint training, where proposals are constants; "joint", non-approximate: the second
            stage's gradients reach the RPN through its boxes (needs roi "align"); or "alternating", in four steps.
        rpn_loss: "softmax" of two scores an anchor (the code), or "sigmoid" of one.
        balance: lambda of the RPN's two losses, as the paper normalizes them (there 10); None: as the code does.
        roi: "pool" (published) or "align".
        order: of proposals: "filter_first" decodes, clips and filters before the highest scores are taken (the code),
            "top_first" after it.
        dropout: behind the fully connected layers.
        num_samples: regions an image that losses are of.
        frozen_stages: of the backbone, not trained.
        stride: of the map, 16 or, for small images, 8.
        scales: of anchors, in strides.
        min_size: of proposals, in pixels.
    """
    check_choice("models", "training", training, ("approximate", "joint", "alternating"))
    check_choice("models", "order", order, ("filter_first", "top_first"))
    if training == "joint" and roi != "align":
        raise ValueError(
            f'relops.models: roi must be "align" where training is "joint": boxes of {roi!r} have no gradient'
        )
    maps, size = single_map(backbone, frozen_stages, stride)
    rpn = make_rpn(
        maps.channels[0],
        channels,
        [paper_anchors(stride, scales=scales)],
        maps.strides,
        loss=rpn_loss,
        balance=balance,
        pre_nms=(12000, 6000),
        post_nms=(2000, 300),
        min_size=min_size,
        filter_first=order == "filter_first",
        ignore_outside=True,
    )
    roi_heads = RoIHeads(
        RegionPool(roi, size, maps.strides),
        TwoFCHead(maps.channels[0] * size**2, hidden, dropout),
        BoxPredictor(hidden, num_classes),
        num_samples=num_samples,
        beta=1.0,
        nms_threshold=0.3,
    )
    if training == "alternating":
        return AlternatingFasterRCNN(maps, rpn, roi_heads)
    return TwoStageDetector(maps, rpn, roi_heads, box_gradients=training == "joint")


def pyramid(
    backbone: str, channels: int, frozen_stages: int, sizes: Sequence[float], **options: Any
) -> tuple[PyramidBackbone, RPN]:
    """A feature pyramid and its RPN, with anchors of one size and three ratios a level. Options are those of RPN."""
    maps = PyramidBackbone(make_body(backbone, frozen_stages), channels)
    if len(sizes) != len(maps.strides):
        raise ValueError(f"relops.models: sizes must be one of each of {len(maps.strides)} levels, got {sizes}")
    return maps, make_rpn(channels, channels, [centered_anchors(size) for size in sizes], maps.strides, **options)


def faster_rcnn_fpn(
    num_classes: int,
    *,
    backbone: str = "resnet50-frozen",
    channels: int = 256,
    hidden: int = 1024,
    frozen_stages: int = 0,
    num_samples: int = 512,
    sizes: Sequence[float] = (32, 64, 128, 256, 512),
) -> TwoStageDetector:
    """Faster R-CNN on a feature pyramid (Lin et al., https://arxiv.org/abs/1612.03144), as torchvision has it.

    A state_dict of torchvision's fasterrcnn_resnet50_fpn loads through `load_torchvision` (num_classes=90 for COCO's).

    Args:
        num_classes: without the background.
        backbone: a ResNet or LR-Net, as in `make_body`.
        channels: of the pyramid and the RPN.
        hidden: of the two fully connected layers.
        frozen_stages: of the backbone, not trained.
        num_samples: regions an image that losses are of.
        sizes: of the anchors of each level, in pixels.
    """
    maps, rpn = pyramid(backbone, channels, frozen_stages, sizes)
    roi_heads = RoIHeads(
        RegionPool("pyramid", 7, maps.strides[:4]),
        TwoFCHead(channels * 49, hidden),
        BoxPredictor(hidden, num_classes),
        num_samples=num_samples,
    )
    return TwoStageDetector(maps, rpn, roi_heads)
