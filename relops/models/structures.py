"""Targets and detections of a batch, padded so that every image has the same number of rows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils import _pytree


class Targets(NamedTuple):
    """The ground truth of a batch.

    T is the largest number of objects in an image of the batch. In images with fewer objects, the remaining rows are
    padding.

    Attributes:
        boxes: Boxes [N,T,4] as x1, y1, x2, y2 in pixels of the images.
        labels: Classes [N,T] from 0, int64; -1 marks padding.
        masks: Bool masks [N,T,H,W], all False for objects without a mask; None if the data has no masks.
        proposals: Boxes [N,P,4] for detectors that need proposals (Fast R-CNN), padded with zeros; None for other
            detectors.

    Example:
        >>> import torch, relops
        >>> boxes = torch.tensor([[[10.0, 10.0, 40.0, 50.0], [5.0, 20.0, 30.0, 60.0]]])
        >>> targets = relops.models.Targets(boxes, labels=torch.tensor([[2, 0]]))
        >>> targets.labels.shape
        torch.Size([1, 2])
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None
    proposals: Tensor | None = None


class Detections(NamedTuple):
    """The objects that a detector finds in a batch, sorted by descending score in each image.

    D is the maximum number of detections per image. In images with fewer detections, the remaining rows are padding.

    Attributes:
        boxes: Boxes [N,D,4] as x1, y1, x2, y2 in pixels of the images.
        scores: Scores [N,D], 0 in padding.
        labels: Classes [N,D] from 0, int64; -1 marks padding.
        masks: Probabilities [N,D,R,R] inside each box, or None if the detector predicts no masks.

    Example:
        >>> import torch, relops
        >>> boxes = torch.tensor([[[10.0, 10.0, 40.0, 50.0], [0.0, 0.0, 0.0, 0.0]]])
        >>> detections = relops.models.Detections(boxes, torch.tensor([[0.9, 0.0]]), torch.tensor([[2, -1]]))
        >>> found = detections.boxes[detections.labels >= 0]
        >>> found.shape
        torch.Size([1, 4])
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None


# torch.export.save needs this registration for models that return Detections. torch's public function for this purpose
# supports only dataclasses.
_pytree._register_namedtuple(Detections, serialized_type_name="relops.models.Detections")
