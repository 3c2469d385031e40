"""Tests of the values and gradients of box_iou and generalized_box_iou."""

from __future__ import annotations

import math

import pytest
import torch
from cases import INTEGERS, Op, grad_like
from cases.iou import GENERALIZED, IOU
from conftest import DTYPES, why_no_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import relops

both = pytest.mark.parametrize("op", [IOU, GENERALIZED], ids=lambda op: op.name)
wide_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def rows(*boxes: tuple[float, ...], dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.tensor(boxes, dtype=dtype, device=device)


def random_boxes(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    corner, size = torch.rand(2, *shape, 2, dtype=torch.float64)
    return torch.cat([100 * corner, 100 * corner + 40 * size], -1).to(device, dtype)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Assert that all elements are equal, where NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# ---- Independent facts ----

# Box a, box b, their IoU and their generalized IoU.
VALUES = {
    "equal": ((1, 2, 4, 7), (1, 2, 4, 7), 1, 1),
    "half of each": ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3, 1 / 3),
    "a corner": ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7, 1 / 7 - 2 / 9),
    "inside": ((0, 0, 4, 4), (1, 1, 3, 3), 1 / 4, 1 / 4),
    "across": ((0, 1, 3, 2), (1, 0, 2, 3), 1 / 5, 1 / 5 - 4 / 9),
    "left of the other": ((0, 0, 1, 1), (2, 0, 3, 1), 0, -1 / 3),
    "above the other": ((0, 0, 1, 1), (0, 4, 1, 5), 0, -3 / 5),
    "far apart": ((0, 0, 1, 1), (9, 9, 10, 10), 0, -98 / 100),
    "side by side": ((0, 0, 1, 1), (1, 0, 2, 1), 0, 0),
    "corner to corner": ((0, 0, 1, 1), (1, 1, 2, 2), 0, -1 / 2),
    "negative coordinates": ((-3, -2, -1, 0), (-2, -2, 0, 0), 1 / 3, 1 / 3),
    "a line in a box": ((1, 0, 1, 2), (0, 0, 2, 2), 0, 0),
    "a point and itself": ((1, 1, 1, 1), (1, 1, 1, 1), 0, 0),
    "two points": ((0, 0, 0, 0), (2, 2, 2, 2), 0, -1),
    "two lines": ((0, 0, 0, 2), (3, 0, 3, 2), 0, -1),
    "two lines on a line": ((0, 0, 1, 0), (2, 0, 3, 0), 0, 0),
    "areas that cancel": ((2, 0, 0, 2), (0, 0, 2, 2), 0, -1),
    "inverted in one direction": ((1, 0, 0, 1), (0, 0, 2, 2), 0, -1 / 4),
    "inverted in both directions": ((2, 2, 0, 0), (0, 0, 2, 2), 0, 1),
}


@pytest.mark.parametrize(("a", "b", "iou", "generalized"), VALUES.values(), ids=VALUES.keys())
@wide_dtypes
def test_values(
    a: tuple[float, ...], b: tuple[float, ...], iou: float, generalized: float, dtype: torch.dtype, device: str
) -> None:
    a, b = (rows(box, dtype=dtype, device=device) for box in (a, b))
    tolerance = {torch.float64: 1e-15, torch.float32: 1e-7}[dtype]
    for x, y in ((a, b), (b, a)):
        assert relops.box_iou(x, y).item() == pytest.approx(iou, abs=tolerance)
        assert relops.generalized_box_iou(x, y).item() == pytest.approx(generalized, abs=tolerance)


@both
@wide_dtypes
def test_identities(op: Op, dtype: torch.dtype, device: str) -> None:
    a, b = random_boxes(40, dtype=dtype, device=device), random_boxes(67, dtype=dtype, device=device)
    output = op.function(a, b)
    assert torch.equal(op.function(b, a).mT, output)
    assert (op.function(a, a).diagonal() == 1).all()
    flipped = [torch.stack([-x[:, 2], x[:, 1], -x[:, 0], x[:, 3]], 1) for x in (a, b)]
    turned = [x[:, [1, 0, 3, 2]] for x in (a, b)]
    scaled = [x * 4 for x in (a, b)]
    for others in (flipped, turned, scaled):
        assert torch.equal(op.function(*others), output)
    torch.testing.assert_close(op.function(a + 1000, b + 1000), output, rtol=0, atol=1e-3)


