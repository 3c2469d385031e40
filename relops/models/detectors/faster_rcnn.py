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
    """Return a backbone with one map of the given stride, and the height and width of pooled regions."""
    if stride not in (8, 16):
        raise ValueError(f"relops.models: stride must be 16 or 8, got {stride}")
    if backbone.startswith("zf"):
        if stride != 16:
            raise ValueError(f"relops.models: stride of zf must be 16, got {stride}")
        return StageBackbone(make_body(backbone, frozen_stages), [2]), 6
    stages = stride.bit_length() - (0 if backbone.startswith("vgg16") else 2)
    return StageBackbone(make_body(backbone, frozen_stages, stages=stages), [stages - 1]), 7


class AlternatingFasterRCNN(TwoStageDetector):
    """Faster R-CNN with the paper's 4-step alternating training (section 3.2).

    1. The RPN is trained with its own backbone.
    2. A Fast R-CNN with a second backbone is trained on the proposals of that RPN.
    3. The RPN is trained on the second backbone, which is frozen in this step and the next.
    4. The heads of the Fast R-CNN are trained on the new proposals, with the same frozen backbone.

    After these steps, both stages share the second backbone. `start_phase` starts a step. Before `start_phase` is
    called for the first time, the detector is in step 4.
    """

    phases = (("rpn", 1 / 3), ("fast_rcnn", 1 / 6), ("rpn, shared", 1 / 3), ("fast_rcnn, shared", 1 / 6))
    PROPOSALS = 2000  # the maximum number of proposals per image when the Fast R-CNN is trained

    def __init__(self, backbone: Backbone, rpn: RPN, roi_heads: RoIHeads) -> None:
        super().__init__(backbone, rpn, roi_heads)
        self.first_backbone = copy.deepcopy(backbone)
        self.phase = len(self.phases) - 1
        self.trainable = {name: p.requires_grad for name, p in self.named_parameters()}

    def start_phase(self, phase: int) -> None:
        """Select the parameters that a step trains, and copy the backbone before the first step.

        Args:
            phase: The index of the step, from 0 to 3.
        """
        self.phase = phase
        if phase == 0:
            self.first_backbone.load_state_dict(self.backbone.state_dict())
        parts = (("first_backbone", "rpn"), ("backbone", "roi_heads"), ("rpn",), ("roi_heads",))[phase]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.trainable[name] and name.split(".")[0] in parts)
        self.train(self.training)

    def train(self, mode: bool = True) -> AlternatingFasterRCNN:
        """Set training or evaluation mode. In the last two steps, the backbone stays in evaluation mode."""
        super().train(mode)
        if mode and self.phase >= 2:
            self.backbone.eval()  # both stages share the backbone, so its normalization statistics must not change
        return self

    def forward(
        self, images: Tensor, sizes: Tensor | None = None, targets: Targets | None = None
    ) -> dict[str, Tensor] | Detections:
        """Return the losses in training mode and the detections in evaluation mode.

        Args:
            images: [N,3,H,W], normalized as the backbone requires and padded on the right and at the bottom.
            sizes: [N,2], the height and width of each image in pixels, without its padding, or None if there is no
                padding.
            targets: The ground truth, which is required in training mode and ignored in evaluation mode.

        Returns:
            In training mode, a dict of the scalar losses of the current phase, whose sum is the training loss. In
            evaluation mode, `Detections`.

        Raises:
            ValueError: If `images`, `sizes` or `targets` has an invalid shape, or if `targets` is missing in training
                mode.
        """
        sizes = self.checked_sizes(images, sizes)
        if not self.training:
            maps, proposals = self._regions(images, sizes)
            return self.roi_heads.detect(maps, proposals, sizes)
        targets = self.checked_targets(images, targets)
        if self.phase in (0, 2):
            return self.rpn((self.first_backbone if self.phase == 0 else self.backbone)(images), sizes, targets)[1]
        maps, proposals = self._regions(images, sizes, self.PROPOSALS)
        return self.roi_heads.losses(maps, proposals, sizes, targets)

    def _regions(
        self, images: Tensor, sizes: Tensor, max_proposals: int | None = None
    ) -> tuple[list[Tensor], Proposals]:
        """Return the maps of the second stage and the proposals.

        The first two steps compute the proposals from the first backbone, and the last two steps from the shared
        backbone.
        """
        maps = self.backbone(images)
        rpn_maps = maps if self.phase >= 2 else self.first_backbone(images)
        return maps, self.rpn([x.detach() for x in rpn_maps], sizes, max_proposals=max_proposals)[0]

    def propose(self, images: Tensor, sizes: Tensor | None = None, max_proposals: int | None = None) -> Proposals:
        """Return the proposals of the RPN.

        Args:
            images: [N,3,H,W], normalized as the backbone requires and padded on the right and at the bottom.
            sizes: [N,2], the height and width of each image in pixels, without its padding, or None if there is no
                padding.
            max_proposals: The maximum number of proposals per image. If None, the RPN's `post_nms` for the current mode
                is used.
        """
        return self._regions(images, self.checked_sizes(images, sizes), max_proposals)[1]


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
    """Build Faster R-CNN as published: a region proposal network and Fast R-CNN on one feature map.

    The detector (Ren et al., https://arxiv.org/abs/1506.01497) uses one feature map with a stride of 16 and anchors
    with three scales and three aspect ratios.

    Args:
        num_classes: Number of object classes, without the background.
        backbone: Name of the backbone: "resnet18", "resnet34", "resnet50", "resnet101", "lr_net26", "lr_net50", "vgg16"
            or "zf". All except LR-Nets accept a suffix that selects the normalization: "-bn" (batch normalization),
            "-frozen" (batch normalization with constant statistics and weights) or "-gn" (group normalization). After
            the normalization, a ResNet also accepts "-dcn" (deformable convolutions in the last stage) or "-dcnv2"
            (modulated deformable convolutions in all stages except the first). For ResNets and LR-Nets, a number at the
            end of the name sets the width, that is, the number of channels of the stem (64 by default), as in
            "resnet18-gn-32" and "lr_net26-32". The paper uses "vgg16" with frozen_stages=2, and "zf" with channels=256.
        channels: Number of channels of the 3x3 convolution of the region proposal network (RPN).
        hidden: Width of the two fully connected layers of the box head.
        training: Training scheme. "approximate" is joint training with constant proposals. "joint" is non-approximate
            joint training: gradients of the second stage also flow through the proposed boxes to the RPN. It requires
            roi="align". "alternating" is the 4-step training of the paper.
        rpn_loss: Loss of the RPN's scores: "softmax" for two scores per anchor, as in the released code, or "sigmoid"
            for one score per anchor.
        balance: Weight lambda of the loss "rpn_boxes", 10 in the paper. This loss is multiplied by lambda and divided
            by the number of positions on the feature map, as in the paper. If `balance` is None, the loss is divided by
            the number of samples, as in the released code.
        roi: Method that pools the features of a region: "pool" for RoI pooling, as published, or "align" for RoIAlign.
        order: Order in which the RPN selects proposals. "filter_first" decodes and clips all boxes and removes small
            ones before it selects the highest scores, as in the released code. "top_first" selects the highest scores
            first, which is faster.
        dropout: Dropout probability after each of the two fully connected layers.
        num_samples: Number of regions per image that are sampled for the losses of the second stage.
        frozen_stages: Number of backbone stages that are not trained, counted from the input.
        stride: Stride of the feature map in pixels: 16, as published, or 8 for small images. "zf" supports only 16.
        scales: Scales of the anchors. An anchor of scale s has an area of (s * stride)^2 pixels.
        min_size: Minimum width and height of proposals, in pixels. Smaller proposals are removed.

    Returns:
        A `TwoStageDetector`. In training mode, `detector(images, sizes, targets)` returns a dict of the scalar losses
        "rpn_objectness", "rpn_boxes", "classes" and "boxes". In evaluation mode, `detector(images, sizes)` returns
        `Detections` with at most 100 objects per image. With training="alternating", the result is an
        `AlternatingFasterRCNN`. Its `start_phase` selects one of the four training steps, and the dict then contains
        only the losses of the RPN or only those of the second stage. `images` is [N,3,H,W], `sizes` is [N,2] with the
        height and width of each image without padding (None if there is no padding), and `targets` is a `Targets`.

    Raises:
        ValueError: If `backbone` is not a valid name, or if group normalization does not support its width.
        ValueError: If `stride` is not 16 or 8, or if it is 8 and `backbone` is "zf".
        ValueError: If `training`, `rpn_loss`, `roi` or `order` is unknown.
        ValueError: If `training` is "joint" and `roi` is not "align".
        ValueError: If `dropout` is not between 0 and 1.

    Example:
        >>> import torch, relops
        >>> model = relops.models.faster_rcnn(3, backbone="resnet18", channels=32, hidden=64, scales=(1, 2), min_size=4)
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
    check_choice("models", "training", training, ("approximate", "joint", "alternating"))
    check_choice("models", "order", order, ("filter_first", "top_first"))
    if training == "joint" and roi != "align":
        raise ValueError(
            f'relops.models: roi must be "align" if training is "joint", got {roi!r}, which has no gradients for boxes'
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
    """Return a feature pyramid and its RPN, which has anchors of one size and three aspect ratios per level.

    Args:
        backbone: The name of the body, which must have four stages.
        channels: The number of channels of the pyramid and of the RPN.
        frozen_stages: The number of stages of the body that are not trained, counted from the input.
        sizes: The anchor size of each level, in pixels.
        options: Options of RPN.
    """
    maps = PyramidBackbone(make_body(backbone, frozen_stages), channels)
    if len(sizes) != len(maps.strides):
        raise ValueError(f"relops.models: sizes must have {len(maps.strides)} entries, one per level, got {sizes}")
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
    """Build Faster R-CNN on a feature pyramid, as in torchvision.

    The detector combines Faster R-CNN (Ren et al., https://arxiv.org/abs/1506.01497) with a feature pyramid network
    (Lin et al., https://arxiv.org/abs/1612.03144).

    `load_torchvision` loads a state_dict of torchvision's fasterrcnn_resnet50_fpn (num_classes=90 for COCO).

    Args:
        num_classes: Number of object classes, without the background.
        backbone: Name of the backbone: "resnet18", "resnet34", "resnet50", "resnet101", "lr_net26" or "lr_net50".
            ResNets accept a suffix that selects the normalization: "-bn" (batch normalization), "-frozen" (batch
            normalization with constant statistics and weights) or "-gn" (group normalization). After the normalization,
            a ResNet also accepts "-dcn" (deformable convolutions in the last stage) or "-dcnv2" (modulated deformable
            convolutions in all stages except the first). A number at the end of any name sets the width, that is, the
            number of channels of the stem (64 by default), as in "resnet18-gn-32" and "lr_net26-32".
        channels: Number of channels of the feature pyramid and of the region proposal network (RPN).
        hidden: Width of the two fully connected layers of the box head.
        frozen_stages: Number of backbone stages that are not trained, counted from the input.
        num_samples: Number of regions per image that are sampled for the losses of the second stage.
        sizes: Anchor sizes in pixels, one for each of the five pyramid levels, from the finest to the coarsest. An
            anchor of size s has an area of s^2.

    Returns:
        A `TwoStageDetector`. In training mode, `detector(images, sizes, targets)` returns a dict of the scalar losses
        "rpn_objectness", "rpn_boxes", "classes" and "boxes". In evaluation mode, `detector(images, sizes)` returns
        `Detections` with at most 100 objects per image. `images` is [N,3,H,W], `sizes` is [N,2] with the height and
        width of each image without padding (None if there is no padding), and `targets` is a `Targets`.

    Raises:
        ValueError: If `backbone` is not a valid name, if it does not have four stages, or if group normalization does
            not support its width.
        ValueError: If `sizes` does not have five entries.

    Example:
        >>> import torch, relops
        >>> model = relops.models.faster_rcnn_fpn(3, backbone="resnet18", channels=32, hidden=64)
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
    maps, rpn = pyramid(backbone, channels, frozen_stages, sizes)
    roi_heads = RoIHeads(
        RegionPool("pyramid", 7, maps.strides[:4]),
        TwoFCHead(channels * 49, hidden),
        BoxPredictor(hidden, num_classes),
        num_samples=num_samples,
    )
    return TwoStageDetector(maps, rpn, roi_heads)
