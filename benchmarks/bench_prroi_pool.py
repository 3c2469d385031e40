"""Benchmarks of prroi_pool: maps of stride 16 and stride 4, with and without gradients with respect to the boxes."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.harness import BACKWARD, FORWARD, FORWARD_BACKWARD, Bench
from benchmarks.regions import HEADLINE, Case, make


def benches(device: str) -> list[Bench]:
    f32, both = torch.float32, (FORWARD, FORWARD_BACKWARD)
    stride_16 = Case("stride 16", N=1, strides=(16,), K=300)
    boxes = replace(stride_16, name="box gradients", box_gradients=True)
    channels_last = replace(stride_16, name="channels_last", channels_last=True)
    rows = [
        make("prroi_pool", stride_16, device, f32, FORWARD, quick=True),
        make("prroi_pool", stride_16, device, f32, FORWARD_BACKWARD),
        make("prroi_pool", boxes, device, f32, FORWARD_BACKWARD, quick=True),
    ]
    rows += [make("prroi_pool", channels_last, device, f32, d) for d in both]
    rows += [make("prroi_pool", stride_16, device, dtype, d) for dtype in (torch.bfloat16, torch.float64) for d in both]
    rows += [make("prroi_pool", HEADLINE, device, f32, d) for d in (FORWARD, BACKWARD)]
    return rows
