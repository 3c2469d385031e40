"""Tests of the values and gradients of multi-scale deformable attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import Inputs, Op, Sample, grad_like
from cases.deform_attn import FUSED, PLAIN, DeformAttn
from conftest import (
    DTYPES,
    assert_matches,
    assert_matches_twin,
    needs_cuda,
    why_no_cuda,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import relops
from relops import reference

both = pytest.mark.parametrize("op", [PLAIN, FUSED], ids=lambda op: op.name)


def sample_case(op: Op, case: DeformAttn) -> Sample:
    return case.fused if op is FUSED else case.plain


def draw(op: Op, case: DeformAttn, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Inputs:
    return op.draw(sample_case(op, case), device, dtype)


# ---- Independent facts ----


def sample_one(image: Tensor, x: float, y: float, weight: float = 1.0) -> Tensor:
    """Sample an image [H,W] at the normalized location (x, y). Check that both ops return the same value."""
    H, W = image.shape
    value = image.reshape(1, H * W, 1, 1)
    location = torch.tensor([x, y], dtype=value.dtype, device=value.device).view(1, 1, 1, 1, 1, 2)
    weights = torch.full((1, 1, 1, 1, 1), weight, dtype=value.dtype, device=value.device)
    plain = relops.ms_deform_attn(value, [(H, W)], None, location, weights)
    # The softmax of a single sample is 1 for any logit.
    points, offsets = torch.full_like(location, 0.5).view(1, 1, 1, 2), (location - 0.5) * torch.tensor([W, H]).to(value)
    fused = relops.ms_deform_attn_fused(value, [(H, W)], None, points, offsets, weights) * weight
    torch.testing.assert_close(fused, plain)
    return plain.view(())


# The pixel centers of a 2 x 2 level have the coordinates 1/4 and 3/4.
IMAGE = [[1.0, 2.0], [4.0, 8.0]]
HAND_COMPUTED = {
    "pixel (0,0)": (0.25, 0.25, 1.0),
    "pixel (1,0): x comes first": (0.75, 0.25, 2.0),
    "pixel (0,1)": (0.25, 0.75, 4.0),
    "pixel (1,1)": (0.75, 0.75, 8.0),
    "middle": (0.5, 0.5, 15 / 4),
    "quarter between columns": (0.375, 0.25, 1.25),
    "half a pixel outside the left": (0.0, 0.25, 0.5),
    "half a pixel outside the right": (1.0, 0.75, 4.0),
    "half a pixel outside the top": (0.75, 0.0, 1.0),
    "corner": (1.0, 1.0, 2.0),
    "a pixel outside": (1.25, 0.25, 0.0),
    "fully outside": (-0.5, 0.5, 0.0),
    "far outside": (0.5, 1e9, 0.0),
}


@pytest.mark.parametrize(("x", "y", "expected"), HAND_COMPUTED.values(), ids=HAND_COMPUTED.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_hand_computed(device: str, dtype: torch.dtype, x: float, y: float, expected: float) -> None:
    image = torch.tensor(IMAGE, dtype=dtype, device=device)
    assert sample_one(image, x, y).item() == pytest.approx(expected, abs=1e-6)
    assert sample_one(image, x, y, weight=-3.0).item() == pytest.approx(-3 * expected, abs=1e-6)


def test_linear_ramp_is_reproduced(device: str) -> None:
    H, W = 5, 7
    rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    ramp = (3.0 * columns - 2.0 * rows + 1).double().to(device)
    for x, y in ((0.1, 0.13), (0.5, 0.5), (0.77, 0.31), (0.92, 0.88)):
        expected = 3 * (x * W - 0.5) - 2 * (y * H - 0.5) + 1
        assert sample_one(ramp, x, y).item() == pytest.approx(expected, abs=1e-12)


@both
def test_constant_value_is_returned(op: Op, device: str) -> None:
    """Check that a constant map gives the constant if all samples are inside and their weights add up to 1."""
    inputs = draw(op, DeformAttn(levels=((4, 6), (3, 3)), P=3), device, torch.float64)
    inputs["value"] = torch.full_like(inputs["value"], 2.5)
    if op is FUSED:
        inputs["reference_points"] = inputs["reference_points"] * 0 + 0.5
        inputs["sampling_offsets"] = inputs["sampling_offsets"].clamp(-1, 1)
    else:
        inputs["sampling_locations"] = inputs["sampling_locations"].clamp(0.2, 0.8)
    torch.testing.assert_close(op.function(**inputs), torch.full((2, 5, 24), 2.5, dtype=torch.float64, device=device))


def test_heads_levels_and_points_do_not_mix(device: str) -> None:
    """Set head m of level l to the constant 100 l + 10 m, so that the output shows which value each weight scales."""
    levels, M, P = [(3, 4), (2, 2)], 3, 2
    constant = torch.cat([torch.full((h * w,), 100.0 * level) for level, (h, w) in enumerate(levels)])
    value = (constant[:, None] + 10 * torch.arange(M)).view(1, -1, M, 1).to(device)
    weights = torch.tensor([[1.0, 2.0], [4.0, 8.0]], device=device).expand(1, 1, M, 2, P).clone()
    weights[:, :, 1] *= -1
    output = relops.ms_deform_attn(value, levels, None, torch.full((1, 1, M, 2, P, 2), 0.5, device=device), weights)
    assert output.flatten().tolist() == [12 * 100, -(12 * 110 + 3 * 10), 12 * 120 + 3 * 20]


def test_an_offset_of_p_reaches_the_edge_of_the_box(device: str) -> None:
    """Check that an offset of P = 4 leads to x = 0.5 + 4 / 4 * 0.5 * 0.5 = 0.75, the center of the second column."""
    image = torch.tensor(IMAGE, device=device).view(1, 4, 1, 1)
    box = torch.tensor([0.5, 0.25, 0.5, 0.1], device=device).view(1, 1, 1, 4)
    offsets = torch.tensor([4.0, 0.0], device=device).expand(1, 1, 1, 1, 4, 2)
    logits = torch.zeros(1, 1, 1, 1, 4, device=device)
    assert relops.ms_deform_attn_fused(image, [(2, 2)], None, box, offsets, logits).item() == pytest.approx(2.0)


def test_gradient_of_location_is_the_slope(device: str) -> None:
    """Check that the gradient for a ramp is its slope per pixel times W or H, because locations are normalized."""
    H, W = 4, 8
    rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    value = (3.0 * columns - 2.0 * rows).view(1, H * W, 1, 1).to(device)
    location = torch.tensor([0.4, 0.6], device=device).view(1, 1, 1, 1, 1, 2).requires_grad_()
    weights = torch.full((1, 1, 1, 1, 1), 0.5, device=device)
    relops.ms_deform_attn(value, [(H, W)], None, location, weights).sum().backward()
    torch.testing.assert_close(location.grad.flatten().cpu(), torch.tensor([0.5 * 3 * W, 0.5 * -2 * H]))


# ---- Against the twin ----

DEFORMABLE_DETR = ((6, 4), (3, 2))  # levels of Deformable DETR's own test, which has N = 1 and M = L = P = Q = 2
SHAPES = {
    **{f"Deformable-DETR D{D}": DeformAttn(DEFORMABLE_DETR, 1, 2, 2, D, 2) for D in (30, 32, 64, 71, 1025, 2048, 3096)},
    "batch 3": DeformAttn(((5, 4), (2, 3)), N=3, D=16),
    "batch 5": DeformAttn(((3, 4),), N=5, M=8, D=4, mask=True),
    "BEVFormer": DeformAttn(((12, 20), (6, 10), (3, 5), (2, 3)), N=6, Q=40, M=8, D=32, P=8),
    "DETR layer": DeformAttn(((13, 17), (7, 9), (4, 5), (2, 3)), N=1, Q=30, M=8, D=32, mask=True, boxes=True),
    "many levels": DeformAttn(tuple((1 + k % 3, 2 + k % 4) for k in range(9)), P=7, mask=True),
    "one column, one row": DeformAttn(((1, 40), (40, 1)), Q=20),
}


@both
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_shapes(op: Op, case: DeformAttn, device: str, dtype: torch.dtype) -> None:
    assert_matches_twin(op, draw(op, case, device, dtype))


@both
@pytest.mark.parametrize("D", [30, 32, 64, 71, 1025])
def test_gradcheck_of_deformable_detr(op: Op, D: int, device: str, deterministic: None) -> None:
    inputs = draw(op, DeformAttn(DEFORMABLE_DETR, 1, 2, 2, D, 2, boxes=D == 71), device, torch.float64)
    names = [name for name in inputs if name in op.differentiable]
    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *tensors: op.function(**inputs | dict(zip(names, tensors))), leaves, fast_mode=D > 32
    )


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES.keys())
def test_fused_equals_unfused(case: DeformAttn, device: str) -> None:
    inputs = draw(FUSED, case, device, torch.float64)
    offsets, logits = inputs["sampling_offsets"], inputs["attention_logits"]
    points = inputs["reference_points"][:, :, None, :, None]
    unit = points[..., 2:] * (0.5 / case.P) if case.boxes else 1 / case.sizes_xy.to(device)
    value = (
        inputs["value"] if inputs["value_mask"] is None else inputs["value"] * ~inputs["value_mask"][..., None, None]
    )
    expected = relops.ms_deform_attn(
        value,
        inputs["spatial_shapes"],
        inputs["level_start_index"],
        points[..., :2] + offsets * unit,
        logits.flatten(-2).softmax(-1).view(logits.shape),
    )
    assert_matches(FUSED.function(**inputs), expected)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("level", [(100, 167), (540, 960)], ids=str)
def test_accuracy_in_16_bit(op: Op, dtype: torch.dtype, level: tuple[int, int], device: str) -> None:
    """Compare with the twin on float64 inputs that were never rounded.

    With 16-bit coordinates, the error would be a third of the result.
    """
    case = DeformAttn((level,), N=1, Q=300, M=1, D=8)
    exact = op.draw(sample_case(op, case), device, torch.float64)
    actual = op.function(**op.cast(exact, dtype, torch.float32)).double()
    expected = op.reference(**exact)
    assert (actual - expected).square().mean().sqrt() < 0.005 * expected.square().mean().sqrt()


@both
def test_large_logits_and_weights(op: Op, device: str) -> None:
    inputs = draw(op, DeformAttn(), device)
    name = "attention_logits" if op is FUSED else "attention_weights"
    inputs[name] = inputs[name] * 1e4  # a softmax that does not subtract its maximum would overflow
    assert_matches_twin(op, inputs)


def test_logit_of_minus_infinity_removes_its_sample(device: str) -> None:
    inputs = draw(FUSED, DeformAttn(), device)
    inputs["attention_logits"][:, :, :, 0, 1] = -math.inf
    assert_matches_twin(FUSED, inputs)


# ---- Values that are not finite ----

# On the CPU, the kernels read value without a copy for "few queries", and read packed rows in the other two cases.
MODES = {
    "few queries": DeformAttn(((12, 10), (6, 5)), N=2, Q=2, M=2, D=32, P=2, mask=True),
    "many queries": DeformAttn(((6, 5), (3, 2)), N=2, Q=50, M=2, D=32, P=2, mask=True),
    "tail": DeformAttn(((12, 10), (6, 5)), N=2, Q=2, M=2, D=5, P=2, mask=True),
}
in_modes = pytest.mark.parametrize("case", MODES.values(), ids=MODES.keys())
NOT_FINITE = [math.nan, math.inf, -math.inf, 1e30, -1e30]


@both
@in_modes
@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("coordinate", [0, 1, slice(None)], ids=["x", "y", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_finite_location(
    op: Op, case: DeformAttn, bad: float, coordinate: int | slice, dtype: torch.dtype, device: str
) -> None:
    """Check that a non-finite location contributes zero, gets a zero gradient and affects no other sample."""
    inputs = draw(op, case, device, dtype)
    name = "sampling_offsets" if op is FUSED else "sampling_locations"
    replaced = torch.zeros(inputs[name].shape[:-1], dtype=torch.bool, device=device)
    replaced[:, 0, :, 1, 0] = replaced[0, 1, 0] = True
    not_finite = inputs[name].clone()
    not_finite[..., coordinate] = not_finite[..., coordinate].masked_fill(
        replaced if isinstance(coordinate, int) else replaced[..., None], bad
    )
    actual = op.run(inputs | {name: not_finite})

    # In the twin's inputs, this sample is far outside of the maps, so it contributes zero but keeps its weight in the
    # softmax.
    far = inputs[name].masked_fill(replaced[..., None], 1e4)
    expected = op.run_twin(inputs | {name: far})
    for result, x in actual.items():
        assert_matches(x, expected[result], result)
    assert not actual[name][replaced].any()


@in_modes
@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("boxes", [False, True], ids=["points", "boxes"])
def test_non_finite_reference_point(case: DeformAttn, bad: float, boxes: bool, device: str) -> None:
    inputs = FUSED.draw(replace(case, boxes=boxes).fused, device)
    far = inputs["reference_points"].clone()
    far[0, 0, 0, :2] = 1e4
    expected = FUSED.run_twin(inputs | {"reference_points": far})
    for coordinate in range(far.shape[-1]):
        points = inputs["reference_points"].clone()
        points[0, 0, 0, coordinate] = bad
        for name, x in FUSED.run(inputs | {"reference_points": points}).items():
            assert_matches(x, expected[name], f"{name} with {bad} as coordinate {coordinate}")


@both
@in_modes
@pytest.mark.parametrize("poison", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unsampled_rows_do_not_leak(op: Op, case: DeformAttn, poison: float, dtype: torch.dtype, device: str) -> None:
    """Poison the neighbors of sampled rows, the rows stored next to a level, and other heads and images.

    Check that results do not change.
    """
    inputs = draw(op, replace(case, mask=False), device, dtype)
    # All samples are among the four top left pixels of each level, or half a pixel outside of the level.
    sizes = case.sizes_xy.to(device)
    locations, points = op.coordinates[-2], (0.5 / sizes)[:, 0]
    pixels = torch.randint(2, inputs[locations].shape, device=device) - 0.5
    if op is FUSED:
        inputs["reference_points"] = points.expand_as(inputs["reference_points"]).to(inputs["reference_points"].dtype)
        inputs["sampling_offsets"] = pixels.to(inputs["sampling_offsets"].dtype)
    else:
        inputs["sampling_locations"] = ((pixels + 0.5) / sizes).to(inputs["sampling_locations"].dtype)
    sampled, start = torch.zeros(case.S, dtype=torch.bool, device=device), 0
    for h, w in case.levels:
        sampled[[start, start + 1, start + w, start + w + 1]] = True
        start += h * w
    # Only head 0 of image 0 and head 1 of image 1 are compared. In each image, the other head is poisoned too.
    compared = torch.eye(2, dtype=torch.bool, device=device)
    poisoned = ~(sampled[:, None] & compared[:, None])[..., None]  # [N,S,M,1]
    grad = torch.ones(2, case.Q, 2, case.D, dtype=dtype, device=device) * compared[:, None, :, None]
    actual, expected = (
        op.run(inputs | {"value": inputs["value"].masked_fill(poisoned, x)}, grad_output=grad.flatten(2))
        for x in (poison, 0.0)
    )
    assert_matches(actual["value"], expected["value"].double(), "value")
    for name in ("output", locations, op.coordinates[-1]):
        a, e = (x[name].unflatten(2, (2, -1)) if name == "output" else x[name] for x in (actual, expected))
        assert_matches(a.transpose(1, 2)[compared], e.transpose(1, 2)[compared].double(), name)


@in_modes
@pytest.mark.parametrize("poison", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_rows_do_not_leak(case: DeformAttn, poison: float, dtype: torch.dtype, device: str) -> None:
    inputs = draw(FUSED, case, device, dtype)
    poisoned = inputs["value"].masked_fill(inputs["value_mask"][:, :, None, None], poison)
    actual, expected = FUSED.run(inputs | {"value": poisoned}), FUSED.run(inputs)
    for name, x in actual.items():
        assert_matches(x, expected[name].double(), name)
    assert not actual["value"][inputs["value_mask"]].any()


def test_everything_masked(device: str) -> None:
    inputs = draw(FUSED, MODES["many queries"], device)
    inputs["value_mask"] = torch.ones_like(inputs["value_mask"])
    assert not any(x.any() for x in FUSED.run(inputs).values())


# ---- Alternative code paths ----


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splitting_the_queries_changes_nothing(op: Op, dtype: torch.dtype, device: str) -> None:
    """Compare the results of one call for 72 queries with those of calls for 6 queries each.

    For 72 queries the CPU kernel packs rows of value, and for 6 queries it reads value without a copy.
    """
    case = DeformAttn(((20, 20), (10, 10)), N=2, Q=72, M=2, D=32, mask=True)
    inputs = draw(op, case, device, dtype)
    actual = op.run(inputs)
    grads = grad_like(actual["output"])
    by_query = ("reference_points", "sampling_offsets", "attention_logits", "sampling_locations", "attention_weights")
    value_grad = torch.zeros_like(inputs["value"], dtype=torch.float64)
    for first in range(0, case.Q, 6):
        queries = slice(first, first + 6)
        few = op.run(
            {name: x[:, queries] if name in by_query else x for name, x in inputs.items()},
            grad_output=grads[:, queries],
        )
        value_grad += few.pop("value").double()
        for name, x in few.items():
            assert_matches(x, actual[name][:, queries].double(), name)
    if dtype.itemsize >= 4:  # in 16-bit dtypes the sum of rounded gradients is not the rounded sum
        assert_matches(actual["value"], value_grad, "value")


@both
@pytest.mark.parametrize("Q", [1, 3, 200])
@pytest.mark.parametrize(("N", "M"), [(1, 1), (2, 3)])
def test_any_number_of_threads(op: Op, Q: int, N: int, M: int, threads: None) -> None:
    inputs = draw(op, DeformAttn(((9, 11), (4, 5)), N=N, M=M, Q=Q, D=12, mask=True))
    runs = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        runs.append(op.run(inputs))
    expected = op.run_twin(inputs)
    for run in runs:
        for name, x in run.items():
            assert_matches(x, expected[name], name)


@pytest.mark.parametrize("needs_grad", [*(tuple(i == j for j in range(4)) for i in range(4)), (True,) * 4], ids=str)
def test_backward_op_returns_only_needed_gradients(needs_grad: tuple[bool, ...], device: str) -> None:
    inputs = FUSED.raw(draw(FUSED, DeformAttn(mask=True), device))
    grad = grad_like(FUSED.function(**inputs))
    grads = torch.ops.relops._ms_deform_attn_fused_backward(grad, *inputs.values(), True, needs_grad)
    expected = FUSED.run(inputs)
    names = ("value", "reference_points", "sampling_offsets", "attention_logits")
    for name, needed, actual in zip(names, needs_grad, grads, strict=True):
        assert actual.shape == (inputs[name].shape if needed else (0,))
        if needed:
            assert_matches(actual, expected[name].double(), name)


@both
def test_compile_with_lists_of_sizes(op: Op) -> None:
    """Check that new sizes in a list cause at most one recompilation, because `dynamic=True` makes sizes symbols."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op.function, fullgraph=True, backend=counter, dynamic=True)
    for k in range(4):
        inputs = draw(op, DeformAttn(((4 + k, 7 + 2 * k), (2 + k, 3 + 3 * k)), N=3 + k, Q=10 + 7 * k, M=5))
        assert torch.equal(compiled(**inputs), op.function(**inputs))
    assert counter.frame_count <= 2