@wide_dtypes
def test_bounds(dtype: torch.dtype, device: str) -> None:
    a, b = random_boxes(60, dtype=dtype, device=device), random_boxes(80, dtype=dtype, device=device)
    iou, generalized = relops.box_iou(a, b), relops.generalized_box_iou(a, b)
    disjoint = (torch.maximum(a[:, None, :2], b[:, :2]) >= torch.minimum(a[:, None, 2:], b[:, 2:])).any(-1)
    assert disjoint.any() and not disjoint.all()
    assert torch.equal(iou == 0, disjoint)
    assert (iou <= 1).all() and (generalized <= iou + 1e-6).all() and (generalized >= -1).all()
    assert (generalized[disjoint] < 0).all()


@both
def test_batch_equals_a_loop(op: Op, device: str) -> None:
    a, b = random_boxes(3, 20, device=device), random_boxes(3, 33, device=device)
    whole = op.run({"a": a, "b": b}, grad_output=grad_like(torch.empty(3, 20, 33, device=device)))
    grads = grad_like(whole["output"])
    for n in range(3):
        for name, x in op.run({"a": a[n], "b": b[n]}, grad_output=grads[n]).items():
            torch.testing.assert_close(whole[name][n], x)
    assert torch.equal(op.function(a, b)[1], op.function(a[1], b[1]))


@both
def test_vmap_of_batches(op: Op, device: str) -> None:
    a, b = random_boxes(2, 3, 5, device=device), random_boxes(3, 7, 2, device=device)
    output = torch.vmap(op.function, in_dims=(0, 2))(a, b)
    assert torch.equal(output, torch.stack([op.function(a[v], b[:, :, v]) for v in range(2)]))


@both
@wide_dtypes
def test_all_lanes_give_identical_bits(op: Op, dtype: torch.dtype, device: str) -> None:
    """Check that results of full vectors, partial vectors and single values are bit-identical to plain arithmetic."""
    for B in [*range(1, 36), 63, 64, 65, 1024, 1025, 2100]:
        a, b = random_boxes(5, dtype=dtype, device=device), random_boxes(B, dtype=dtype, device=device)
        output = op.function(a, b)
        assert torch.equal(output, op.reference(a, b))
        assert torch.equal(output, op.function(b, a).mT)
        for j in {0, B // 2, B - 2, B - 1} - {-1}:
            assert torch.equal(output[:, j : j + 1], op.function(a, b[j : j + 1]))


# ---- Gradients ----


def formula(op: Op, a: Tensor, b: Tensor) -> Tensor:
    """Compute the textbook formula, with 0 in place of 0 / 0."""
    a, b = a[:, None], b[None]

    def sides(x: Tensor) -> Tensor:
        return torch.where(x >= 0, x, 0.0)

    inner = sides(torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2]))
    outer = sides(torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2]))
    intersection, hull = inner[..., 0] * inner[..., 1], outer[..., 0] * outer[..., 1]
    areas = [(x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b)]
    union = areas[0] + areas[1] - intersection
    iou = torch.where(union == 0, 0.0, intersection / torch.where(union == 0, 1.0, union))
    if op is IOU:
        return iou
    return iou - torch.where(hull == 0, 0.0, (hull - union) / torch.where(hull == 0, 1.0, hull))


@both
def test_gradients_at_ties(op: Op, device: str) -> None:
    """Use boxes on a coarse grid, where most pairs share coordinates, touch, or have no area."""
    inputs = {}
    for name, K in (("a", 60), ("b", 90)):
        corner, size = torch.randint(0, 5, (2, K, 2)).double().to(device)
        inputs[name] = torch.cat([corner, corner + size], 1)
    actual = op.run(inputs)
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    output = formula(op, *leaves)
    assert_equal(actual["output"], output)
    for name, x in zip(inputs, torch.autograd.grad(output, leaves, grad_like(output))):
        torch.testing.assert_close(actual[name], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        # d IoU / d intersection = 1 / U + I / U^2; d IoU / d area = -I / U^2.
        ((0, 0, 2, 2), (1, 0, 3, 2), (2 * 2 / 36, 0, 2 * 8 / 36 - 2 * 2 / 36, 0)),
        ((0, 0, 4, 4), (1, 1, 3, 3), (4 * 4 / 256, 4 * 4 / 256, -4 * 4 / 256, -4 * 4 / 256)),
        ((1, 2, 4, 7), (1, 2, 4, 7), (0, 0, 0, 0)),  # the IoU is at its maximum
        ((0, 0, 1, 1), (1, 0, 2, 1), (0, 0, 1 / 2, 0)),  # the boxes touch, and a larger x2 makes them overlap
        ((0, 0, 1, 1), (2, 0, 3, 1), (0, 0, 0, 0)),
        ((1, 1, 1, 1), (1, 1, 1, 1), (0, 0, 0, 0)),
        ((0, 0, 1, 0), (0, 0, 3, 0), (0, 0, 0, 0)),
    ],
)
def test_gradient_of_iou_by_hand(a: tuple, b: tuple, expected: tuple, device: str) -> None:
    leaf = rows(a, device=device).requires_grad_()
    relops.box_iou(leaf, rows(b, device=device)).sum().backward()
    assert leaf.grad[0].tolist() == pytest.approx(expected, abs=1e-15)
    leaf = rows(a, device=device).requires_grad_()
    relops.box_iou(rows(b, device=device), leaf).sum().backward()
    assert leaf.grad[0].tolist() == pytest.approx(expected, abs=1e-15)


