"""What detectors are given and what they give, for a whole batch: padded, so that nothing depends on counts."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils import _pytree


class Targets(NamedTuple):
    """Ground truth of a batch. T is the largest number of objects of its images; rows behind an image's are padding.

    Attributes:
        boxes: [N,T,4] x1, y1, x2, y2 in pixels of the images.
        labels: [N,T] int64, classes from 0; -1 = padding.
        masks: [N,T,H,W] bool, all False for objects that have none; or None where the data has none.
        proposals: [N,P,4] boxes for detectors that are given them (Fast R-CNN), zeros = padding; None for others.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None
    proposals: Tensor | None = None


class Detections(NamedTuple):
    """Objects found, by descending score. D is the most that a detector gives of an image.

    Attributes:
        boxes: [N,D,4] x1, y1, x2, y2 in pixels of the images.
        scores: [N,D], 0 in padding.
        labels: [N,D] int64, classes from 0; -1 = padding.
        masks: [N,D,R,R] probabilities within each box, or None.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None


# For torch.export.save, of models whose output this is. It has a public counterpart for dataclasses only.
_pytree._register_namedtuple(Detections, serialized_type_name="relops.models.Detections")
