"""Benchmarks of local_relation: layers of an LR-Net at 224 x 224, windows of 3 x 3 to 15 x 15, both memory formats."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import relops
from benchmarks.harness import FORWARD, FORWARD_BACKWARD, Bench, Model
from relops import reference


@dataclass(frozen=True)
class Case:
    """The sizes of one row: `N` square maps with sides of `size` pixels."""

    N: int
    C: int
    G: int
    size: int
    k: int = 7
    stride: int = 1
    similarity: str = "squared_difference"
    channels_last: bool = False

    @property
    def label(self) -> str:
        stride = f" s{self.stride}" if self.stride > 1 else ""
        similarity = "" if self.similarity == "squared_difference" else f" {self.similarity}"
        layout = " channels_last" if self.channels_last else ""
        return f"{self.N}x{self.C}x{self.size}x{self.size} G{self.G} k{self.k}{stride}{similarity}{layout}"

    @property
    def output_size(self) -> int:
        return -(-self.size // self.stride)

    def model(self, dtype: torch.dtype, direction: str) -> Model:
        inputs, outputs = self.N * self.size**2, self.N * self.output_size**2
        size = (inputs * (self.C + self.G) + outputs * (self.C + self.G)) * dtype.itemsize
        # Per tap, a channel needs one multiply-add, and a group needs 6 operations: 3 for the logit, and one each for
        # the maximum, the exponential and the sum.
        taps = outputs * self.k**2
        forward = Model(size, taps * (2 * self.C + 6 * self.G))
        if direction == FORWARD:
            return forward
        # Per tap, a channel needs two multiply-adds, for the gradients of the weight and of the value. A group needs 7
        # operations for the gradients of the logit (2), query (2), key (2) and prior (1).
        return Model(2 * size + inputs * self.C * dtype.itemsize, forward.flops + taps * (4 * self.C + 7 * self.G))


def draw(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    def randn(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, device=generator.device).to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if case.channels_last and len(shape) == 4 else x

    query = randn(case.N, case.G, case.output_size, case.output_size)
    key, value = (randn(case.N, channels, case.size, case.size) for channels in (case.G, case.C))
    prior = torch.randn(case.G, case.k, case.k, generator=generator, device=generator.device)
    return query, key, value, prior.to(torch.promote_types(dtype, torch.float32))


def bind_options(op: Callable[..., Tensor], case: Case) -> Callable[..., Tensor]:
    return functools.partial(op, kernel_size=case.k, stride=case.stride, similarity=case.similarity)


def shifted(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prior: Tensor,
    *,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    similarity: str = "squared_difference",
    border: str = "mask",
) -> Tensor:
    """Compute local_relation in PyTorch as a sum of shifted maps, one per tap, without unfolding the values.

    Only squared differences with masked borders are implemented.

    Raises:
        ValueError: If `similarity` or `border` has another value.
    """
    if (similarity, border) != ("squared_difference", "mask"):
        raise ValueError(
            "shifted: similarity must be 'squared_difference' and border must be 'mask', got"
            f" {similarity!r} and {border!r}"
        )
    N, G, Ho, Wo = query.shape
    C, H, W = value.shape[1:]
    k, dtype_of_value = kernel_size, value.dtype
    dtype = torch.promote_types(dtype_of_value, torch.float32)
    before, reach = dilation * (k // 2), dilation * (k - 1) + 1
    spans = [stride * (size - 1) + 1 for size in (Ho, Wo)]  # rows and columns that the reads of one tap span
    below, right = (span - 1 + reach - before - size for span, size in zip(spans, (H, W)))
    around = (before, right, before, below)
    inside = F.pad(torch.ones(H, W, dtype=torch.bool, device=value.device), around)
    missing = -C % G  # channels of padding in the last groups
    query, key, value = query.to(dtype), F.pad(key.to(dtype), around), F.pad(value.to(dtype), (*around, 0, missing))
    prior = prior.to(dtype)

    def pixels_of_tap(i: int, j: int) -> tuple:
        y, x = i * dilation, j * dilation
        return ..., slice(y, y + spans[0], stride), slice(x, x + spans[1], stride)

    taps = [(i, j, pixels_of_tap(i, j)) for i in range(k) for j in range(k)]
    logits = torch.stack(
        [
            (prior[:, i, j, None, None] - (query - key[pixels]).square()).masked_fill(~inside[pixels], -math.inf)
            for i, j, pixels in taps
        ]
    )
    weights = logits.softmax(0)
    value = value.unflatten(1, (G, -1))
    output = torch.zeros(N, G, value.shape[2], Ho, Wo, dtype=dtype, device=value.device)
    for weight, (_, _, pixels) in zip(weights, taps):
        output = torch.addcmul(output, weight.unsqueeze(2), value[pixels])
    return output.flatten(1, 2)[:, :C].to(dtype_of_value)


@functools.cache
def window_mask(size: int, k: int, device: str):
    def inside(n: Tensor, g: Tensor, q: Tensor, p: Tensor) -> Tensor:
        y, x = p // size - q // size + k // 2, p % size - q % size + k // 2
        return (y >= 0) & (y < k) & (x >= 0) & (x < k)

    return create_block_mask(inside, None, None, size * size, size * size, device=device)


@torch.compile(dynamic=False)
def flex(query: Tensor, key: Tensor, value: Tensor, prior: Tensor, *, kernel_size: int, **_: object) -> Tensor:
    """Compute local_relation with flex_attention.

    The product of the vectors [2q, 1] and [k, -k^2] replaces the negated squared difference of q and k, and leads to
    the same weights. A score_mod adds the prior, and a block mask defines the window. The heads are padded with zeros
    to a width of 16, the minimum of flex_attention.
    """
    N, G, H, W = query.shape
    m = value.shape[1] // G

    def score_mod(score: Tensor, n: Tensor, g: Tensor, q: Tensor, p: Tensor) -> Tensor:
        y, x = p // W - q // W + kernel_size // 2, p % W - q % W + kernel_size // 2
        return score + prior[g, y.clamp(0, kernel_size - 1), x.clamp(0, kernel_size - 1)]

    q, p, v = query.flatten(2), key.flatten(2), value.view(N, G, m, H * W).transpose(2, 3)
    queries = F.pad(torch.stack([2 * q, torch.ones_like(q)], -1), (0, 14))
    keys = F.pad(torch.stack([p, -p.square()], -1), (0, 14))
    mask = window_mask(H, kernel_size, str(value.device))
    output = flex_attention(queries, keys, F.pad(v, (0, 16 - m)), score_mod, mask, scale=1.0)
    return output[..., :m].transpose(2, 3).reshape(N, G * m, H, W)


def make(
    case: Case, device: str, dtype: torch.dtype, direction: str, target: dict[str, float] | None = None, **options
) -> Bench:
    squared = case.similarity == "squared_difference"
    peers = {"shifted maps": bind_options(shifted, case)} if squared else {}
    # flex_attention computes no gradient for the prior, which the score_mod captures, so it has forward rows only.
    regular = case.stride == 1 and case.C % case.G == 0
    if squared and regular and device == "cuda" and direction == FORWARD and not case.channels_last:
        peers["flex_attention"] = bind_options(flex, case)
    return Bench(
        op="local_relation",
        shape=case.label,
        dtype=dtype,
        device=device,
        direction=direction,
        make_inputs=functools.partial(draw, case, dtype),
        relops=bind_options(relops.local_relation, case),
        pytorch=bind_options(reference.local_relation, case),
        model=case.model(dtype, direction),
        peers=peers,
        target=(target or {}).get(device),
        **options,
    )


def benches(device: str) -> list[Bench]:
    f32, both = torch.float32, (FORWARD, FORWARD_BACKWARD)
    targets = {FORWARD: {"cpu": 20, "cuda": 20}, FORWARD_BACKWARD: {"cpu": 12, "cuda": 20}}
    N = {"cpu": 2, "cuda": 32}[device]
    main = Case(N, 256, 32, 56)
    rows = [make(main, device, f32, direction, targets[direction], quick=True) for direction in both]
    cases = [
        Case(N, 256, 32, 56, channels_last=True),
        Case(N, 256, 32, 56, k=3),
        Case(min(N, 4), 256, 32, 56, k=15),  # in float64, the twin takes 6 GB per image
        Case(N, 256, 32, 56, similarity="product"),
        Case(N, 256, 32, 56, similarity="absolute_difference"),
        # The following cases are layers of LR-Net-50.
        Case(N, 64, 64, 224, stride=2),
        Case(N, 100, 13, 56),
        Case(N, 200, 25, 28),
        Case(N, 400, 50, 28, stride=2),
        Case(N, 400, 50, 14),
        Case(N, 800, 100, 7),
    ]
    rows += [make(case, device, f32, direction) for case in cases for direction in both]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        rows += [make(main, device, dtype, direction) for direction in both]
    return rows
