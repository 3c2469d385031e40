"""Benchmarks of ps_roi_pool: the head of R-FCN."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.harness import FORWARD, FORWARD_BACKWARD, Bench
from benchmarks.regions import RFCN, make

# The forward pass of torchvision skips the last row and column of the map, but its backward pass gives them a gradient.
# torchvision would fail the verification for a box that reaches them, so boxes keep a distance from the border.
POOLED = replace(RFCN, margin=32)


def benches(device: str) -> list[Bench]:
    both = (FORWARD, FORWARD_BACKWARD)
    channels_last = replace(POOLED, name="channels_last", channels_last=True)
    rows = [
        make("ps_roi_pool", POOLED, device, torch.float32, FORWARD, {"cuda": 3}, quick=True),
        make("ps_roi_pool", POOLED, device, torch.float32, FORWARD_BACKWARD, {"cuda": 3}),
    ]
    rows += [make("ps_roi_pool", channels_last, device, torch.float32, d) for d in both]
    rows += [make("ps_roi_pool", POOLED, device, dtype, d) for dtype in (torch.bfloat16, torch.float64) for d in both]
    return rows
