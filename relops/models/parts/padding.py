"""Conversion of padded batches [N,K,...] to rows, which the region ops take, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from relops._tracing import has_values


def gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Return the entries [N,S,...] of x [N,K,...] at indices [N,S]."""
    return x.gather(1, indices.view(*indices.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))


def as_rows(boxes: Tensor) -> Tensor:
    """Convert boxes [N,K,4] to rows [N*K,5] (image, x1, y1, x2, y2) for the region ops."""
    N, K = boxes.shape[:2]
    image = torch.arange(N, device=boxes.device, dtype=boxes.dtype).repeat_interleave(K, output_size=N * K)
    return torch.cat([image[:, None], boxes.reshape(-1, 4)], 1)


def present_rows(boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor | None]:
    """Convert boxes [N,K,4] to rows as `as_rows` does, and leave out padding where that costs nothing.

    Returns:
        On the CPU the rows [R,5] of the boxes that are valid [N,K], and their places [R] in the flattened [N*K]. On
        other devices, where counting them would wait for the device, all rows and None.
    """
    rows = as_rows(boxes)
    if not valid.is_cpu or not has_values(valid):
        return rows, None
    place = valid.flatten().nonzero().squeeze(1)
    return rows[place], place


def at_places(x: Tensor, place: Tensor | None) -> Tensor:
    """Return the rows [R,...] of x [N,K,...] that `present_rows` gave."""
    x = x.flatten(0, 1)
    return x if place is None else x[place]


def spread(x: Tensor, place: Tensor | None, N: int, K: int) -> Tensor:
    """Put rows [R,...] back to the places that `present_rows` took them from: [N,K,...], zeros elsewhere."""
    if place is not None:
        x = x.new_zeros(N * K, *x.shape[1:]).index_copy_(0, place, x)
    return x.view(N, K, *x.shape[1:])
