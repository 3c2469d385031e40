"""Intersection over union of boxes, by broadcasting."""

from __future__ import annotations

import torch
from torch import Tensor


def box_iou(
    a: Tensor,  # [..,A,4]
    b: Tensor,  # [..,B,4]
) -> Tensor:  # [..,A,B]
    """16-bit boxes are computed in float32."""
    a, b = pairs(a, b)
    return ratio(*intersection_and_union(a, b))


def pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:  # [..,A,1,4] and [..,1,B,4]
    a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
    return a.unsqueeze(-2), b.unsqueeze(-3)


def area(corner: Tensor, opposite: Tensor) -> Tensor:
    width, height = (opposite - corner).unbind(-1)
    return width * height


def area_if_any(corner: Tensor, opposite: Tensor) -> Tensor:
    """Sides are limited to 0, where the gradient of torch.clamp changes with the version."""
    sides = opposite - corner
    width, height = torch.where(sides >= 0, sides, 0).unbind(-1)
    return width * height


def intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    intersection = area_if_any(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    return intersection, area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - intersection


def ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 with a gradient of 0 where y is 0."""
    none = y == 0
    return torch.where(none, 0, x / torch.where(none, 1, y))