# ---- Random search ----

SIZES = st.integers(0, 9)
FAR = 1e4  # a location with such a large coordinate is outside of every level
# Normalized coordinates: on borders, on pixel centers, outside by half a pixel, by one pixel and by far, and
# non-finite.
COORDINATES = st.one_of(
    st.floats(-0.6, 1.6),
    st.sampled_from([0.0, 1.0, 0.5, 0.25, 0.75, 0.125, -0.125, -0.25, -0.5, 1.25, 1.5, 1e-30, *NOT_FINITE]),
)


@st.composite
def random_cases(draw_from: st.DrawFn) -> tuple[DeformAttn, list[float], int]:
    levels = draw_from(st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=4))
    case = DeformAttn(
        levels=tuple(levels),
        N=draw_from(st.integers(0, 3)),
        Q=draw_from(st.integers(0, 9)),
        M=draw_from(st.integers(1, 3)),
        D=draw_from(st.integers(1, 20)),
        P=draw_from(st.integers(1, 5)),
        shapes=draw_from(st.sampled_from(["list", "tensor"])),
        starts=draw_from(st.sampled_from([None, "in order", "reversed"])),
        boxes=draw_from(st.booleans()),
        mask=draw_from(st.booleans()),
    )
    return case, draw_from(st.lists(COORDINATES, min_size=1, max_size=40)), draw_from(st.integers(0, 2**31))


