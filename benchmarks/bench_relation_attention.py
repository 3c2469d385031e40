"""Benchmarks of relation_attention: detector heads, learned duplicate removal, batches, box gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import relops
from benchmarks.bench_box_iou import draw as draw_boxes
from benchmarks.harness import FORWARD, FORWARD_BACKWARD, Bench, Model
from relops import reference
from relops._dtypes import compute_dtype

EMBEDDING = 64
QUERY, KEY, VALUE, QUERY_BOXES, KEY_BOXES, WEIGHT, BIAS = range(7)  # positions of the differentiable inputs


@dataclass(frozen=True)
class Case:
    """The sizes of one row: `N` sets of `K` objects that attend to each other.

    `kept` is the fraction of keys that key_mask does not exclude.
    """

    name: str
    K: int
    N: int = 1
    M: int = 16
    D: int = 64
    Dv: int = 64
    geometry: str = "paper"
    kept: float | None = None
    box_gradients: bool = False

    @property
    def label(self) -> str:
        return f"{self.name} N{self.N} K{self.K} M{self.M} D{self.D} Dv{self.Dv}"

    def model(self, dtype: torch.dtype, direction: str) -> Model:
        objects = self.N * self.K
        features = objects * self.M * (2 * self.D + 2 * self.Dv) * dtype.itemsize
        boxes = 2 * objects * 4 * compute_dtype(dtype).itemsize
        pairs = objects * self.K * self.M
        # Per pair and head, the forward pass computes the geometric weight b, the logit and the output. The backward
        # pass computes the gradients of the geometry weight, of the attention weight and value, and of query and key.
        forward = Model(features + boxes, 2 * pairs * (EMBEDDING + self.D + self.Dv))
        if direction == FORWARD:
            return forward
        flops = forward.flops + 2 * pairs * (EMBEDDING + 2 * self.D + 2 * self.Dv)
        return Model(2 * forward.bytes, flops)


def draw(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    """Return random arguments of relation_attention.

    Boxes have sides of 16 to 256 pixels in an image of 1024 pixels. Their coordinates are multiples of 1/16 pixel, so
    differences between their centers are exact in float32. With other coordinates, the gradients of the twin with
    respect to the boxes have an error of 5%.

    The geometric weights b are between 0.3 and 1.7, far from 1e-6. The op clamps b to at least 1e-6, and the gradient
    is discontinuous at this bound, where a comparison with float64 would measure the direction of rounding.
    """
    device, wide_dtype = generator.device, compute_dtype(dtype)
    features = [
        torch.randn(case.N, case.K, case.M, width, generator=generator, device=device).to(dtype)
        for width in (case.D, case.D, case.Dv)
    ]
    (boxes,) = draw_boxes(wide_dtype, ((case.N, case.K),), generator)
    boxes = boxes.mul(16).round().div(16)
    weight = 0.04 * (torch.rand(case.M, EMBEDDING, generator=generator, device=device) - 0.5).to(wide_dtype)
    mask = None
    if case.kept is not None:
        mask = torch.rand(case.N, case.K, generator=generator, device=device) > case.kept
    return *features, boxes, boxes.clone(), weight, torch.ones(case.M, device=device, dtype=wide_dtype), mask


def bind_geometry(op: Callable[..., Tensor], geometry: str) -> Callable[..., Tensor]:
    def call(*inputs: Tensor) -> Tensor:
        return op(*inputs[:-1], key_mask=inputs[-1], geometry=geometry)

    return call


@torch.compile(dynamic=False)
def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_boxes: Tensor,
    key_boxes: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: None,
) -> Tensor:
    """Compute relation_attention with flex_attention. Distances are divided by the size of the key's box."""

    def sizes(boxes: Tensor) -> tuple[Tensor, ...]:
        x1, y1, x2, y2 = boxes.unbind(-1)
        return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1 + 1, y2 - y1 + 1

    (qx, qy, qw, qh), (kx, ky, kw, kh) = sizes(query_boxes), sizes(key_boxes)
    log_qw, log_qh, log_kw, log_kh = qw.log(), qh.log(), kw.log(), kh.log()

    def score_mod(score: Tensor, n: Tensor, m: Tensor, q: Tensor, k: Tensor) -> Tensor:
        logs = (
            ((qx[n, q] - kx[n, k]).abs() / kw[n, k]).clamp(min=1e-3).log(),
            ((qy[n, q] - ky[n, k]).abs() / kh[n, k]).clamp(min=1e-3).log(),
            log_qw[n, q] - log_kw[n, k],
            log_qh[n, q] - log_kh[n, k],
        )
        b = bias[m]
        for c, log in enumerate(logs):
            for j in range(8):
                angle = log * (100 / 1000 ** (j / 8))
                b = b + weight[m, 16 * c + j] * angle.sin() + weight[m, 16 * c + 8 + j] * angle.cos()
        return score + b.clamp(min=1e-6).log()

    return flex_attention(*(x.transpose(1, 2) for x in (query, key, value)), score_mod=score_mod).transpose(1, 2)


def make(
    case: Case, device: str, dtype: torch.dtype, direction: str, target: dict[str, float] | None = None, **options
) -> Bench:
    differentiated = [QUERY, KEY, VALUE, WEIGHT, BIAS] + [QUERY_BOXES, KEY_BOXES] * case.box_gradients
    # flex_attention computes no gradients for tensors that a score_mod captures, and no gradients at all on the CPU.
    expressible = direction == FORWARD and case.geometry == "paper" and case.kept is None
    return Bench(
        op="relation_attention",
        shape=case.label,
        dtype=dtype,
        device=device,
        direction=direction,
        make_inputs=functools.partial(draw, case, dtype),
        relops=bind_geometry(relops.relation_attention, case.geometry),
        pytorch=bind_geometry(reference.relation_attention, case.geometry),
        model=case.model(dtype, direction),
        peers={"flex_attention": flex} if expressible and device == "cuda" else {},
        target=(target or {}).get(device),
        differentiated=tuple(differentiated),
        **options,
    )


def benches(device: str) -> list[Bench]:
    f32, both = torch.float32, (FORWARD, FORWARD_BACKWARD)
    small, large = Case("self", 300), Case("self", 1000)
    huge = Case("self", {"cpu": 2000, "cuda": 4000}[device])  # at 4000 boxes the twin takes 12 GB, or 24 GB in float64
    duplicates = Case("duplicate removal", 100, N=80, Dv=8)
    batch = Case("padded batch", 300, N=4, kept=0.7)
    rows = [
        make(small, device, f32, FORWARD, {"cpu": 5, "cuda": 5}, quick=True),
        make(small, device, f32, FORWARD_BACKWARD),
        make(large, device, f32, FORWARD, {"cpu": 10, "cuda": 10}, quick=True),
        make(large, device, f32, FORWARD_BACKWARD, {"cpu": 8}, quick=True),
        make(huge, device, f32, FORWARD, {"cuda": 15}, min_rounds=2),
        make(huge, device, f32, FORWARD_BACKWARD, min_rounds=2),
        make(replace(small, name="box gradients", box_gradients=True), device, f32, FORWARD_BACKWARD),
        make(replace(small, name="official", geometry="official"), device, f32, FORWARD),
    ]
    rows += [make(case, device, f32, direction) for case in (duplicates, batch) for direction in both]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        rows += [make(large, device, dtype, direction) for direction in both]
    return rows
