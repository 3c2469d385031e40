"""Helpers for code that also runs with fake tensors, or while torch.compile or torch.export traces a graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_values(*tensors: Tensor | None) -> bool:
    """Return whether the caller may read the values of the tensors.

    Fake tensors have no values, and a traced graph must not depend on values.
    """
    if torch.compiler.is_compiling() or FakeTensor in map(type, tensors):
        return False
    if torch._C._len_torch_dispatch_stack() == 0:
        return True
    modes = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY
    return all(torch._C._get_dispatch_mode(mode) is None for mode in modes)


def int_tensor(ints: Sequence[int]) -> Tensor:
    """Return the ints as an int64 tensor on the CPU. Symbolic ints of a traced graph stay symbolic."""
    if torch.SymInt in map(type, ints):
        return torch.stack([torch.scalar_tensor(x, dtype=torch.int64, device="cpu") for x in ints])
    return torch.tensor(ints, dtype=torch.int64, device="cpu")
