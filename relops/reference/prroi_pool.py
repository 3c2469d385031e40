"""Precise RoI pooling (Jiang et al. 2018, https://arxiv.org/abs/1807.11590): the mean of the surface over each bin."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from relops.reference._regions import Taps, drop_boxes, limited, longest, numbers, pair, pool, split_boxes


def prroi_pool(
    input: Tensor,  # [N,C,H,W]
    boxes: Tensor | Sequence[Tensor],  # [K,5], or N times [Ki,4]
    output_size: int | Sequence[int],  # PH, PW
    spatial_scale: float = 1.0,
) -> Tensor:  # [K,C,PH,PW]
    """f(y,x) = sum over pixels m,n of input[m,n] hat(y - m) hat(x - n), with hat(t) = max(1 - |t|, 0).

    16-bit inputs are computed in float32. Features must be finite. First derivatives only.
    """
    PH, PW = pair(output_size)
    batch, corners, finite = split_boxes(input, boxes)
    x1, y1, x2, y2 = (corners * spatial_scale).unbind(1)
    y = integral_taps(y1, y2 - y1, PH, input.shape[2])
    x = integral_taps(x1, x2 - x1, PW, input.shape[3])
    return pool(input, batch, drop_boxes(y, finite), x)


def integral_taps(start: Tensor, size: Tensor, P: int, n: int) -> Taps:
    """Pixel m weighs the mean of hat(t - m) over the bin; nothing where the bin has no length."""
    bins = (torch.where(size > 0, size, 1) / P)[:, None, None]
    a = start[:, None, None] + numbers(P, start)[:, None] * bins  # [K,P,1]
    b = a + bins
    first = a.detach().floor().clamp(0, max(n - 1, 0))
    last = b.detach().ceil().clamp(0, max(n - 1, 0))
    pixels = first + numbers(longest(last - first) + 1, start)  # [K,P,T]

    # The hat's rise and fall apart, each integrated as length times value in the middle: nothing cancels. An end of
    # the bin that lies on a pixel moves in one of them, not in both.
    (rise_a, fall_a), (rise_b, fall_b) = (
        (limited((d > -1) & (d <= 0), d, -1, 0), limited((d > 0) & (d < 1), d, 0, 1)) for d in (a - pixels, b - pixels)
    )
    integral = (rise_b - rise_a) * (1 + (rise_a + rise_b) / 2) + (fall_b - fall_a) * (1 - (fall_a + fall_b) / 2)
    weights = torch.where((size > 0)[:, None, None] & (pixels < n), integral / bins, 0)
    return pixels.clamp(max=max(n - 1, 0)).long(), weights
