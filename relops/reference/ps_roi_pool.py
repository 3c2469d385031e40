"""Position-sensitive RoI pooling (R-FCN, https://arxiv.org/abs/1605.06409), as torchvision defines it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from relops.reference._regions import (
    Taps,
    arange_like,
    integer_bins,
    max_length,
    pool,
    round_half_away,
    size_pair,
    split_boxes,
    zero_boxes,
)


def ps_roi_pool(
    input: Tensor,  # [N,C,H,W]
    boxes: Tensor | Sequence[Tensor],  # [K,5], or N tensors [Ki,4]
    output_size: int | Sequence[int],  # PH, PW
    spatial_scale: float = 1.0,
) -> Tensor:  # [K,C/(PH*PW),PH,PW]
    """Compute the mean of the pixels in each bin of each box, with separate input channels for each bin.

    ``output[k,c,ph,pw]`` is the mean of input channel ``(c * PH + ph) * PW + pw`` over the pixels of bin (ph,pw) of box
    k. The corners of a box are multiplied by `spatial_scale` and rounded to whole pixels. The pixel at the corner (x2,
    y2) does not belong to the box. The edges of bins are rounded outward to whole pixels. Bins exclude the last row and
    the last column of the map.

    `input` is [N,C,H,W], `boxes` are [K,5] with rows (batch index, x1, y1, x2, y2) or a list of N tensors [Ki,4], and
    the result is [K,C/(PH*PW),PH,PW]. For 16-bit inputs, all computations use float32. Features must be finite. Only
    first derivatives are available.
    """
    PH, PW = size_pair(output_size)
    batch, corners, finite = split_boxes(input, boxes)
    x1, y1, x2, y2 = round_half_away(corners.detach() * spatial_scale).unbind(1)
    y = mean_taps(y1, y2, PH, input.shape[2])
    x = mean_taps(x1, x2, PW, input.shape[3])
    return pool(input, batch, zero_boxes(y, finite), x, position_sensitive=True)


def mean_taps(start: Tensor, end: Tensor, P: int, n: int) -> Taps:
    """Return taps for the mean of the pixels in each bin."""
    # torchvision's forward pass clips bins to n - 1, and released models rely on this. The last row and column are
    # therefore excluded.
    limit = max(n - 1, 0)
    first, end = integer_bins(start, (end - start).clamp(min=1), P, limit)
    lengths = (end - first)[..., None]
    tap = arange_like(max_length(lengths), first)
    weights = torch.where(tap < lengths, 1 / lengths.to(start.dtype), 0)
    return (first[..., None] + tap).clamp(max=limit), weights
