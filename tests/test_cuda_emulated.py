"""What the CUDA kernels compute, on a CPU emulation of CUDA: the check that needs no GPU. See cuda_emulation/."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import cuda_emulation
import pytest
import torch
from cases import FUSED, OPS, PLAIN, DeformAttn, Op
from conftest import DTYPES, assert_matches, assert_matches_twin, determinism

from relops import _library


@pytest.fixture(scope="module", autouse=True)
def cuda_kernels_on_the_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """While these tests run, ops given CPU tensors run the CUDA kernels, under the same checks and autograd."""
    emulated = cuda_emulation.ops(tmp_path_factory.mktemp("cuda_emulation"))
    library = torch.library.Library("relops", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the override, which is meant
        for name in _library.op_kernels():
            library.impl(name, getattr(emulated, name), "CPU", allow_override=True)
    yield
    library._destroy()


SAMPLES = [pytest.param(op, sample, id=f"{op.name}-{name}") for op in OPS for name, sample in op.samples.items()]


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op, sample", SAMPLES)
def test_outputs_and_gradients(op: Op, sample, dtype: torch.dtype, deterministic: bool) -> None:
    with determinism(deterministic):
        assert_matches_twin(op, op.draw(sample, dtype=dtype))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("op, sample", SAMPLES)
def test_coordinates_of_16_bits(op: Op, sample, dtype: torch.dtype) -> None:
    assert_matches_twin(op, op.cast(op.draw(sample), dtype, dtype), dtype)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_empty_inputs(op: Op) -> None:
    for name, sample in op.empty.items():
        inputs = op.draw(sample)
        for key, got in op.run(inputs).items():
            assert not got.any(), (name, key)
            assert key == "output" or got.shape == inputs[key].shape


@pytest.mark.parametrize("wanted", [("value",), ("sampling_locations",), ("attention_weights",)])
def test_only_what_is_wanted(wanted: tuple[str, ...]) -> None:
    inputs = PLAIN.draw(PLAIN.samples["typical"])
    everything = PLAIN.run(inputs)
    for name, got in PLAIN.run(inputs, wanted=wanted).items():
        assert_matches(got, everything[name].double(), name)


@pytest.mark.parametrize("D", [40, 200, 260], ids=lambda D: f"D{D}")
def test_heads_wider_than_a_group_of_lanes(D: int) -> None:
    case = DeformAttn(N=1, M=1, D=D, mask=True)
    for op, sample in ((PLAIN, case.plain), (FUSED, case.fused)):
        assert_matches_twin(op, op.draw(sample))


def test_encoder_whose_patches_end_inside_a_level() -> None:
    """Queries that are the pixels of the pyramid are worked on in patches of 8 rows: each must be visited once."""
    levels = ((17, 9), (8, 3), (3, 11), (1, 2))
    case = DeformAttn(levels=levels, N=2, Q=sum(h * w for h, w in levels), M=2, D=16, P=2)
    assert_matches_twin(PLAIN, PLAIN.draw(case.plain))


@pytest.mark.parametrize("starts", [None, "in order"])
def test_levels_read_by_the_kernel(starts: str | None) -> None:
    """More levels than travel as parameters take the path of sizes in device memory."""
    case = DeformAttn(levels=((2, 3),) * 17, P=1, starts=starts)
    assert_matches_twin(PLAIN, PLAIN.draw(case.plain))


def test_levels_that_do_not_fit_give_nan() -> None:
    """The kernel's own check: the host cannot see sizes in device memory."""
    case = DeformAttn(levels=((2, 3),) * 17, P=1)
    inputs = PLAIN.draw(case.plain)
    for wrong in ([(2, 3)] * 16 + [(2, 4)], [(2, 3)] * 16 + [(-2, -3)], [(2**40, 2**40)] + [(0, 0)] * 16):
        arguments = PLAIN.raw(inputs | {"spatial_shapes": torch.tensor(wrong)})
        assert PLAIN.overload(*arguments.values()).isnan().all()


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
def test_samples_that_are_not_finite_give_nothing(deterministic: bool) -> None:
    inputs = PLAIN.draw(PLAIN.samples["typical"])
    clean = inputs["sampling_locations"]
    for value in (float("nan"), float("inf"), -float("inf"), 1e30, -1e30):
        dirty = clean.clone()
        dirty[:, ::2, :, 0, 1, 1] = value
        away = clean.clone()
        away[:, ::2, :, 0, 1] = 9.0
        with determinism(deterministic):
            got, expected = (PLAIN.run(inputs | {"sampling_locations": locations}) for locations in (dirty, away))
        for name in got:
            assert torch.equal(got[name], expected[name]), (name, value)
