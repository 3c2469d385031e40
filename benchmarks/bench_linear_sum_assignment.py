"""Benchmarks of linear_sum_assignment: the matching in the loss of DETR, and large problems of several kinds.

Some of the DETR problems are padded or have many queries. Every contender returns the total cost of its matching, and
verification compares these costs, because several matchings can be optimal. As in DETR, SciPy solves one problem at a
time on the CPU. On CUDA, the time of SciPy includes the copies from and to the device.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import relops
from benchmarks.harness import FORWARD, Bench, Model
from relops import reference

CLASSES = 91


def draw_boxes(B: int, count: int, generator: torch.Generator) -> Tensor:
    """Return boxes [B,count,4] as (cx, cy, w, h) with centers in the unit square."""
    boxes = torch.rand(B, count, 4, generator=generator, device=generator.device)
    return torch.cat([boxes[..., :2], 0.02 + 0.4 * boxes[..., 2:]], -1)


def draw_detr(B: int, R: int, C: int, padded: bool, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    """Return the costs of R queries and C objects, and the number of objects of each problem (None if it is always C).

    A cost is the sum of a class, an L1 and a generalized IoU term, weighted as in DETR.
    """
    device = generator.device
    probabilities = torch.randn(B, R, CLASSES, generator=generator, device=device).softmax(-1)
    labels = torch.randint(CLASSES, (B, 1, C), generator=generator, device=device)
    queries, objects = draw_boxes(B, R, generator), draw_boxes(B, C, generator)
    classes = probabilities.gather(2, labels.expand(B, R, C))
    corners = (torch.cat([x[..., :2] - x[..., 2:] / 2, x[..., :2] + x[..., 2:] / 2], -1) for x in (queries, objects))
    cost = 5 * torch.cdist(queries, objects, 1) - 2 * classes - 2 * relops.generalized_box_iou(*corners)
    used = torch.randint(1, C + 1, (B,), generator=generator, device=device) if padded else None
    return cost.to(dtype), used


def draw_square(kind: str, n: int, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    """Return a square cost matrix [1,n,n] of the given kind."""
    device = generator.device
    uniform = functools.partial(torch.rand, generator=generator, device=device)
    if kind == "uniform":
        cost = uniform(n, n)
    elif kind == "ties":
        cost = torch.randint(0, 100, (n, n), generator=generator, device=device)
    elif kind == "products":
        steps = torch.arange(1.0, n + 1, device=device)
        cost = steps[:, None] * steps
    elif kind == "distances":
        cost = torch.cdist(uniform(n, 2), uniform(n, 2))
    else:  # "low rank"
        cost = (uniform(n, 5) - 0.5) @ (uniform(5, n) - 0.5) + 0.01 * uniform(n, n)
    return cost[None].to(dtype), None


def total_costs(cost: Tensor, row_to_col: Tensor) -> Tensor:
    costs = cost.gather(-1, row_to_col.clamp(min=0)[..., None])[..., 0].double()
    return torch.where(row_to_col >= 0, costs, 0).sum(-1)


def returning_cost(assign: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor, Tensor | None], Tensor]:
    def call(cost: Tensor, num_cols: Tensor | None) -> Tensor:
        return total_costs(cost, assign(cost, num_cols=num_cols)[0])

    return call


def scipy_loop(cost: Tensor, num_cols: Tensor | None = None) -> tuple[Tensor, Tensor]:
    from scipy.optimize import linear_sum_assignment

    on_host = cost.cpu().numpy() if cost.dtype in (torch.float32, torch.float64) else cost.float().cpu().numpy()
    used = [cost.size(2)] * cost.size(0) if num_cols is None else num_cols.tolist()
    row_to_col, col_to_row = (np.full((cost.size(0), cost.size(d)), -1) for d in (1, 2))
    for b, columns in enumerate(used):
        rows, cols = linear_sum_assignment(on_host[b, :, :columns])
        row_to_col[b, rows], col_to_row[b, cols] = cols, rows
    return torch.from_numpy(row_to_col).to(cost.device), torch.from_numpy(col_to_row).to(cost.device)


def bench(shape: str, device: str, draw: Callable, dtype: torch.dtype, B: int, R: int, C: int, **options: Any) -> Bench:
    peers = {}
    if importlib.util.find_spec("scipy") is not None:
        peers["scipy"] = returning_cost(scipy_loop)
    return Bench(
        op="linear_sum_assignment",
        shape=shape,
        dtype=dtype,
        device=device,
        direction=FORWARD,
        make_inputs=draw,
        relops=returning_cost(relops.linear_sum_assignment),
        pytorch=returning_cost(reference.linear_sum_assignment),
        # Each cost is read once and compared at least once.
        model=Model(B * (R * C * dtype.itemsize + (R + C) * 8), B * R * C),
        peers=peers,
        min_rounds=3,
        tolerance=1e-9,  # the total cost is summed in float64, whatever the dtype of the costs
        **options,
    )


def benches(device: str) -> list[Bench]:
    def detr(
        name: str, B: int, R: int, C: int, padded: bool = False, dtype: torch.dtype = torch.float32, **options: Any
    ) -> Bench:
        draw = functools.partial(draw_detr, B, R, C, padded, dtype)
        return bench(f"{name} {B}x{R}x{C}", device, draw, dtype, B, R, C, **options)

    def square(kind: str, n: int = 1000, dtype: torch.dtype = torch.float32) -> Bench:
        draw = functools.partial(draw_square, kind, n, dtype)
        targets = {"peer_targets": {"scipy": 1}} if device == "cpu" else {}
        return bench(f"{kind} 1x{n}x{n}", device, draw, dtype, 1, n, n, **targets)

    return [
        detr("DETR", 32, 300, 60, peer_targets={"scipy": 3}, quick=True),
        detr("DETR padded", 32, 300, 60, padded=True, quick=True),
        detr("DETR one image", 1, 300, 60),
        detr("DINO padded, 6 layers", 96, 900, 100, padded=True),
        detr("DETR", 32, 300, 60, dtype=torch.bfloat16),
        detr("DETR", 32, 300, 60, dtype=torch.float64),
        *(square(kind) for kind in ("uniform", "ties", "distances", "low rank")),
        square("products", n=400),  # the twin needs n * n / 2 steps
        square("uniform", dtype=torch.float64),
    ]
