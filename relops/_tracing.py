"""Helpers for code that also runs while torch.compile, torch.export or fake tensors trace a graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_values(*tensors: Tensor | None) -> bool:
    """Return whether the host may read values: fake tensors have none, and a traced graph must not depend on them."""
    if torch.compiler.is_compiling() or FakeTensor in map(type, tensors):
        return False
    if torch._C._len_torch_dispatch_stack() == 0:
        return True
    modes = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY
    return all(torch._C._get_dispatch_mode(mode) is None for mode in modes)


def int_tensor(ints: Sequence[int]) -> Tensor:
    """Make an int64 tensor on the CPU. In a graph that is being traced, symbolic sizes stay symbolic."""
    if torch.SymInt in map(type, ints):
        return torch.stack([torch.scalar_tensor(x, dtype=torch.int64, device="cpu") for x in ints])
    return torch.tensor(ints, dtype=torch.int64, device="cpu")
