"""RoI pooling (Fast R-CNN, Girshick 2015, https://arxiv.org/abs/1504.08083), as torchvision defines it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from relops.reference._dtypes import compute_dtype
from relops.reference._regions import CHUNK, longest, numbers, pair, rounded, split_boxes, whole_bins


def roi_pool(
    input: Tensor,  # [N,C,H,W]
    boxes: Tensor | Sequence[Tensor],  # [K,5], or N times [Ki,4]
    output_size: int | Sequence[int],  # PH, PW
    spatial_scale: float = 1.0,
) -> Tensor:  # [K,C,PH,PW]
    """NaN features are passed over. The gradient goes to the first maximum in row-major order."""
    N, C, H, W = input.shape
    PH, PW = pair(output_size)
    batch, corners, finite = split_boxes(input, boxes)
    x1, y1, x2, y2 = rounded(corners.detach() * spatial_scale).unbind(1)
    rows, row_counts = whole_taps(y1, y2, PH, H)
    columns, column_counts = whole_taps(x1, x2, PW, W)
    full = (finite[:, None, None] & (row_counts > 0)[:, :, None] & (column_counts > 0)[:, None])[..., None]
    K, _, TY = rows.shape
    TX = columns.shape[2]
    table = input.to(compute_dtype(input)).permute(0, 2, 3, 1).reshape(N * H * W, C)
    if not table.numel() or not K:  # an embedding bag wants something in it
        return input.new_zeros(K, C, PH, PW) + input.sum()
    table = torch.where(table.isnan(), -math.inf, table)

    output = []
    for k in numbers(K, batch).split(max(1, CHUNK // (PH * PW * TY * TX))):
        pixels = (batch[k, None, None] * H + rows[k])[:, :, None, :, None] * W + columns[k][:, None, :, None]
        maxima = F.embedding_bag(pixels.flatten(3).flatten(0, 2), table, mode="max").view(-1, PH, PW, C)
        output.append(torch.where(full[k], maxima, 0))
    return torch.cat(output).permute(0, 3, 1, 2).to(input.dtype)


def whole_taps(start: Tensor, end: Tensor, P: int, n: int) -> tuple[Tensor, Tensor]:
    """Pixels of each bin [K,P,T] in order, the last one repeated to make them T, and how many they are [K,P]."""
    first, end = whole_bins(start, (end - start + 1).clamp(min=1), P, n)
    pixels = first[..., None] + numbers(max(1, longest(end - first)), first)
    return pixels.minimum(end[..., None] - 1).clamp(0, max(n - 1, 0)), end - first
