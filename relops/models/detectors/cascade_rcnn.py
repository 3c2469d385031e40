"""Cascade R-CNN (Cai & Vasconcelos, https://arxiv.org/abs/1712.00726): three heads, each on the last one's boxes."""

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
from relops.models.parts.padding import present_rows, spread
from relops.models.parts.roi_heads import BoxPredictor, RegionPool, RoIHeads, TwoFCHead
from relops.models.parts.rpn import Proposals
from relops.models.structures import Detections, Targets


class CascadeRoIHeads(RoIHeads):
    """Stages with an IoU of .5, .6 and .7 for positive regions, of which each refines the boxes that the next is given.

    Boxes between stages are constants. Each stage samples anew; at inference the last boxes count, with the mean of the
    scores that the stages gave. Deltas are of all classes together, and their weights 1, 2 and 3 times the first's.
    """

    IOU = 0.5, 0.6, 0.7

    box_head: nn.ModuleList
    box_predictor: nn.ModuleList

    def __init__(self, box_roi_pool: nn.Module, heads: nn.ModuleList, predictors: nn.ModuleList, **options: Any):
        super().__init__(box_roi_pool, heads, predictors, **options)
        self.stage_weights = [(i * self.WEIGHTS[0], i * self.WEIGHTS[1]) for i in (1, 2, 3)]

    def refine(self, maps: list[Tensor], rois: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        """Scores [R,classes + 1] and deltas [R,4] of rows [R,5] by one stage."""
        logits, deltas = self.box_predictor[stage](self.box_head[stage](self.box_roi_pool(maps, rois)))
        return to_compute_dtype(logits), to_compute_dtype(deltas)

    def losses(self, maps: list[Tensor], proposals: Proposals, sizes: Tensor, targets: Targets) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for stage, iou in enumerate(self.IOU):
            samples = self.sample(proposals, targets, iou)
            valid = samples.classes >= 0
            rois, place = present_rows(samples.boxes, valid)
            logits, deltas = self.refine(maps, rois, stage)
            weights = self.stage_weights[stage]
            losses |= self.box_losses(logits, deltas, samples, targets, place, weights, f"_{stage}")
            boxes = clip_boxes(spread(decode_boxes(deltas.detach(), rois[:, 1:], weights), place, *valid.shape), sizes)
            valid = valid & ~smaller_than(boxes, 1e-2)
            proposals = Proposals(torch.where(valid[..., None], boxes, 0), valid.float(), valid)
        return losses

    def detect(self, maps: list[Tensor], proposals: Proposals, sizes: Tensor) -> Detections:
        N, P = proposals.valid.shape
        boxes, scores = proposals.boxes, []
        for stage, weights in enumerate(self.stage_weights):
            rois, place = present_rows(boxes, proposals.valid)
            logits, deltas = self.refine(maps, rois, stage)
            scores.append(logits.softmax(-1)[:, 1:] / len(self.IOU))
            boxes = clip_boxes(spread(decode_boxes(deltas, rois[:, 1:], weights), place, N, P), sizes)
        mean = functools.reduce(torch.add, scores)
        return self.select(boxes[:, :, None], spread(mean, place, N, P), proposals, sizes)


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
    """Cascade R-CNN on a feature pyramid.

    Args:
        num_classes: without the background.
        backbone: a ResNet or LR-Net, as in `make_body`.
        channels: of the pyramid and the RPN.
        hidden: of the fully connected layers.
        frozen_stages: of the backbone, not trained.
        num_samples: regions an image and stage that losses are of.
        sizes: of the anchors of each level, in pixels.
    """
    maps, rpn = pyramid(backbone, channels, frozen_stages, sizes)
    roi_heads = CascadeRoIHeads(
        RegionPool("pyramid", 7, maps.strides[:4]),
        nn.ModuleList(TwoFCHead(channels * 49, hidden) for _ in range(3)),
        nn.ModuleList(BoxPredictor(hidden, num_classes, class_agnostic=True) for _ in range(3)),
        num_samples=num_samples,
    )
    return TwoStageDetector(maps, rpn, roi_heads)
