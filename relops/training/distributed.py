"""The processes of a run: a single process, or the processes that torchrun started."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from relops.training.errors import UsageError


class World(NamedTuple):
    """The rank of this process, the number of processes in the run, and the device of this process."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Return whether this is the main process, which writes files and prints messages."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return, in every process, the values of all processes as a list ordered by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def largest(self, number: int) -> int:
        """Return, in every process, the largest of the numbers of all processes, without waiting for the GPU."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def on_main(self, action: Callable[[], None]) -> None:
        """Run a function in the main process, and raise its exception in all processes so that no process hangs."""
        error = None
        if self.is_main:
            try:
                action()
            except Exception as raised:
                error = raised
        error = self.gather(error)[0]
        if error is not None:
            raise error


def device_named(name: str | None) -> torch.device:
    """Return the device named `cpu`, `cuda` or `cuda:N`. For None, return a GPU if one is available, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", name):
        raise UsageError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    if name != "cpu" and int(name[5:] or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device must be visible to torch, which sees the CPU and {torch.cuda.device_count()} GPUs, got {name!r}"
        )
    return torch.device(name)


@contextlib.contextmanager
def world(device: str | None = None) -> Iterator[World]:
    """Join the process group that torchrun's environment variables describe, or yield a World of one process.

    Args:
        device: see `device_named`. If the device is a GPU and the run has several processes, each process uses the GPU
            of its local rank.
    """
    own_device = device_named(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, own_device)
        return
    if own_device.type == "cuda":
        own_device = device_named(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(own_device)
    # CPU tensors use the gloo backend. Collectives on CPU tensors therefore do not wait for work queued on the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if own_device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, own_device)
    finally:
        dist.destroy_process_group()
