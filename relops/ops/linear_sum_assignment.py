"""linear_sum_assignment: the checks, fake kernel and vmap rule around the C++ and CUDA kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from relops._checks import check_device, check_tensor, is_int
from relops._dtypes import FEATURE_DTYPES
from relops._library import check_device_has_kernels
from relops._tracing import int_tensor
from relops.ops._vmap import mapped_first

OP = "linear_sum_assignment"


def linear_sum_assignment(
    cost: Tensor,
    num_rows: Tensor | Sequence[int] | int | None = None,
    num_cols: Tensor | Sequence[int] | int | None = None,
    maximize: bool = False,
) -> tuple[Tensor, Tensor]:
    """Linear assignment problems: pairs each row with at most one column, and each column with at most one row, so that
    as many as possible are paired and the sum of their costs is the least.

    The result is optimal, as scipy.optimize.linear_sum_assignment's is; of several optimal ones, which is returned may
    differ from SciPy's, not between CPU and CUDA. Shortest augmenting paths (Jonker and Volgenant 1987,
    https://doi.org/10.1007/BF02278710; Crouse 2016, https://doi.org/10.1109/TAES.2016.140952), in float64 whatever the
    dtype of cost.

    Args:
        cost: [B,R,C], a problem each, or [R,C]; float64, float32, float16, bfloat16, or integers, which are converted
            to float64. Pairs whose cost is NaN, inf or -inf are forbidden: they are never in the result.
        num_rows: [B] rows of each problem that are used, in [0,R]: int64 or int32 on the device of cost, or a list of
            ints; for cost [R,C] one int, [] or [1]. Rows from there on are ignored, whatever they hold. None: all.
        num_cols: the same of columns, in [0,C].
        maximize: the largest sum instead of the least.

    Returns:
        row_to_col, int64 [B,R] (or [R]): the column of each row, -1 where it has none.
        col_to_row, int64 [B,C] (or [C]): the row of each column, -1 where it has none.

    Gradients: none; cost may require them. On CUDA it runs on the device without synchronizing, a block per problem;
    on the CPU problems run in parallel on threads.

    Raises:
        TypeError: a dtype, or an argument of another type.
        ValueError: a shape, a device, a value of num_rows outside [0,R] or of num_cols outside [0,C]. On CUDA finding
            that in a tensor would cost a synchronization; such a problem gives -1 everywhere instead.

    Example:
        >>> row_to_col, col_to_row = relops.linear_sum_assignment(torch.tensor([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0]]))
        >>> row_to_col, col_to_row  # (tensor([1, 0]), tensor([1, 0, -1])): costs 1 + 2
    """
    check_tensor(OP, "cost", cost)
    if cost.is_complex() or (cost.is_floating_point() and cost.dtype not in FEATURE_DTYPES):
        raise TypeError(f"relops.{OP}: cost must be float64, float32, float16, bfloat16 or integer, got {cost.dtype}")
    if cost.dim() not in (2, 3):
        raise ValueError(f"relops.{OP}: cost must be [B,R,C] or [R,C], got shape {list(cost.shape)}")
    check_device_has_kernels(OP, cost.device)
    num_rows = _checked_sizes("num_rows", num_rows, cost, "R", cost.size(-2))
    num_cols = _checked_sizes("num_cols", num_cols, cost, "C", cost.size(-1))
    if not isinstance(maximize, bool):
        raise TypeError(f"relops.{OP}: maximize must be of type bool, got {maximize!r}")
    cost = cost.detach() if cost.is_floating_point() else cost.double()
    return torch.ops.relops.linear_sum_assignment(cost, num_rows, num_cols, maximize)


def _checked_sizes(name: str, sizes: object, cost: Tensor, letter: str, limit: int) -> Tensor | None:
    """int64 [B], B = 1 for one problem."""
    if sizes is None:
        return None
    batched = cost.dim() == 3
    B = cost.size(0) if batched else 1

    def words() -> str:  # called for an error only: to format a symbolic size is to fix it
        return f"[B] = [{B}]" if batched else "[] or [1]"

    if isinstance(sizes, Tensor):
        if sizes.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"relops.{OP}: {name} must be int64 or int32, got {sizes.dtype}")
        check_device(OP, name, sizes, "cost", cost)
        if sizes.dim() > 1 or (batched and sizes.dim() == 0) or sizes.numel() != B:
            raise ValueError(f"relops.{OP}: {name} must be {words()}, got shape {list(sizes.shape)}")
        return sizes.long().reshape(B)
    ints = [sizes] if is_int(sizes) and not batched else sizes
    if not isinstance(ints, (list, tuple)) or not all(is_int(size) for size in ints):
        raise TypeError(
            f"relops.{OP}: {name} must be a Tensor {words()}, {'a list of ints' if batched else 'an int'} or None, got "
            f"{sizes!r}"
        )
    if len(ints) != B:
        raise ValueError(f"relops.{OP}: {name} must be {words()}, got {len(ints)} ints")
    for b, size in enumerate(ints):
        if not 0 <= size <= limit:
            raise ValueError(f"relops.{OP}: {name} must be in [0,{letter}] = [0,{limit}], got {size} for problem {b}")
    # Without waiting for the copy, which blocking ones do.
    return int_tensor(ints).to(cost.device, non_blocking=True)


@torch.library.register_fake(f"relops::{OP}")
def _fake(
    cost: Tensor, num_rows: Tensor | None = None, num_cols: Tensor | None = None, maximize: bool = False
) -> tuple[Tensor, Tensor]:
    *batch, R, C = cost.shape
    return cost.new_empty([*batch, R], dtype=torch.int64), cost.new_empty([*batch, C], dtype=torch.int64)


def _vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    cost: Tensor,
    num_rows: Tensor | None = None,
    num_cols: Tensor | None = None,
    maximize: bool = False,
) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """vmap folds its dimension into B."""

    V = info.batch_size
    cost = mapped_first(cost, in_dims[0], V)
    # torch leaves out arguments at the end that have their default values, and their dimensions.
    dims = (*in_dims[1:], None, None)
    sizes = [None if x is None else mapped_first(x, dim, V).flatten() for x, dim in zip((num_rows, num_cols), dims)]
    outputs = torch.ops.relops.linear_sum_assignment(cost.flatten(0, -3), *sizes, maximize)
    return tuple(x.view(*cost.shape[:-2], x.size(-1)) for x in outputs), (0, 0)


torch.library.register_vmap(f"relops::{OP}", _vmap)
