"""Benchmarks of roi_pool: the headline map, channels_last, a C4 head, dtypes."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.harness import BACKWARD, FORWARD, FORWARD_BACKWARD, Bench
from benchmarks.regions import C4, HEADLINE, make

# Boxes with these widths or heights in map pixels are avoided, because float32 and float64 would round an edge of one
# of their 7 bins to different pixels.
POOLED = replace(HEADLINE, avoided=(29, 57, 58))


def benches(device: str) -> list[Bench]:
    f32, both = torch.float32, (FORWARD, FORWARD_BACKWARD)
    channels_last = replace(POOLED, name="channels_last", channels_last=True)
    slow = {"min_rounds": 3}  # the twin takes seconds
    exact = slow | {"tolerance": 0.0}  # a maximum is exact, but gradients are sums
    rows = [
        make("roi_pool", POOLED, device, f32, FORWARD, {"cpu": 8, "cuda": 3}, quick=True, **exact),
        make("roi_pool", POOLED, device, f32, BACKWARD, {"cuda": 3}, **slow),
        make("roi_pool", POOLED, device, f32, FORWARD_BACKWARD, **slow),
    ]
    rows += [
        make("roi_pool", case, device, dtype, d, **(exact if d == FORWARD else slow))
        for case, dtype in [
            (channels_last, f32),
            (C4, f32),
            (POOLED, torch.bfloat16),
            (POOLED, torch.float16),
            (POOLED, torch.float64),
        ]
        for d in both
    ]
    return rows
