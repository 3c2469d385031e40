"""The linear assignment problem by shortest augmenting paths (Crouse 2016, https://doi.org/10.1109/TAES.2016.140952)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_sum_assignment(
    cost: Tensor,  # [B,R,C] or [R,C]
    num_rows: Tensor | Sequence[int] | int | None = None,  # [B]; one for [R,C]
    num_cols: Tensor | Sequence[int] | int | None = None,  # [B]; one for [R,C]
    maximize: bool = False,
) -> tuple[Tensor, Tensor]:  # row_to_col [B,R] or [R], col_to_row [B,C] or [C]; -1 = unmatched
    """In float64 on the CPU. What a row does to all columns is vectorized; the search is a Python loop."""
    problems = cost.detach().double().cpu()
    problems = problems if cost.dim() == 3 else problems[None]
    B, R, C = problems.shape
    rows, cols = (
        [size] * B if sizes is None else torch.as_tensor(sizes).reshape(B).tolist()
        for sizes, size in ((num_rows, R), (num_cols, C))
    )
    row_to_col = torch.full((B, R), -1)
    col_to_row = torch.full((B, C), -1)
    for b in range(B):
        used = problems[b, : rows[b], : cols[b]]
        used = -used if maximize else used
        matched = solve(used) if used.shape[0] <= used.shape[1] else solve(used.T).flip(0)
        row_to_col[b, matched[0]] = matched[1]
        col_to_row[b, matched[1]] = matched[0]
    outputs = row_to_col.to(cost.device), col_to_row.to(cost.device)
    return outputs if cost.dim() == 3 else (outputs[0][0], outputs[1][0])


def solve(cost: Tensor) -> Tensor:
    """[2,K] pairs of row and column of a problem [n,m], n <= m."""
    n, m = cost.shape
    permitted = cost.isfinite()
    if not permitted.any():
        return torch.empty((2, 0), dtype=torch.int64)
    # A power of two divides without rounding, and keeps sums of the largest costs there are from overflowing.
    exponent = torch.frexp(cost[permitted].abs().max()).exponent
    cost = torch.ldexp(cost, -exponent.clamp(min=-1000))
    # One forbidden pair costs more than all that permitted ones can differ by: as few as possible are taken.
    cost = torch.where(permitted, cost, 2.0 * n + 3)

    u, v = torch.zeros(n, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)  # dual variables
    row_of, col_of = torch.full((m,), -1), torch.full((n,), -1)
    for start in range(n):
        distance = torch.full((m,), torch.inf, dtype=torch.float64)  # from `start`, in reduced costs
        reached_from = torch.full((m,), start)
        settled = torch.zeros(m, dtype=torch.bool)
        row, so_far = start, 0.0
        while True:
            through = so_far + (cost[row] - u[row] - v)
            closer = ~settled & (through < distance)
            distance[closer] = through[closer]
            reached_from[closer] = row
            so_far = float(torch.where(settled, torch.inf, distance).min())
            equally_near = ~settled & (distance == so_far)
            free = equally_near & (row_of < 0)
            if free.any():
                nearest = int(free.int().argmax())
                break
            nearest = int(equally_near.int().argmax())
            settled[nearest] = True
            row = int(row_of[nearest])
        # Reduced costs stay non-negative, and zero along the path.
        u[row_of[settled]] += so_far - distance[settled]
        v[settled] -= so_far - distance[settled]
        u[start] += so_far
        # Along the path from the free column back to `start`, every row takes the column it was reached by.
        column, row = nearest, -1
        while row != start:
            row = int(reached_from[column])
            row_of[column] = row
            before = int(col_of[row])
            col_of[row] = column
            column = before
    rows = torch.arange(n)
    pairs = torch.stack([rows, col_of])
    return pairs[:, permitted[rows, col_of]]
