"""Set prediction: the outputs, the matching and the losses of detectors that predict a set of objects.

The method is that of DETR (Carion et al., End-to-End Object Detection with Transformers,
https://arxiv.org/abs/2005.12872).

Each object in an image is paired with a different prediction, at minimum total cost. A paired prediction is trained to
predict its object, and all other predictions are trained to predict the background. No two predictions are trained to
predict the same object, so no suppression is needed.
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

ALPHA, GAMMA = 0.25, 2.0  # the parameters of the focal loss
PRIOR = 0.01  # the initial probability of each class, if the focal loss is used


class SetPrediction(NamedTuple):
    """The predictions of L decoder layers. In evaluation mode, L is 1 and only the last layer is included.

    Attributes:
        logits: [L,N,Q,C].
        boxes: [L,N,Q,4], as fractions of the image without its padding.
        first: In a two-stage model, the predictions of the first stage, with L = 1. The first stage only distinguishes
            objects (class 0) from the background. In other models, None.
    """

    logits: Tensor
    boxes: Tensor
    first: SetPrediction | None = None


def focal_losses(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the focal loss (https://arxiv.org/abs/1708.02002) of each logit for the target 1 and for the target 0."""
    p, log_p = logits.sigmoid(), F.logsigmoid(logits)
    return ALPHA * (1 - p) ** GAMMA * -log_p, (1 - ALPHA) * p**GAMMA * (logits - log_p)


def mean_over_processes(count: Tensor) -> Tensor:
    """Return the mean of a count over all processes, but at least 1, without waiting for a CUDA device."""
    count = count.float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count.clamp(min=1)


class SetLoss:
    """The matching and the losses of set prediction, computed on the device for all images and layers at once.

    The losses are the focal loss or cross entropy of the classes, the L1 distance of boxes, and 1 - GIoU. Each loss is
    divided by the number of objects, except the cross entropy, which is divided by the sum of its class weights.

    Args:
        focal: If True, each class has its own sigmoid, and the loss is the focal loss. If False, the classes share a
            softmax, the last class is the background, and the loss is the cross entropy.
        weights: The weights of the class, L1 and GIoU terms in the loss.
        costs: The weights of the class, L1 and GIoU terms in the cost of a pair.
        corners: If True, boxes are x1, y1, x2, y2. If False, they are center x, center y, width and height. The L1
            distance is computed in this format.
        background: The weight of the background class in the cross entropy.
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
        """Return predicted boxes [...,4] as x1, y1, x2, y2."""
        return boxes if self.corners else corners_of(boxes)

    def class_cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the class cost [L,N,Q,T] of pairing each prediction with each object.

        With the focal loss, the cost depends only on the logits of the objects' classes, so these logits are gathered
        first.

        Args:
            logits: [L,N,Q,C].
            labels: [N,T], -1 in padding.
        """
        index = labels.clamp(min=0)[None, :, None].expand(*logits.shape[:3], -1)
        if not self.focal:
            return -logits.softmax(-1).gather(3, index)
        as_positive, as_negative = focal_losses(logits.gather(3, index))
        return as_positive - as_negative

    @torch.no_grad()
    def match(self, logits: Tensor, boxes: Tensor, labels: Tensor, objects: Tensor) -> Tensor:
        """Return the index [L,N,T] of the prediction that is paired with each object, or -1 for unpaired objects.

        Args:
            logits: [L,N,Q,C].
            boxes: [L,N,Q,4].
            labels: [N,T], -1 in padding.
            objects: [N,T,4], the boxes of the objects.
        """
        L, N, _, _ = logits.shape
        class_weight, distance_weight, overlap_weight = self.costs
        cost = class_weight * self.class_cost(logits, labels)
        cost += distance_weight * (boxes[..., None, :] - objects[:, None]).abs().sum(-1)
        a, b = self.as_corners(boxes).flatten(0, 1), self.as_corners(objects).repeat(L, 1, 1)
        cost -= overlap_weight * generalized_box_iou(a, b).view_as(cost)
        cost = cost.masked_fill((labels < 0)[:, None], math.inf)  # a cost of inf or NaN forbids a pair
        return linear_sum_assignment(cost.flatten(0, 1))[1].view(L, N, -1)

    def __call__(self, logits: Tensor, boxes: Tensor, labels: Tensor, objects: Tensor) -> dict[str, Tensor]:
        """Return the losses "classes", "boxes" and "giou" of the last layer.

        With more than one layer, there is also the loss "auxiliary", the sum of the losses of all other layers.

        Args:
            logits: [L,N,Q,C].
            boxes: [L,N,Q,4].
            labels: [N,T], -1 in padding.
            objects: [N,T,4], the boxes of the objects.
        """
        logits, boxes = to_compute_dtype(logits), to_compute_dtype(boxes)
        objects = torch.where(labels[..., None] >= 0, objects.to(boxes.dtype), 0.5)  # padding must be finite
        num_objects = mean_over_processes((labels >= 0).sum())
        L, N, Q, C = logits.shape
        pairs = self.match(logits, boxes, labels, objects)
        found = pairs >= 0
        pairs = pairs.clamp(min=0)

        # `classes` holds the target class of each prediction. Unpaired objects write to an extra slot at the end, which
        # is dropped.
        classes = labels.new_full((L, N, Q + 1), C if self.focal else C - 1)
        classes.scatter_(2, pairs.masked_fill(~found, Q), labels.clamp(min=0).expand(L, N, -1))
        classes = classes[..., :Q]
        if self.focal:
            is_positive = classes[..., None] == torch.arange(C, device=classes.device)
            class_loss = torch.where(is_positive, *focal_losses(logits)).sum((1, 2, 3)) / num_objects
        else:
            weight = logits.new_ones(C)
            weight[-1] = self.background
            entropy = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), weight, reduction="none").view(L, -1)
            class_loss = entropy.sum(1) / weight[classes].sum((1, 2))

        paired = boxes.gather(2, pairs[..., None].expand(-1, -1, -1, 4))
        objects = objects.expand_as(paired)
        distance = (paired - objects).abs().sum(-1)
        overlap = generalized_box_iou(*(self.as_corners(x).reshape(-1, 1, 4) for x in (paired, objects)))
        box_loss = (distance * found).sum((1, 2)) / num_objects
        overlap_loss = ((1 - overlap.view_as(distance)) * found).sum((1, 2)) / num_objects

        layer_losses = [w * x for w, x in zip(self.weights, (class_loss, box_loss, overlap_loss))]  # [L] each
        losses = {name: x[-1] for name, x in zip(("classes", "boxes", "giou"), layer_losses)}
        if L > 1:
            losses["auxiliary"] = functools.reduce(torch.add, layer_losses)[:-1].sum()
        return losses


def set_prior(classifier: nn.Linear) -> None:
    """Initialize the bias of a classifier so that the initial probability of every class is about PRIOR."""
    nn.init.constant_(classifier.bias, -math.log((1 - PRIOR) / PRIOR))
