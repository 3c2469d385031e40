"""Detection as prediction of a set (Carion et al., End-to-End Object Detection with Transformers,
https://arxiv.org/abs/2005.12872): matching, losses, and what the detectors that are trained so have in common.

Q predictions of an image are paired with its objects, one to one, at the least cost; what is paired learns its object,
all others the background. So no two predictions learn the same object, and nothing has to be suppressed.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relops._dtypes import to_compute_dtype
from relops.models.parts.boxes import corners_of
from relops.ops.generalized_box_iou import generalized_box_iou
from relops.ops.linear_sum_assignment import linear_sum_assignment

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss
PRIOR = 0.01  # probability of an object that classifiers begin with where the focal loss teaches them


class SetPrediction(NamedTuple):
    """Of L decoder layers, in evaluation mode of the last alone.

    Attributes:
        logits: [L,N,Q,C].
        boxes: [L,N,Q,4], as fractions of the image without its padding.
        first: a SetPrediction of one layer that tells objects from background only, by class 0 (two-stage models).
    """

    logits: Tensor
    boxes: Tensor
    first: SetPrediction | None = None


def focal_losses(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the focal loss (https://arxiv.org/abs/1708.02002) of each logit, if its class is wanted and if not."""
    p, log_p = logits.sigmoid(), F.logsigmoid(logits)
    return ALPHA * (1 - p) ** GAMMA * -log_p, (1 - ALPHA) * p**GAMMA * (logits - log_p)


def mean_over_processes(count: Tensor) -> Tensor:
    """At least 1. Nothing waits for a CUDA device."""
    count = count.float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count.clamp(min=1)


class SetLoss:
    """Matching and its losses, of a whole batch and of all layers at once, on the device that they are on.

    Classes, by focal loss or cross entropy, the L1 distance of boxes, and 1 - GIoU, each divided by the number of
    objects (cross entropy: by its weights).

    Args:
        focal: a sigmoid a class and focal loss; otherwise a softmax, whose last class is the background.
        weights: of classes, L1 and GIoU in the loss.
        costs: the same in the cost of a pair.
        corners: boxes are x1, y1, x2, y2, and so is their L1 distance; otherwise center and size.
        background: weight of the background in the cross entropy.
    """

    def __init__(
        self,
        *,
        focal: bool = True,
        weights: tuple[float, float, float] = (2.0, 5.0, 2.0),
        costs: tuple[float, float, float] = (2.0, 5.0, 2.0),
        corners: bool = False,
        background: float = 0.1,
    ) -> None:
        self.focal, self.weights, self.costs, self.corners = focal, weights, costs, corners
        self.background = background

    def as_corners(self, boxes: Tensor) -> Tensor:
        return boxes if self.corners else corners_of(boxes)

    def class_cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return what the class of each prediction costs as that of each object, [L,N,Q,T]; arguments as in `match`.

        The classes of the objects are gathered first. Only the softmax needs the others.
        """
        index = labels.clamp(min=0)[None, :, None].expand(*logits.shape[:3], -1)
        if not self.focal:
            return -logits.softmax(-1).gather(3, index)
        wanted, unwanted = focal_losses(logits.gather(3, index))
        return wanted - unwanted

    @torch.no_grad()
    def match(self, logits: Tensor, boxes: Tensor, labels: Tensor, objects: Tensor) -> Tensor:
        """The prediction of each object, [L,N,T], -1 = none: of logits [L,N,Q,C], boxes [L,N,Q,4], labels [N,T] (-1 =
        padding) and objects [N,T,4]."""
        L, N, _, _ = logits.shape
        by_class, by_distance, by_overlap = self.costs
        cost = by_class * self.class_cost(logits, labels)
        cost += by_distance * (boxes[..., None, :] - objects[:, None]).abs().sum(-1)
        a, b = self.as_corners(boxes).flatten(0, 1), self.as_corners(objects).repeat(L, 1, 1)
        cost -= by_overlap * generalized_box_iou(a, b).view_as(cost)
        cost = cost.masked_fill((labels < 0)[:, None], math.inf)  # forbidden, as is what is not a number
        return linear_sum_assignment(cost.flatten(0, 1))[1].view(L, N, -1)

    def __call__(self, logits: Tensor, boxes: Tensor, labels: Tensor, objects: Tensor) -> dict[str, Tensor]:
        """Of arguments as in `match`: the last layer's three losses by name, and the sum of all others' as
        "auxiliary" where there are others."""
        logits, boxes = to_compute_dtype(logits), to_compute_dtype(boxes)
        objects = torch.where(labels[..., None] >= 0, objects.to(boxes.dtype), 0.5)  # padding needs numbers
        num_objects = mean_over_processes((labels >= 0).sum())
        L, N, Q, C = logits.shape
        pairs = self.match(logits, boxes, labels, objects)
        found = pairs >= 0
        pairs = pairs.clamp(min=0)

        # The class of each prediction. Objects without one write to a place behind all of them, which is cut off.
        classes = labels.new_full((L, N, Q + 1), C if self.focal else C - 1)
        classes.scatter_(2, pairs.masked_fill(~found, Q), labels.clamp(min=0).expand(L, N, -1))
        classes = classes[..., :Q]
        if self.focal:
            wanted = classes[..., None] == torch.arange(C, device=classes.device)
            of_classes = torch.where(wanted, *focal_losses(logits)).sum((1, 2, 3)) / num_objects
        else:
            weight = logits.new_ones(C)
            weight[-1] = self.background
            entropy = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), weight, reduction="none").view(L, -1)
            of_classes = entropy.sum(1) / weight[classes].sum((1, 2))

        paired = boxes.gather(2, pairs[..., None].expand(-1, -1, -1, 4))
        objects = objects.expand_as(paired)
        distance = (paired - objects).abs().sum(-1)
        overlap = generalized_box_iou(*(self.as_corners(x).reshape(-1, 1, 4) for x in (paired, objects)))
        of_boxes = (distance * found).sum((1, 2)) / num_objects
        of_overlap = ((1 - overlap.view_as(distance)) * found).sum((1, 2)) / num_objects

        each = [w * x for w, x in zip(self.weights, (of_classes, of_boxes, of_overlap))]
        losses = {name: x[-1] for name, x in zip(("classes", "boxes", "giou"), each)}
        if L > 1:
            losses["auxiliary"] = functools.reduce(torch.add, each)[:-1].sum()
        return losses


def set_prior(classifier: nn.Linear) -> None:
    """Its bias, so that at first every class has the probability PRIOR."""
    nn.init.constant_(classifier.bias, -math.log((1 - PRIOR) / PRIOR))
