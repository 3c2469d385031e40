"""The second stage of detectors: classes and boxes of regions (Girshick, Fast R-CNN, https://arxiv.org/abs/1504.08083)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relops._checks import check_choice
from relops._dtypes import to_compute_dtype
from relops.models.initialization import zero_bias
from relops.models.parts.box_coding import decode_boxes, encode_boxes
from relops.models.parts.boxes import clip_boxes, smaller_than
from relops.models.parts.padding import at_places, gather_rows, present_rows, spread
from relops.models.parts.rpn import Proposals
from relops.models.parts.sampling import sample_candidates, target_overlaps
from relops.models.structures import Detections, Targets
from relops.ops.multi_scale_roi_align import multi_scale_roi_align
from relops.ops.nms_padded import nms_padded
from relops.ops.roi_align import roi_align
from relops.ops.roi_pool import roi_pool


class Samples(NamedTuple):
    """Regions that losses are of; chosen ones have the positive first.

    Attributes:
        boxes: [N,S,4].
        classes: [N,S] int64: 0 background, c + 1 an object of class c; -1 padding, or neither.
        matched: [N,S], the object that each overlaps most with.
    """

    boxes: Tensor
    classes: Tensor
    matched: Tensor


class RegionPool(nn.Module):
    """Features of regions from the maps of a backbone.

    Args:
        kind: "align" or "pool", on the first map; "pyramid": RoI Align on the level that fits.
        output_size: of each region.
        strides: of the maps; one for "align" and "pool".
        aligned: as in relops.roi_align.
    """

    SAMPLING_RATIO = 2  # of "align" and "pyramid"

    def __init__(self, kind: str, output_size: int, strides: Sequence[int], *, aligned: bool = False) -> None:
        super().__init__()
        check_choice("models", "roi", kind, ("align", "pool", "pyramid"))
        self.kind = kind
        self.output_size = output_size
        self.scales = [1 / stride for stride in strides]
        self.aligned = aligned

    def forward(self, maps: list[Tensor], rois: Tensor) -> Tensor:
        """[R,C,output_size,output_size] of rows [R,5] (image, x1, y1, x2, y2)."""
        if self.kind == "pyramid":
            levels = maps[: len(self.scales)]
            return multi_scale_roi_align(levels, rois, self.output_size, self.scales, self.SAMPLING_RATIO, self.aligned)
        if self.kind == "align":
            return roi_align(maps[0], rois, self.output_size, self.scales[0], self.SAMPLING_RATIO, self.aligned)
        return roi_pool(maps[0], rois, self.output_size, self.scales[0])


class TwoFC(nn.Module):
    """Base of heads that have two fully connected layers, which a VGG-16 may have learned."""

    def __init__(self, in_features: int, hidden: int) -> None:
        super().__init__()
        self.fc6 = nn.Linear(in_features, hidden)
        self.fc7 = nn.Linear(hidden, hidden)


class TwoFCHead(TwoFC):
    """fc6 and fc7, each with ReLU, and dropout behind as in VGG where asked for."""

    def __init__(self, in_features: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__(in_features, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.relu(self.fc6(x.flatten(1))))
        return self.dropout(F.relu(self.fc7(x)))


class BoxPredictor(nn.Module):
    """Scores of the background and of each class, and deltas of each class or one for all."""

    def __init__(self, in_features: int, num_classes: int, class_agnostic: bool = False) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        self.bbox_pred = nn.Linear(in_features, 4 if class_agnostic else 4 * (num_classes + 1))
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        for layer in (self.cls_score, self.bbox_pred):
            zero_bias(layer)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)


class RoIHeads(nn.Module):
    """Samples regions and computes losses of them in training, and makes detections of them at inference.

    Args:
        box_roi_pool: features of regions from maps, as RegionPool.
        box_head: to vectors.
        box_predictor: to scores and deltas, as BoxPredictor.
        num_samples: regions an image that losses are of.
        negative: (lowest, below) IoU of regions of the background.
        beta: of smooth L1.
        score_threshold, nms_threshold, most: detections have larger scores; IoU above which one gives way to a better
            one of its class; so many an image at most.
    """

    POSITIVE_FRACTION = 0.25  # so many of the samples at most overlap an object
    POSITIVE = 0.5  # IoU from which on a region is of an object
    WEIGHTS = 10.0, 5.0  # of deltas (center, size): the inverse of the standard deviations that targets are divided by

    def __init__(
        self,
        box_roi_pool: nn.Module,
        box_head: nn.Module,
        box_predictor: nn.Module,
        *,
        num_samples: int = 512,
        negative: tuple[float, float] = (0.0, 0.5),
        beta: float = 1 / 9,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        most: int = 100,
    ) -> None:
        super().__init__()
        self.box_roi_pool = box_roi_pool
        self.box_head = box_head
        self.box_predictor = box_predictor
        self.num_samples = num_samples
        self.negative = negative
        self.beta = beta
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.most = most

    @property
    def most_positive(self) -> int:
        """Regions of objects among the samples of an image, at most."""
        return int(self.num_samples * self.POSITIVE_FRACTION)

    def predict(self, maps: list[Tensor], rois: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [R,classes + 1], background first, and deltas [R,4] or [R,4 * (classes + 1)] of rows [R,5]."""
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(maps, rois)))
        return to_compute_dtype(logits), to_compute_dtype(deltas)

    def losses(self, maps: list[Tensor], proposals: Proposals, sizes: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Of a batch: cross entropy of classes and smooth L1 of the positive regions' deltas."""
        return self.losses_of(maps, self.sample(proposals, targets), targets)

    def losses_of(self, maps: list[Tensor], samples: Samples, targets: Targets) -> dict[str, Tensor]:
        rois, place = present_rows(samples.boxes, samples.classes >= 0)
        logits, deltas = self.predict(maps, rois)
        return self.box_losses(logits, deltas, samples, targets, place, self.WEIGHTS)

    def sample(self, proposals: Proposals, targets: Targets, positive: float | None = None) -> Samples:
        """At most num_samples regions an image, POSITIVE_FRACTION of them positive at most, by chance."""
        boxes, classes, matched = self.regions(proposals, targets, positive)
        index, _, there = sample_candidates(classes > 0, classes == 0, self.num_samples, self.most_positive)
        classes = classes.gather(1, index).masked_fill(~there, -1)
        return Samples(gather_rows(boxes, index), classes, matched.gather(1, index))

    def regions(self, proposals: Proposals, targets: Targets, positive: float | None = None) -> Samples:
        """All that samples are chosen of: proposals, and the objects themselves. `positive`: an IoU that divides them
        into regions of objects and background, in place of the settings."""
        above, (lowest, below) = (positive, (0.0, positive)) if positive is not None else (self.POSITIVE, self.negative)
        boxes = torch.cat([proposals.boxes, targets.boxes.to(proposals.boxes.dtype)], 1)
        valid = torch.cat([proposals.valid, targets.labels >= 0], 1)
        best, matched = target_overlaps(boxes, targets.boxes, targets.labels).max(1)
        best = best.clamp(min=0)  # an image without objects is background
        negative = (best >= lowest) & (best < below)
        classes = torch.where(best >= above, targets.labels.gather(1, matched) + 1, negative.long() - 1)
        return Samples(boxes, classes.masked_fill(~valid, -1), matched)

    def box_losses(
        self,
        logits: Tensor,
        deltas: Tensor,
        samples: Samples,
        targets: Targets,
        place: Tensor | None,
        weights: tuple[float, float],
        suffix: str = "",
    ) -> dict[str, Tensor]:
        """Means over the samples, of scores and deltas of the rows that `present_rows` made of them."""
        entropy, distance = self.region_losses(logits, deltas, samples, targets, place, weights)
        num = (samples.classes >= 0).sum().clamp(min=1)
        return {"classes" + suffix: entropy.sum() / num, "boxes" + suffix: distance.sum() / num}

    def hardest_losses(
        self, logits: Tensor, deltas: Tensor, samples: Samples, targets: Targets, place: Tensor | None
    ) -> dict[str, Tensor]:
        """Means over the num_samples regions of an image whose loss is largest, of the rows that `present_rows` made of
        all (online hard example mining, Shrivastava et al., https://arxiv.org/abs/1604.03540)."""
        entropy, distance = self.region_losses(logits, deltas, samples, targets, place, self.WEIGHTS)
        valid = samples.classes >= 0
        hardness = spread((entropy + distance).detach(), place, *valid.shape).masked_fill(~valid, -1)
        hardest = hardness.topk(min(self.num_samples, valid.shape[1]), 1).indices
        kept = torch.zeros_like(valid).scatter_(1, hardest, True) & valid
        num, weight = kept.sum().clamp(min=1), at_places(kept, place)
        return {"classes": (entropy * weight).sum() / num, "boxes": (distance * weight).sum() / num}

    def region_losses(
        self,
        logits: Tensor,
        deltas: Tensor,
        samples: Samples,
        targets: Targets,
        place: Tensor | None,
        weights: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:
        """Cross entropy and smooth L1, [R] each, of every row; 0 where there is nothing to learn."""
        classes = at_places(samples.classes, place)
        boxes = at_places(samples.boxes, place)
        objects = at_places(gather_rows(targets.boxes.to(boxes.dtype), samples.matched), place)
        positive = (classes > 0)[:, None]
        # What is not positive needs a target that is a number, as boxes may carry gradients: any box with an extent.
        unit = torch.arange(4, device=boxes.device).div(2, rounding_mode="floor").to(boxes.dtype)
        wanted = encode_boxes(torch.where(positive, objects, unit), torch.where(positive, boxes, unit), weights)
        if deltas.shape[1] > 4:
            of_class = classes.clamp(min=0)[:, None, None].expand(-1, 1, 4)
            deltas = deltas.unflatten(1, (-1, 4)).gather(1, of_class).squeeze(1)
        distance = F.smooth_l1_loss(deltas, wanted, reduction="none", beta=self.beta) * positive
        return F.cross_entropy(logits, classes, ignore_index=-1, reduction="none"), distance.sum(-1)

    def detect(self, maps: list[Tensor], proposals: Proposals, sizes: Tensor) -> Detections:
        """Detections of a batch."""
        rois, place = present_rows(proposals.boxes, proposals.valid)
        logits, deltas = self.predict(maps, rois)
        scores = logits.softmax(-1)[:, 1:]
        deltas = deltas.unflatten(1, (-1, 4))[:, -scores.shape[1] :]
        boxes = decode_boxes(deltas, rois[:, None, 1:], self.WEIGHTS)
        N, P = proposals.valid.shape
        return self.select(spread(boxes, place, N, P), spread(scores, place, N, P), proposals, sizes)

    def select(self, boxes: Tensor, scores: Tensor, proposals: Proposals, sizes: Tensor) -> Detections:
        """Suppression within classes: of boxes [N,P,classes or 1,4] and scores [N,P,classes]."""
        N, P, C = scores.shape
        boxes = clip_boxes(boxes.expand(N, P, C, 4).reshape(N, P * C, 4), sizes)
        gone = ~proposals.valid[..., None] | smaller_than(boxes, 1e-2).view(N, P, C)
        scores = scores.masked_fill(gone, -math.inf).view(N, P * C)
        classes = torch.arange(C, device=scores.device).repeat(P).expand(N, -1)
        keep, _ = nms_padded(boxes, scores, self.nms_threshold, self.most, classes, self.score_threshold)
        valid = keep >= 0
        keep = keep.clamp(min=0)
        return Detections(
            torch.where(valid[..., None], gather_rows(boxes, keep), 0),
            torch.where(valid, scores.gather(1, keep), 0),
            torch.where(valid, keep % C, -1),
        )
