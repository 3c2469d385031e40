"""Precise RoI Pooling (IoU-Net, Jiang et al. 2018, https://arxiv.org/abs/1807.11590)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from relops.reference._regions import (
    Taps,
    arange_like,
    clamp_where,
    max_length,
    pool,
    size_pair,
    split_boxes,
    zero_boxes,
)


def prroi_pool(
    input: Tensor,  # [N,C,H,W]
    boxes: Tensor | Sequence[Tensor],  # [K,5], or N tensors [Ki,4]
    output_size: int | Sequence[int],  # PH, PW
    spatial_scale: float = 1.0,
) -> Tensor:  # [K,C,PH,PW]
    """Compute the exact mean of the bilinearly interpolated map over each bin of each box.

    The coordinates of each box are multiplied by `spatial_scale`, and the box is divided into PH x PW equal bins. The
    value of a bin is the mean of the following surface f over the bin::

        f(y, x) = sum over pixels m, n of input[m,n] * hat(y - m) * hat(x - n)
        hat(t) = max(1 - |t|, 0)

    `input` is [N,C,H,W], `boxes` are [K,5] with rows (batch index, x1, y1, x2, y2) or a list of N tensors [Ki,4], and
    the result is [K,C,PH,PW]. For 16-bit inputs, all computations use float32. Features must be finite. Only first
    derivatives are available.
    """
    PH, PW = size_pair(output_size)
    batch, corners, finite = split_boxes(input, boxes)
    x1, y1, x2, y2 = (corners * spatial_scale).unbind(1)
    y = integral_taps(y1, y2 - y1, PH, input.shape[2])
    x = integral_taps(x1, x2 - x1, PW, input.shape[3])
    return pool(input, batch, zero_boxes(y, finite), x)


def integral_taps(start: Tensor, size: Tensor, P: int, n: int) -> Taps:
    """Return taps whose weight for pixel m is the mean of hat(t - m) over the bin, or 0 if the bin has no length."""
    bins = (torch.where(size > 0, size, 1) / P)[:, None, None]
    a = start[:, None, None] + arange_like(P, start)[:, None] * bins  # [K,P,1]
    b = a + bins
    first = a.detach().floor().clamp(0, max(n - 1, 0))
    last = b.detach().ceil().clamp(0, max(n - 1, 0))
    pixels = first + arange_like(max_length(last - first) + 1, start)  # [K,P,T]

    # The rising and the falling half of the hat are integrated separately, as the length of an interval times the value
    # at its midpoint, which avoids cancellation. If an end of the bin lies on a pixel, the gradient of that end flows
    # through only one half of the hat.
    (rise_a, fall_a), (rise_b, fall_b) = (
        (clamp_where((d > -1) & (d <= 0), d, -1, 0), clamp_where((d > 0) & (d < 1), d, 0, 1))
        for d in (a - pixels, b - pixels)
    )
    integral = (rise_b - rise_a) * (1 + (rise_a + rise_b) / 2) + (fall_b - fall_a) * (1 - (fall_a + fall_b) / 2)
    weights = torch.where((size > 0)[:, None, None] & (pixels < n), integral / bins, 0)
    return pixels.clamp(max=max(n - 1, 0)).long(), weights
