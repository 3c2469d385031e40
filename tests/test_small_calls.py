"""Tests that small calls stay on the calling thread.

On a busy machine, a call that waits for another thread may be delayed by a time slice of the scheduler.
"""

from __future__ import annotations

import sys

import pytest
from cases import OPS, SELECTIONS
from conftest import run_python

# A process starts its threads when it first runs parallel code and then keeps them, so each op runs in a separate
# process. Samples are drawn with one thread, so that only the op can start other threads.
PROGRAM = """
import os
import torch
from cases import OPS, SELECTIONS
from cases.relation_attention import Ranks
from cases.suppression import Suppression

def threads():
    return len(os.listdir("/proc/self/task"))

def run(op, sample, dtype=torch.float32):
    inputs = op.draw(sample, dtype=dtype)
    if "scores" in inputs:  # no box suppresses another, so that each box is compared with many
        inputs["boxes"] += 1000 * torch.arange(inputs["boxes"].size(-2))[:, None]
    torch.set_num_threads(8)
    op.run(inputs)
    torch.set_num_threads(1)

def small(op):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for name in op.samples.keys() & {"typical", "channels_last", "official", "classes", "batch", "padded"}:
            run(op, op.samples[name], dtype)

def large(op):
    nms = Suppression(K=8000, classes=6)
    cases = {"rank_embedding": Ranks((5000,)), "nms": nms, "batched_nms": nms}
    if op.name in cases:
        run(op, getattr(cases[op.name], op.name))
    else:
        run(op, op.growing(60 if "box_iou" in op.name or "nms" in op.name else 9))

torch.set_num_threads(1)
for op in OPS + SELECTIONS:
    for call in (small, large):
        pid = os.fork()
        if pid == 0:
            torch.ones(1, requires_grad=True).sum().backward()  # starts the threads of autograd
            before = threads()
            call(op)
            print(op.name, call.__name__, threads() - before, flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
"""


@pytest.fixture(scope="module")
def started_threads() -> dict[tuple[str, str], int]:
    """Return the number of threads that a small and a large call of every op start, if 8 threads may run."""
    if sys.platform != "linux":
        pytest.skip("the threads of a process are counted in /proc, which only Linux has")
    process = run_python(PROGRAM, OMP_NUM_THREADS="8")
    assert process.returncode == 0, process.stderr
    lines = [line.split() for line in process.stdout.splitlines()]
    return {(name, call): int(count) for name, call, count in lines}


on_ops = pytest.mark.parametrize("name", [op.name for op in OPS + SELECTIONS])


@on_ops
def test_small_call_starts_no_thread(started_threads: dict[tuple[str, str], int], name: str) -> None:
    """Check the forward and backward pass, including samples with more items than threads."""
    assert started_threads[name, "small"] == 0


@on_ops
def test_large_call_starts_all_threads(started_threads: dict[tuple[str, str], int], name: str) -> None:
    assert started_threads[name, "large"] == 7