def test_generalized_iou_pulls_disjoint_boxes_together(device: str) -> None:
    """Check that gradient descent moves a box onto a disjoint target. The gradient of the plain IoU would be zero."""
    target = rows((5, 6, 9, 11), device=device)
    box = rows((-3, -4, 0, 0), device=device).requires_grad_()
    optimizer = torch.optim.Adam([box], lr=0.1)
    for _ in range(600):
        optimizer.zero_grad()
        (1 - relops.generalized_box_iou(box, target)).sum().backward()
        optimizer.step()
    assert relops.box_iou(box, target).item() > 0.9


@both
@pytest.mark.parametrize(("A", "B"), [(1100, 1050), (3, 5000), (5000, 3)], ids=str)
@pytest.mark.parametrize("layout", ["dense", "transposed", "expanded", "column expanded"])
def test_sums_over_many_boxes(op: Op, A: int, B: int, layout: str, device: str, threads: None) -> None:
    """Check gradients that sum more terms than a thread adds at a time.

    They must not depend on the number of threads.
    """
    inputs = {"a": random_boxes(A, device=device), "b": random_boxes(B, device=device)}
    grad = grad_like(torch.empty(A, B, device=device))
    grad = {
        "dense": grad,
        "transposed": grad.T.contiguous().T,
        "expanded": grad[:1, 1:2].expand(A, B),
        "column expanded": grad[:, :1].expand(A, B),
    }[layout]
    actual = op.run(inputs, grad_output=grad)
    expected = op.run(op.cast(inputs, torch.float64, torch.float64), op.reference, grad.double())
    for name, x in expected.items():
        assert torch.allclose(actual[name].double(), x, rtol=1e-5, atol=1e-5 * x.abs().max().item()), name
    torch.set_num_threads(1)
    for name, x in op.run(inputs, grad_output=grad.contiguous()).items():
        if device == "cpu":
            assert torch.equal(x, actual[name]), name


# ---- Invalid boxes ----


@both
@wide_dtypes
@pytest.mark.parametrize("column", range(4))
def test_nan_stays_in_its_row_and_column(op: Op, dtype: torch.dtype, column: int, device: str) -> None:
    a, b = random_boxes(6, dtype=dtype, device=device), random_boxes(40, dtype=dtype, device=device)
    expected = op.function(a, b)
    a[2, column] = b[17, column] = b[38, column] = math.nan
    expected[2] = expected[:, [17, 38]] = math.nan
    assert_equal(op.function(a, b), expected)


@both
@wide_dtypes
def test_non_finite_coordinates_follow_plain_arithmetic(op: Op, dtype: torch.dtype, device: str) -> None:
    numbers = [-math.inf, -1e30, -1.0, 0.0, 1.0, 1e30, math.inf, math.nan]
    boxes = torch.cartesian_prod(*[torch.tensor(numbers, dtype=dtype)] * 4).to(device)
    boxes = boxes[torch.randperm(len(boxes), device=boxes.device)][:300]
    assert_equal(op.function(boxes, boxes.flip(0)), op.reference(boxes, boxes.flip(0)))


# ---- Dtypes ----


