"""Code that the benchmarks of region ops share: sizes, boxes, compulsory work, and torchvision as a peer."""

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

IMAGE = (800, 1216)  # height and width of the image that contains all boxes
POSITION_SENSITIVE = ("ps_roi_align", "ps_roi_pool")


@dataclass(frozen=True)
class Case:
    """The sizes of one row: maps [N,C,H,W] of whole images, K boxes, and output x output bins per box."""

    name: str
    N: int = 2
    C: int = 256
    strides: tuple[int, ...] = (4,)  # one per map
    K: int = 1000
    sides: tuple[float, float] = (30.0, 300.0)  # range of the sides of boxes, in image pixels
    logarithmic: bool = False  # whether log(side) is uniform instead of the side
    output: int = 7
    sampling_ratio: int = 2
    aligned: bool = False
    channels_last: bool = False
    margin: int = 0  # minimum distance of boxes from the right and bottom borders, in image pixels
    avoided: tuple[int, ...] = ()  # sides in map pixels that no rounded box may have, in ascending order
    box_gradients: bool = False

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [(math.ceil(IMAGE[0] / stride), math.ceil(IMAGE[1] / stride)) for stride in self.strides]

    @property
    def label(self) -> str:
        maps = "..".join(f"{h}x{w}" for h, w in dict.fromkeys([self.sizes[0], self.sizes[-1]]))
        return f"{self.name} {self.N}x{self.C}x{maps} K={self.K} {self.output}x{self.output}"


HEADLINE = Case("headline")
C4 = Case("C4", N=1, C=1024, strides=(16,), K=512)  # the map after the fourth stage of a ResNet
RFCN = Case("R-FCN", N=1, C=21 * 49, strides=(16,), K=300)  # 20 classes and background, 7 x 7 bins


# ---- Inputs ----


def draw_boxes(case: Case, generator: torch.Generator) -> Tensor:
    """Return [K,5] float32 boxes at random positions in the image, sorted by image as detectors return them.

    The gradient with respect to a box is discontinuous where the four pixels around one of its samples change, and a
    comparison with float64 would only measure the direction of rounding there. If `case.box_gradients` is true, every
    sample is therefore at least 1/128 pixel of the last map away from such positions. The corners of the boxes lie at
    odd multiples of 1/128 pixel, and their sides are chosen so that the samples lie at odd multiples, too. This also
    keeps the samples away from such positions on maps that are up to 32 times finer.
    """
    device, (low, high) = generator.device, case.sides
    index = torch.arange(case.K, device=device) * case.N // case.K
    sides, positions = torch.rand(2, case.K, 2, generator=generator, device=device)
    sides = low * (high / low) ** sides if case.logarithmic else low + (high - low) * sides
    corners = positions * (torch.tensor(IMAGE, device=device).flip(0) - case.margin - sides)
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
    """Return the map and the boxes. If the map is 16-bit, the boxes are float32, as the ops recommend."""
    (features,) = draw_maps(case, dtype, generator)
    return features, draw_boxes(case, generator).to(compute_dtype(dtype))


# ---- Compulsory work ----


def taps_along_axis(op: str, case: Case) -> float:
    """Return how many values an op reads per box along one axis of a channel, averaged over the sizes of the boxes.

    The counts follow from the definitions of the ops and are summed over the bins of the box. A bilinear sample reads
    two values, a maximum or a mean reads every pixel of the box, and the integral of the bilinear surface reads every
    pixel whose bilinear basis function overlaps a bin.
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
    """Return the compulsory work of a row.

    Bytes: The forward pass reads the input once and writes the outputs once. If the bins need only a part of the
    input, only this part is counted. The backward pass reads the gradient of the outputs and writes the gradient of
    the whole input. If it computes gradients with respect to the boxes, it also reads the input.

    Flops: Each value that a bin reads costs one multiply-add for the output and one for each gradient. In roi_pool, a
    value costs one comparison, and the backward pass needs one addition per output. In ps_roi_pool, a value costs one
    addition.
    """
    bins, size = case.output**2, dtype.itemsize
    channels = case.C // bins if op in POSITION_SENSITIVE else case.C  # the channels that a bin reads
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
    """Return torchvision's op as a peer and, for 16-bit dtypes, also one that computes in float32 as in autocast."""

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
    torchvision_targets: dict[str, float] | None = None,
    **options: Any,
) -> Bench:
    """Return a row of an op that reads one map.

    `torchvision_targets` maps devices to the ratios to torchvision that the project wants to reach. Gradients are
    computed for the map and, if `case.box_gradients` is true, for the boxes. No peer computes gradients with respect to
    boxes, so rows with these gradients have no peers.
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
        peer_targets=peer_targets(torchvision_targets, device),
        differentiated=(0, 1) if case.box_gradients else (0,),
        **options,
    )


def peer_targets(torchvision_targets: dict[str, float] | None, device: str) -> dict[str, float]:
    if not torchvision_targets or device not in torchvision_targets:
        return {}
    return {"torchvision": torchvision_targets[device]}
