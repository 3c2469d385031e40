"""RoI pooling (Fast R-CNN, Girshick 2015, https://arxiv.org/abs/1504.08083), as torchvision defines it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from relops.reference._dtypes import compute_dtype
from relops.reference._regions import (
    CHUNK,
    arange_like,
    integer_bins,
    max_length,
    round_half_away,
    size_pair,
    split_boxes,
)


def roi_pool(
    input: Tensor,  # [N,C,H,W]
    boxes: Tensor | Sequence[Tensor],  # [K,5], or N tensors [Ki,4]
    output_size: int | Sequence[int],  # PH, PW
    spatial_scale: float = 1.0,
) -> Tensor:  # [K,C,PH,PW]
    """Compute the maximum of the pixels in each bin of each box.

    The corners of a box are multiplied by `spatial_scale` and rounded to whole pixels, and both corner pixels belong to
    the box. The box is divided into PH x PW bins, whose edges are rounded outward to whole pixels. The value of a bin
    without pixels is zero. NaN features are ignored. The gradient goes to the first maximum in row-major order.

    `input` is [N,C,H,W], `boxes` are [K,5] with rows (batch index, x1, y1, x2, y2) or a list of N tensors [Ki,4], and
    the result is [K,C,PH,PW].
    """
    N, C, H, W = input.shape
    PH, PW = size_pair(output_size)
    batch, corners, finite = split_boxes(input, boxes)
    x1, y1, x2, y2 = round_half_away(corners.detach() * spatial_scale).unbind(1)
    rows, row_counts = maximum_taps(y1, y2, PH, H)
    columns, column_counts = maximum_taps(x1, x2, PW, W)
    nonempty = (finite[:, None, None] & (row_counts > 0)[:, :, None] & (column_counts > 0)[:, None])[..., None]
    K, _, TY = rows.shape
    TX = columns.shape[2]
    table = input.to(compute_dtype(input)).permute(0, 2, 3, 1).reshape(N * H * W, C)
    if not table.numel() or not K:  # embedding_bag rejects empty tensors
        return input.new_zeros(K, C, PH, PW) + input.sum()
    table = torch.where(table.isnan(), -math.inf, table)

    output = []
    for k in arange_like(K, batch).split(max(1, CHUNK // (PH * PW * TY * TX))):
        pixels = (batch[k, None, None] * H + rows[k])[:, :, None, :, None] * W + columns[k][:, None, :, None]
        maxima = F.embedding_bag(pixels.flatten(3).flatten(0, 2), table, mode="max").view(-1, PH, PW, C)
        output.append(torch.where(nonempty[k], maxima, 0))
    return torch.cat(output).permute(0, 3, 1, 2).to(input.dtype)


def maximum_taps(start: Tensor, end: Tensor, P: int, n: int) -> tuple[Tensor, Tensor]:
    """Return the pixels [K,P,T] of each bin in order, padded with the last pixel, and the number of pixels [K,P]."""
    first, end = integer_bins(start, (end - start + 1).clamp(min=1), P, n)
    pixels = first[..., None] + arange_like(max(1, max_length(end - first)), first)
    return pixels.minimum(end[..., None] - 1).clamp(0, max(n - 1, 0)), end - first
