"""Little work stays on the calling thread: waking another one can cost a scheduler's slice where all cores are busy."""

from __future__ import annotations

import sys

import pytest
from cases import OPS, SELECTIONS
from conftest import run_python

# The threads of a process begin at the first work that is shared among them, and stay: each op has a process of its
# own. Samples are drawn with one thread, so that it is the op that makes others begin.
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
    if "scores" in inputs:  # none suppresses another, so that they are compared with many
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
            torch.ones(1, requires_grad=True).sum().backward()  # what autograd begins with
            before = threads()
            call(op)
            print(op.name, call.__name__, threads() - before, flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
"""


@pytest.fixture(scope="module")
def begun() -> dict[tuple[str, str], int]:
    """How many threads begin at small and at large calls of every op, of which 8 may."""
    if sys.platform != "linux":
        pytest.skip("counts the threads of a process in /proc")
    done = run_python(PROGRAM, OMP_NUM_THREADS="8")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {(name, call): int(count) for name, call, count in lines}


on_ops = pytest.mark.parametrize("name", [op.name for op in OPS + SELECTIONS])


@on_ops
def test_a_small_call_wakes_no_thread(begun: dict[tuple[str, str], int], name: str) -> None:
    """Forward and backward, also where there are more items than threads."""
    assert begun[name, "small"] == 0


@on_ops
def test_a_large_call_wakes_them(begun: dict[tuple[str, str], int], name: str) -> None:
    assert begun[name, "large"] == 7
