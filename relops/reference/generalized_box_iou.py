"""Generalized intersection over union (https://arxiv.org/abs/1902.09630), by broadcasting."""

from __future__ import annotations

import torch
from torch import Tensor

from relops.reference._iou import if_any, intersection_and_union, pairs, ratio


def generalized_box_iou(
    a: Tensor,  # [..,A,4]
    b: Tensor,  # [..,B,4]
) -> Tensor:  # [..,A,B]
    """Return the generalized IoU in the dtype that it is computed in."""
    a, b = pairs(a, b)
    intersection, union = intersection_and_union(a, b)
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    width = if_any(torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1))
    hull = width * if_any(torch.maximum(ay2, by2) - torch.minimum(ay1, by1))
    return ratio(intersection, union) - ratio(hull - union, hull)
