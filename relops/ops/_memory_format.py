"""Memory formats of feature maps [N,C,H,W]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_channels_last(input: Tensor) -> bool:
    """Return whether the kernels read the map as channels_last.

    A channels_last map is read without a copy, and its output and gradient are also channels_last. The kernels apply
    the same rule as this function.
    """
    return input.dim() == 4 and not input.is_contiguous() and input.size(1) > 1 and input.stride(1) == 1


def empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)
