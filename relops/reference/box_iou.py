"""Intersection over union of boxes, by broadcasting."""

from __future__ import annotations

from torch import Tensor

from relops.reference._iou import intersection_and_union, pairs, ratio


def box_iou(
    a: Tensor,  # [..,A,4]
    b: Tensor,  # [..,B,4]
) -> Tensor:  # [..,A,B]
    """Return the IoU in the dtype that it is computed in."""
    return ratio(*intersection_and_union(*pairs(a, b)))
