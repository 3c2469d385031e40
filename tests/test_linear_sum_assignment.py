"""Tests of linear_sum_assignment: comparisons with brute force, SciPy and its twin, and the ways to pass sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from conftest import DTYPES, needs_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import relops
from relops import reference

INF, NAN = math.inf, math.nan

# Sizes (R, C) of problems with R < C, R = C and R > C, with a single row or column, and with more rows or columns
# than a vector or a warp has lanes.
SIZES = [(1, 1), (1, 5), (5, 1), (3, 4), (4, 4), (5, 3), (7, 40), (40, 7), (33, 33), (70, 130), (130, 70)]


def check_consistent(cost: Tensor, row_to_col: Tensor, col_to_row: Tensor) -> None:
    """Check shapes and dtypes, and that both outputs describe the same matching of permitted pairs."""
    *batch, R, C = cost.shape
    assert row_to_col.dtype == col_to_row.dtype == torch.int64
    assert row_to_col.device == col_to_row.device == cost.device
    assert list(row_to_col.shape) == [*batch, R] and list(col_to_row.shape) == [*batch, C]
    for b in itertools.product(*map(range, batch)):
        rows, cols = row_to_col[b].tolist(), col_to_row[b].tolist()
        pairs = {(i, j) for i, j in enumerate(rows) if j != -1}
        assert pairs == {(i, j) for j, i in enumerate(cols) if i != -1}
        assert all(math.isfinite(cost[b][pair]) for pair in pairs)


def summary(cost: Tensor, row_to_col: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each problem, the number of pairs and the sum of their costs in float64."""
    used = row_to_col >= 0
    if cost.size(-1) == 0:
        return used.sum(-1), used.sum(-1).double()
    costs = cost.double().gather(-1, row_to_col.clamp(min=0)[..., None])[..., 0]
    return used.sum(-1), torch.where(used, costs, 0.0).sum(-1)


