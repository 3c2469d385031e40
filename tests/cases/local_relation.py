"""Test cases for local_relation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Bad, Inputs, Op, bad_options, change, put, to_other_device


@dataclass(frozen=True)
class Windows:
    """The sizes and options of a sample. The letters have the same meaning as in relops.local_relation."""

    N: int = 2
    C: int = 7
    G: int = 3
    H: int = 6
    W: int = 9
    k: int = 3
    stride: int = 1
    dilation: int = 1
    similarity: str = "squared_difference"
    border: str = "mask"
    prior: bool = True
    channels_last: bool = False

    def local_relation(self, generator: torch.Generator) -> Inputs:
        def draw(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            return x.contiguous(memory_format=torch.channels_last) if self.channels_last and len(shape) == 4 else x

        query = draw(self.N, self.G, -(-self.H // self.stride), -(-self.W // self.stride))
        key = draw(self.N, self.G, self.H, self.W)
        # No query equals a key in any dtype, because the gradient jumps where a query and a key are equal.
        if self.similarity == "absolute_difference":
            query, key = (2 * query).round() / 2, (2 * key).round() / 2 + 0.25
        return {
            "query": query,
            "key": key,
            "value": draw(self.N, self.C, self.H, self.W),
            "prior": draw(self.G, self.k, self.k) if self.prior else None,
            "kernel_size": self.k,
            "stride": self.stride,
            "dilation": self.dilation,
            "similarity": self.similarity,
            "border": self.border,
        }


WINDOWS = {
    "typical": Windows(),
    "one": Windows(N=1, C=1, G=1, H=1, W=1, k=1, prior=False),
    "even": Windows(k=4, G=2, C=6, similarity="absolute_difference", border="zero"),
    "product": Windows(k=5, G=1, C=12, W=21, similarity="product", channels_last=True),
    "strided": Windows(k=3, H=7, W=19, C=16, G=2, stride=2, dilation=2, border="zero", channels_last=True),
    "far": Windows(H=11, W=13, k=4, stride=3, dilation=2, similarity="product", prior=False),
    "gaps": Windows(H=9, W=10, k=2, G=4, stride=4, similarity="absolute_difference", channels_last=True),
    "wide window": Windows(N=1, C=3, G=2, H=8, W=5, k=15, border="zero"),
    "beyond the map": Windows(N=1, H=4, W=5, k=5, dilation=3, similarity="product", border="zero"),
    "ragged": Windows(N=1, C=6, G=5, W=40),  # three groups have two channels, the other two have none
    "wide groups": Windows(N=1, C=20, G=1, H=12, W=17, similarity="product"),
}
WINDOWS_EMPTY = {
    "N": Windows(N=0),
    "C": Windows(C=0),
    "G": Windows(C=0, G=0),
    "H": Windows(H=0, stride=2),
    "W": Windows(W=0, channels_last=True),
}


def windows_growing(k: int) -> Windows:
    """Return sample `k` of the series. For k = 0 all sizes differ."""
    return Windows(N=2 + k, C=23 + 3 * k, G=5 + k, H=7 + 2 * k, W=11 + 3 * k, k=3, stride=2)


def bad_windows() -> Iterator[Bad]:
    """Yield changes that make the sample "typical" invalid.

    This sample has N = 2, C = 7, G = 3, H = 6, W = 9, k = 3 and the dtype float32.
    """
    for name, letters in (("query", r"\[N,G,Ho,Wo\]"), ("key", r"\[N,G,H,W\]"), ("value", r"\[N,C,H,W\]")):
        rule = "float64" if name == "value" else "torch.float32, the dtype of value"
        yield Bad(f"{name} not a tensor", put(name, [1.0]), TypeError, f"{name} must be a Tensor, got list")
        yield Bad(f"{name} int", change(name, Tensor.long), TypeError, f"{name} must be {rule}.*got torch.int64")
        yield Bad(f"{name} 3-D", change(name, lambda x: x[0]), ValueError, rf"{name} must be {letters}, got .*, 6, 9\]")
    for name in ("query", "key"):
        yield Bad(f"{name} wider", change(name, Tensor.double), TypeError, f"{name} must be .*got torch.float64")
        yield Bad(
            f"{name} on another device",
            change(name, to_other_device),
            ValueError,
            f"{name} must be on the device of value.*",
        )
        yield Bad(f"{name} batch", change(name, lambda x: x[:1]), ValueError, rf"{name} must be .*got shape \[1, 3")
        yield Bad(f"{name} short", change(name, lambda x: x[:, :, 1:]), ValueError, rf"{name} must be .*got .*3, 5, 9")
        yield Bad(f"{name} narrow", change(name, lambda x: x[..., 1:]), ValueError, rf"{name} must be .*got .*3, 6, 8")
    yield Bad(
        "query groups", change("query", lambda x: x[:, 1:]), ValueError, r"query must be .*= \[2,3,6,9\], got .*2, 2, 6"
    )
    yield Bad(
        "no groups",
        lambda x: x | {"query": x["query"][:, :0], "key": x["key"][:, :0], "prior": x["prior"][:0]},
        ValueError,
        "key must have at least one group for the C = 7 channels of value, got G = 0",
    )
    prior = r"prior must be \[G,k,k\] = \[3,3,3\]"
    yield Bad("prior not a tensor", put("prior", 3), TypeError, "prior must be a Tensor, got int")
    yield Bad("prior int", change("prior", Tensor.long), TypeError, "prior must be .*float32.*got torch.int64")
    yield Bad("prior wider", change("prior", Tensor.double), TypeError, "prior must be .*got torch.float64")
    yield Bad("prior narrower", change("prior", Tensor.half), TypeError, "prior must be .*got torch.float16")
    yield Bad(
        "prior on another device", change("prior", to_other_device), ValueError, "prior must be on the device of value"
    )
    yield Bad("prior groups", change("prior", lambda x: x[1:]), ValueError, rf"{prior}, got shape \[2, 3, 3\]")
    yield Bad("prior flat", change("prior", lambda x: x.flatten(1)), ValueError, rf"{prior}, got shape \[3, 9\]")
    yield Bad("prior of another window", put("kernel_size", 5), ValueError, r"prior must be .*\[3,5,5\], got")
    yield from bad_options("kernel_size", ValueError, 0, -3, 64)
    yield from bad_options("stride", ValueError, 0, -1, 2**25)
    yield from bad_options("dilation", ValueError, 0, -1, 2**25)
    for name in ("kernel_size", "stride", "dilation"):
        yield from bad_options(name, TypeError, 2.5, "3", None, (3, 3))
        yield Bad(
            f"{name} True", put(name, True), TypeError, f"{name} must be an int from 1 to .*got True", harmless=True
        )
    yield from bad_options("similarity", ValueError, "cosine", "", None, 1)
    yield from bad_options("border", ValueError, "reflect", None, True, harmless=True)


LOCAL_RELATION = Op(
    name="local_relation",
    samples={key: case.local_relation for key, case in WINDOWS.items()},
    empty={key: case.local_relation for key, case in WINDOWS_EMPTY.items()},
    growing=lambda k: windows_growing(k).local_relation,
    features=("query", "key", "value"),
    coordinates=("prior",),
    differentiable=("query", "key", "value", "prior"),
    vmapped=("query", "key", "value"),
    bad=tuple(bad_windows()),
)
OPS = [LOCAL_RELATION]
