"""What the benchmarks of region ops share: sizes, boxes, compulsory work, torchvision as a peer."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import relops
from benchmarks.harness import BACKWARD, FORWARD, Bench, Model
from relops import reference
from relops._dtypes import compute_dtype

IMAGE = (800, 1216)  # height and width that all boxes lie in
POSITION_SENSITIVE = ("ps_roi_align", "ps_roi_pool")


@dataclass(frozen=True)
class Case:
    """Sizes of one row: N x C maps of the whole image, K boxes, output x output bins."""

    name: str
    N: int = 2
    C: int = 256
    strides: tuple[int, ...] = (4,)  # a map each
    K: int = 1000
    sides: tuple[float, float] = (30.0, 300.0)  # of boxes, in image pixels
    logarithmic: bool = False  # the logarithms of the sides are uniform, instead of the sides
    output: int = 7
    sampling_ratio: int = 2
    aligned: bool = False
    channels_last: bool = False
    margin: int = 0  # image pixels at the right and the bottom that no box reaches into
    avoided: tuple[int, ...] = ()  # sizes in pixels of the map that no box has, once rounded; ascending
    box_gradients: bool = False

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [(math.ceil(IMAGE[0] / stride), math.ceil(IMAGE[1] / stride)) for stride in self.strides]

    @property
    def label(self) -> str:
        maps = "..".join(f"{h}x{w}" for h, w in dict.fromkeys([self.sizes[0], self.sizes[-1]]))
        return f"{self.name} {self.N}x{self.C}x{maps} K={self.K} {self.output}x{self.output}"


HEADLINE = Case("headline")
C4 = Case("C4", N=1, C=1024, strides=(16,), K=512)  # the last map of a ResNet before its fifth stage
RFCN = Case("R-FCN", N=1, C=21 * 49, strides=(16,), K=300)  # 20 classes and background, 7 x 7 bins


# ---- Inputs ----


def draw_boxes(case: Case, generator: torch.Generator) -> Tensor:
    """[K,5] float32 boxes anywhere in the image, those of an image together, as detectors hand them over.

    For gradients to boxes, samples keep 1/128 of a pixel of the last map away from where their four corners change:
    there that gradient jumps, and a comparison with float64 would measure on which side rounding falls. Corners on odd
    multiples of 1/128 and sides that put samples on further odd multiples do that, on maps up to 32 times finer too.
    """
    device, (low, high) = generator.device, case.sides
    index = torch.arange(case.K, device=device) * case.N // case.K
    sides, places = torch.rand(2, case.K, 2, generator=generator, device=device)
    sides = low * (high / low) ** sides if case.logarithmic else low + (high - low) * sides
    corners = places * (torch.tensor(IMAGE, device=device).flip(0) - case.margin - sides)
    if case.box_gradients:
        grid = case.strides[-1] / 64
        unit = 2 * case.sampling_ratio * case.output * grid
        sides = (sides / unit).ceil() * unit
        corners = ((corners / grid).floor() + 0.5) * grid
    ends = corners + sides
    for pixels in case.avoided:
        sizes = (ends / case.strides[0]).round() - (corners / case.strides[0]).round() + 1
        ends = torch.where(sizes == pixels, ends + case.strides[0], ends)
    return torch.cat([index[:, None], corners, ends], 1)


def draw_maps(case: Case, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    return [
        torch.randn(case.N, case.C, h, w, generator=generator, device=generator.device).to(dtype, memory_format=layout)
        for h, w in case.sizes
    ]


def draw_inputs(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The map, and boxes which beside 16-bit features are float32, as the ops recommend."""
    (features,) = draw_maps(case, dtype, generator)
    return features, draw_boxes(case, generator).to(compute_dtype(dtype))


# ---- Compulsory work ----