def assert_as_good(cost: Tensor, actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Assert that two results have the same number of pairs and, up to rounding, the same sum of costs."""
    check_consistent(cost, *actual)
    (pairs, total), (expected_pairs, expected_total) = summary(cost, actual[0]), summary(cost, expected[0])
    assert torch.equal(pairs, expected_pairs)
    torch.testing.assert_close(total, expected_total, rtol=1e-11, atol=1e-11 * largest_finite(cost))


def largest_finite(cost: Tensor) -> float:
    finite = cost[cost.isfinite()].double().abs()
    return finite.max().item() if finite.numel() else 0.0


def brute_force(cost: list[list[float]], maximize: bool = False) -> tuple[int, float]:
    """Try every assignment of the smaller side.

    Return the number of pairs and the total cost of the best assignment.
    """
    R, C = len(cost), len(cost[0]) if cost else 0
    if R > C:
        cost, R, C = [list(column) for column in zip(*cost)], C, R
    best = (0, 0.0)
    for columns in itertools.permutations(range(C), R):
        costs = [x for i, j in enumerate(columns) if math.isfinite(x := cost[i][j])]
        best = max(best, (len(costs), sum(costs) if maximize else -sum(costs)))
    return best[0], best[1] if maximize else -best[1]


def random_costs(B: int, R: int, C: int, seed: int = 0) -> Tensor:
    return torch.randn(B, R, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_sizes(B: int, limit: int, seed: int = 0) -> Tensor:
    return torch.randint(0, limit + 1, (B,), generator=torch.Generator().manual_seed(seed))


def forbid_some(cost: Tensor, fraction: float, value: float = INF) -> Tensor:
    draws = torch.rand(cost.shape, generator=torch.Generator().manual_seed(1)).to(cost.device)
    return torch.where(draws < fraction, value, cost)


# ---- Values ----


@pytest.mark.parametrize(
    ("cost", "maximize", "expected"),
    [
        ([[4, 1, 3], [2, 0, 5], [3, 2, 2]], False, [1, 0, 2]),  # 1 + 2 + 2
        ([[4, 1, 3], [2, 0, 5], [3, 2, 2]], True, [0, 2, 1]),  # 4 + 5 + 2
        ([[1, 2, 3]], False, [0]),
        ([[3], [1], [2]], False, [-1, 0, -1]),
        ([[1, 2], [1, 10], [0, 10]], False, [1, -1, 0]),  # 2 + 0
        ([[-1, -2], [-1, -4]], False, [0, 1]),
        ([[1, INF], [1, INF]], False, None),  # row 0 or row 1 is assigned
        ([[1, INF], [0, 9]], False, [0, 1]),  # two pairs, although the single pair of cost 0 would be cheaper
        ([[NAN, INF], [-INF, NAN]], False, [-1, -1]),
        ([[NAN, 7], [-INF, INF]], True, [1, -1]),
        ([[0, 0], [0, 0]], False, None),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_hand(
    cost: list[list[float]], maximize: bool, expected: list[int] | None, dtype: torch.dtype, device: str
) -> None:
    tensor = torch.tensor(cost, dtype=dtype, device=device)
    outputs = relops.linear_sum_assignment(tensor, maximize=maximize)
    check_consistent(tensor, *outputs)
    pairs, total = summary(tensor, outputs[0])
    assert (pairs.item(), total.item()) == brute_force(cost, maximize)
    assert expected is None or outputs[0].tolist() == expected


@pytest.mark.parametrize("maximize", [False, True], ids=["", "maximize"])
@pytest.mark.parametrize("forbidden", [None, INF, -INF, NAN], ids=str)
@pytest.mark.parametrize("R, C", [(1, 4), (4, 1), (3, 5), (5, 3), (5, 5)])
def test_matches_brute_force(R: int, C: int, forbidden: float | None, maximize: bool, device: str) -> None:
    cost = random_costs(20, R, C).mul(4).round().to(device)  # rounding creates ties
    if forbidden is not None:
        cost = forbid_some(cost, 0.5, forbidden)
    outputs = relops.linear_sum_assignment(cost, maximize=maximize)
    check_consistent(cost, *outputs)
    pairs, totals = summary(cost, outputs[0])
    for problem, *found in zip(cost.tolist(), pairs.tolist(), totals.tolist()):
        assert tuple(found) == brute_force(problem, maximize)


@pytest.mark.parametrize("maximize", [False, True], ids=["", "maximize"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R, C", SIZES)
def test_matches_scipy(R: int, C: int, dtype: torch.dtype, maximize: bool, device: str) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    cost = random_costs(4, R, C).to(device, dtype)
    row_to_col, col_to_row = relops.linear_sum_assignment(cost, maximize=maximize)
    check_consistent(cost, row_to_col, col_to_row)
    for b in range(len(cost)):
        numbers = cost[b].double().cpu().numpy()
        rows, cols = optimize.linear_sum_assignment(numbers, maximize)
        pairs, total = summary(cost[b], row_to_col[b])
        assert pairs.item() == min(R, C)
        assert total.item() == pytest.approx(numbers[rows, cols].sum(), rel=1e-12, abs=1e-12)


def adversarial(kind: str, n: int, generator: torch.Generator) -> Tensor:
    if kind == "products":
        steps = torch.arange(1.0, n + 1)
        return steps[:, None] * steps
    if kind == "few values":
        return torch.randint(0, 3, (n, n), generator=generator).float()
    if kind == "many values":
        return torch.randint(0, 10 * n, (n, n), generator=generator).float()
    if kind == "distances":
        return torch.cdist(torch.rand(n, 2, generator=generator), torch.rand(n, 2, generator=generator))
    if kind == "low rank":
        return torch.randn(n, 3, generator=generator) @ torch.randn(3, n, generator=generator)
    return torch.rand(n, 1, generator=generator).expand(n, n)  # "equal columns"


@pytest.mark.parametrize("kind", ["products", "few values", "many values", "distances", "low rank", "equal columns"])
def test_costs_that_are_hard_for_augmenting_paths(kind: str, device: str) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    cost = adversarial(kind, 150, torch.Generator().manual_seed(0))
    rows, cols = optimize.linear_sum_assignment(cost.numpy())
    cost = cost.to(device)
    outputs = relops.linear_sum_assignment(cost)
    check_consistent(cost, *outputs)
    assert summary(cost, outputs[0])[1].item() == pytest.approx(
        cost.double().cpu().numpy()[rows, cols].sum(), rel=1e-12
    )


@pytest.mark.parametrize("maximize", [False, True], ids=["", "maximize"])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("R, C", SIZES)
def test_matches_twin(R: int, C: int, fraction: float, maximize: bool, device: str) -> None:
    cost = forbid_some(random_costs(3, R, C).to(device), fraction)
    sizes = [random_sizes(3, limit, seed).to(device) for seed, limit in enumerate((R, C))]
    actual, expected = (
        function(cost, *sizes, maximize) for function in (relops.linear_sum_assignment, reference.linear_sum_assignment)
    )
    assert_as_good(cost, actual, expected)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_search(data: st.DataObject) -> None:
    R, C = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    entry = st.one_of(st.integers(-3, 3).map(float), st.sampled_from([INF, -INF, NAN, 1e6, 0.5]))
    rows = data.draw(st.lists(st.lists(entry, min_size=C, max_size=C), min_size=R, max_size=R))
    r, c = data.draw(st.integers(0, R)), data.draw(st.integers(0, C))
    maximize = data.draw(st.booleans())
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    cost = torch.tensor(rows, dtype=dtype).reshape(R, C)
    for function in (relops.linear_sum_assignment, reference.linear_sum_assignment):
        outputs = function(cost, r, c, maximize)
        check_consistent(cost, *outputs)
        assert (outputs[0][r:] == -1).all() and (outputs[1][c:] == -1).all()
        pairs, total = summary(cost, outputs[0])
        assert (pairs.item(), total.item()) == brute_force([row[:c] for row in rows[:r]], maximize)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 0.0, -6e4])
@pytest.mark.parametrize("R, C", [(20, 9), (9, 20), (12, 12)])
def test_padding_is_ignored(R: int, C: int, garbage: float, dtype: torch.dtype, device: str) -> None:
    B = 12
    cost = random_costs(B, R, C).to(device, dtype)
    num_rows, num_cols = random_sizes(B, R, 1), random_sizes(B, C, 2)
    for b in range(B):
        cost[b, num_rows[b] :] = garbage
        cost[b, :, num_cols[b] :] = garbage
    row_to_col, col_to_row = relops.linear_sum_assignment(cost, num_rows.to(device), num_cols.to(device))
    for b, (r, c) in enumerate(zip(num_rows.tolist(), num_cols.tolist())):
        rows, cols = relops.linear_sum_assignment(cost[b, :r, :c])
        assert torch.equal(row_to_col[b, :r], rows) and torch.equal(col_to_row[b, :c], cols)
        assert (row_to_col[b, r:] == -1).all() and (col_to_row[b, c:] == -1).all()


@pytest.mark.parametrize("form", [list, tuple, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
def test_forms_of_sizes(form: Callable, device: str) -> None:
    cost = random_costs(3, 6, 5).to(device)
    given = [form(sizes) for sizes in ([6, 0, 3], [2, 5, 4])]
    given = [x.to(device) if isinstance(x, Tensor) else x for x in given]
    actual = relops.linear_sum_assignment(cost, *given)
    expected = reference.linear_sum_assignment(cost, [6, 0, 3], [2, 5, 4])
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    for rows in (3, [3], torch.tensor(3, device=device), torch.tensor([3], device=device)):
        actual = relops.linear_sum_assignment(cost[2], rows, 4)
        assert torch.equal(actual[0], expected[0][2]) and torch.equal(actual[1], expected[1][2])


@pytest.mark.parametrize("maximize", [False, True], ids=["", "maximize"])
@pytest.mark.parametrize("largest", [1e-310, 1e-30, 1.0, 1e30, 3e38, 1e300, 1.7e308])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("fraction", [0.0, 0.4])
def test_any_magnitude(fraction: float, dtype: torch.dtype, largest: float, maximize: bool, device: str) -> None:
    """Check that neither sums of the largest possible costs nor the cost of a forbidden pair overflows."""
    if dtype == torch.float32 and not 1e-38 < largest < 3.3e38:
        pytest.skip("the costs are out of the range of float32")
    cost = torch.rand(2, 30, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    cost = forbid_some((cost * largest).to(dtype), fraction).to(device)
    row_to_col, col_to_row = relops.linear_sum_assignment(cost, maximize=maximize)
    check_consistent(cost, row_to_col, col_to_row)
    normal = cost.double() * 0.25 if largest > 1 else cost.double() * 2.0**60
    expected = reference.linear_sum_assignment(normal, maximize=maximize)
    (pairs, total), (expected_pairs, expected_total) = summary(normal, row_to_col), summary(normal, expected[0])
    assert torch.equal(pairs, expected_pairs)
    scale = largest_finite(normal)
    torch.testing.assert_close(total / scale, expected_total / scale, rtol=1e-11, atol=1e-11)


def test_small_costs_next_to_huge_costs_keep_their_precision(device: str) -> None:
    """Check that huge costs of other pairs do not reduce the precision of small costs."""
    small = random_costs(1, 20, 20).abs()[0] * 1e-30
    huge = torch.where(torch.rand(20, 20, generator=torch.Generator().manual_seed(2)) < 0.3, 1e300, small)
    cost = huge.to(device)
    optimize = pytest.importorskip("scipy.optimize")
    rows, cols = optimize.linear_sum_assignment(huge.numpy())
    outputs = relops.linear_sum_assignment(cost)
    check_consistent(cost, *outputs)
    assert summary(cost, outputs[0])[1].item() == pytest.approx(huge.numpy()[rows, cols].sum(), rel=1e-12)


def test_all_pairs_forbidden(device: str) -> None:
    for R, C in SIZES:
        for value in (NAN, INF, -INF):
            outputs = relops.linear_sum_assignment(torch.full((2, R, C), value, device=device))
            assert all((x == -1).all() for x in outputs)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool], ids=str)
def test_integer_costs(dtype: torch.dtype, device: str) -> None:
    cost = random_costs(3, 9, 7).mul(50).abs().to(dtype).to(device)
    assert_as_good(cost, relops.linear_sum_assignment(cost), reference.linear_sum_assignment(cost))


def test_many_problems(device: str) -> None:
    """Check that the results are the same in every run, and the same as when the problems are solved one by one.

    There are more problems than threads, and the sizes of the problems differ.
    """
    B, R, C = 200, 25, 18
    cost = random_costs(B, R, C).to(device, torch.float32)
    sizes = [random_sizes(B, limit, seed).to(device) for seed, limit in enumerate((R, C))]
    outputs = relops.linear_sum_assignment(cost, *sizes)
    for _ in range(3):
        again = relops.linear_sum_assignment(cost, *sizes)
        assert torch.equal(outputs[0], again[0]) and torch.equal(outputs[1], again[1])
    for b in range(0, B, 7):
        rows, cols = relops.linear_sum_assignment(cost[b], sizes[0][b], sizes[1][b])
        assert torch.equal(rows, outputs[0][b]) and torch.equal(cols, outputs[1][b])


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    cost = random_costs(50, 60, 70)
    expected = relops.linear_sum_assignment(cost)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(*pair) for pair in zip(relops.linear_sum_assignment(cost), expected))
    finally:
        torch.set_num_threads(before)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_assignment_on_both_devices(dtype: torch.dtype) -> None:
    for R, C in [*SIZES, (900, 100), (50, 2000)]:
        for fraction in (0.0, 0.5):
            cost = forbid_some(random_costs(4, R, C).mul(8).round(), fraction).to(dtype)  # rounding creates ties
            on_cuda = relops.linear_sum_assignment(cost.cuda())
            assert all(torch.equal(x.cpu(), y) for x, y in zip(on_cuda, relops.linear_sum_assignment(cost)))


# ---- Sizes ----


@pytest.mark.parametrize("value", [-1, 8, 2**40, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("which", ["num_rows", "num_cols"])
def test_sizes_out_of_range_give_an_error_or_no_pairs(which: str, value: int, device: str) -> None:
    cost = random_costs(3, 7, 7).to(device)
    sizes = {which: torch.tensor([7, value, 2], device=device)}
    if device == "cpu":
        letter = "R" if which == "num_rows" else "C"
        message = (
            rf"relops.linear_sum_assignment: {which} must be in \[0,{letter}\] = \[0,7\], got {value} for prob.* 1"
        )
        with pytest.raises(ValueError, match=message):
            relops.linear_sum_assignment(cost, **sizes)
        return
    outputs = relops.linear_sum_assignment(cost, **sizes)
    expected = relops.linear_sum_assignment(cost[::2], **{which: sizes[which][::2]})
    for x, y in zip(outputs, expected):
        assert (x[1] == -1).all() and torch.equal(x[::2], y)


def test_compile_with_lists_of_sizes(device: str, fresh_compiler: None) -> None:
    cost = random_costs(2, 5, 6).to(device)
    compiled = torch.compile(
        lambda x: relops.linear_sum_assignment(x, [2, 5], [6, 3]), fullgraph=True, backend="aot_eager"
    )
    expected = relops.linear_sum_assignment(cost, [2, 5], [6, 3])
    assert all(torch.equal(*pair) for pair in zip(compiled(cost), expected))


@needs_cuda
def test_no_synchronization_for_lists() -> None:
    cost = random_costs(3, 60, 20).cuda()
    relops.linear_sum_assignment(cost)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        relops.linear_sum_assignment(cost, [1, 2, 3], [20, 0, 5])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nested_vmap_with_one_size_per_entry(device: str) -> None:
    V, B, R, C = 4, 3, 6, 5
    cost, sizes = random_costs(V * B, R, C).to(device), random_sizes(V * B, R).to(device)
    mapped = torch.vmap(torch.vmap(relops.linear_sum_assignment))(cost.unflatten(0, (V, B)), sizes.view(V, B))
    for x, y in zip(mapped, relops.linear_sum_assignment(cost, sizes)):
        assert torch.equal(x.flatten(0, 1), y)


def test_kernels_reject_unconverted_dtypes(device: str) -> None:
    """Check that kernels reject integer costs and 32-bit sizes, which relops.linear_sum_assignment converts."""
    cost = random_costs(2, 3, 4).to(device)
    for arguments in ((cost.long(),), (cost, torch.ones(2, dtype=torch.int32, device=device))):
        with pytest.raises(RuntimeError):
            torch.ops.relops.linear_sum_assignment(*arguments)


def test_sizes_in_a_list_are_symbols_of_a_symbolic_graph() -> None:
    """Check that a graph computes the sizes from the shape of its input and does not store them as constants."""

    def assign(cost: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
        return relops.linear_sum_assignment(cost, num_cols=[objects.shape[0]] * 2)

    cost = torch.rand(2, 5, 7)
    graph = make_fx(assign, tracing_mode="symbolic")(cost, torch.zeros(4))
    for actual, expected in zip(graph(cost, torch.zeros(3)), assign(cost, torch.zeros(3)), strict=True):
        assert torch.equal(actual, expected)
