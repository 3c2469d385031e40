"""Tests of the values and gradients of local_relation, which weights the pixels of a window."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import Inputs, grad_like
from cases.local_relation import LOCAL_RELATION as OP
from cases.local_relation import WINDOWS, Windows
from conftest import (
    assert_matches,
    determinism,
    needs_cuda,
    resident_growth,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import relops
from relops.ops.local_relation import BORDERS, SIMILARITIES

similarities = pytest.mark.parametrize("similarity", SIMILARITIES)
borders = pytest.mark.parametrize("border", BORDERS)


def draw(case: Windows, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Inputs:
    return OP.draw(case.local_relation, device, dtype)


# ---- The definition, written out ----


def by_loops(inputs: Inputs) -> Tensor:
    """Compute the definition with plain arithmetic on lists."""
    k, stride, dilation, similarity, border = (
        inputs[name] for name in ("kernel_size", "stride", "dilation", "similarity", "border")
    )
    query, key, value = (inputs[name].tolist() for name in ("query", "key", "value"))
    (N, G, Ho, Wo), (C, H, W) = inputs["query"].shape, inputs["value"].shape[1:]
    prior = inputs["prior"].tolist() if inputs["prior"] is not None else [[[0.0] * k] * k] * G
    phi = {
        "squared_difference": lambda a, b: -((a - b) ** 2),
        "absolute_difference": lambda a, b: -abs(a - b),
        "product": lambda a, b: a * b,
    }[similarity]
    output = torch.zeros(N, C, Ho, Wo, dtype=torch.float64)
    for n, c, ho, wo in itertools.product(range(N), range(C), range(Ho), range(Wo)):
        g = c // math.ceil(C / G)
        total = weighted = 0.0
        for i, j in itertools.product(range(k), range(k)):
            y, x = stride * ho + dilation * (i - k // 2), stride * wo + dilation * (j - k // 2)
            inside = 0 <= y < H and 0 <= x < W
            if not inside and border == "mask":
                continue
            tap_key, tap_value = (key[n][g][y][x], value[n][c][y][x]) if inside else (0.0, 0.0)
            weight = math.exp(phi(query[n][g][ho][wo], tap_key) + prior[g][i][j])
            total += weight
            weighted += weight * tap_value
        output[n, c, ho, wo] = weighted / total
    return output


@pytest.mark.parametrize("case", WINDOWS.values(), ids=WINDOWS)
def test_definition(case: Windows, device: str) -> None:
    inputs = draw(case, device)
    expected = by_loops(inputs)
    assert_matches(OP.run(inputs)["output"], expected)
    assert_matches(OP.reference(**inputs), expected, "twin")


def test_by_hand(device: str) -> None:
    """Check a map of two pixels.

    The window of each output contains both pixels. Query 0 differs by 1 from key 0 and by 2 from key 1.
    """
    query, key, value = (
        torch.tensor([x], device=device).view(1, 1, 1, 2) for x in ([1.0, 0.0], [2.0, 3.0], [5.0, 9.0])
    )
    for similarity, logits in (
        ("squared_difference", [(-1, -4), (-4, -9)]),
        ("absolute_difference", [(-1, -2), (-2, -3)]),
        ("product", [(2, 3), (0, 0)]),
    ):
        output = relops.local_relation(query, key, value, kernel_size=3, similarity=similarity)
        weights = torch.tensor(logits, dtype=torch.float64).exp()
        expected = (weights * value.double().cpu().flatten()).sum(1) / weights.sum(1)
        assert_matches(output.flatten(), expected)


@borders
@pytest.mark.parametrize("k", [1, 3, 7])
def test_equal_logits_give_means(border: str, k: int, device: str) -> None:
    value = torch.randn(2, 6, 9, 11, device=device, dtype=torch.float64)
    zeros = value.new_zeros(2, 2, 9, 11)
    output = relops.local_relation(zeros, zeros, value, kernel_size=k, border=border)
    expected = F.avg_pool2d(value.cpu(), k, 1, k // 2, count_include_pad=border == "zero")
    assert_matches(output, expected)


@pytest.mark.parametrize(("k", "stride", "dilation"), [(3, 1, 1), (4, 1, 1), (4, 2, 3), (5, 3, 2), (2, 1, 4)])
def test_prior_that_selects_a_tap_shifts_the_map(k: int, stride: int, dilation: int, device: str) -> None:
    """Check the positions of the taps. For an even k, one more tap lies before the center than after it."""
    H, W = 8, 9
    value = torch.randn(1, k * k, H, W, device=device)  # one channel per group; each group selects one tap
    key = torch.randn(1, k * k, H, W, device=device)
    query = torch.randn(1, k * k, -(-H // stride), -(-W // stride), device=device)
    prior = torch.full((k * k, k * k), -math.inf, device=device).fill_diagonal_(0.0).view(k * k, k, k)
    output = relops.local_relation(
        query, key, value, prior, kernel_size=k, stride=stride, dilation=dilation, border="zero"
    )
    for i, j in itertools.product(range(k), range(k)):
        before_y, before_x = (dilation * (k // 2 - tap) for tap in (i, j))
        padded = F.pad(value[0, i * k + j], (before_x, 60, before_y, 60))  # negative padding crops
        expected = padded[::stride, ::stride][: query.shape[2], : query.shape[3]]
        assert torch.equal(output[0, i * k + j], expected), (i, j)


def test_attention_with_a_bias() -> None:
    """Compare with scaled dot product attention with a bias.

    -(q - k)^2 is the product of [2q, 1] and [k, -k^2] plus a term that is the same for all taps of a query.
    """
    N, C, G, H, W, k = 2, 12, 3, 7, 8, 5
    inputs = draw(Windows(N=N, C=C, G=G, H=H, W=W, k=k))
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    i, j = (a.flatten()[None] - a.flatten()[:, None] + k // 2 for a in (y, x))  # [query pixels, key pixels]
    inside = (i >= 0) & (i < k) & (j >= 0) & (j < k)
    bias = inputs["prior"][:, i.clamp(0, k - 1), j.clamp(0, k - 1)].masked_fill(~inside, -math.inf)  # [G,HW,HW]
    q, key = (inputs[name].flatten(2) for name in ("query", "key"))
    value = inputs["value"].view(N, G, C // G, H * W).transpose(2, 3)
    queries, keys = torch.stack([2 * q, torch.ones_like(q)], -1), torch.stack([key, -key.square()], -1)
    expected = F.scaled_dot_product_attention(queries, keys, value, bias, scale=1.0)
    assert_matches(OP.function(**inputs), expected.transpose(2, 3).reshape(N, C, H, W))


# ---- Groups ----


@pytest.mark.parametrize(("C", "G"), [(100, 13), (7, 3), (6, 5), (3, 8), (64, 64)])
def test_channels_of_groups(C: int, G: int, device: str) -> None:
    """Check that a call with a single group gives the same results, and that empty groups get zero gradients."""
    inputs = draw(Windows(N=1, C=C, G=G), device)
    whole = OP.run(inputs)
    m = math.ceil(C / G)
    for g in range(G):
        channels = slice(min(g * m, C), min((g + 1) * m, C))
        if channels.start == channels.stop:
            assert not any(whole[name][0, g].any() for name in ("query", "key")) and not whole["prior"][g].any()
            continue
        one = {name: inputs[name][:, g : g + 1] for name in ("query", "key")}
        one |= {"value": inputs["value"][:, channels], "prior": inputs["prior"][g : g + 1]}
        alone = OP.run(inputs | one, grad_output=grad_like(whole["output"])[:, channels])
        for name in ("output", "value"):
            assert_matches(whole[name][:, channels], alone[name], name)
        for name in ("query", "key"):
            assert_matches(whole[name][:, g : g + 1], alone[name], name)
        assert_matches(whole["prior"][g : g + 1], alone["prior"], "prior")


# ---- Numbers ----


@similarities
def test_adding_a_constant_to_the_prior_changes_nothing(similarity: str, device: str) -> None:
    inputs = draw(Windows(similarity=similarity, border="zero"), device)
    results = OP.run(inputs)
    shifted = OP.run(inputs | {"prior": inputs["prior"] + 50.0})
    for name in results:
        assert_matches(shifted[name], results[name].cpu(), name)
    assert_matches(results["prior"].sum((1, 2)) + 1, torch.ones(3, dtype=torch.float64))


@similarities
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_logits_far_from_zero(similarity: str, dtype: torch.dtype, device: str) -> None:
    """Check logits that are so negative that all their exponentials underflow to 0."""
    inputs = draw(Windows(similarity=similarity), device, dtype)
    inputs["query"] = inputs["query"] + (300 if similarity == "absolute_difference" else 30)
    inputs["key"] = inputs["key"] * 0.1 - (30 if similarity == "product" else 0)
    results, expected = OP.run(inputs), OP.run_twin(inputs)
    # Rounding a logit of 1000 changes its weight by 6e-5. For "absolute_difference", each query is greater than all
    # keys, so its gradient is zero except for rounding errors.
    for name, x in results.items():
        if name == "query" and similarity == "absolute_difference":
            assert x.abs().max() < 1e-3
        else:
            assert_matches(x, expected[name], name, noise=30.0)


@borders
@similarities
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stride", [1, 2])
def test_non_finite_numbers_affect_only_their_windows(
    border: str, similarity: str, bad: float, stride: int, device: str
) -> None:
    """Check that a non-finite number does not affect other outputs of the same vector or tile."""
    case = Windows(N=2, C=10, G=2, H=13, W=21, k=3, stride=stride, similarity=similarity, border=border)
    inputs = draw(case, device, torch.float32)
    clean = OP.run(inputs)
    y, x = 6, 9
    # The windows of these outputs contain pixel (y, x).
    rows, columns = (slice(-(-(pixel - 1) // stride), (pixel + 1) // stride + 1) for pixel in (y, x))
    for name, index, affected in (
        ("value", (0, 7, y, x), (0, slice(7, 8), rows, columns)),
        ("key", (0, 1, y, x), (0, slice(5, 10), rows, columns)),
        ("query", (0, 1, y // stride, x // stride), (0, slice(5, 10), y // stride, x // stride)),
    ):
        not_finite = inputs[name].clone()
        not_finite[index] = bad
        output = OP.function(**inputs | {name: not_finite})
        unaffected = torch.ones_like(output, dtype=torch.bool)
        unaffected[affected] = False
        assert torch.equal(output[unaffected], clean["output"][unaffected]), name
        assert name != "value" or not output[affected].isfinite().any()

    grad = grad_like(clean["output"])
    grad[1, 3, 2, 4] = bad
    results = OP.run(inputs, grad_output=grad)
    unaffected = torch.ones_like(inputs["value"], dtype=torch.bool)
    unaffected[1, 3, 2 * stride - 1 : 2 * stride + 2, 4 * stride - 1 : 4 * stride + 2] = False
    assert torch.equal(results["value"][unaffected], clean["value"][unaffected])
    assert not results["value"][~unaffected].isfinite().any()
    assert torch.equal(results["query"][0], clean["query"][0]) and torch.equal(results["key"][0], clean["key"][0])


def test_gradient_of_absolute_differences_that_are_zero(device: str) -> None:
    inputs = draw(Windows(similarity="absolute_difference"), device)
    inputs |= {"query": torch.ones_like(inputs["query"]), "key": torch.ones_like(inputs["key"])}
    results = OP.run(inputs)
    assert not results["query"].any() and not results["key"].any() and results["prior"].any()


@borders
@pytest.mark.parametrize("step", [7, 100, 2**24])
def test_steps_larger_than_the_map(border: str, step: int, device: str) -> None:
    """Check dilations and strides that are larger than the map.

    Such a dilation leaves only the center tap, and such a stride leaves only the first output.
    """
    inputs = draw(Windows(N=1, H=5, W=6, prior=False, border=border), device)
    center = OP.run(inputs | {"dilation": step})
    if border == "mask":
        assert_matches(center["output"], inputs["value"].cpu())
        assert not center["query"].any() and not center["key"].any()
    first = OP.run(inputs | {"query": inputs["query"][:, :, :1, :1], "stride": step, "dilation": step})
    assert_matches(first["output"], center["output"][:, :, :1, :1].cpu())
    assert not first["value"][:, :, 1:].any() and not first["value"][:, :, :, 1:].any()


# ---- Layouts, threads, memory ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_channels_last_is_preserved(dtype: torch.dtype, stride: int, device: str) -> None:
    case = Windows(C=20, G=5, H=9, W=18, stride=stride)
    planar = OP.run(draw(case, device, dtype))
    inputs = draw(replace(case, channels_last=True), device, dtype)
    results = OP.run(inputs)
    for name, x in results.items():
        assert name == "prior" or x.is_contiguous(memory_format=torch.channels_last), name
        assert_matches(x, planar[name].double().cpu(), name)
    mixed = OP.run(inputs | {"query": inputs["query"].contiguous(), "key": inputs["key"].contiguous()})
    assert mixed["output"].is_contiguous(memory_format=torch.channels_last) and mixed["query"].is_contiguous()
    assert_matches(mixed["output"], planar["output"].double().cpu())


def test_windows_of_a_crop(device: str) -> None:
    """Check that windows end at the border of a crop, which is read from the larger map without a copy."""
    inputs = draw(Windows(), device)
    large = {name: F.pad(inputs[name], (2, 3, 1, 2), value=math.nan) for name in ("query", "key", "value")}
    crop = {name: x[:, :, 1:-2, 2:-3] for name, x in large.items()}
    for name, x in OP.run(inputs | crop).items():
        assert_matches(x, OP.run(inputs)[name].cpu(), name)


@pytest.mark.parametrize(
    "case",
    [
        Windows(C=16, G=2, H=40, W=23, k=5),
        Windows(C=16, G=2, H=41, W=23, k=4, stride=2, channels_last=True),
        Windows(N=1, C=4, G=1, H=70, W=9, k=3, dilation=3, border="zero"),
        # These windows are so large that kernels cannot keep the weights of all outputs that read a pixel.
        Windows(N=1, C=5, G=2, H=45, W=150, k=21),
        Windows(N=1, C=5, G=2, H=31, W=300, k=20, stride=2, dilation=2, border="zero", similarity="product"),
    ],
)
def test_results_do_not_depend_on_the_number_of_threads(case: Windows, threads: None) -> None:
    """Check that results are bit-identical, including gradients that are sums over images or strips of a large map."""
    inputs = draw(case, dtype=torch.float32)
    expected = OP.run_twin(inputs)
    runs = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        runs.append(OP.run(inputs))
    for name, x in runs[0].items():
        assert all(torch.equal(x, run[name]) for run in runs[1:]), name
        assert_matches(x, expected[name], name)


def test_memory() -> None:
    """Check that neither the windows of this map (314 MB) nor the weights of all its pixels (39 MB) are stored."""
    begin = """
