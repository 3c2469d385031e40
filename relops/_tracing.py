"""Helpers for code that also runs while torch.compile, torch.export or fake tensors trace a graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_values(*tensors: Tensor | None) -> bool:
    """Return whether code may read the values of tensors.

    Fake tensors have no values, and a traced graph must not depend on values.
    """
    if torch.compiler.is_compiling() or FakeTensor in map(type, tensors):
        return False
    if torch._C._len_torch_dispatch_stack() == 0:
        return True
    modes = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY
    return all(torch._C._get_dispatch_mode(mode) is None for mode in modes)


def int_tensor(ints: Sequence[int]) -> Tensor:
    """Return an int64 tensor on the CPU. While a graph is traced, symbolic ints stay symbolic."""
    if torch.SymInt in map(type, ints):
        return torch.stack([torch.scalar_tensor(x, dtype=torch.int64, device="cpu") for x in ints])
    return torch.tensor(ints, dtype=torch.int64, device="cpu")
