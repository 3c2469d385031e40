"""The dtype that twins compute in."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any is float64 or of 64-bit integers, else float32."""
    wide = any(x.dtype in (torch.float64, torch.int64, torch.uint64) for x in tensors)
    return torch.float64 if wide else torch.float32
