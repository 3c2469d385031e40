"""Linear assignment by shortest augmenting paths (Crouse 2016, https://doi.org/10.1109/TAES.2016.140952)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_sum_assignment(
    cost: Tensor,  # [B,R,C] or [R,C]
    num_rows: Tensor | Sequence[int] | int | None = None,  # [B], or one number for [R,C]
    num_cols: Tensor | Sequence[int] | int | None = None,  # [B], or one number for [R,C]
    maximize: bool = False,
) -> tuple[Tensor, Tensor]:  # row_to_col [B,R] or [R], col_to_row [B,C] or [C]; -1 = unmatched
    """Match rows with columns in the maximum number of pairs, with the minimum sum of costs.

    `cost` is [R,C] or [B,R,C]. Pairs with a non-finite cost are never matched. Problem b uses only its first
    ``num_rows[b]`` rows and ``num_cols[b]`` columns. If `maximize` is True, the sum of the costs is maximized instead.
    The first result, [R] or [B,R], contains the column that is matched with each row. The second result, [C] or
    [B,C], contains the row that is matched with each column. Unmatched rows and columns have -1.

    All problems are solved in float64 on the CPU. The search is a Python loop, in which each step updates all columns
    with vectorized operations.
    """
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
        problem = problems[b, : rows[b], : cols[b]]
        problem = -problem if maximize else problem
        pairs = solve(problem) if problem.shape[0] <= problem.shape[1] else solve(problem.T).flip(0)
        row_to_col[b, pairs[0]] = pairs[1]
        col_to_row[b, pairs[1]] = pairs[0]
    outputs = row_to_col.to(cost.device), col_to_row.to(cost.device)
    return outputs if cost.dim() == 3 else (outputs[0][0], outputs[1][0])


def solve(cost: Tensor) -> Tensor:
    """Return the matched rows and columns as pairs [2,K], for a problem [n,m] with n <= m."""
    n, m = cost.shape
    allowed = cost.isfinite()
    if not allowed.any():
        return torch.empty((2, 0), dtype=torch.int64)
    # Divide by a power of two, so that sums of very large costs do not overflow. This division is exact.
    exponent = torch.frexp(cost[allowed].abs().max()).exponent
    cost = torch.ldexp(cost, -exponent.clamp(min=-1000))
    # The cost of a forbidden pair is larger than any difference between two sums of allowed costs, so the solution has
    # the minimum number of forbidden pairs.
    cost = torch.where(allowed, cost, 2.0 * n + 3)

    u, v = torch.zeros(n, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)  # dual variables
    row_of, col_of = torch.full((m,), -1), torch.full((n,), -1)
    for start in range(n):
        distance = torch.full((m,), torch.inf, dtype=torch.float64)  # distance from row `start` in reduced costs
        predecessor = torch.full((m,), start)
        visited = torch.zeros(m, dtype=torch.bool)
        row, path_cost = start, 0.0
        while True:
            candidate = path_cost + (cost[row] - u[row] - v)
            improved = ~visited & (candidate < distance)
            distance[improved] = candidate[improved]
            predecessor[improved] = row
            path_cost = float(torch.where(visited, torch.inf, distance).min())
            minimal = ~visited & (distance == path_cost)
            unmatched = minimal & (row_of < 0)
            if unmatched.any():
                nearest = int(unmatched.int().argmax())
                break
            nearest = int(minimal.int().argmax())
            visited[nearest] = True
            row = int(row_of[nearest])
        # This update keeps reduced costs non-negative, and zero along the path.
        u[row_of[visited]] += path_cost - distance[visited]
        v[visited] -= path_cost - distance[visited]
        u[start] += path_cost
        # Along the path from the unmatched column back to row `start`, match each column with its predecessor.
        column, row = nearest, -1
        while row != start:
            row = int(predecessor[column])
            row_of[column] = row
            previous = int(col_of[row])
            col_of[row] = column
            column = previous
    rows = torch.arange(n)
    pairs = torch.stack([rows, col_of])
    return pairs[:, allowed[rows, col_of]]
