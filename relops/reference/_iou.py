"""Intersection and union areas of all pairs of boxes, for the twins of the IoU and suppression ops."""

from __future__ import annotations

import torch
from torch import Tensor

from relops.reference._dtypes import compute_dtype


def broadcast_pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the boxes as [..,A,1,4] and [..,1,B,4] in their compute dtype."""
    dtype = compute_dtype(a, b)
    return a.to(dtype).unsqueeze(-2), b.to(dtype).unsqueeze(-3)


def intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the intersection and union areas [..,A,B] of all pairs of boxes [..,A,1,4] and [..,1,B,4].

    The result of every operation is rounded to the dtype of the boxes. The kernels use the same order of operations.
    """
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    width = clamp_to_zero(torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1))
    intersection = width * clamp_to_zero(torch.minimum(ay2, by2) - torch.maximum(ay1, by1))
    return intersection, (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection


def clamp_to_zero(side: Tensor) -> Tensor:
    """Return max(side, 0). The gradient of torch.clamp at 0 is not used, because it depends on the version of torch."""
    return torch.where(side >= 0, side, 0) if side.requires_grad else side.clamp_(min=0)


def safe_ratio(x: Tensor, y: Tensor) -> Tensor:
    """Return x / y, or 0 with a gradient of 0 if y is 0."""
    is_zero = y == 0
    return torch.where(is_zero, 0, x / torch.where(is_zero, 1, y))
