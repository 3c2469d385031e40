"""The second stage of detectors, which classifies regions and refines their boxes.

The second stage is that of Fast R-CNN (Girshick, https://arxiv.org/abs/1504.08083).
"""

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
from relops.models.parts.padding import gather_rows, present_rows, scatter_rows, select_rows
from relops.models.parts.rpn import Proposals
from relops.models.parts.sampling import sample_candidates, target_overlaps
from relops.models.structures import Detections, Targets
from relops.ops.multi_scale_roi_align import multi_scale_roi_align
from relops.ops.nms_padded import nms_padded
from relops.ops.roi_align import roi_align
from relops.ops.roi_pool import roi_pool


class Samples(NamedTuple):
    """The regions that losses are computed from. In a random sample, positive regions come first.

    Attributes:
        boxes: [N,S,4] x1, y1, x2, y2 in pixels.
        classes: [N,S] int64: 0 for background, c + 1 for an object of class c, and -1 for padding and ignored regions.
        matched: [N,S], the index of the object that each region overlaps most.
    """

    boxes: Tensor
    classes: Tensor
    matched: Tensor


class RegionPool(nn.Module):
    """A module that pools the features of regions from the maps of a backbone.

    Args:
        kind: "align" for RoIAlign or "pool" for RoI pooling, both on the first map, or "pyramid" for RoIAlign on the
            pyramid level that fits the size of the region.
        output_size: The height and width of the pooled features.
        strides: The strides of the maps in pixels of the image. "align" and "pool" use only the first one.
        aligned: Whether RoIAlign shifts boxes by half a pixel of the map (the `aligned` option of `relops.roi_align`).
    """

    SAMPLING_RATIO = 2  # for "align" and "pyramid"

    def __init__(self, kind: str, output_size: int, strides: Sequence[int], *, aligned: bool = False) -> None:
        super().__init__()
        check_choice("models", "roi", kind, ("align", "pool", "pyramid"))
        self.kind = kind
        self.output_size = output_size
        self.scales = [1 / stride for stride in strides]
        self.aligned = aligned

    def forward(self, maps: list[Tensor], rois: Tensor) -> Tensor:
        """Return the features [R,C,output_size,output_size] of regions [R,5] (image, x1, y1, x2, y2)."""
        if self.kind == "pyramid":
            levels = maps[: len(self.scales)]
            return multi_scale_roi_align(levels, rois, self.output_size, self.scales, self.SAMPLING_RATIO, self.aligned)
        if self.kind == "align":
            return roi_align(maps[0], rois, self.output_size, self.scales[0], self.SAMPLING_RATIO, self.aligned)
        return roi_pool(maps[0], rois, self.output_size, self.scales[0])


class TwoFC(nn.Module):
    """The base class of heads with two fully connected layers, which can be initialized from a VGG-16 classifier."""

    def __init__(self, in_features: int, hidden: int) -> None:
        super().__init__()
        self.fc6 = nn.Linear(in_features, hidden)
        self.fc7 = nn.Linear(hidden, hidden)


