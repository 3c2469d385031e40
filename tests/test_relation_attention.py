"""Tests of the values and gradients of relation_attention, which weights attention by the geometry of boxes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import Inputs, grad_like
from cases.relation_attention import RELATION_ATTENTION as OP
from cases.relation_attention import Relations
from conftest import (
    assert_matches,
    assert_matches_twin,
    needs_cuda,
    resident_growth,
    why_no_cuda,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import relops
from relops.ops._tf32 import tf32_allowed

both_geometries = pytest.mark.parametrize("geometry", ["paper", "official"])


def draw(case: Relations, device: str = "cpu", dtype: torch.dtype = torch.float64, **options: object) -> Inputs:
    return OP.draw(replace(case, options=tuple(options.items())).relation_attention, device, dtype)


# ---- The definition, written out ----


def embedding(query: list[float], key: list[float], geometry: str, wavelength: float) -> list[float]:
    def center_and_size(box: list[float]) -> tuple[float, ...]:
        x1, y1, x2, y2 = box
        return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1 + 1, y2 - y1 + 1

    (qx, qy, qw, qh), (kx, ky, kw, kh) = center_and_size(query), center_and_size(key)
    w, h = (qw, qh) if geometry == "official" else (kw, kh)
    coordinates = [max(abs(qx - kx) / w, 1e-3), max(abs(qy - ky) / h, 1e-3), qw / kw, qh / kh]
    numbers = []
    for coordinate in map(math.log, coordinates):
        angles = [100 * coordinate / wavelength ** (j / 8) for j in range(8)]
        numbers += [*map(math.sin, angles), *map(math.cos, angles)]
    return numbers


def geometry_bias(inputs: Inputs) -> Tensor:
    """Return the attention bias log max(b, 1e-6), [N,M,Q,K], in float64."""
    weight, bias = inputs["geometry_weight"].tolist(), inputs["geometry_bias"]
    biases = [0.0] * len(weight) if bias is None else bias.tolist()

    def logits(query: list[float], key: list[float]) -> list[float]:
        e = embedding(query, key, inputs["geometry"], inputs["wavelength"])
        b = [sum(w * x for w, x in zip(row, e)) + constant for row, constant in zip(weight, biases)]
        return [math.log(max(x, 1e-6)) for x in b]

    pairs = zip(inputs["query_boxes"].tolist(), inputs["key_boxes"].tolist())
    rows = [[[logits(query, key) for key in keys] for query in queries] for queries, keys in pairs]
    return torch.tensor(rows, dtype=torch.float64, device=inputs["query"].device).permute(0, 3, 1, 2)


def attention(inputs: Inputs, bias: Tensor | None) -> Tensor:
    query, key, value = (inputs[name].transpose(1, 2) for name in ("query", "key", "value"))
    return F.scaled_dot_product_attention(query, key, value, bias, scale=inputs["scale"]).transpose(1, 2)


@both_geometries
@pytest.mark.parametrize(
    "case",
    [
        Relations(),
        Relations(N=1, Q=3, K=17, M=2, D=5, Dv=3, bias=None),
        Relations(N=3, M=1, D=16, Dv=20, clamped=True),
        Relations(Q=9, same_boxes=True),
        Relations(Q=1, K=1),
    ],
    ids=["typical", "no bias", "clamped", "same boxes", "one pair"],
)
@pytest.mark.parametrize(("wavelength", "scale"), [(1000.0, None), (77.0, 0.7), (10000.0, -0.1)])
def test_definition(case: Relations, geometry: str, wavelength: float, scale: float | None, device: str) -> None:
    inputs = draw(case, device, geometry=geometry, wavelength=wavelength, scale=scale)
    assert_matches(OP.function(**inputs), attention(inputs, geometry_bias(inputs)), noise=OP.noise)


def test_one_coordinate_by_hand(device: str) -> None:
    """Give a weight only to the slowest sine of log(|dx| / w), so that b = 1 + sin(100 / 1000^(7/8) log(30 / 10))."""
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [30.0, 0.0, 39.0, 9.0], [30.0, 50.0, 39.0, 59.0]], device=device)
    weight = torch.zeros(1, 64, device=device)
    weight[0, 7] = 1
    value = torch.tensor([1.0, 2.0, 4.0], device=device).view(1, 3, 1, 1)
    zeros = torch.zeros(1, 3, 1, 1, device=device)
    output = relops.relation_attention(
        zeros[:, :1], zeros, value, boxes[None, :1], boxes[None], weight, torch.ones(1, device=device)
    )
    far, near = (1 + math.sin(100 / 1000 ** (7 / 8) * math.log(x)) for x in (3, 1e-3))
    expected = (near * 1 + far * 2 + far * 4) / (near + far + far)
    assert output.item() == pytest.approx(expected, rel=1e-6)


def test_geometries_differ_for_unequal_boxes(device: str) -> None:
    """Check that "paper" and "official" give the same result if all boxes have the same size, and only then."""
    inputs = draw(Relations(), device)
    for name in ("query_boxes", "key_boxes"):
        inputs[name][..., 2:] = inputs[name][..., :2] + 40
    assert_matches(OP.function(**inputs | {"geometry": "official"}), OP.function(**inputs), noise=OP.noise)
    inputs["key_boxes"][..., 2:] += 30
    difference = OP.function(**inputs | {"geometry": "official"}) - OP.function(**inputs)
    assert difference.abs().max() > 1e-2


# ---- Identities ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_uniform_attention_is_a_mean(dtype: torch.dtype, device: str) -> None:
    inputs = draw(Relations(mask="some", K=40), device, dtype)
    inputs["geometry_weight"] = torch.zeros_like(inputs["geometry_weight"])
    inputs["query"] = torch.zeros_like(inputs["query"])
    kept = ~inputs["key_mask"].double()[:, :, None, None].bool()
    mean = (inputs["value"].double() * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
    for bias in (2.5, 1e-3, -7.0, 0.0):
        output = OP.function(**inputs | {"geometry_bias": torch.full_like(inputs["geometry_bias"], bias)})
        assert_matches(output, mean.expand(output.shape))


@pytest.mark.parametrize("bias", [2.5, -3.0], ids=["constant", "clamped"])
def test_equals_attention_without_geometry(bias: float, device: str) -> None:
    inputs = draw(Relations(K=50, D=16), device)
    inputs["geometry_weight"] = torch.zeros_like(inputs["geometry_weight"])
    inputs["geometry_bias"] = torch.full_like(inputs["geometry_bias"], bias)
    needs_grad = ("query", "key", "value")
    expected = OP.run(inputs, lambda **inputs: attention(inputs, None), needs_grad=needs_grad)
    for name, x in OP.run(inputs, needs_grad=needs_grad).items():
        assert_matches(x, expected[name], name)


def test_large_logits(device: str) -> None:
    """Check that the largest logit is subtracted before the exponential, which would overflow otherwise."""
    inputs = draw(Relations(K=40, D=16), device, torch.float32, scale=30.0)
    assert_matches(OP.function(**inputs), OP.run_twin(inputs)["output"], noise=30 * OP.noise)
    inputs["scale"] = 1e4
    assert OP.function(**inputs).isfinite().all()


@both_geometries
def test_geometry_is_relative(geometry: str, device: str) -> None:
    """Check that the output stays the same if all boxes are moved, scaled or mirrored.

    The width of a box is x2 - x1 + 1.
    """
    inputs = draw(Relations(), device, geometry=geometry)
    expected = OP.function(**inputs)
    shift = torch.tensor([[100.0, -37.0, 100.0, -37.0]], dtype=torch.float64, device=device)
    one = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64, device=device)
    for change in (lambda x: x + shift, lambda x: 2.5 * (x + one) - one):
        changed = {name: change(inputs[name]) for name in ("query_boxes", "key_boxes")}
        assert_matches(OP.function(**inputs | changed), expected, noise=OP.noise)
    mirrored = {
        name: -inputs[name][..., [2, 1, 0, 3]] * torch.tensor([1.0, -1.0, 1.0, -1.0]).to(shift)
        for name in ("query_boxes", "key_boxes")
    }
    assert_matches(OP.function(**inputs | mirrored), expected, noise=OP.noise)


def permuted(inputs: Inputs, order: Tensor, *names: str) -> Inputs:
    return inputs | {name: inputs[name][:, order] for name in names}


KEYS = ("key", "value", "key_boxes", "key_mask")
QUERIES = ("query", "query_boxes")


def test_permuted_queries_permute_the_output_and_permuted_keys_do_not_change_it(device: str) -> None:
    inputs = draw(Relations(Q=37, K=50, mask="some"), device)
    expected = OP.function(**inputs)
    keys, queries = torch.randperm(50, device=device), torch.randperm(37, device=device)
    assert_matches(OP.function(**permuted(inputs, keys, *KEYS)), expected, noise=OP.noise)
    assert_matches(OP.function(**permuted(inputs, queries, *QUERIES)), expected[:, queries], noise=OP.noise)


def test_permuted_objects_have_permuted_outputs(device: str) -> None:
    """Check that permuting objects, which are both queries and keys, permutes the output."""
    inputs = draw(Relations(Q=40, K=40, same_boxes=True), device)
    inputs["key"] = inputs["query"].clone()
    order = torch.randperm(40, device=device)
    del inputs["key_mask"]
    output = OP.function(**permuted(inputs, order, "key", "value", "key_boxes", *QUERIES))
    assert_matches(output, OP.function(**inputs)[:, order], noise=OP.noise)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_padded_batch_equals_a_loop(dtype: torch.dtype, device: str) -> None:
    inputs = draw(Relations(N=4, Q=5, K=70, D=16), device, dtype)
    sizes = [70, 1, 33, 64]
    inputs["key_mask"] = torch.arange(70, device=device) >= torch.tensor(sizes, device=device)[:, None]
    whole = OP.run(inputs)
    grads = grad_like(whole["output"])
    sums = {name: torch.zeros_like(whole[name], dtype=torch.float64) for name in ("geometry_weight", "geometry_bias")}
    for n, size in enumerate(sizes):
        image = {name: inputs[name][n : n + 1] for name in QUERIES} | {
            name: inputs[name][n : n + 1, :size] for name in ("key", "value", "key_boxes")
        }
        alone = OP.run(inputs | image | {"key_mask": None}, grad_output=grads[n : n + 1])
        for name in (*QUERIES, "output"):
            assert_matches(whole[name][n : n + 1], alone[name].double(), name, noise=OP.noise)
        for name in ("key", "value", "key_boxes"):
            assert_matches(whole[name][n : n + 1, :size], alone[name].double(), name, noise=OP.noise)
            assert not whole[name][n, size:].any(), name
        for name in sums:
            sums[name] += alone[name].double()
    for name, x in sums.items():
        assert_matches(whole[name], x, name, noise=OP.noise)


# ---- Masked keys, and queries without keys ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_query_without_keys_gives_zeros(dtype: torch.dtype, device: str) -> None:
    inputs = draw(Relations(N=3, Q=40, K=50, mask="all"), device, dtype)
    results = OP.run(inputs)
    for name in ("output", *QUERIES, "key", "value", "key_boxes"):
        assert not results[name][0].any(), name
        assert results[name][1:].any() and results[name].isfinite().all(), name
    # The other images are not affected.
    alone = OP.run(
        {name: x[1:] if isinstance(x, Tensor) and "geometry" not in name else x for name, x in inputs.items()},
        grad_output=grad_like(results["output"])[1:],
    )
    assert torch.equal(alone["output"], results["output"][1:])
    assert_matches(alone["geometry_weight"], results["geometry_weight"].double(), noise=OP.noise)


POISON = [math.nan, math.inf, -math.inf, 1e30, -1e30]


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["some", "all"])
def test_masked_keys_do_not_leak(mask: str, dtype: torch.dtype, poison: float, device: str) -> None:
    """Check that the values of masked keys, and of queries whose keys are all masked, do not affect the results."""
    inputs = draw(Relations(Q=20, K=70, D=17, mask=mask), device, dtype)
    masked = inputs["key_mask"]
    expected = OP.run(inputs)
    for name in QUERIES if mask == "all" else ():
        inputs[name][0] = poison
    for name in ("key", "value", "key_boxes"):
        inputs[name] = inputs[name].masked_fill(masked.view(*masked.shape, *[1] * (inputs[name].dim() - 2)), poison)
    for name, x in OP.run(inputs).items():
        assert torch.equal(x, expected[name]), name
        if name in ("key", "value", "key_boxes"):
            assert not x[masked].any()


# ---- Boxes for which a logarithm is undefined ----

INVALID_BOXES = {
    "nan": (1.0, math.nan, 9.0, 9.0),
    "infinite": (1.0, 1.0, math.inf, 9.0),
    "everywhere": (-math.inf, -math.inf, math.inf, math.inf),
    "inverted": (20.0, 1.0, 9.0, 30.0),
    "inverted twice": (20.0, 20.0, 9.0, 9.0),
    "no width": (10.0, 1.0, 9.0, 30.0),
}


@pytest.mark.parametrize("box", INVALID_BOXES.values(), ids=INVALID_BOXES)
@both_geometries
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_invalid_box(geometry: str, box: tuple[float, ...], dtype: torch.dtype, device: str) -> None:
    """Check that an invalid query box gives NaN only in its row, and an invalid key box in all rows of its image."""
    inputs = draw(Relations(N=3, Q=37, K=50, mask="some"), device, dtype, geometry=geometry)
    expected = OP.function(**inputs)
    query_boxes = inputs["query_boxes"].clone()
    query_boxes[1, 20] = torch.tensor(box)
    with_nan = expected.clone()
    with_nan[1, 20] = math.nan
    actual = OP.run(inputs | {"query_boxes": query_boxes})
    torch.testing.assert_close(actual["output"], with_nan, rtol=0, atol=0, equal_nan=True)
    assert actual["query"][[0, 2]].isfinite().all()

    key_boxes = inputs["key_boxes"].clone()
    key_boxes[1, 33] = torch.tensor(box)
    mask = inputs["key_mask"].clone()
    mask[1, 33] = False
    with_nan = expected.clone()
    with_nan[1] = math.nan
    actual = OP.run(inputs | {"key_boxes": key_boxes, "key_mask": mask})
    torch.testing.assert_close(actual["output"], with_nan, rtol=0, atol=0, equal_nan=True)
    assert actual["value"][[0, 2]].isfinite().all()


@pytest.mark.parametrize("size", [1e4, 1e9, 1e15, 1e30, 3e38])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_huge_coordinates(dtype: torch.dtype, size: float, device: str) -> None:
    """Check that results are finite if their exact values are, and that the op returns for huge coordinates."""
    inputs = draw(Relations(), device, dtype)
    for change in (lambda x: x * size, lambda x: x + size, lambda x: x - size):
        changed = {name: change(inputs[name].double()).to(dtype) for name in ("query_boxes", "key_boxes")}
        results = OP.run(inputs | changed)
        if all(x.double().abs().max() < 1e37 and (x[..., 2:] >= x[..., :2]).all() for x in changed.values()):
            assert all(x.isfinite().all() for x in results.values())
    everything = torch.tensor([-size, -size, size, size]).to(inputs["query_boxes"])
    results = OP.run(inputs | {"query_boxes": everything.expand_as(inputs["query_boxes"])})
    if size < 1e37:
        assert all(x.isfinite().all() for x in results.values())


def test_boxes_far_from_the_origin_keep_their_precision(device: str) -> None:
    """Check that distances between float32 boxes near 1e6 are as accurate as the coordinates of the boxes."""
    inputs = draw(Relations(), device, torch.float32)
    for name in ("query_boxes", "key_boxes"):
        inputs[name] = inputs[name] + 1e6
    assert_matches_twin(OP, inputs)


# ---- Gradients ----


@both_geometries
@pytest.mark.parametrize("same_boxes", [False, True])
def test_gradcheck(geometry: str, same_boxes: bool, device: str) -> None:
    """Check the gradient of every input, with some keys masked, and with positive and negative b."""
    case = Relations(N=2, Q=3, K=3, M=3, D=3, Dv=2, bias=0.0, clamped=True, same_boxes=same_boxes, mask="all")
    inputs = draw(case, device, geometry=geometry)
    inputs["key_mask"][1, :2] = False
    names = OP.needs_grad(inputs)
    leaves = [inputs[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *tensors: OP.function(**inputs | dict(zip(names, tensors))), leaves)


def test_clamped_weights_have_no_gradient(device: str) -> None:
    inputs = draw(Relations(clamped=True), device)
    results = OP.run(inputs)
    assert not results["geometry_weight"][-1].any() and not results["geometry_bias"][-1].any()
    assert results["geometry_weight"][:-1].any(1).all() and results["geometry_bias"][:-1].all()
    inputs["geometry_bias"] = torch.full_like(inputs["geometry_bias"], -10.0)
    results = OP.run(inputs)
    for name in ("geometry_weight", "geometry_bias", "query_boxes", "key_boxes"):
        assert not results[name].any(), name
    assert results["query"].any()


def test_clamped_distances_have_no_gradient(device: str) -> None:
    """Check that boxes with the same center get no gradient, because their distances are clamped."""
    inputs = draw(Relations(), device)
    inputs["geometry_weight"][:, 32:] = 0
    half = torch.rand(2, 9, 2, dtype=torch.float64, device=device) * 100 + 1
    boxes = torch.cat([50 - half, 50 + half], -1)
    changed = {"query_boxes": boxes[:, :6], "key_boxes": boxes}
    results = OP.run(inputs | changed)
    assert not results["query_boxes"].any() and not results["key_boxes"].any()
    changed["query_boxes"] = changed["query_boxes"] + torch.tensor([0.4, 0.0, 0.4, 0.0]).to(half)
    results = OP.run(inputs | changed)
    assert results["query_boxes"][..., 0].all() and not results["query_boxes"][..., 1].any()


def test_output_is_the_value_of_the_only_key(device: str) -> None:
    """Check that the output is the value of the only key, and that only `value` has a gradient."""
    inputs = draw(Relations(K=1), device)
    results = OP.run(inputs)
    torch.testing.assert_close(results["output"], inputs["value"].expand(results["output"].shape))
    for name in set(OP.differentiable) - {"value"}:
        assert results[name].abs().max() < 1e-12, name


@pytest.mark.parametrize("flags", [1 << i for i in range(7)] + [0, 0b1010101, 0b1111000, 0b1111111], ids=bin)
def test_backward_op_returns_only_needed_gradients(flags: int, device: str) -> None:
    inputs = draw(Relations(mask="some"), device)
    needs_grad = [bool(flags >> i & 1) for i in range(7)]
    raw = OP.raw(inputs)
    output, logsumexp = OP.overload(*raw.values())
    tensors, options = list(raw.values())[:8], list(raw.values())[8:]
    grads = torch.ops.relops._relation_attention_backward(
        grad_like(output), *tensors, output, logsumexp, *options, needs_grad
    )
    expected = OP.run(inputs)
    for name, needed, x in zip(OP.differentiable, needs_grad, grads):
        assert x.shape == (inputs[name].shape if needed else (0,)), name
        if needed:
            assert torch.equal(x, expected[name]), name


def test_raw_op_names_an_unknown_geometry(device: str) -> None:
    inputs = OP.raw(draw(Relations(), device)) | {"geometry": "other"}
    with pytest.raises(RuntimeError, match=r"relation_attention: geometry must be paper or official, got other"):
        OP.overload(*inputs.values())


def test_logsumexp(device: str) -> None:
    """Check the logsumexp of the logits, which the forward pass saves. For a query without keys, it is infinite."""
    inputs = draw(Relations(N=3, Q=5, K=40, mask="all"), device)
    output, logsumexp = OP.overload(*OP.raw(inputs).values())
    logits = geometry_bias(inputs) + inputs["query"].shape[3] ** -0.5 * torch.einsum(
        "nqmd,nkmd->nmqk", inputs["query"], inputs["key"]
    )
    logits = logits.masked_fill(inputs["key_mask"][:, None, None], -math.inf)
    torch.testing.assert_close(logsumexp[1:], logits.logsumexp(-1).transpose(1, 2)[1:], rtol=1e-12, atol=1e-12)
    assert (logsumexp[0] == math.inf).all() and not output[0].any()
    for dtype, wide in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        assert OP.overload(*OP.raw(OP.cast(inputs, dtype, wide)).values())[1].dtype == wide
    leaves = [x.requires_grad_() if i < 7 else x for i, x in enumerate(OP.raw(inputs).values())]
    output, logsumexp = OP.overload(*leaves)
    assert output.requires_grad and not logsumexp.requires_grad


# ---- Dtypes and settings ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_accuracy_in_16_bit(dtype: torch.dtype, device: str) -> None:
    """Compare with the twin on float64 inputs that were never rounded.

    Results are accurate only if boxes stay float32.
    """
    exact = draw(Relations(Q=60, K=80, D=32, Dv=32, bias=2.0), device)
    for name in ("query_boxes", "key_boxes"):
        exact[name] = exact[name] + torch.rand_like(exact[name])
    exact["scale"] = 0.0  # removes q . k, whose error comes from the rounded inputs
    expected = OP.reference(**exact)

    def error(coordinates: torch.dtype) -> float:
        output = OP.function(**OP.cast(exact, dtype, coordinates)).double()
        return ((output - expected).square().mean() / expected.square().mean()).sqrt().item()

    assert error(torch.float32) < 0.005
    if dtype == torch.bfloat16:
        assert error(dtype) > 0.02


@pytest.mark.parametrize("narrow", [("query",), ("key",), ("value",), ("query", "value")], ids=",".join)
def test_mixed_features(narrow: tuple[str, ...], device: str) -> None:
    """Check that autocast converts all features to the widest dtype, and that dtypes must be equal without autocast."""
    inputs = draw(Relations(), device, torch.float32)
    mixed = inputs | {name: inputs[name].bfloat16() for name in narrow}
    with torch.autocast(device, torch.bfloat16):
        actual = OP.run(mixed)
    expected = OP.run(mixed | {name: mixed[name].float() for name in narrow})
    for name, x in actual.items():
        assert torch.equal(x, expected[name].to(x.dtype)), name
        assert name == "output" or x.dtype == mixed[name].dtype
    with pytest.raises(
        TypeError, match=r"relops\.relation_attention: (key|value) must be torch\..*, the dtype of query"
    ):
        OP.function(**mixed)


@pytest.mark.parametrize("name", ["geometry_weight", "geometry_bias"])
def test_vmap_over_weights_raises(name: str, device: str) -> None:
    inputs = draw(Relations(), device)
    stacked = torch.stack([inputs[name]] * 2)
    with pytest.raises(ValueError, match=f"relops.relation_attention: vmap over {name} is not supported"):
        torch.vmap(lambda x: OP.function(**inputs | {name: x}))(stacked)


@pytest.fixture
def matmul_precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before
    torch.set_float32_matmul_precision("highest")


@pytest.mark.filterwarnings("error")
def test_tf32_follows_the_settings(matmul_precision: None, fresh_compiler: None) -> None:
    """Check all settings that control TF32, in eager and in compiled code."""

    def switches() -> Iterator[tuple[Callable[[], None], bool]]:
        yield lambda: torch.set_float32_matmul_precision("high"), True
        yield lambda: torch.set_float32_matmul_precision("highest"), False
        yield lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), True
        yield lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", False), False
        yield lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), True
        yield lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"), False

    compiled = torch.compile(lambda x: x + 1 if tf32_allowed() else x, fullgraph=True, backend="eager")
    assert not tf32_allowed() and compiled(torch.zeros(())) == 0
    for switch, allowed in switches():
        switch()
        assert tf32_allowed() == allowed
        assert compiled(torch.zeros(())) == allowed


# ---- Sizes ----

SIZES = {
    **{f"K{K}": Relations(N=1, Q=3, K=K, M=2, bias=3.0) for K in (2, 15, 16, 17, 63, 64, 65, 128, 129)},
    **{f"Q{Q}": Relations(N=1, Q=Q, K=5, M=2) for Q in (15, 16, 17, 31, 32, 33, 64, 65)},
    **{
        f"D{D}": Relations(Q=5, K=20, M=2, D=D, Dv=Dv)
        for D, Dv in ((1, 130), (15, 17), (100, 1), (128, 128), (257, 64))
    },
    "16 heads": Relations(N=1, Q=33, K=40, M=16, D=64, Dv=64, bias=3.0),
    "many images": Relations(N=11, Q=4, K=7, M=1, mask="some"),
}


@pytest.mark.parametrize("case", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sizes(case: Relations, dtype: torch.dtype, device: str) -> None:
    assert_matches_twin(OP, draw(case, device, dtype))


@both_geometries
def test_many_boxes(geometry: str, device: str) -> None:
    """Compare a few of the 1500 rows with the twin, which computes only these rows and their gradients."""
    inputs = draw(Relations(N=1, Q=1500, K=1500, M=2, D=16, Dv=16, same_boxes=True), device, geometry=geometry)
    rows = torch.tensor([0, 1, 700, 1498, 1499], device=device)
    grad = torch.zeros(1, 1500, 2, 16, dtype=torch.float64, device=device)
    grad[:, rows] = grad_like(grad[:, rows])
    actual = OP.run(inputs, grad_output=grad)
    few = inputs | {name: inputs[name][:, rows] for name in QUERIES}
    expected = OP.run(few, OP.reference, grad_output=grad[:, rows])
    for name, x in actual.items():
        assert_matches(x[:, rows] if name in (*QUERIES, "output") else x, expected[name], name, noise=OP.noise)


def test_memory() -> None:
    """Check that neither the embeddings of 2000 x 2000 pairs (1 GB) nor their logits (16 MB per head) are stored."""
    begin = """
