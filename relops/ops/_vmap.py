"""What the vmap rules share."""

from __future__ import annotations

from torch import Tensor


def mapped_first(tensor: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """With the mapped dimension first, which a tensor without one (dim None) is expanded by."""
    return tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
