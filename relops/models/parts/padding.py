"""Conversion of padded batches [N,K,...] to the rows that the region ops expect, and back."""

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
    """Convert boxes [N,K,4] to rows (image, x1, y1, x2, y2), without padding if that needs no synchronization.

    Returns:
        On the CPU, the rows [R,5] of the boxes for which `valid` [N,K] is True, and the indices [R] of these boxes
        among all N * K boxes. On other devices, counting the valid boxes would require a synchronization, so all rows
        [N*K,5] and None are returned. The same holds in a traced graph.
    """
    rows = as_rows(boxes)
    if not valid.is_cpu or not has_values(valid):
        return rows, None
    row_index = valid.flatten().nonzero().squeeze(1)
    return rows[row_index], row_index


def select_rows(x: Tensor, row_index: Tensor | None) -> Tensor:
    """Return the rows [R,...] of x [N,K,...] at the indices that `present_rows` returned."""
    x = x.flatten(0, 1)
    return x if row_index is None else x[row_index]


def scatter_rows(x: Tensor, row_index: Tensor | None, N: int, K: int) -> Tensor:
    """Invert `select_rows`: return [N,K,...] with the rows [R,...] at their indices and zeros elsewhere."""
    if row_index is not None:
        x = x.new_zeros(N * K, *x.shape[1:]).index_copy_(0, row_index, x)
    return x.view(N, K, *x.shape[1:])
