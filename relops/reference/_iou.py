"""What the twins of the ops on pairs of boxes share: areas of every box of one set with every box of another."""

from __future__ import annotations

import torch
from torch import Tensor

from relops.reference._dtypes import compute_dtype


def pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:  # [..,A,1,4] and [..,1,B,4]
    dtype = compute_dtype(a, b)
    return a.to(dtype).unsqueeze(-2), b.to(dtype).unsqueeze(-3)


def intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:  # [..,A,1,4] and [..,1,B,4]
    """[..,A,B] each. Every operation is rounded to the dtype of the boxes, in the order that the kernels keep too."""
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    width = if_any(torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1))
    intersection = width * if_any(torch.minimum(ay2, by2) - torch.maximum(ay1, by1))
    return intersection, (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection


def if_any(side: Tensor) -> Tensor:
    """Limited to 0, where the gradient of torch.clamp changes with the version."""
    return torch.where(side >= 0, side, 0) if side.requires_grad else side.clamp_(min=0)


def ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 with a gradient of 0 where y is 0."""
    none = y == 0
    return torch.where(none, 0, x / torch.where(none, 1, y))