def oracle(
    value: Tensor,
    spatial_shapes: Tensor | list[tuple[int, int]],
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Run the twin after removing the samples and levels that contribute zero.

    The twin supports only finite locations and non-empty levels.
    """
    shapes = torch.as_tensor(spatial_shapes)
    areas = shapes.prod(-1)
    starts = areas.cumsum(0) - areas if level_start_index is None else level_start_index
    kept = areas > 0
    inside = (sampling_locations.abs() < FAR).all(-1)
    locations = torch.where(inside[..., None], sampling_locations, 0.5)[:, :, :, kept]
    weights = (attention_weights * inside)[:, :, :, kept]
    if not kept.any():
        N, Q, M = weights.shape[:3]
        return value.new_zeros(N, Q, M * value.shape[3]) + 0 * (value.sum() + locations.sum() + weights.sum())
    return reference.ms_deform_attn(value, shapes[kept], starts[kept], locations, weights)


def fused_oracle(
    value: Tensor,
    spatial_shapes: Tensor | list[tuple[int, int]],
    level_start_index: Tensor | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    value_mask: Tensor | None,
) -> Tensor:
    # With a non-finite offset, the gradient of the box would be 0 * inf, which is NaN.
    offsets = torch.where(sampling_offsets.abs() < 100 * FAR, sampling_offsets, 100 * FAR)
    points = reference_points[:, :, None, :, None]
    if points.shape[-1] == 4:
        unit = points[..., 2:] * (0.5 / offsets.shape[4])
    else:
        unit = 1 / torch.as_tensor(spatial_shapes).flip(-1)[:, None].to(value).clamp(min=1)
    if value_mask is not None:
        value = value.masked_fill(value_mask[:, :, None, None], 0)
    weights = attention_logits.flatten(-2).softmax(-1).view(attention_logits.shape)
    return oracle(value, spatial_shapes, level_start_index, points[..., :2] + offsets * unit, weights)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(random_cases())
def test_random_search(search: tuple[DeformAttn, list[float], int]) -> None:
    for device in ["cpu"] if why_no_cuda() else ["cpu", "cuda"]:
        check_against_oracles(*search, device)


def check_against_oracles(case: DeformAttn, coordinates: list[float], seed: int, device: str) -> None:
    torch.manual_seed(seed)
    fused = FUSED.draw(case.fused, device, torch.float64)
    pool = torch.tensor(coordinates, dtype=torch.float64, device=device)
    locations = pool[torch.randint(len(pool), fused["sampling_offsets"].shape, device=device)]
    sizes = case.sizes_xy.to(device)
    # The gradient of a location jumps at a pixel center. Gradients at pixel centers are not compared, because the
    # slopes on both sides are correct.
    pixels = locations * sizes - 0.5
    smooth = ~((pixels - pixels.round()).abs() < 1e-6)

    plain = {name: fused[name] for name in ("value", "spatial_shapes", "level_start_index")} | {
        "sampling_locations": locations,
        "attention_weights": fused["attention_logits"],
    }
    compare(PLAIN, plain, oracle, {"sampling_locations": smooth})

    points = fused["reference_points"]
    unit = points[:, :, None, :, None, 2:] * (0.5 / case.P) if case.boxes else 1 / sizes
    fused["sampling_offsets"] = (locations - points[:, :, None, :, None, :2]) / unit
    smooth_reference = smooth.all(4).all(2).repeat(1, 1, 1, points.shape[-1] // 2)
    compare(FUSED, fused, fused_oracle, {"sampling_offsets": smooth, "reference_points": smooth_reference})


def compare(op: Op, inputs: Inputs, twin: Callable[..., Tensor], smooth: dict[str, Tensor]) -> None:
    actual = op.run(inputs)
    expected = op.run(inputs, twin)
    for name, x in actual.items():
        compared = smooth.get(name, torch.ones_like(x, dtype=torch.bool))
        torch.testing.assert_close(
            x[compared], expected[name][compared], rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


# ---- CUDA ----


@needs_cuda
@both
@pytest.mark.parametrize("levels", ["few", "many", "on the device", "with starts on the device"])
def test_cuda_graph(op: Op, levels: str) -> None:
    """Capture a call once, and replay it with other inputs.

    If spatial_shapes are on the host, the graph stores them.
    """
    case = DeformAttn(
        levels=((2, 3),) * 17 if levels == "many" else DeformAttn.levels,
        mask=True,
        shapes="tensor" if levels == "on the device" else "list",
        starts="in order" if levels == "with starts on the device" else None,
    )
    inputs = draw(op, case, "cuda")
    op.function(**inputs)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        output = op.function(**inputs)
    for name in ("value", *op.coordinates):
        inputs[name].copy_(inputs[name] * 0.9)
    graph.replay()
    assert_matches(output, op.reference(**op.cast(inputs, torch.float64, torch.float64)))


@needs_cuda
@both
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("spatial_shapes", shapes)
        for shapes in (
            [[6, 4], [3, 3]],
            [[60, 40], [3, 2]],
            [[-6, -4], [3, 2]],
            [[2**40, 2**40], [3, 2]],
            [[6, 4], [0, 0]],
        )
    ]
    + [("level_start_index", starts) for starts in ([0, 25], [-1, 24], [0, 2**62])],
    ids=str,
)
def test_cuda_invalid_levels_on_the_device_give_nan(op: Op, name: str, sizes: list) -> None:
    """Check that invalid sizes on the device give NaN, and that kernels read nothing outside of their tensors.

    The host does not check such sizes, because it would have to synchronize.
    """
    inputs = draw(op, DeformAttn(), "cuda") | {name: torch.tensor(sizes, device="cuda")}
    results = op.run(inputs)
    torch.cuda.synchronize()
    assert results["output"].isnan().all()


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@both
def test_cuda_device_that_is_not_current(op: Op) -> None:
    inputs = draw(op, DeformAttn(mask=True), "cuda:1")
    with torch.cuda.device(0):
        actual = op.run(inputs)
    for name, expected in op.run_twin(inputs).items():
        assert actual[name].device == inputs["value"].device
        assert_matches(actual[name], expected, name)


@needs_cuda
@both
def test_cuda_memory(op: Op) -> None:
    """Check that the memory of a call is bounded by the sizes of its outputs and inputs.

    Sampled values are not stored, and the fused op does not store locations and weights either.
    """
    inputs = draw(op, DeformAttn(((64, 64), (32, 32)), N=2, Q=4096, M=8, D=32), "cuda")
    inputs = {n: x.requires_grad_() if n in op.differentiable else x for n, x in inputs.items()}

    def allocated_by(f: Callable[[], Tensor | None]) -> tuple[int, Tensor | None]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = f()
        return torch.cuda.max_memory_allocated() - before, result

    size = {name: x.numel() * 4 for name, x in inputs.items() if isinstance(x, Tensor)}
    slack = 2**20
    forward, output = allocated_by(lambda: op.function(**inputs))
    assert forward <= output.numel() * 4 + slack
    grad = grad_like(output)
    backward, _ = allocated_by(lambda: output.backward(grad))
    assert backward <= sum(size[name] for name in op.differentiable) + sum(size.values()) + slack


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_sizes_in_a_list_are_symbols_of_a_symbolic_graph(fused: bool) -> None:
    """Check that a graph computes the levels (H,W) from its inputs and does not store them as constants."""

    def attend(*inputs: Tensor) -> Tensor:
        maps, (points, weights) = inputs[:2], inputs[2:]
        value = torch.cat([x.flatten(2) for x in maps], 2).transpose(1, 2).unflatten(2, (2, -1))
        shapes = [tuple(x.shape[2:]) for x in maps]
        if fused:
            return relops.ms_deform_attn_fused(value, shapes, None, points[:, :, 0, :, 0], points, weights)
        return relops.ms_deform_attn(value, shapes, None, points, weights)

    def inputs(*sizes: tuple[int, int]) -> list[Tensor]:
        return [*(torch.randn(1, 8, *size) for size in sizes), torch.rand(1, 4, 2, 2, 3, 2), torch.rand(1, 4, 2, 2, 3)]

    graph = make_fx(attend, tracing_mode="symbolic")(*inputs((6, 5), (10, 9)))
    others = inputs((13, 7), (3, 11))
    assert torch.equal(graph(*others), attend(*others))
