"""batched_nms: proposals in few classes, in COCO's 80, and in LVIS's 1203. See proposals.py.

On CUDA torchvision goes from one strategy to the other at 100,000 boxes over the number of classes it expects: both are
timed. Moving classes apart by an offset rounds coordinates, so that it selects a few boxes otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import relops
from benchmarks.harness import FORWARD, Bench
from benchmarks.proposals import proposals
from benchmarks.regions import torchvision_ops
from relops import reference


def torchvision_peers(device: str) -> dict[str, Callable[..., Tensor]]:
    ops = torchvision_ops()
    if ops is None:
        return {}
    found = {"torchvision": ops.batched_nms}
    if device == "cuda":
        found["torchvision per class"] = ops.boxes._batched_nms_vanilla
        found["torchvision offset"] = ops.boxes._batched_nms_coordinate_trick
    return found


def row(K: int, classes: int, device: str, goal: float | None = None, **options: object) -> Bench:
    peers = torchvision_peers(device)
    return Bench(
        op="batched_nms",
        shape=f"proposals K={K} C={classes} IoU 0.5",
        dtype=torch.float32,
        device=device,
        direction=FORWARD,
        make_inputs=lambda generator: (*proposals(K, generator, classes), 0.5),
        relops=relops.batched_nms,
        pytorch=reference.batched_nms,
        peers=peers,
        peer_targets={"torchvision": goal} if peers and goal is not None else {},
        selection=True,
        **options,
    )


def benches(device: str) -> list[Bench]:
    return [
        row(1000, 80, device),
        row(20_000, 80, device, 10 if device == "cpu" else None, quick=True),
        row(100_000, 1203, device, min_rounds=3),
    ]
