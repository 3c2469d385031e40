"""Benchmarks of roi_align: several heads, memory formats and dtypes, adaptive sampling, box gradients."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.harness import BACKWARD, FORWARD, FORWARD_BACKWARD, Bench
from benchmarks.regions import C4, HEADLINE, make


def benches(device: str) -> list[Bench]:
    f32, both = torch.float32, (FORWARD, FORWARD_BACKWARD)
    channels_last = replace(HEADLINE, name="channels_last", channels_last=True)
    mask = replace(HEADLINE, name="mask head", K=100, output=14)
    adaptive = replace(HEADLINE, name="adaptive", sampling_ratio=-1)
    aligned = replace(HEADLINE, name="aligned", aligned=True)
    boxes = replace(HEADLINE, name="box gradients", box_gradients=True)
    rows = [
        make("roi_align", HEADLINE, device, f32, FORWARD, {"cpu": 5, "cuda": 3}, quick=True),
        make("roi_align", HEADLINE, device, f32, BACKWARD, {"cpu": 8, "cuda": 3}, quick=True),
        make("roi_align", HEADLINE, device, f32, FORWARD_BACKWARD),
        make("roi_align", channels_last, device, f32, FORWARD, {"cpu": 8, "cuda": 3}, quick=True),
        make("roi_align", channels_last, device, f32, BACKWARD, {"cuda": 3}),
    ]
    rows += [make("roi_align", case, device, f32, d) for case in (mask, C4, adaptive, aligned) for d in both]
    rows += [make("roi_align", boxes, device, f32, FORWARD_BACKWARD)]
    rows += [
        make("roi_align", case, device, dtype, d)
        for case, dtype in [
            (HEADLINE, torch.bfloat16),
            (channels_last, torch.bfloat16),
            (HEADLINE, torch.float16),
            (HEADLINE, torch.float64),
        ]
        for d in both
    ]
    return rows
