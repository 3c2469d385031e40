"""Benchmarks of box_iou and generalized_box_iou: anchors, proposals, two large sets, and a batch of loss size."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import relops
from benchmarks.harness import FORWARD, FORWARD_BACKWARD, Bench, Model
from benchmarks.regions import torchvision_ops
from relops import reference

# Operations per pair of boxes, according to the definition. The width and the height of the intersection and of the
# enclosing box each take a minimum, a maximum, a difference and a clamp.
FLOPS = {"box_iou": 12, "generalized_box_iou": 23}


def draw(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]], generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return boxes with sides of 16 to 256 pixels and corners at random positions in an image of 1024 pixels."""
    boxes = []
    for shape in shapes:
        corner, size = torch.rand(2, *shape, 2, generator=generator, device=generator.device)
        boxes.append(torch.cat([1024 * corner, 1024 * corner + 16 * 16**size], -1).to(dtype))
    return tuple(boxes)


def peers(op: str, batched: bool) -> dict[str, Callable[..., Tensor]]:
    theirs = getattr(torchvision_ops(), op, None)
    if theirs is None:
        return {}
    if not batched:
        return {"torchvision": theirs}

    def looped(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([theirs(x, y) for x, y in zip(a, b)])

    return {"torchvision, in a loop": looped}


def make(
    op: str,
    label: str,
    sizes: tuple[int, ...],  # (A, B) or (N, A, B)
    device: str,
    direction: str,
    dtype: torch.dtype = torch.float32,
    quick: bool = False,
) -> Bench:
    *N, A, B = sizes
    pairs, boxes = math.prod(sizes), math.prod(N) * (A + B) * 4
    forward = Model((boxes + pairs) * dtype.itemsize, pairs * FLOPS[op])
    # The backward pass reads the boxes and the gradient of the output, and writes the gradient of the boxes.
    forward_backward = Model(forward.bytes + (2 * boxes + pairs) * dtype.itemsize, 3 * forward.flops)
    return Bench(
        op=op,
        shape=f"{label} {'x'.join(map(str, sizes))}",
        dtype=dtype,
        device=device,
        direction=direction,
        make_inputs=functools.partial(draw, dtype, ((*N, A), (*N, B))),
        relops=getattr(relops, op),
        pytorch=getattr(reference, op),
        model=forward if direction == FORWARD else forward_backward,
        peers=peers(op, bool(N)),
        quick=quick,
    )


def benches(device: str) -> list[Bench]:
    rows = []
    for op in ("box_iou", "generalized_box_iou"):
        rows += [
            make(op, "proposals", (1000, 100), device, FORWARD),
            make(op, "anchors", (20000, 100), device, FORWARD, quick=True),
            make(op, "anchors", (20000, 100), device, FORWARD, torch.float64),
            make(op, "all pairs", (5000, 5000), device, FORWARD),
            make(op, "anchors", (20000, 100), device, FORWARD_BACKWARD),
            make(op, "loss", (2, 300, 300), device, FORWARD),
            make(op, "loss", (2, 300, 300), device, FORWARD_BACKWARD, quick=True),
        ]
    return rows