class TwoFCHead(TwoFC):
    """The layers fc6 and fc7, each followed by ReLU and optionally by dropout, as in VGG."""

    def __init__(self, in_features: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__(in_features, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.relu(self.fc6(x.flatten(1))))
        return self.dropout(F.relu(self.fc7(x)))


class BoxPredictor(nn.Module):
    """The layers that predict scores for the background and each class, and deltas (per class or class-agnostic)."""

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
    """Region heads, which sample regions and compute losses in training and return detections in evaluation mode.

    Args:
        box_roi_pool: A module that pools the features of regions from maps, such as RegionPool.
        box_head: A module that turns pooled features into vectors.
        box_predictor: A module that turns vectors into scores and deltas, such as BoxPredictor.
        num_samples: The number of regions per image that losses are computed from.
        negative: The IoU range of background regions, as (minimum, exclusive maximum).
        beta: The distance at which the smooth L1 loss changes from quadratic to linear.
        score_threshold: The score that a detection must exceed.
        nms_threshold: The IoU above which a detection is suppressed by a detection of the same class with a higher
            score.
        max_detections: The maximum number of detections per image.
    """

    POSITIVE_FRACTION = 0.25  # the maximum fraction of samples that are positive
    POSITIVE = 0.5  # the minimum IoU of positive regions
    WEIGHTS = 10.0, 5.0  # the inverse standard deviations of the center and size deltas of the targets

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
        max_detections: int = 100,
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
        self.max_detections = max_detections

    @property
    def max_positive(self) -> int:
        """The maximum number of positive samples per image."""
        return int(self.num_samples * self.POSITIVE_FRACTION)

    def predict(self, maps: list[Tensor], rois: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores [R,classes+1] and the deltas [R,4] or [R,4*(classes+1)] of regions [R,5].

        The background is the first class.
        """
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(maps, rois)))
        return to_compute_dtype(logits), to_compute_dtype(deltas)

    def losses(self, maps: list[Tensor], proposals: Proposals, sizes: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Return the cross entropy of the classes and the smooth L1 loss of the deltas of positive regions."""
        return self.losses_of(maps, self.sample(proposals, targets), targets)

    def losses_of(self, maps: list[Tensor], samples: Samples, targets: Targets) -> dict[str, Tensor]:
        """Return the losses of the given samples."""
        rois, row_index = present_rows(samples.boxes, samples.classes >= 0)
        logits, deltas = self.predict(maps, rois)
        return self.box_losses(logits, deltas, samples, targets, row_index, self.WEIGHTS)

    def sample(self, proposals: Proposals, targets: Targets, positive: float | None = None) -> Samples:
        """Randomly sample at most num_samples regions per image, of which at most max_positive are positive.

        Args:
            proposals: The proposals of the batch.
            targets: The ground truth.
            positive: The minimum IoU of positive regions. All other regions are background. If None, the IoU ranges of
                positive and background regions are given by `POSITIVE` and `negative`.
        """
        boxes, classes, matched = self.regions(proposals, targets, positive)
        index, _, valid = sample_candidates(classes > 0, classes == 0, self.num_samples, self.max_positive)
        classes = classes.gather(1, index).masked_fill(~valid, -1)
        return Samples(gather_rows(boxes, index), classes, matched.gather(1, index))

    def regions(self, proposals: Proposals, targets: Targets, positive: float | None = None) -> Samples:
        """Return all regions that can be sampled: the proposals, followed by the ground-truth boxes.

        Args:
            proposals: The proposals of the batch.
            targets: The ground truth.
            positive: The minimum IoU of positive regions. All other regions are background. If None, the IoU ranges of
                positive and background regions are given by `POSITIVE` and `negative`.
        """
        min_positive, (min_negative, max_negative) = self.POSITIVE, self.negative
        if positive is not None:
            min_positive, (min_negative, max_negative) = positive, (0.0, positive)
        boxes = torch.cat([proposals.boxes, targets.boxes.to(proposals.boxes.dtype)], 1)
        valid = torch.cat([proposals.valid, targets.labels >= 0], 1)
        best, matched = target_overlaps(boxes, targets.boxes, targets.labels).max(1)
        best = best.clamp(min=0)  # if an image has no objects, all regions are background
        negative = (best >= min_negative) & (best < max_negative)
        classes = torch.where(best >= min_positive, targets.labels.gather(1, matched) + 1, negative.long() - 1)
        return Samples(boxes, classes.masked_fill(~valid, -1), matched)

    def box_losses(
        self,
        logits: Tensor,
        deltas: Tensor,
        samples: Samples,
        targets: Targets,
        row_index: Tensor | None,
        weights: tuple[float, float],
        suffix: str = "",
    ) -> dict[str, Tensor]:
        """Return the losses of the sampled rows, averaged over the samples.

        Args:
            logits, deltas: The predictions for the rows that `present_rows` returned for the samples.
            samples: The sampled regions.
            targets: The ground truth.
            row_index: The indices that `present_rows` returned.
            weights: The weights of the center and size deltas.
            suffix: A suffix for the names of the losses.
        """
        entropy, distance = self.region_losses(logits, deltas, samples, targets, row_index, weights)
        num = (samples.classes >= 0).sum().clamp(min=1)
        return {"classes" + suffix: entropy.sum() / num, "boxes" + suffix: distance.sum() / num}

    def hardest_losses(
        self, logits: Tensor, deltas: Tensor, samples: Samples, targets: Targets, row_index: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the losses, averaged over the num_samples regions with the largest loss in each image.

        This is online hard example mining (Shrivastava et al., https://arxiv.org/abs/1604.03540).

        Args:
            logits, deltas: The predictions for the rows that `present_rows` returned for all regions.
            samples: All regions.
            targets: The ground truth.
            row_index: The indices that `present_rows` returned.
        """
        entropy, distance = self.region_losses(logits, deltas, samples, targets, row_index, self.WEIGHTS)
        valid = samples.classes >= 0
        hardness = scatter_rows((entropy + distance).detach(), row_index, *valid.shape).masked_fill(~valid, -1)
        hardest = hardness.topk(min(self.num_samples, valid.shape[1]), 1).indices
        kept = torch.zeros_like(valid).scatter_(1, hardest, True) & valid
        num, weight = kept.sum().clamp(min=1), select_rows(kept, row_index)
        return {"classes": (entropy * weight).sum() / num, "boxes": (distance * weight).sum() / num}

    def region_losses(
        self,
        logits: Tensor,
        deltas: Tensor,
        samples: Samples,
        targets: Targets,
        row_index: Tensor | None,
        weights: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:
        """Return the cross entropy [R] and the smooth L1 loss [R] of each row.

        The losses of a row are 0 if the row has no target.
        """
        classes = select_rows(samples.classes, row_index)
        boxes = select_rows(samples.boxes, row_index)
        objects = select_rows(gather_rows(targets.boxes.to(boxes.dtype), samples.matched), row_index)
        positive = (classes > 0)[:, None]
        # Boxes may require gradients, so all targets must be finite. For regions that are not positive, the targets are
        # computed from a unit box.
        unit = torch.arange(4, device=boxes.device).div(2, rounding_mode="floor").to(boxes.dtype)
        target_deltas = encode_boxes(torch.where(positive, objects, unit), torch.where(positive, boxes, unit), weights)
        if deltas.shape[1] > 4:
            class_index = classes.clamp(min=0)[:, None, None].expand(-1, 1, 4)
            deltas = deltas.unflatten(1, (-1, 4)).gather(1, class_index).squeeze(1)
        distance = F.smooth_l1_loss(deltas, target_deltas, reduction="none", beta=self.beta) * positive
        return F.cross_entropy(logits, classes, ignore_index=-1, reduction="none"), distance.sum(-1)

    def detect(self, maps: list[Tensor], proposals: Proposals, sizes: Tensor) -> Detections:
        """Return the detections of a batch."""
        rois, row_index = present_rows(proposals.boxes, proposals.valid)
        logits, deltas = self.predict(maps, rois)
        scores = logits.softmax(-1)[:, 1:]
        deltas = deltas.unflatten(1, (-1, 4))[:, -scores.shape[1] :]
        boxes = decode_boxes(deltas, rois[:, None, 1:], self.WEIGHTS)
        N, P = proposals.valid.shape
        boxes, scores = (scatter_rows(x, row_index, N, P) for x in (boxes, scores))
        return self.select(boxes, scores, proposals, sizes)

    def select(self, boxes: Tensor, scores: Tensor, proposals: Proposals, sizes: Tensor) -> Detections:
        """Return the detections that remain after non-maximum suppression within classes.

        Args:
            boxes: [N,P,classes,4], or [N,P,1,4] if all classes share a box.
            scores: [N,P,classes].
            proposals: The proposals. Only their field `valid` is used.
            sizes: [N,2] height and width of each image, in pixels.
        """
        N, P, C = scores.shape
        boxes = clip_boxes(boxes.expand(N, P, C, 4).reshape(N, P * C, 4), sizes)
        removed = ~proposals.valid[..., None] | smaller_than(boxes, 1e-2).view(N, P, C)
        scores = scores.masked_fill(removed, -math.inf).view(N, P * C)
        classes = torch.arange(C, device=scores.device).repeat(P).expand(N, -1)
        keep, _ = nms_padded(boxes, scores, self.nms_threshold, self.max_detections, classes, self.score_threshold)
        valid = keep >= 0
        keep = keep.clamp(min=0)
        return Detections(
            torch.where(valid[..., None], gather_rows(boxes, keep), 0),
            torch.where(valid, scores.gather(1, keep), 0),
            torch.where(valid, keep % C, -1),
        )
