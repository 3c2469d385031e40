"""Linear assignment problems, solved with shortest augmenting paths (https://doi.org/10.1109/TAES.2016.140952)."""

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
    """Solve linear assignment problems: match rows with columns so that the total cost is the minimum.

    Each row is matched with at most one column, and each column with at most one row. The number of matched pairs is
    the maximum possible. Among all matchings with this number of pairs, the result has the minimum sum of costs. The
    result is optimal, like that of `scipy.optimize.linear_sum_assignment`. If a problem has several optimal matchings,
    the result may differ from SciPy's, but it is the same on CPU and CUDA.

    The algorithm finds shortest augmenting paths (Jonker and Volgenant 1987, https://doi.org/10.1007/BF02278710; Crouse
    2016, https://doi.org/10.1109/TAES.2016.140952). All computations use float64, whatever the dtype of `cost`. On
    CUDA, each problem is solved by one block, and the call does not wait for the device. On the CPU, several threads
    solve the problems of a batch in parallel.

    Args:
        cost: A tensor [R,C] with the cost of each pair, or [B,R,C] for a batch of problems. The dtype is float64,
            float32, float16, bfloat16 or an integer dtype. Integers are converted to float64. Pairs whose cost is NaN,
            inf or -inf are forbidden and never matched.
        num_rows: The number of rows that each problem uses, from 0 to R. All later rows are ignored, whatever values
            they contain. For a batch, pass an int64 or int32 tensor [B] on the device of `cost`, or a list of B ints.
            For a single problem, pass an int, or a tensor [] or [1]. If None, all rows are used.
        num_cols: The number of columns that each problem uses, from 0 to C. All later columns are ignored, whatever
            values they contain. For a batch, pass an int64 or int32 tensor [B] on the device of `cost`, or a list of B
            ints. For a single problem, pass an int, or a tensor [] or [1]. If None, all columns are used.
        maximize: If True, the sum of the costs is maximized instead of minimized.

    Returns:
        A tuple ``(row_to_col, col_to_row)``.

        - ``row_to_col``, an int64 tensor [R] or [B,R], contains the column that is matched with each row, or -1 for an
          unmatched row.
        - ``col_to_row``, an int64 tensor [C] or [B,C], contains the row that is matched with each column, or -1 for an
          unmatched column.

    Gradients:
        The result consists of indices and has no gradient. `cost` may require gradients.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or device, a value of `num_rows` is outside of [0,R], or a value
            of `num_cols` is outside of [0,C]. The values of a CUDA tensor are not checked, because this would require a
            synchronization. Instead, the result of a problem with an invalid value is -1 everywhere.

    Example:
        >>> import torch, relops
        >>> cost = torch.tensor([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0]])
        >>> row_to_col, col_to_row = relops.linear_sum_assignment(cost)  # the total cost is 1 + 2
        >>> row_to_col.tolist(), col_to_row.tolist()
        ([1, 0], [1, 0, -1])
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
    """Check num_rows or num_cols, and return it as an int64 tensor [B]. B is 1 for a single problem."""
    if sizes is None:
        return None
    batched = cost.dim() == 3
    B = cost.size(0) if batched else 1

    def shape_rule() -> str:  # only called for errors: formatting a symbolic size specializes the graph to that size
        return f"[B] = [{B}]" if batched else "[] or [1]"

    if isinstance(sizes, Tensor):
        if sizes.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"relops.{OP}: {name} must be int64 or int32, got {sizes.dtype}")
        check_device(OP, name, sizes, "cost", cost)
        if sizes.dim() > 1 or (batched and sizes.dim() == 0) or sizes.numel() != B:
            raise ValueError(f"relops.{OP}: {name} must be {shape_rule()}, got shape {list(sizes.shape)}")
        return sizes.long().reshape(B)
    ints = [sizes] if is_int(sizes) and not batched else sizes
    if not isinstance(ints, (list, tuple)) or not all(is_int(size) for size in ints):
        raise TypeError(
            f"relops.{OP}: {name} must be a Tensor {shape_rule()}, {'a list of ints' if batched else 'an int'} or "
            f"None, got {sizes!r}"
        )
    if len(ints) != B:
        raise ValueError(f"relops.{OP}: {name} must be {shape_rule()}, got {len(ints)} ints")
    for b, size in enumerate(ints):
        if not 0 <= size <= limit:
            raise ValueError(f"relops.{OP}: {name} must be in [0,{letter}] = [0,{limit}], got {size} for problem {b}")
    # A blocking copy would wait for the device.
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
    """Fold the vmapped dimension into B."""
    V = info.batch_size
    cost = mapped_first(cost, in_dims[0], V)
    # torch passes neither trailing arguments that have their default values nor their entries of in_dims.
    dims = (*in_dims[1:], None, None)
    sizes = [None if x is None else mapped_first(x, dim, V).flatten() for x, dim in zip((num_rows, num_cols), dims)]
    outputs = torch.ops.relops.linear_sum_assignment(cost.flatten(0, -3), *sizes, maximize)
    return tuple(x.view(*cost.shape[:-2], x.size(-1)) for x in outputs), (0, 0)


torch.library.register_vmap(f"relops::{OP}", _vmap)