@both
@pytest.mark.parametrize("a_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("b_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_dtypes_may_differ(op: Op, a_dtype: torch.dtype, b_dtype: torch.dtype, autocast: bool, device: str) -> None:
    inputs = {"a": random_boxes(9, dtype=a_dtype, device=device), "b": random_boxes(20, dtype=b_dtype, device=device)}
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        actual = op.run(inputs)
    assert actual["output"].dtype == torch.float32
    assert actual["a"].dtype == a_dtype and actual["b"].dtype == b_dtype
    for name, x in op.run(op.cast(inputs, torch.float32, torch.float32)).items():
        assert torch.equal(actual[name], x.to(actual[name].dtype)), name


@both
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers(op: Op, dtype: torch.dtype, device: str, fresh_compiler: None) -> None:
    """Check that arithmetic and results are float64 for 64-bit integers, and float32 for narrower integers."""
    a, b = (random_boxes(2, K, device=device).round().to(dtype) for K in (9, 5))
    floating = torch.float64 if dtype.itemsize == 8 else torch.float32
    expected = op.function(a.to(floating), b.to(floating))
    for actual in (
        op.function(a, b),
        op.reference(a, b),
        torch.compile(op.function, fullgraph=True, backend="aot_eager")(a, b),
        torch.jit.script(op.function)(a, b),
        make_fx(op.function, tracing_mode="fake")(a, b)(a, b),
        torch.vmap(op.function)(a[:, None], b[:, None])[:, 0],
    ):
        assert_equal(actual, expected)


@both
@pytest.mark.parametrize("integer", [torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("floating", DTYPES, ids=str)
def test_integers_with_floats(op: Op, integer: torch.dtype, floating: torch.dtype, device: str) -> None:
    integer_boxes = random_boxes(5, device=device).round().to(integer)
    boxes = random_boxes(9, dtype=floating, device=device).requires_grad_()
    actual = op.function(boxes, integer_boxes)
    compute_dtype = torch.float64 if integer == torch.int64 or floating == torch.float64 else torch.float32
    assert_equal(actual, op.function(boxes.to(compute_dtype), integer_boxes.to(compute_dtype)))
    assert_equal(actual, op.function(integer_boxes, boxes).T)
    assert_equal(actual, op.reference(boxes, integer_boxes))
    actual.sum().backward()
    assert boxes.grad.dtype == floating and boxes.grad.any()


def test_integers_beyond_float32_keep_their_precision(device: str) -> None:
    corner = torch.tensor([2**40, 2**40, 2**40, 2**40], device=device)
    a, b = (corner + torch.tensor([box], device=device) for box in ((0, 0, 2, 2), (1, 0, 3, 2)))
    for op in (relops.box_iou, relops.generalized_box_iou):
        assert op(a, b).item() == pytest.approx(1 / 3, abs=1e-7)


@both
def test_torchscript(op: Op) -> None:
    a, b = random_boxes(3, dtype=torch.bfloat16), random_boxes(4)
    assert torch.equal(torch.jit.script(op.function)(a, b), op.function(a, b))


# ---- Random search ----

COORDINATE = st.integers(-2, 3).map(float)
BOX = st.tuples(COORDINATE, COORDINATE, COORDINATE, COORDINATE)


@both
@settings(max_examples=150, deadline=None, derandomize=True)
@given(a=st.lists(BOX, min_size=1, max_size=6), b=st.lists(BOX, min_size=1, max_size=20))
def test_random_search(op: Op, a: list[tuple[float, ...]], b: list[tuple[float, ...]]) -> None:
    """Compare with the twin for boxes on a grid. Many coordinates are equal, and boxes may be inverted or empty."""
    for device in ["cpu"] if why_no_cuda() else ["cpu", "cuda"]:
        for dtype in (torch.float64, torch.float32):
            inputs = {name: rows(*boxes, dtype=dtype, device=device) for name, boxes in (("a", a), ("b", b))}
            assert_equal(op.function(**inputs), op.reference(**inputs))
            actual, tolerance = op.run(inputs), {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
            # The gradients are sums of up to 20 terms of magnitude 1, which may cancel.
            for name, x in op.run_twin(inputs).items():
                torch.testing.assert_close(actual[name].double(), x, rtol=tolerance, atol=tolerance)


@both
def test_twin_is_finite_for_boxes_without_area(op: Op) -> None:
    boxes = rows((1, 1, 1, 1), (0, 0, 2, 0))
    results = op.run({"a": boxes, "b": boxes}, op.reference)
    assert all(x.isfinite().all() for x in results.values())