x, boxes = torch.randn(1, 2000, 4, 16), torch.rand(1, 2000, 4) + torch.tensor([0.0, 0.0, 50.0, 50.0])
leaves = [t.requires_grad_() for t in (x, boxes, torch.randn(4, 64) * 0.1, torch.ones(4))]
def step(n):
    y, b, w, c = leaves
    relops.relation_attention(y[:, :n], y[:, :n], y[:, :n], b[:, :n], b[:, :n], w, c).sum().backward()
"""
    assert resident_growth(begin, "step(20)", "step(2000)") < 30 * 1024


@pytest.mark.parametrize(
    "case", [Relations(Q=70, K=40, M=5, mask="some"), Relations(N=1, Q=1, M=1)], ids=["many", "one"]
)
def test_any_number_of_threads(case: Relations, threads: None) -> None:
    inputs = draw(case, dtype=torch.float32)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert_matches_twin(OP, inputs)


# ---- Random search ----

COORDINATES = st.one_of(
    st.integers(-20, 300).map(float), st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e9, -1e9, 1e15, math.nan, math.inf])
)
BOXES = st.lists(st.tuples(COORDINATES, COORDINATES, COORDINATES, COORDINATES), min_size=1, max_size=12)


@st.composite
def random_cases(draw_from: st.DrawFn) -> tuple[Relations, list[tuple[float, ...]], bool, int]:
    case = Relations(
        N=draw_from(st.integers(1, 3)),
        Q=draw_from(st.integers(1, 40)),
        K=draw_from(st.integers(1, 40)),
        M=draw_from(st.integers(1, 3)),
        D=draw_from(st.integers(0, 20)),
        Dv=draw_from(st.integers(1, 20)),
        bias=draw_from(st.sampled_from([None, 0.0, 1.0])),
        clamped=draw_from(st.booleans()),
        mask=draw_from(st.sampled_from([None, "some", "all"])),
        options=(
            ("geometry", draw_from(st.sampled_from(["paper", "official"]))),
            ("wavelength", draw_from(st.sampled_from([1000.0, 20.0, 1.0]))),
            ("scale", draw_from(st.sampled_from([None, 0.0, 2.0]))),
        ),
    )
    return case, draw_from(BOXES), draw_from(st.booleans()), draw_from(st.integers(0, 2**31))


@settings(max_examples=250, deadline=None, derandomize=True)
@given(random_cases())
def test_random_search(search: tuple[Relations, list[tuple[float, ...]], bool, int]) -> None:
    """Compare with the twin for boxes that are equal, inverted, huge or not finite, and masked or not."""
    case, boxes, ordered, seed = search
    generator = torch.Generator().manual_seed(seed)
    inputs = case.relation_attention(generator)
    pool = torch.tensor(boxes, dtype=torch.float64)
    if ordered:
        pool = torch.cat([torch.minimum(pool[:, :2], pool[:, 2:]), torch.maximum(pool[:, :2], pool[:, 2:])], 1)
    for name in ("query_boxes", "key_boxes"):
        inputs[name] = pool[torch.randint(len(pool), inputs[name].shape[:2], generator=generator)]
    for device in ["cpu"] if why_no_cuda() else ["cpu", "cuda"]:
        moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        actual, expected = OP.run(moved), OP.run(moved, OP.reference)
        if expected["output"].isnan().any():  # it is not specified which gradients are NaN
            actual, expected = ({"output": results["output"]} for results in (actual, expected))
        for name, x in actual.items():
            largest = expected[name].nan_to_num().abs().max().item() if x.numel() else 0.0
            torch.testing.assert_close(
                x,
                expected[name],
                rtol=1e-9,
                atol=1e-9 * max(largest, 1e-3),
                equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )


# ---- CUDA ----


@needs_cuda
def test_cuda_tf32(matmul_precision: None) -> None:
    """Check that errors are not larger than those of TF32 if TF32 is allowed. The geometry is never rounded to TF32."""
    inputs = draw(Relations(Q=70, K=150, D=64, Dv=64, bias=3.0), "cuda", torch.float32)
    expected = OP.run_twin(inputs)
    torch.set_float32_matmul_precision("high")
    for name, x in OP.run(inputs).items():
        assert_matches(x, expected[name], name, noise=300.0)


@needs_cuda
def test_cuda_memory() -> None:
    """Check that the memory of a call is bounded by the sizes of inputs, outputs, gradients and logsumexp."""
    inputs = draw(Relations(N=1, Q=4000, K=4000, M=2, D=16, Dv=16), "cuda", torch.float32)
    OP.run(inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    OP.run(inputs)
    size = sum(x.numel() * 4 for x in inputs.values() if isinstance(x, Tensor))
    assert torch.cuda.max_memory_allocated() - before <= 4 * size + 2**22


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_cuda_device_that_is_not_current() -> None:
    inputs = OP.draw(Relations(mask="some").relation_attention, "cuda:1")
    with torch.cuda.device(0):
        assert_matches_twin(OP, inputs)
