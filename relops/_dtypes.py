"""The dtypes that ops take, and those that they compute in.

torch.jit.script compiles `compute_dtype`, `common_compute_dtype` and `to_compute_dtype`. It reads annotations as
objects, so this file does not import annotations from __future__.
"""

import torch
from torch import Tensor

FEATURE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums, scores and coordinates of tensors of `dtype` are computed.

    It is float64 for float64 and for 64-bit integers, and float32 for all others: nothing is computed in 16 bits.
    """
    wide = dtype == torch.float64 or dtype == torch.int64 or dtype == torch.uint64
    return torch.float64 if wide else torch.float32


def common_compute_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """Return the dtype in which both tensors are computed together: float64 if it is that of either."""
    dtype = compute_dtype(a.dtype)
    return dtype if dtype == torch.float64 or a.dtype == b.dtype else compute_dtype(b.dtype)


def to_compute_dtype(tensor: Tensor) -> Tensor:
    """Convert to the dtype that the tensor is computed in."""
    return tensor.to(compute_dtype(tensor.dtype))
