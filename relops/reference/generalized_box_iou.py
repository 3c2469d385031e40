"""Generalized intersection over union of all pairs of boxes (https://arxiv.org/abs/1902.09630), by broadcasting."""

from __future__ import annotations

import torch
from torch import Tensor

from relops.reference._iou import broadcast_pairs, clamp_to_zero, intersection_and_union, safe_ratio


def generalized_box_iou(
    a: Tensor,  # [..,A,4]
    b: Tensor,  # [..,B,4]
) -> Tensor:  # [..,A,B]
    """Compute the generalized intersection over union of every box of a [..,A,4] with every box of b [..,B,4].

    The result [..,A,B] is ``IoU - (C - U) / C``, where U is the area of the union of two boxes and C is the area of the
    smallest box that contains both. A term is 0 if its denominator is 0. The result is float64 if `a` or `b` is float64
    or has a 64-bit integer dtype, and float32 otherwise.
    """
    a, b = broadcast_pairs(a, b)
    intersection, union = intersection_and_union(a, b)
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    width = clamp_to_zero(torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1))
    hull = width * clamp_to_zero(torch.maximum(ay2, by2) - torch.minimum(ay1, by1))
    return safe_ratio(intersection, union) - safe_ratio(hull - union, hull)
