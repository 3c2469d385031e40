"""Test cases for box_iou and generalized_box_iou."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Bad, Inputs, Op, change, put, to_other_device


@dataclass(frozen=True)
class BoxPairs:
    """The sizes and options of a sample. The letters have the same meaning as in relops.box_iou.

    No coordinate of `a` equals a coordinate of `b` in any dtype, because the gradient jumps where two coordinates are
    equal.
    """

    A: int = 7
    B: int = 5
    N: int | None = None
    inverted: bool = False  # some boxes are inverted in x, in y or in both
    spread: float = 8.0  # upper bound of the first corner, in units of 1/2; boxes are up to 10 units wide

    def arguments(self, generator: torch.Generator) -> Inputs:
        """Return boxes that 16-bit dtypes represent exactly.

        Coordinates are multiples of 1/2, plus 1/8 for `a` or 3/8 for `b`.
        """
        batch = () if self.N is None else (self.N,)
        a, b = (self.boxes(generator, (*batch, K, 1), offset) for K, offset in ((self.A, 0.125), (self.B, 0.375)))
        return {"a": a, "b": b}

    def boxes(self, generator: torch.Generator, shape: tuple[int, ...], offset: float) -> Tensor:
        def whole(high: float) -> Tensor:
            return torch.rand(*shape[:-1], 2, generator=generator, dtype=torch.float64).mul(high).floor()

        corner, size = whole(self.spread), whole(10) + 1
        if self.inverted:
            size = size * (whole(4) > 0).double().mul(2).sub(1)
        return torch.cat([corner, corner + size], -1) / 2 + offset


BOX_PAIRS = {
    "typical": BoxPairs(),
    "one pair": BoxPairs(A=1, B=1, spread=2.0),
    "batch": BoxPairs(N=3, A=9, B=18),
    "many columns": BoxPairs(A=4, B=139),
    "many rows": BoxPairs(A=139, B=3),
    "one column": BoxPairs(N=2, A=21, B=1),
    "inverted": BoxPairs(A=12, B=20, inverted=True),
    "apart": BoxPairs(A=6, B=8, spread=50.0),
}
BOX_PAIRS_EMPTY = {
    "A": BoxPairs(A=0),
    "B": BoxPairs(B=0),
    "A and B": BoxPairs(A=0, B=0),
    "N": BoxPairs(N=0),
    "B of a batch": BoxPairs(N=2, B=0),
}
# Changes that make the sample "typical" invalid. This sample has A = 7, B = 5 and the dtype float32.
BAD_BOX_PAIRS = (
    Bad("a not a tensor", put("a", [[0.0, 0.0, 1.0, 1.0]]), TypeError, "a must be a Tensor, got list"),
    Bad("b not a tensor", put("b", None), TypeError, "b must be a Tensor, got NoneType"),
    Bad("a complex", change("a", Tensor.cfloat), TypeError, "a must be float64.*got torch.complex64"),
    Bad("b bool", change("b", Tensor.bool), TypeError, "b must be float64.*or integer, got torch.bool"),
    Bad(
        "a of 5",
        change("a", lambda x: x[:, [0, 0, 1, 2, 3]]),
        ValueError,
        r"a must be \[A,4\] or \[N,A,4\], got shape \[7, 5\]",
    ),
    Bad("a 1-D", change("a", lambda x: x[0]), ValueError, r"a must be \[A,4\] or \[N,A,4\], got shape \[4\]"),
    Bad("b 4-D", change("b", lambda x: x[None, None]), ValueError, r"b must be \[B,4\] or \[N,B,4\], got .*1, 5, 4\]"),
    Bad("b of 3", change("b", lambda x: x[:, 1:]), ValueError, r"b must be \[B,4\] or \[N,B,4\], got shape \[5, 3\]"),
    Bad("b wider", change("b", Tensor.double), TypeError, "b must be .*float32 when a is torch.float32, .*float64"),
    Bad("a wider", change("a", Tensor.double), TypeError, "b must be float64 when a is torch.float64, got .*float32"),
    Bad("b on another device", change("b", to_other_device), ValueError, "b must be on the device of a.*got"),
    Bad(
        "a alone batched",
        change("a", lambda x: x[None]),
        ValueError,
        r"b must be \[N,B,4\] with N = 1 as in a, got shape \[5, 4\]",
    ),
    Bad(
        "b alone batched",
        change("b", lambda x: x[None]),
        ValueError,
        r"b must be \[B,4\] when a is \[A,4\], got shape \[1, 5, 4\]",
    ),
    Bad(
        "batches differ",
        lambda x: {"a": x["a"].expand(2, -1, -1), "b": x["b"].expand(3, -1, -1)},
        ValueError,
        r"b must be \[N,B,4\] with N = 2 as in a, got shape \[3, 5, 4\]",
    ),
)


def box_pairs_growing(k: int) -> BoxPairs:
    """Return sample `k` of the series.

    For k = 0 all sizes differ, and none is 4, the number of coordinates of a box.
    """
    return BoxPairs(N=3 + k, A=7 + 2 * k, B=10 + 3 * k)


def box_pair_op(name: str) -> Op:
    return Op(
        name=name,
        samples={key: case.arguments for key, case in BOX_PAIRS.items()},
        empty={key: case.arguments for key, case in BOX_PAIRS_EMPTY.items()},
        growing=lambda k: box_pairs_growing(k).arguments,
        features=("a", "b"),
        coordinates=(),
        differentiable=("a", "b"),
        vmapped=("a", "b"),
        bad=BAD_BOX_PAIRS,
        wide_output=True,
    )


OPS = IOU, GENERALIZED = [box_pair_op("box_iou"), box_pair_op("generalized_box_iou")]
