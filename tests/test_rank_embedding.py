"""Tests of the values and gradients of rank_embedding, the sinusoidal embedding of ranks."""

from __future__ import annotations

import math

import pytest
import torch
from cases import grad_like
from cases.relation_attention import RANK_EMBEDDING as OP
from cases.relation_attention import Ranks
from conftest import assert_matches, assert_matches_twin, needs_cuda, why_no_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import relops
from relops import reference

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def by_loops(ranks: list[float], dim: int, wavelength: float) -> Tensor:
    rows = []
    for rank in ranks:
        angles = [rank / wavelength ** (j / (dim // 2)) for j in range(dim // 2)]
        rows.append([*map(math.sin, angles), *map(math.cos, angles)])
    return torch.tensor(rows, dtype=torch.float64)


# ---- Values ----


@pytest.mark.parametrize("dim", [2, 4, 6, 14, 16, 18, 30, 34, 128, 130, 1024])
@pytest.mark.parametrize("wavelength", [1000.0, 10000.0, 1.0, 0.25])
def test_definition(dim: int, wavelength: float, device: str) -> None:
    ranks = [0.0, 1.0, 2.5, 99.0, -3.0, 1234.0]
    expected = by_loops(ranks, dim, wavelength)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-7)):
        output = relops.rank_embedding(torch.tensor(ranks, dtype=dtype, device=device), dim, wavelength)
        assert output.dtype == dtype and output.shape == (6, dim)
        torch.testing.assert_close(output.double().cpu(), expected, rtol=0, atol=tolerance)


def test_defaults(device: str) -> None:
    ranks = torch.arange(100, device=device)
    assert torch.equal(relops.rank_embedding(ranks), relops.rank_embedding(ranks, 128, 1000.0))


def test_identities(device: str) -> None:
    """Check rank 0, negative ranks, that sine and cosine lie on the unit circle, and that adding 1 is a rotation.

    If 1 is added to a rank, each pair of sine and cosine rotates by an angle that does not depend on the rank.
    """
    ranks = torch.arange(-50, 400, device=device).double()
    sine, cosine = relops.rank_embedding(ranks, 32).chunk(2, -1)
    assert not sine[50].any() and (cosine[50] == 1).all()
    torch.testing.assert_close(sine**2 + cosine**2, torch.ones_like(sine))
    torch.testing.assert_close(sine[50:].flip(0)[-51:], -sine[:51])
    torch.testing.assert_close(cosine[50:].flip(0)[-51:], cosine[:51])
    step = sine[1:] * cosine[:-1] - cosine[1:] * sine[:-1]
    torch.testing.assert_close(step, step[:1].expand_as(step))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers(dtype: torch.dtype, device: str) -> None:
    ranks = torch.arange(100, dtype=dtype, device=device)
    output = relops.rank_embedding(ranks, 16)
    assert output.dtype == torch.float32 and not output.requires_grad
    assert torch.equal(output, relops.rank_embedding(ranks.float(), 16))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float32], ids=str)