query, key, value = torch.randn(2, 32, 56, 56), torch.randn(2, 32, 56, 56), torch.randn(2, 256, 56, 56)
leaves = [t.requires_grad_() for t in (query, key, value, torch.randn(32, 7, 7))]
def step(rows):
    cut = [t[:, :, :rows] for t in leaves[:3]]
    relops.local_relation(*cut, leaves[3], kernel_size=7).sum().backward()
"""
    # The limit allows for the output, for the gradients of the slices, and for the full-size gradients to which
    # autograd adds the gradients of the slices.
    assert resident_growth(begin, "step(4)", "step(56)") < 32 * 1024


def test_memory_of_large_windows() -> None:
    """Check that only the weights of one row of outputs are stored. The weights of all outputs would take 70 MB."""
    begin = """
torch.set_num_threads(1)
query, value = torch.randn(1, 1, 64, 64), torch.randn(1, 4, 64, 64)
leaves = [t.requires_grad_() for t in (query, query.clone(), value)]
def step(k):
    relops.local_relation(*leaves, kernel_size=k).sum().backward()
"""
    assert resident_growth(begin, "step(3)", "step(41)") < 20 * 1024


def test_fake_kernel_of_the_backward() -> None:
    """Check the fake kernel for every combination of needed gradients, with 16-bit maps and a float32 prior."""
    inputs = draw(Windows(), dtype=torch.bfloat16)
    arguments = (grad_like(OP.function(**inputs)), *OP.raw(inputs).values())
    backward = torch.ops.relops._local_relation_backward.default
    for needs_grad in itertools.product([False, True], repeat=4):
        torch.library.opcheck(backward, (*arguments, list(needs_grad)), test_utils="test_faketensor")


@pytest.mark.parametrize("name", ["similarity", "border"])
def test_raw_op_names_an_unknown_choice(name: str, device: str) -> None:
    inputs = OP.raw(draw(Windows(), device)) | {name: "other"}
    with pytest.raises(RuntimeError, match=rf"local_relation: {name} must be .* or .*, got other"):
        OP.overload(*inputs.values())


def test_extreme_sizes_are_rejected() -> None:
    """Check a map that is too large for the 32-bit arithmetic of the kernels."""
    x = torch.zeros(1, 1, 1, 1).expand(1, 1, 1, 2**24 + 1)
    with pytest.raises(RuntimeError, match="at most 16777216 rows and columns"):
        relops.local_relation(x, x, x, kernel_size=1)


# ---- Random search ----


@st.composite
def random_cases(draw: st.DrawFn) -> tuple[Windows, int]:
    def integers(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    case = Windows(
        N=integers(1, 3),
        C=integers(1, 20),
        G=integers(1, 6),
        H=integers(1, 20),
        W=integers(1, 40),
        k=integers(1, 9),
        stride=draw(st.sampled_from([1, 1, 2, 3, 4, 9])),
        dilation=draw(st.sampled_from([1, 1, 2, 3, 7, 30])),
        similarity=draw(st.sampled_from(SIMILARITIES)),
        border=draw(st.sampled_from(BORDERS)),
        prior=draw(st.booleans()),
        channels_last=draw(st.booleans()),
    )
    return case, integers(0, 2**31)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(random_cases())
def test_random_search(search: tuple[Windows, int]) -> None:
    case, seed = search
    inputs = case.local_relation(torch.Generator().manual_seed(seed))
    actual = OP.run(inputs)
    for name, expected in OP.run_twin(inputs).items():
        # With one group and few pixels, sums may cancel to almost zero.
        torch.testing.assert_close(actual[name], expected, rtol=1e-11, atol=1e-12, msg=lambda text: f"{name}: {text}")  # noqa: B023


# ---- CUDA ----


@needs_cuda
@pytest.mark.parametrize("case", WINDOWS.values(), ids=WINDOWS)
def test_cuda_backward_is_reproducible(case: Windows) -> None:
    inputs = draw(case, "cuda", torch.float32)
    with determinism(False):
        runs = [OP.run(inputs) for _ in range(5)]
    for name, x in runs[0].items():
        assert all(torch.equal(x, run[name]) for run in runs[1:]), name


@needs_cuda
def test_cuda_memory() -> None:
    """Check that a call allocates only outputs, gradients and two numbers per query."""
    inputs = draw(Windows(C=256, G=32, H=56, W=56, k=7), "cuda", torch.float32)
    OP.run(inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    OP.run(inputs)
    size = sum(x.numel() * 4 for x in inputs.values() if isinstance(x, Tensor))
    assert torch.cuda.max_memory_allocated() - before <= 4 * size


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_cuda_device_that_is_not_current() -> None:
    inputs = draw(Windows(), "cuda:1")
    assert_matches(OP.function(**inputs), OP.function(**draw(Windows())))
