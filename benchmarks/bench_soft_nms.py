"""Benchmarks of soft_nms with both methods on the proposals of one image, as proposals.py defines them.

The twin is a vectorized loop over the kept boxes. torchvision has no soft_nms.
"""

from __future__ import annotations

import torch
from torch import Tensor

import relops
from benchmarks.harness import FORWARD, Bench
from benchmarks.proposals import proposals
from relops import reference


def by_index(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Sort the outputs by index, because rounding decides the order of two scores that are nearly equal."""
    order = outputs[0].argsort()
    return tuple(x[order] for x in outputs)


def row(K: int, method: str, device: str, **options: object) -> Bench:
    return Bench(
        op="soft_nms",
        shape=f"proposals K={K} {method}",
        dtype=torch.float32,
        device=device,
        direction=FORWARD,
        make_inputs=lambda generator: (*proposals(K, generator)[:2], method),
        relops=relops.soft_nms,
        pytorch=reference.soft_nms,
        target=20,
        selection=True,
        comparable=by_index,
        tolerance=1e-5,
        **options,
    )


def benches(device: str) -> list[Bench]:
    return [
        row(K, method, device, quick=(K, method) == (1000, "gaussian"))
        for K in (1000, 4000)
        for method in ("gaussian", "linear")
    ]
