"""The dtypes that ops accept and the dtypes in which they compute.

torch.jit.script compiles `compute_dtype`, `common_compute_dtype` and `to_compute_dtype` and evaluates their annotations
at run time. Therefore this file must not import annotations from __future__.
"""

import torch
from torch import Tensor

FEATURE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which ops compute sums, scores and coordinates if their tensors have `dtype`.

    This is float64 for float64 and 64-bit integers, and float32 for all other dtypes. No op computes in 16 bits.
    """
    wide = dtype == torch.float64 or dtype == torch.int64 or dtype == torch.uint64
    return torch.float64 if wide else torch.float32


def common_compute_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """Return float64 if it is the compute dtype of at least one of the tensors, and float32 otherwise."""
    dtype = compute_dtype(a.dtype)
    return dtype if dtype == torch.float64 or a.dtype == b.dtype else compute_dtype(b.dtype)


def to_compute_dtype(tensor: Tensor) -> Tensor:
    """Convert the tensor to its compute dtype."""
    return tensor.to(compute_dtype(tensor.dtype))
