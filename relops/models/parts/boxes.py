"""Geometry of boxes [...,4], which are x1, y1, x2, y2 in pixels unless stated otherwise."""

from __future__ import annotations

import torch
from torch import Tensor


def center_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centers [...,2] and sizes [...,2] of boxes [...,4]."""
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * size, size


def corners_of(boxes: Tensor) -> Tensor:
    """Convert boxes (center x, center y, width, height) [...,4] to x1, y1, x2, y2."""
    center, size = boxes.split(2, -1)
    return torch.cat([center - 0.5 * size, center + 0.5 * size], -1)


def centers_of(boxes: Tensor) -> Tensor:
    """Convert boxes x1, y1, x2, y2 [...,4] to (center x, center y, width, height)."""
    return torch.cat(center_size(boxes), -1)


def image_extent(sizes: Tensor) -> Tensor:
    """Convert image sizes [N,2] (height, width) to factors [N,1,4] for relative boxes x1, y1, x2, y2."""
    return sizes.flip(-1).repeat(1, 2)[:, None]


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes [N,K,4] to the images, whose sizes are [N,2] (height, width)."""
    return boxes.clamp(min=0).minimum(image_extent(sizes).to(boxes.dtype))


def smaller_than(boxes: Tensor, size: float) -> Tensor:
    """Return a mask [...] that is True for boxes [...,4] whose width or height is NaN or less than size."""
    return ~(boxes[..., 2:] - boxes[..., :2] >= size).all(-1)
