"""Intersection over union of all pairs of boxes, by broadcasting."""

from __future__ import annotations

from torch import Tensor

from relops.reference._iou import broadcast_pairs, intersection_and_union, safe_ratio


def box_iou(
    a: Tensor,  # [..,A,4]
    b: Tensor,  # [..,B,4]
) -> Tensor:  # [..,A,B]
    """Compute the intersection over union of every box of a [..,A,4] with every box of b [..,B,4].

    The result [..,A,B] is the area of the intersection divided by the area of the union, or 0 if the union has no area.
    It is float64 if `a` or `b` is float64 or has a 64-bit integer dtype, and float32 otherwise.
    """
    return safe_ratio(*intersection_and_union(*broadcast_pairs(a, b)))
