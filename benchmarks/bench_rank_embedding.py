"""Benchmarks of rank_embedding: the sizes of learned duplicate removal in its paper and in its released code."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import relops
from benchmarks.harness import FORWARD, FORWARD_BACKWARD, Bench, Model
from relops import reference

# Operations per angle, according to the definition: one product, and about 10 each for the sine and the cosine.
FLOPS = 21


def draw(shape: tuple[int, ...], dim: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, int]:
    """Return random ranks below the number of boxes per class (fractional if `dtype` is floating point), and `dim`."""
    ranks = shape[-1] * torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
    return (ranks if dtype.is_floating_point else ranks.floor()).to(dtype), dim


def make(
    label: str,
    shape: tuple[int, ...],  # shape of the ranks
    dim: int,
    device: str,
    direction: str,
    dtype: torch.dtype = torch.int64,
    quick: bool = False,
) -> Bench:
    ranks = torch.Size(shape).numel()
    size = dtype.itemsize if dtype.is_floating_point else 4
    forward = Model(ranks * (dtype.itemsize + dim * size), ranks * dim // 2 * FLOPS)
    forward_backward = Model(forward.bytes + ranks * (2 * dtype.itemsize + dim * size), 2 * forward.flops)
    return Bench(
        op="rank_embedding",
        shape=f"{label} {'x'.join(map(str, shape))}, {dim} wide",
        dtype=dtype if dtype.is_floating_point else torch.float32,
        device=device,
        direction=direction,
        make_inputs=functools.partial(draw, shape, dim, dtype),
        relops=relops.rank_embedding,
        pytorch=reference.rank_embedding,
        model=forward if direction == FORWARD else forward_backward,
        quick=quick,
    )


def benches(device: str) -> list[Bench]:
    return [
        make("code", (100,), 1024, device, FORWARD, quick=True),
        make("paper, 80 classes", (80, 100), 128, device, FORWARD, quick=True),
        make("floating", (80, 100), 128, device, FORWARD, torch.float32),
        make("floating", (80, 100), 128, device, FORWARD, torch.bfloat16),
        make("floating", (80, 100), 128, device, FORWARD, torch.float64),
        make("floating", (80, 100), 128, device, FORWARD_BACKWARD, torch.float32),
        make("paper, 1203 classes", (1203, 100), 128, device, FORWARD),
    ]
