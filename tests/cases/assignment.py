"""Test cases for linear_sum_assignment: cost matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Bad, Inputs, Selection, bad_options, change, put, to_other_device


@dataclass(frozen=True)
class Assignment:
    """The sizes and options of a sample. The letters have the same meaning as in relops.linear_sum_assignment."""

    R: int = 7
    C: int = 5
    B: int | None = None
    padded: bool = False
    forbidden: float | None = None  # cost of the forbidden pairs: a random half, one full row, one full column
    maximize: bool = False

    def problem(self, r: int, c: int, generator: torch.Generator) -> Tensor:
        """Return integer costs that every dtype represents exactly and that have only one optimal assignment.

        The cost of a pair is its excess minus the bonus of its row and the bonus of its column. The excess is zero only
        for the pairs of the optimal assignment, and only the rows and columns of these pairs have a bonus.
        """
        rows, cols = (torch.randperm(size, generator=generator)[: min(r, c)] for size in (r, c))
        bonus = torch.zeros(r, 1, dtype=torch.float64), torch.zeros(c, dtype=torch.float64)
        for x, paired in zip(bonus, (rows, cols)):
            x[paired] = torch.randint(60, x[paired].shape, generator=generator).double()
        excess = torch.randint(1, 60, (r, c), generator=generator).double()
        if self.forbidden is not None:
            excess[torch.rand(r, c, generator=generator) < 0.5] = self.forbidden
        excess[rows, cols] = 0.0
        if self.forbidden is not None:
            excess[rows[:1]] = excess[:, cols[:1]] = self.forbidden
        return excess - bonus[0] - bonus[1]

    def linear_sum_assignment(self, generator: torch.Generator) -> Inputs:
        limits, B = (self.R, self.C), 1 if self.B is None else self.B
        sizes = [torch.randint(x + 1, (B,), generator=generator) if self.padded else None for x in limits]
        # The padding is lower than every valid cost, so a kernel that reads the padding gives a different result.
        cost = torch.full((B, *limits), -200.0, dtype=torch.float64)
        for b in range(B):
            r, c = (limit if x is None else int(x[b]) for x, limit in zip(sizes, limits))
            cost[b, :r, :c] = self.problem(r, c, generator)
        cost = -cost if self.maximize else cost
        return {
            "cost": cost[0] if self.B is None else cost,
            "num_rows": sizes[0],
            "num_cols": sizes[1],
            "maximize": self.maximize,
        }


ASSIGNMENT = {
    "typical": Assignment(),
    "one": Assignment(R=1, C=1),
    "wide": Assignment(R=13, C=40, forbidden=math.nan),
    "tall": Assignment(R=40, C=13, forbidden=-math.inf, maximize=True),
    "square": Assignment(R=33, C=33),
    "padded": Assignment(R=12, C=10, padded=True),
    "batch": Assignment(R=9, C=12, B=4, padded=True, forbidden=math.inf),
    "batch of one": Assignment(R=6, C=8, B=1),
    "batch maximize": Assignment(R=70, C=40, B=3, padded=True, maximize=True),
}
ASSIGNMENT_EMPTY = {
    f"{name}{'' if B is None else ' of a batch'}": Assignment(R=R, C=C, B=B, padded=padded)
    for name, R, C, padded in (("R", 0, 4, True), ("C", 3, 0, False), ("R and C", 0, 0, True))
    for B in (None, 2)
} | {"B": Assignment(B=0), "B padded": Assignment(B=0, padded=True)}


def bad_sizes(what: str, name: str, sizes: Any, error: type[Exception], message: str, B: int | None = None) -> Bad:
    def changed(inputs: Inputs) -> Inputs:
        cost = inputs["cost"] if B is None else inputs["cost"].expand(B, -1, -1)
        return inputs | {"cost": cost, name: sizes.to(cost.device) if isinstance(sizes, Tensor) else sizes}

    return Bad(f"{name} {what}", changed, error, f"{name} must be {message}")


# Changes that make the sample "typical" invalid. This sample has R = 7 and C = 5, is float32 and has no batch
# dimension.
BAD_ASSIGNMENT = (
    Bad("cost not a tensor", put("cost", [[1.0]]), TypeError, "cost must be a Tensor, got list"),
    Bad("cost complex", change("cost", Tensor.cfloat), TypeError, "cost must be float64.*or integer.*torch.complex64"),
    Bad("cost 1-D", change("cost", lambda x: x[0]), ValueError, r"cost must be \[B,R,C\] or \[R,C\], got shape \[5\]"),
    Bad("cost 4-D", change("cost", lambda x: x[None, None]), ValueError, r"cost must be .*got shape \[1, 1, 7, 5\]"),
    Bad(
        "num_rows on another device",
        lambda x: x | {"num_rows": to_other_device(x["cost"][0, :1].long())},
        ValueError,
        "num_rows must be on the device of cost.*got",
    ),
    bad_sizes("float", "num_rows", torch.ones(1), TypeError, "int64 or int32, got torch.float32"),
    bad_sizes("too many", "num_rows", torch.ones(2).long(), ValueError, r"\[\] or \[1\], got shape \[2\]"),
    bad_sizes("none", "num_cols", torch.ones(0).long(), ValueError, r"\[\] or \[1\], got shape \[0\]"),
    bad_sizes("bool", "num_cols", True, TypeError, "a Tensor .* an int or None, got True"),
    bad_sizes("of a batch", "num_rows", torch.ones(3).long(), ValueError, r"\[B\] = \[2\], got shape \[3\]", B=2),
    bad_sizes("0-D", "num_rows", torch.ones(()).long(), ValueError, r"\[B\] = \[2\], got shape \[\]", B=2),
    bad_sizes("2-D", "num_cols", torch.ones(2, 1).long(), ValueError, r"\[B\] = .*got shape \[2, 1\]", B=2),
    bad_sizes("int", "num_rows", 3, TypeError, "a Tensor .* a list of ints or None, got 3", B=2),
    bad_sizes("floats", "num_rows", [1.0, 2.0], TypeError, r"a Tensor .*got \[1.0, 2.0\]", B=2),
    bad_sizes("too few ints", "num_cols", [1], ValueError, r"\[B\] = \[2\], got 1 ints", B=2),
    bad_sizes("too large", "num_rows", [7, 8], ValueError, r"in \[0,R\] = \[0,7\], got 8 for problem 1", B=2),
    bad_sizes("negative", "num_cols", [-1, 0], ValueError, r"in \[0,C\] = \[0,5\], got -1 for problem 0", B=2),
    *bad_options("maximize", TypeError, 1, harmless=True),
)


SELECTIONS = [
    Selection(
        name="linear_sum_assignment",
        samples={key: case.linear_sum_assignment for key, case in ASSIGNMENT.items()},
        empty={key: case.linear_sum_assignment for key, case in ASSIGNMENT_EMPTY.items()},
        growing=lambda k: Assignment(R=9 + 4 * k, C=6 + 3 * k, B=3 + k, padded=True).linear_sum_assignment,
        floats=("cost",),
        widened=False,
        vmapped=("cost", "num_rows", "num_cols"),
        bad=BAD_ASSIGNMENT,
    )
]
