"""Benchmarks of nms on 100 to 400,000 boxes: uniform boxes and proposals, as proposals.py defines them."""

from __future__ import annotations

import torch
from torch import Tensor

import relops
from benchmarks.harness import FORWARD, Bench
from benchmarks.proposals import proposals, uniform
from benchmarks.regions import torchvision_ops
from relops import reference

# With this number of boxes or more, the size in bytes of torchvision's mask of all pairs overflows an int on CUDA.
TOO_MANY_FOR_TORCHVISION = 370_000


def row(kind: str, K: int, device: str, torchvision_target: float | None = None, **options: object) -> Bench:
    iou_threshold = {"uniform": 0.5, "proposals": 0.7}[kind]

    def make_inputs(generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
        boxes, scores = uniform(K, generator) if kind == "uniform" else proposals(K, generator)[:2]
        return boxes, scores, iou_threshold

    theirs = torchvision_ops() if K < TOO_MANY_FOR_TORCHVISION else None
    return Bench(
        op="nms",
        shape=f"{kind} K={K} IoU {iou_threshold}",
        dtype=torch.float32,
        device=device,
        direction=FORWARD,
        make_inputs=make_inputs,
        relops=relops.nms,
        pytorch=reference.nms,
        peers={} if theirs is None else {"torchvision": theirs.nms},
        peer_targets={} if theirs is None or torchvision_target is None else {"torchvision": torchvision_target},
        selection=True,
        **options,
    )


def benches(device: str) -> list[Bench]:
    targets = {"cpu": {1000: 4, 12_000: 25}, "cuda": {100: 1, 1000: 3, 12_000: 3, 100_000: 3}}[device]
    rows = [
        row(kind, K, device, targets.get(K), quick=(kind, K) == ("proposals", 1000))
        for K in (100, 1000, 12_000)
        for kind in ("uniform", "proposals")
    ]
    rows.append(row("proposals", 100_000, device, targets.get(100_000), min_rounds=3))
    if device == "cuda":
        rows += [row("uniform", 100_000, device, targets.get(100_000), min_rounds=3)]
        rows += [row("proposals", 400_000, device, min_rounds=3)]
    return rows
