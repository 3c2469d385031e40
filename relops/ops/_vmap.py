"""A helper for vmap rules."""

from __future__ import annotations

from torch import Tensor


def mapped_first(tensor: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """Move the vmapped dimension to the front. If `dim` is None, expand the tensor along a new first dimension."""
    return tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
