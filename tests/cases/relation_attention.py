"""Test cases for relation_attention and rank_embedding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Bad, Inputs, Op, bad_numbers, bad_options, change, put, to_other_device


@dataclass(frozen=True)
class Relations:
    """The sizes and options of a sample. The letters have the same meaning as in relops.relation_attention.

    Coordinates are whole numbers, and the width and height of a box are odd numbers of pixels. The distances between
    box centers are therefore exact in float32. No distance is close to 1e-3 times the side of a box, where the gradient
    jumps. The gradient also jumps where the geometric weight b is 1e-6, but hardly any b is close to that value.
    """

    N: int = 2
    Q: int = 6
    K: int = 9
    M: int = 3
    D: int = 8
    Dv: int = 8
    bias: float | None = 1.0  # the mean of geometry_bias
    clamped: bool = False  # b is negative for all pairs of the last head
    same_boxes: bool = False  # queries and keys have the same boxes
    mask: str | None = None  # masked keys: None, "some", or "all" (all keys of image 0 and some of the other images)
    options: tuple[tuple[str, Any], ...] = ()

    def relation_attention(self, generator: torch.Generator) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def boxes(count: int) -> Tensor:
            center, half = torch.rand(2, self.N, count, 2, generator=generator, dtype=torch.float64)
            center, half = (800 * center).floor(), (5 + 145 * half).floor()
            return torch.cat([center - half, center + half], -1)

        weight, bias, mask = 0.1 * normal(self.M, 64), None, None
        if self.bias is None:
            weight[:, 47] += 4  # scales the slowest cosine of log(wq / wk), which exceeds 0.7, so b is positive
        else:
            bias = self.bias + 0.3 * normal(self.M)
            bias[self.M - self.clamped :] = -10
        if self.mask is not None:
            mask = torch.rand(self.N, self.K, generator=generator) < 0.4
            mask[: 1 if self.mask == "all" else 0] = True
        query_boxes = boxes(self.Q)
        return {
            "query": normal(self.N, self.Q, self.M, self.D),
            "key": normal(self.N, self.K, self.M, self.D),
            "value": normal(self.N, self.K, self.M, self.Dv),
            "query_boxes": query_boxes,
            "key_boxes": query_boxes.clone() if self.same_boxes else boxes(self.K),
            "geometry_weight": weight,
            "geometry_bias": bias,
            "key_mask": mask,
            "geometry": "paper",
            "wavelength": 1000.0,
            "scale": None,
        } | dict(self.options)


RELATIONS = {
    "typical": Relations(mask="some"),
    "one": Relations(N=1, Q=1, K=2, M=1, D=1, Dv=1),
    "official": Relations(Q=9, D=16, Dv=16, same_boxes=True, options=(("geometry", "official"),)),
    "no bias": Relations(Q=4, K=20, D=5, Dv=7, bias=None),
    "image masked": Relations(N=3, K=12, M=2, D=12, Dv=3, clamped=True, mask="all"),
    "one head": Relations(Q=17, K=33, M=1, D=64, Dv=64),
    "many": Relations(Q=40, K=135, M=2, D=32, Dv=32, bias=3.0, mask="some"),
    "numbers": Relations(N=1, D=33, Dv=65, clamped=True, options=(("wavelength", 10000.0), ("scale", -0.3))),
    "no features": Relations(D=0, mask="all", options=(("geometry", "official"), ("wavelength", 50.0))),
}
RELATIONS_EMPTY = {
    "N": Relations(N=0, mask="some"),
    "Q": Relations(Q=0),
    "K": Relations(K=0),
    "K masked": Relations(K=0, mask="all"),
    "M": Relations(M=0, mask="some"),
    "Dv": Relations(Dv=0),
    "everything masked": Relations(N=1, mask="all"),
}


def relations_growing(k: int) -> Relations:
    """Return sample `k` of the series. For k = 0 all sizes differ."""
    return Relations(N=3 + k, Q=11 + 3 * k, K=17 + 5 * k, M=5 + k, D=8 + k, Dv=23 + 2 * k, mask="some")


def raw_relations(inputs: Inputs) -> Inputs:
    return inputs | {"allow_tf32": False}


def bad_relations() -> Iterator[Bad]:
    """Yield changes that make the sample "typical" invalid.

    This sample has N = 2, Q = 6, K = 9, M = 3, D = 8, Dv = 8 and the dtype float32.
    """
    for name, letters in (("query", r"\[N,Q,M,D\]"), ("key", r"\[N,K,M,D\]"), ("value", r"\[N,K,M,Dv\]")):
        rule = "float64" if name == "query" else "torch.float32, the dtype of query"
        yield Bad(f"{name} not a tensor", put(name, [1.0]), TypeError, f"{name} must be a Tensor, got list")
        yield Bad(f"{name} int", change(name, Tensor.long), TypeError, f"{name} must be {rule}.*got torch.int64")
        yield Bad(f"{name} 3-D", change(name, lambda x: x[0]), ValueError, rf"{name} must be {letters}, got .*, 3, 8\]")
    for name in ("key", "value"):
        yield Bad(f"{name} wider", change(name, Tensor.double), TypeError, f"{name} must be .*got torch.float64")
        yield Bad(
            f"{name} on another device",
            change(name, to_other_device),
            ValueError,
            f"{name} must be on the device of query.*",
        )
        yield Bad(f"{name} batch", change(name, lambda x: x[:1]), ValueError, rf"{name} must be .*got shape \[1, 9, 3")
        yield Bad(
            f"{name} heads", change(name, lambda x: x[:, :, 1:]), ValueError, rf"{name} must be .*got .*9, 2, 8\]"
        )
    yield Bad(
        "key narrow", change("key", lambda x: x[..., 1:]), ValueError, r"key must be .*= \[2,9,3,8\], got .*3, 7\]"
    )
    yield Bad(
        "value short", change("value", lambda x: x[:, 1:]), ValueError, r"value must be .*\[2,9,3,8\], got .*8, 3, 8"
    )
    for name, letters in (
        ("query_boxes", r"\[N,Q,4\] = \[2,6,4\]"),
        ("key_boxes", r"\[N,K,4\] = \[2,9,4\]"),
        ("geometry_weight", r"\[M,64\] = \[3,64\]"),
        ("geometry_bias", r"\[M\] = \[3\]"),
    ):
        yield Bad(f"{name} not a tensor", put(name, 3), TypeError, f"{name} must be a Tensor, got int")
        yield Bad(f"{name} int", change(name, Tensor.long), TypeError, f"{name} must be .*float32.*got torch.int64")
        yield Bad(f"{name} wider", change(name, Tensor.double), TypeError, f"{name} must be .*got torch.float64")
        yield Bad(f"{name} narrower", change(name, Tensor.half), TypeError, f"{name} must be .*got torch.float16")
        yield Bad(
            f"{name} on another device",
            change(name, to_other_device),
            ValueError,
            f"{name} must be on the device of query",
        )
        yield Bad(f"{name} short", change(name, lambda x: x[1:]), ValueError, f"{name} must be {letters}, got shape")
        yield Bad(f"{name} narrow", change(name, lambda x: x[..., 1:]), ValueError, f"{name} must be {letters}, got")
        yield Bad(f"{name} another dimension", change(name, lambda x: x[None]), ValueError, f"{name} must be {letters}")
    yield Bad("weight None", put("geometry_weight", None), TypeError, "geometry_weight must be a Tensor, got NoneType")
    mask = "key_mask"
    yield Bad("mask not a tensor", put(mask, True), TypeError, "key_mask must be a Tensor, got bool")
    yield Bad("mask uint8", change(mask, Tensor.byte), TypeError, "key_mask must be bool .*got torch.uint8")
    yield Bad(
        "mask on another device",
        change(mask, to_other_device),
        ValueError,
        "key_mask must be on the device of query.*got",
    )
    yield Bad("mask short", change(mask, lambda x: x[:, 1:]), ValueError, r"key_mask must be \[N,K\] = \[2,9\], got")
    yield Bad("mask flat", change(mask, lambda x: x[0]), ValueError, r"key_mask must be \[N,K\] = \[2,9\], got .*\[9\]")
    yield from bad_options("geometry", ValueError, "query", None, 1, harmless=True)
    yield from bad_numbers("wavelength", "a finite positive number", 0.0, -1.0, math.nan, math.inf, True)
    yield from bad_numbers("scale", "a finite number or None", math.nan, math.inf, True)
    for name in ("wavelength", "scale"):
        yield Bad(f"{name} str", put(name, "1"), TypeError, f"{name} must be a finite .*number.*got '1'")


@dataclass(frozen=True)
class Ranks:
    """Random ranks up to 100. Most ranks are not whole numbers, even after they are rounded to a 16-bit dtype."""

    shape: tuple[int, ...] = (3, 7)
    dim: int = 16
    wavelength: float = 1000.0

    def rank_embedding(self, generator: torch.Generator) -> Inputs:
        ranks = 100 * torch.rand(self.shape, generator=generator, dtype=torch.float64)
        return {"ranks": ranks, "dim": self.dim, "wavelength": self.wavelength}


RANKS = {
    "typical": Ranks(),
    "one": Ranks((1,), dim=2),
    "odd": Ranks((2, 1, 5), dim=46, wavelength=10000.0),
    "wide": Ranks((5,), dim=1024),
    "many": Ranks((700,), dim=6, wavelength=0.5),
}
RANKS_EMPTY = {"all": Ranks((0,)), "some": Ranks((3, 0, 2))}
# Changes that make the sample "typical" invalid. This sample has 3 x 7 ranks of the dtype float32.
BAD_RANKS = (
    Bad("ranks not a tensor", put("ranks", [1, 2]), TypeError, "ranks must be a Tensor, got list"),
    Bad("ranks bool", change("ranks", Tensor.bool), TypeError, "ranks must be of an integer dtype.*got torch.bool"),
    Bad("ranks complex", change("ranks", Tensor.cfloat), TypeError, "ranks must be .*got torch.complex64"),
    *bad_options("dim", ValueError, 0, 1, 17, -2),
    *bad_options("dim", TypeError, 2.5, "16", None),
    Bad("dim True", put("dim", True), TypeError, "dim must be an int, got True"),
)


RELATION_ATTENTION = Op(
    name="relation_attention",
    samples={key: case.relation_attention for key, case in RELATIONS.items()},
    empty={key: case.relation_attention for key, case in RELATIONS_EMPTY.items()},
    growing=lambda k: relations_growing(k).relation_attention,
    features=("query", "key", "value"),
    coordinates=("query_boxes", "key_boxes", "geometry_weight", "geometry_bias"),
    differentiable=("query", "key", "value", "query_boxes", "key_boxes", "geometry_weight", "geometry_bias"),
    vmapped=("query", "key", "value", "query_boxes", "key_boxes", "key_mask"),
    bad=tuple(bad_relations()),
    raw=raw_relations,
    # The angles in the geometric embedding go down to 100 log(1e-3) = -691 radians, which float32 rounds by up to 3e-5.
    # Even the twin has relative errors of up to 3.1e-5 in float32.
    noise=2.0,
)
RANK_EMBEDDING = Op(
    name="rank_embedding",
    samples={key: case.rank_embedding for key, case in RANKS.items()},
    empty={key: case.rank_embedding for key, case in RANKS_EMPTY.items()},
    growing=lambda k: Ranks((5 + k, 7 + 2 * k), dim=12).rank_embedding,
    features=("ranks",),
    coordinates=(),
    differentiable=("ranks",),
    vmapped=("ranks",),
    bad=(*BAD_RANKS, *bad_numbers("wavelength", "a finite positive number", 0.0, -1.0, math.nan, math.inf, True)),
)
OPS = [RELATION_ATTENTION, RANK_EMBEDDING]
