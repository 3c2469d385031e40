"""The dtypes in which twins compute."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if at least one tensor is float64 or has a 64-bit integer dtype, and float32 otherwise."""
    wide = any(x.dtype in (torch.float64, torch.int64, torch.uint64) for x in tensors)
    return torch.float64 if wide else torch.float32