def taps_along_axis(op: str, case: Case) -> float:
    """How many values a box reads along one axis of one channel, over all its bins, in the mean over sides.

    By definition: two for each sample; every pixel of the box for maxima and means; every pixel under the tents of a
    bin for the integral of the bilinear surface.
    """
    low, high = (side / case.strides[0] for side in case.sides)
    if op == "prroi_pool":
        return (low + high) / 2 + case.output
    if op in ("roi_pool", "ps_roi_pool"):
        return (low + high) / 2 + 1
    if case.sampling_ratio > 0:
        return 2 * case.output * case.sampling_ratio
    sides = torch.linspace(low, high, 1001)
    return 2 * case.output * (sides / case.output).ceil().mean().item()


def work(op: str, case: Case, dtype: torch.dtype, direction: str) -> Model:
    """What no implementation avoids.

    Bytes: the input is read once, or as many values of it as all boxes together read where those are fewer; outputs are
    written once. Backward reads the gradient of the outputs and writes that of the whole input; gradients to boxes read
    the input again. Flops: a multiply-add for each value that a bin reads by the definition, for the output and for
    each of the gradients; for roi_pool one comparison instead, and backward an addition an output; for ps_roi_pool one
    addition.
    """
    bins, size = case.output**2, dtype.itemsize
    channels = case.C // bins if op in POSITION_SENSITIVE else case.C  # that a bin reads
    outputs = case.K * channels * bins
    gathered = round(case.K * channels * taps_along_axis(op, case) ** 2)
    values = case.N * case.C * sum(h * w for h, w in case.sizes)
    boxes = case.K * 5 * compute_dtype(dtype).itemsize
    read = min(values, gathered) * size + boxes
    flops = gathered * (1 if op in ("roi_pool", "ps_roi_pool") else 2)
    forward = Model(read + outputs * size, flops, gathered * size)
    backward = Model((outputs + values) * size + boxes, outputs if op == "roi_pool" else flops)
    if case.box_gradients:
        backward = Model(backward.bytes + read, backward.flops + flops)
    if direction == FORWARD:
        return forward
    if direction == BACKWARD:
        return backward
    return Model(forward.bytes + backward.bytes, forward.flops + backward.flops)


# ---- torchvision ----


def torchvision_ops() -> Any | None:
    if importlib.util.find_spec("torchvision") is None:
        return None
    import torchvision

    return torchvision.ops


def torchvision_peers(call: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Callable[..., Tensor]]:
    """A call of torchvision as it stands, and for 16 bits also what its autocast does."""

    def same_dtype(features: Tensor, boxes: Tensor) -> Tensor:
        return call(features, boxes.to(features.dtype))

    def in_float32(features: Tensor, boxes: Tensor) -> Tensor:
        return call(features.float(), boxes).to(features.dtype)

    if dtype.itemsize > 2:
        return {"torchvision": call}
    return {"torchvision": same_dtype, "torchvision in float32": in_float32}


# ---- Rows ----


def make(
    op: str,
    case: Case,
    device: str,
    dtype: torch.dtype,
    direction: str,
    goals: dict[str, float] | None = None,
    **options: Any,
) -> Bench:
    """A row of an op that reads one map. `goals`: the ratios to reach against torchvision, by device.

    Gradients go to the map, and to boxes where the case says so; no peer has those.
    """
    arguments: dict[str, Any] = {"output_size": case.output, "spatial_scale": 1 / case.strides[0]}
    if op in ("roi_align", "ps_roi_align"):
        arguments["sampling_ratio"] = case.sampling_ratio
    if op == "roi_align":
        arguments["aligned"] = case.aligned
    theirs = None if case.box_gradients else getattr(torchvision_ops(), op, None)
    return Bench(
        op=op,
        shape=case.label,
        dtype=dtype,
        device=device,
        direction=direction,
        make_inputs=functools.partial(draw_inputs, case, dtype),
        relops=functools.partial(getattr(relops, op), **arguments),
        pytorch=functools.partial(getattr(reference, op), **arguments),
        model=work(op, case, dtype, direction),
        peers={} if theirs is None else torchvision_peers(functools.partial(theirs, **arguments), dtype),
        peer_targets=peer_targets(goals, device),
        differentiated=(0, 1) if case.box_gradients else (0,),
        **options,
    )


def peer_targets(goals: dict[str, float] | None, device: str) -> dict[str, float]:
    return {"torchvision": goals[device]} if goals and device in goals else {}
