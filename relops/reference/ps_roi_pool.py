"""Position-sensitive RoI pooling (R-FCN, https://arxiv.org/abs/1605.06409), as torchvision defines it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from relops.reference._regions import Taps, drop_boxes, longest, numbers, pair, pool, rounded, split_boxes, whole_bins


def ps_roi_pool(
    input: Tensor,  # [N,C,H,W]
    boxes: Tensor | Sequence[Tensor],  # [K,5], or N times [Ki,4]
    output_size: int | Sequence[int],  # PH, PW
    spatial_scale: float = 1.0,
) -> Tensor:  # [K,C/(PH*PW),PH,PW]
    """16-bit inputs are computed in float32. Features must be finite. First derivatives only."""
    PH, PW = pair(output_size)
    batch, corners, finite = split_boxes(input, boxes)
    x1, y1, x2, y2 = rounded(corners.detach() * spatial_scale).unbind(1)
    y = averaged_taps(y1, y2, PH, input.shape[2])
    x = averaged_taps(x1, x2, PW, input.shape[3])
    return pool(input, batch, drop_boxes(y, finite), x, position_sensitive=True)


def averaged_taps(start: Tensor, end: Tensor, P: int, n: int) -> Taps:
    # The last row and column are left out: torchvision's forward clips to n - 1, and released models are used to it.
    limit = max(n - 1, 0)
    first, end = whole_bins(start, (end - start).clamp(min=1), P, limit)
    lengths = (end - first)[..., None]
    tap = numbers(longest(lengths), first)
    weights = torch.where(tap < lengths, 1 / lengths.to(start.dtype), 0)
    return (first[..., None] + tap).clamp(max=limit), weights
