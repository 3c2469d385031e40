"""Benchmarks of multi_scale_roi_align: the box head and the mask head of a feature pyramid network."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import relops
from benchmarks.harness import BACKWARD, FORWARD, FORWARD_BACKWARD, Bench
from benchmarks.regions import IMAGE, Case, draw_boxes, draw_maps, peer_targets, torchvision_ops, work
from relops import reference
from relops._dtypes import compute_dtype

# From the finest to the coarsest level, the levels receive 58%, 27%, 13% and 2% of the boxes.
PYRAMID = Case("box head", strides=(4, 8, 16, 32), sides=(16.0, 600.0), logarithmic=True)


def draw_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return the maps of all levels, followed by the boxes [Ki,4] of each image."""
    boxes = draw_boxes(case, generator).to(compute_dtype(dtype))
    return (*draw_maps(case, dtype, generator), *(boxes[boxes[:, 0] == i, 1:] for i in range(case.N)))


def call(op: Callable[..., Tensor], case: Case, *inputs: Tensor) -> Tensor:
    maps, boxes = inputs[: len(case.strides)], inputs[len(case.strides) :]
    scales = [1 / stride for stride in case.strides]
    return op(list(maps), list(boxes), case.output, scales, sampling_ratio=case.sampling_ratio)


def torchvision_peer(case: Case, dtype: torch.dtype) -> dict[str, Callable[..., Tensor]]:
    """Return torchvision's module as a peer. It rejects 16-bit maps, so they are cast to float32, as autocast does."""
    ops = torchvision_ops()
    if ops is None or case.box_gradients:
        return {}
    names = [str(stride) for stride in case.strides]
    pool = ops.MultiScaleRoIAlign(names, case.output, case.sampling_ratio)

    def theirs(*inputs: Tensor) -> Tensor:
        maps, boxes = inputs[: len(names)], inputs[len(names) :]
        return pool(OrderedDict(zip(names, maps)), list(boxes), [IMAGE] * case.N)

    def in_float32(*inputs: Tensor) -> Tensor:
        return theirs(*(x.float() for x in inputs)).to(dtype)

    return {"torchvision": theirs} if dtype.itemsize > 2 else {"torchvision in float32": in_float32}


def make(
    case: Case,
    device: str,
    dtype: torch.dtype,
    direction: str,
    torchvision_targets: dict[str, float] | None = None,
    **options: Any,
) -> Bench:
    op, levels = "multi_scale_roi_align", len(case.strides)
    return Bench(
        op=op,
        shape=case.label,
        dtype=dtype,
        device=device,
        direction=direction,
        make_inputs=functools.partial(draw_inputs, case, dtype),
        relops=functools.partial(call, relops.multi_scale_roi_align, case),
        pytorch=functools.partial(call, reference.multi_scale_roi_align, case),
        model=work(op, case, dtype, direction),
        peers=torchvision_peer(case, dtype),
        peer_targets=peer_targets(torchvision_targets, device),
        differentiated=tuple(range(levels + case.N if case.box_gradients else levels)),
        **options,
    )


def benches(device: str) -> list[Bench]:
    f32, both = torch.float32, (FORWARD, FORWARD_BACKWARD)
    channels_last = replace(PYRAMID, name="channels_last", channels_last=True)
    mask = replace(PYRAMID, name="mask head", K=100, output=14)
    boxes = replace(PYRAMID, name="box gradients", box_gradients=True)
    rows = [
        make(PYRAMID, device, f32, FORWARD, {"cuda": 3}, quick=True),
        make(PYRAMID, device, f32, BACKWARD, {"cuda": 3}),
        make(PYRAMID, device, f32, FORWARD_BACKWARD),
    ]
    rows += [make(case, device, f32, d) for case in (channels_last, mask) for d in both]
    rows += [make(boxes, device, f32, FORWARD_BACKWARD)]
    rows += [make(PYRAMID, device, dtype, d) for dtype in (torch.bfloat16, torch.float64) for d in both]
    return rows
