"""The processes of a run: one, or those that torchrun started."""

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
    """The place of this process among all of a run, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def gather(self, thing: Any) -> list[Any]:
        """Return in every process what each of them gives, by rank."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def largest(self, number: int) -> int:
        """Return in every process the largest of what they give. Nothing waits for a GPU: the tensors are the CPU's."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def on_main(self, action: Callable[[], None]) -> None:
        """Run an action in the main process, and raise its error in all processes, so that none waits for another."""
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
    """Return the device `cpu`, `cuda` or `cuda:N`; for None, a GPU where torch sees one, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", name):
        raise UsageError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    if name != "cpu" and int(name[5:] or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device must be one that torch sees, which are cpu and {torch.cuda.device_count()} GPUs, got {name!r}"
        )
    return torch.device(name)


@contextlib.contextmanager
def world(device: str | None = None) -> Iterator[World]:
    """Join what torchrun's variables describe, on GPUs where there are some and `device` does not say otherwise."""
    mine = device_named(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, mine)
        return
    if mine.type == "cuda":
        mine = device_named(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(mine)
    # With both, flags and objects on the CPU take no turn in the queue of a GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if mine.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, mine)
    finally:
        dist.destroy_process_group()