def test_large_ranks(dtype: torch.dtype, device: str) -> None:
    """Check ranks so large that a float32 angle would have an error of several radians."""
    ranks = torch.tensor([10**6 + 1, 10**7, 2**30 - 1, 2**30, 2**30 + 64, 2**31], dtype=dtype, device=device)
    expected = by_loops(ranks.tolist(), 16, 1000.0)
    torch.testing.assert_close(relops.rank_embedding(ranks, 16).double().cpu(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rank", [1e15, 1e16, 1e30, 1e300, -1e300])
def test_huge_ranks(rank: float, device: str) -> None:
    ranks = torch.tensor([rank, 3.0], dtype=torch.float64, device=device)
    output = relops.rank_embedding(ranks, 18)
    assert output.abs().max() <= 1
    assert torch.equal(output[1:], relops.rank_embedding(ranks[1:], 18))
    whole = torch.tensor([2**63 - 1, -(2**63)], device=device)
    assert relops.rank_embedding(whole, 18).abs().max() <= 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_non_finite_ranks(bad: float, dtype: torch.dtype, device: str) -> None:
    inputs = {"ranks": torch.tensor([2.0, bad, 3.0], dtype=dtype, device=device), "dim": 34}
    grad = torch.ones(3, 34, dtype=dtype, device=device)
    results = OP.run(inputs, grad_output=grad)
    assert results["output"][1].isnan().all() and results["ranks"][1].isnan()
    others = OP.run(inputs | {"ranks": inputs["ranks"][::2]}, grad_output=grad[::2])
    for name, x in others.items():
        assert torch.equal(results[name][::2], x), name


@pytest.mark.parametrize("shape", [(), (1,), (3, 0), (2, 3, 4, 5)], ids=str)
def test_shapes(shape: tuple[int, ...], device: str) -> None:
    inputs = OP.draw(Ranks(shape, dim=6).rank_embedding, device)
    assert_matches_twin(OP, inputs)
    assert OP.function(**inputs).shape == (*shape, 6)


def test_many_ranks(device: str) -> None:
    """Check outputs with more numbers than one thread or block computes."""
    for case in (Ranks((30000,), dim=4), Ranks((3000,), dim=130), Ranks((3,), dim=20000)):
        assert_matches_twin(OP, OP.draw(case.rank_embedding, device))


# ---- Gradients ----


def test_gradient_by_hand(device: str) -> None:
    """Check dim = 2, for which the output is (sin r, cos r) for any wavelength."""
    ranks = torch.tensor([0.0, 0.5, -2.0], dtype=torch.float64, device=device)
    grad = torch.tensor([[3.0, 5.0]], dtype=torch.float64, device=device).expand(3, -1)
    actual = OP.run({"ranks": ranks, "dim": 2, "wavelength": 7.0}, grad_output=grad)["ranks"]
    torch.testing.assert_close(actual, 3 * ranks.cos() - 5 * ranks.sin())


def test_integer_ranks_have_no_gradient(device: str) -> None:
    output = relops.rank_embedding(torch.arange(5, device=device), 4)
    weight = torch.randn(4, device=device, requires_grad=True)
    (output * weight).sum().backward()
    torch.testing.assert_close(weight.grad, output.sum(0))


def test_gradients_of_large_ranks(device: str) -> None:
    inputs = {"ranks": torch.tensor([1e6, 2.0**31, 1e12], dtype=torch.float64, device=device), "dim": 8}
    expected = OP.run(inputs, OP.reference)
    for name, x in OP.run(inputs).items():
        torch.testing.assert_close(x, expected[name], rtol=0, atol=1e-3, msg=name)


# ---- Compilation and transforms ----


def test_compile_with_any_dim(fresh_compiler: None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(relops.rank_embedding, fullgraph=True, backend=counter, dynamic=True)
    for k in range(5):
        ranks = torch.arange(5 + 3 * k)
        assert torch.equal(compiled(ranks, 12 + 4 * k), relops.rank_embedding(ranks, 12 + 4 * k))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_compile_of_integers(dtype: torch.dtype, fresh_compiler: None) -> None:
    ranks = torch.arange(9, dtype=dtype)
    compiled = torch.compile(relops.rank_embedding, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ranks, 8), relops.rank_embedding(ranks, 8))


def test_vmap_of_integers() -> None:
    ranks = torch.arange(30).view(5, 6)
    output = torch.vmap(lambda x: relops.rank_embedding(x, 8), in_dims=1)(ranks)
    assert torch.equal(output, relops.rank_embedding(ranks.T, 8))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    ranks=st.lists(st.floats(-5000, 5000), min_size=1, max_size=40),
    half=st.integers(1, 70),
    wavelength=st.sampled_from([1e-3, 0.5, 1.0, 3.0, 1000.0, 1e6]),
)
def test_random_search(ranks: list[float], half: int, wavelength: float) -> None:
    for device in ["cpu"] if why_no_cuda() else ["cpu", "cuda"]:
        inputs = {"ranks": torch.tensor(ranks, dtype=torch.float64, device=device), "dim": 2 * half}
        inputs["wavelength"] = wavelength
        actual, expected = OP.run(inputs), OP.run(inputs, OP.reference)
        max_frequency = max(1.0, 1 / wavelength)
        torch.testing.assert_close(actual["output"], expected["output"], rtol=0, atol=1e-11 * max_frequency)
        torch.testing.assert_close(actual["ranks"], expected["ranks"], rtol=0, atol=1e-10 * half * max_frequency**2)


@needs_cuda
def test_cuda_graph() -> None:
    ranks = torch.arange(1000, device="cuda")
    relops.rank_embedding(ranks)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        output = relops.rank_embedding(ranks)
    ranks.add_(17)
    graph.replay()
    assert_matches(output, reference.rank_embedding(ranks.double()))


@needs_cuda
def test_cuda_equals_cpu() -> None:
    ranks = torch.arange(3000)
    for x in (ranks, ranks.double(), ranks / 7):
        torch.testing.assert_close(
            relops.rank_embedding(x.cuda(), 130).cpu(), relops.rank_embedding(x, 130), rtol=0, atol=2e-7
        )
        if x.is_floating_point():
            grad = grad_like(relops.rank_embedding(x, 130))
            assert_matches(
                OP.run({"ranks": x.cuda(), "dim": 130}, grad_output=grad.cuda())["ranks"],
                OP.run({"ranks": x, "dim": 130}, grad_output=grad)["ranks"].double(),
            )
