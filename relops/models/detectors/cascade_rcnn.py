"""Cascade R-CNN (Cai & Vasconcelos, https://arxiv.org/abs/1712.00726), which has three successive box heads."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from relops._dtypes import to_compute_dtype
from relops.models.detectors.faster_rcnn import pyramid
from relops.models.detectors.two_stage import TwoStageDetector
from relops.models.parts.box_coding import decode_boxes
from relops.models.parts.boxes import clip_boxes, smaller_than
from relops.models.parts.padding import present_rows, scatter_rows
from relops.models.parts.roi_heads import BoxPredictor, RegionPool, RoIHeads, TwoFCHead
from relops.models.parts.rpn import Proposals
from relops.models.structures import Detections, Targets


class CascadeRoIHeads(RoIHeads):
    """Region heads with three stages, each of which refines the boxes of the previous stage.

    The three stages treat a region as positive if its IoU with an object is at least 0.5, 0.6 and 0.7, respectively.
    Each stage samples its own regions, and no gradients flow through boxes from one stage to another. In evaluation
    mode, the boxes of the detections are those of the last stage, and the scores are averaged over all stages. Deltas
    are class-agnostic, and the weights of the deltas in the second and third stage are two and three times as large as
    in the first stage.
    """

    IOU = 0.5, 0.6, 0.7

    box_head: nn.ModuleList
    box_predictor: nn.ModuleList

    def __init__(self, box_roi_pool: nn.Module, heads: nn.ModuleList, predictors: nn.ModuleList, **options: Any):
        super().__init__(box_roi_pool, heads, predictors, **options)
        self.stage_weights = [(i * self.WEIGHTS[0], i * self.WEIGHTS[1]) for i in (1, 2, 3)]

    def refine(self, maps: list[Tensor], rois: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        """Return the scores [R,classes+1] and the deltas [R,4] that one stage predicts for regions [R,5]."""
        logits, deltas = self.box_predictor[stage](self.box_head[stage](self.box_roi_pool(maps, rois)))
        return to_compute_dtype(logits), to_compute_dtype(deltas)

    def losses(self, maps: list[Tensor], proposals: Proposals, sizes: Tensor, targets: Targets) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for stage, iou in enumerate(self.IOU):
            samples = self.sample(proposals, targets, iou)
            valid = samples.classes >= 0
            rois, row_index = present_rows(samples.boxes, valid)
            logits, deltas = self.refine(maps, rois, stage)
            weights = self.stage_weights[stage]
            losses |= self.box_losses(logits, deltas, samples, targets, row_index, weights, f"_{stage}")
            boxes = decode_boxes(deltas.detach(), rois[:, 1:], weights)
            boxes = clip_boxes(scatter_rows(boxes, row_index, *valid.shape), sizes)
            valid = valid & ~smaller_than(boxes, 1e-2)
            proposals = Proposals(torch.where(valid[..., None], boxes, 0), valid.float(), valid)
        return losses

    def detect(self, maps: list[Tensor], proposals: Proposals, sizes: Tensor) -> Detections:
        N, P = proposals.valid.shape
        boxes, scores = proposals.boxes, []
        for stage, weights in enumerate(self.stage_weights):
            rois, row_index = present_rows(boxes, proposals.valid)
            logits, deltas = self.refine(maps, rois, stage)
            scores.append(logits.softmax(-1)[:, 1:] / len(self.IOU))
            boxes = clip_boxes(scatter_rows(decode_boxes(deltas, rois[:, 1:], weights), row_index, N, P), sizes)
        mean = functools.reduce(torch.add, scores)
        return self.select(boxes[:, :, None], scatter_rows(mean, row_index, N, P), proposals, sizes)


def cascade_rcnn(
    num_classes: int,
    *,
    backbone: str = "resnet50-frozen",
    channels: int = 256,
    hidden: int = 1024,
    frozen_stages: int = 0,
    num_samples: int = 512,
    sizes: Sequence[float] = (32, 64, 128, 256, 512),
) -> TwoStageDetector:
    """Build Cascade R-CNN on a feature pyramid: Faster R-CNN with three successive box heads.

    Each head of the detector (Cai & Vasconcelos, https://arxiv.org/abs/1712.00726) refines the boxes of the previous
    head. The heads are trained with IoU thresholds of 0.5, 0.6 and 0.7.

    Args:
        num_classes: Number of object classes, without the background.
        backbone: Name of the backbone: "resnet18", "resnet34", "resnet50", "resnet101", "lr_net26" or "lr_net50".
            ResNets accept a suffix that selects the normalization: "-bn" (batch normalization), "-frozen" (batch
            normalization with constant statistics and weights) or "-gn" (group normalization). After the normalization,
            a ResNet also accepts "-dcn" (deformable convolutions in the last stage) or "-dcnv2" (modulated deformable
            convolutions in all stages except the first). A number at the end of any name sets the width, that is, the
            number of channels of the stem (64 by default), as in "resnet18-gn-32" and "lr_net26-32".
        channels: Number of channels of the feature pyramid and of the region proposal network (RPN).
        hidden: Width of the two fully connected layers of each box head.
        frozen_stages: Number of backbone stages that are not trained, counted from the input.
        num_samples: Number of regions per image that are sampled for the losses of each box head.
        sizes: Anchor sizes in pixels, one for each of the five pyramid levels, from the finest to the coarsest. An
            anchor of size s has an area of s^2.

    Returns:
        A `TwoStageDetector`. In training mode, `detector(images, sizes, targets)` returns a dict of the scalar losses
        "rpn_objectness" and "rpn_boxes" and, for each head i from 0 to 2, "classes_i" and "boxes_i". In evaluation
        mode, `detector(images, sizes)` returns `Detections` with at most 100 objects per image. `images` is [N,3,H,W],
        `sizes` is [N,2] with the height and width of each image without padding (None if there is no padding), and
        `targets` is a `Targets`.

    Raises:
        ValueError: If `backbone` is not a valid name, if it does not have four stages, or if group normalization does
            not support its width.
        ValueError: If `sizes` does not have five entries.

    Example:
        >>> import torch, relops
        >>> model = relops.models.cascade_rcnn(3, backbone="resnet18", channels=32, hidden=64)
        >>> images = torch.rand(1, 3, 64, 64)
        >>> targets = relops.models.Targets(torch.tensor([[[8.0, 8.0, 40.0, 48.0]]]), torch.tensor([[2]]))
        >>> losses = model.train()(images, None, targets)
        >>> sorted(losses)
        ['boxes_0', 'boxes_1', 'boxes_2', 'classes_0', 'classes_1', 'classes_2', 'rpn_boxes', 'rpn_objectness']
        >>> with torch.no_grad():
        ...     detections = model.eval()(images)
        >>> detections.boxes.shape
        torch.Size([1, 100, 4])
    """
    maps, rpn = pyramid(backbone, channels, frozen_stages, sizes)
    roi_heads = CascadeRoIHeads(
        RegionPool("pyramid", 7, maps.strides[:4]),
        nn.ModuleList(TwoFCHead(channels * 49, hidden) for _ in range(3)),
        nn.ModuleList(BoxPredictor(hidden, num_classes, class_agnostic=True) for _ in range(3)),
        num_samples=num_samples,
    )
    return TwoStageDetector(maps, rpn, roi_heads)
