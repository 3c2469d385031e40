"""Benchmarks of batched_nms on the proposals of proposals.py, with 80 classes as in COCO and 1203 as in LVIS.

torchvision has two strategies. It either suppresses class by class, or adds an offset per class to the boxes, so that
boxes of different classes do not overlap. The number of boxes decides which one it uses (on CUDA, class by class above
25,000 boxes). On CUDA, both strategies are timed. Adding the offset rounds the coordinates, which changes the selection
of a few boxes.
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


def row(K: int, classes: int, device: str, torchvision_target: float | None = None, **options: object) -> Bench:
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
        peer_targets={"torchvision": torchvision_target} if peers and torchvision_target is not None else {},
        selection=True,
        **options,
    )


def benches(device: str) -> list[Bench]:
    return [
        row(1000, 80, device),
        row(20_000, 80, device, 10 if device == "cpu" else None, quick=True),
        row(100_000, 1203, device, min_rounds=3),
    ]
