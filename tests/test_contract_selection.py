"""Tests of the ops that return indices, and in some cases scores. They run for every op in cases.SELECTIONS."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import INTEGERS, SELECTIONS, Bad, Inputs, Sample, Selection
from conftest import (
    DTYPES,
    LAYOUTS,
    TRACING_MODES,
    AsModule,
    assert_matches_selection,
    assert_same_selection,
    captured,
    check_recompiles,
    check_two_streams,
    faked,
    forward_mode_calls,
    needs_cuda,
    tensors_of,
    traced,
    why_no_cuda,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from relops import _library


def first_sample(op: Selection) -> Sample:
    return next(iter(op.samples.values()))


def samples_of(op: Selection) -> list[Any]:
    """Return the samples of an op as test parameters.

    `make quick` uses only the first sample of an op, which has no batch dimension, and the sample named "batch".
    """
    return [
        pytest.param(op, sample, id=f"{op.name}-{name}", marks=pytest.mark.quick if is_main else ())
        for name, sample in op.samples.items()
        for is_main in (sample is first_sample(op) or name == "batch",)
    ]


SAMPLES = [sample for op in SELECTIONS for sample in samples_of(op)]
on_samples = pytest.mark.parametrize(("op", "sample"), SAMPLES)
# For tests that would not find more errors with more samples.
on_few_samples = pytest.mark.parametrize(("op", "sample"), [sample for sample in SAMPLES if sample.marks])
on_empty = pytest.mark.parametrize(
    ("op", "sample"),
    [pytest.param(op, sample, id=f"{op.name}-{name}") for op in SELECTIONS for name, sample in op.empty.items()],
)
on_ops = pytest.mark.parametrize("op", SELECTIONS, ids=lambda op: op.name)


def bad_inputs(harmful: bool) -> pytest.MarkDecorator:
    cases = [(op, bad) for op in SELECTIONS for bad in op.bad if not (harmful and bad.harmless)]
    return pytest.mark.parametrize(
        ("op", "bad"), [pytest.param(*case, id=f"{case[0].name}-{case[1].id}") for case in cases]
    )


# ---- Values ----


@on_samples
def test_equals_twin(op: Selection, sample: Sample, device: str) -> None:
    for shift, start in itertools.product(range(2 if len(op.floats) > 1 else 1), range(len(DTYPES))):
        dtypes = tuple(DTYPES[(start + shift * i) % len(DTYPES)] for i in range(len(op.floats)))
        assert_matches_selection(op, op.draw(sample, device, dtypes))


@on_ops
def test_deterministic_for_large_inputs(op: Selection, device: str) -> None:
    """Use inputs so large that the order of threads and blocks differs from run to run."""
    inputs = op.draw(op.growing(9), device)
    first = op.run(inputs)
    for _ in range(20 if device == "cuda" else 3):
        assert_same_selection(op.run(inputs), first)


@on_samples
def test_inputs_that_require_grad(op: Selection, sample: Sample, device: str) -> None:
    inputs = op.draw(sample, device)
    actual = op.run(inputs | {name: inputs[name].clone().requires_grad_() for name in op.floats})
    assert not any(x.requires_grad for x in actual)
    assert_same_selection(actual, op.run(inputs))


@on_samples
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(op: Selection, sample: Sample, device: str, autocast_dtype: torch.dtype) -> None:
    for dtype in (torch.float32, autocast_dtype):
        inputs = op.draw(sample, device, dtype)
        with torch.autocast(device, autocast_dtype):
            actual = op.run(inputs)
        assert_same_selection(actual, op.run(inputs))


@on_samples
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layouts_of_inputs(op: Selection, sample: Sample, device: str, layout: Callable) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        inputs = op.draw(sample, device, dtype)
        laid_out = inputs | {name: layout(x) for name, x in tensors_of(inputs).items()}
        assert_same_selection(op.run(laid_out), op.run(inputs))


@on_samples
def test_expanded_inputs(op: Selection, sample: Sample, device: str) -> None:
    inputs = op.draw(sample, device)
    tensors = tensors_of(inputs)
    for names, dim in itertools.product([*((name,) for name in tensors), tuple(tensors)], (0, -1)):
        expanded = {name: tensors[name].narrow(dim, 0, 1).expand_as(tensors[name]) for name in names}
        dense = {name: x.contiguous() for name, x in expanded.items()}
        assert_same_selection(op.run(inputs | expanded), op.run(inputs | dense))


@on_empty
def test_empty(op: Selection, sample: Sample, device: str) -> None:
    inputs = op.draw(sample, device)
    actual = op.run(inputs)
    with FakeTensorMode() as mode:
        fake = op.run(faked(mode, inputs))
    assert [x.shape for x in fake] == [x.shape for x in actual]
    assert_same_selection(actual, op.run_twin(inputs))


SUPPRESSIONS = [op for op in SELECTIONS if "boxes" in op.floats]
on_integer_boxes = pytest.mark.parametrize("op", SUPPRESSIONS, ids=lambda op: op.name)


def integer_boxes(op: Selection, dtype: torch.dtype, device: str) -> tuple[Inputs, Inputs]:
    """Return inputs with integer boxes, and the equivalent inputs with floating-point boxes.

    The inputs are a batch if the op accepts batches, and a single image otherwise.
    """
    inputs = op.draw(op.samples.get("batch", first_sample(op)), device)
    whole = inputs["boxes"] + 4  # corners are at least -4, but some of the dtypes are unsigned
    assert torch.equal(whole, whole.round()) and whole.min() >= 0
    floating = torch.float64 if dtype.itemsize == 8 else torch.float32
    return inputs | {"boxes": whole.to(dtype)}, inputs | {"boxes": whole.to(floating)}


@on_integer_boxes
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integer_boxes(op: Selection, dtype: torch.dtype, device: str, fresh_compiler: None) -> None:
    inputs, equivalent = integer_boxes(op, dtype, device)
    expected = op.run(equivalent)
    assert_same_selection(op.run(inputs), expected)
    assert_matches_selection(op, inputs)
    assert_same_selection(op.run(inputs, torch.compile(op.function, fullgraph=True, backend="aot_eager")), expected)
    assert_same_selection(traced(op.run, inputs, "fake")(inputs), expected)
    if op.vmapped:
        mapped = torch.vmap(lambda boxes: op.run(inputs | {"boxes": boxes}))(inputs["boxes"][None])
        assert_same_selection([x[0] for x in mapped], expected)


# ---- Tracing, compilation and transforms ----


@on_few_samples
def test_fake_tensors(op: Selection, sample: Sample, device: str) -> None:
    inputs = op.draw(sample, device)
    unknown_size = op.synchronizes(inputs)  # the size of an output depends on values, so it must be a symbol
    with FakeTensorMode(shape_env=ShapeEnv() if unknown_size else None) as mode:
        actual = op.run(faked(mode, inputs))
    for x, y in zip(actual, op.run(inputs), strict=True):
        assert isinstance(x, FakeTensor) and x.dtype == y.dtype and x.device == y.device and x.dim() == y.dim()
        assert unknown_size or x.shape == y.shape


@on_few_samples
@pytest.mark.parametrize("tracing_mode", TRACING_MODES)
def test_make_fx(op: Selection, sample: Sample, device: str, tracing_mode: str) -> None:
    inputs, others = (op.draw(sample, device, seed=seed) for seed in (0, 1))
    graph = traced(op.run, inputs, tracing_mode)
    for each in (inputs, others):
        assert_same_selection(graph(each), op.run(each))


@on_samples
def test_forward_mode(op: Selection, sample: Sample, device: str) -> None:
    """Check that forward-mode AD raises an error if an op returns scores, and is ignored if it returns only indices."""
    inputs = op.draw(sample, device)
    expected = op.run(inputs)
    for name, function in itertools.product(op.floats, (op.function, lambda **x: op.overload(*op.raw(x).values()))):
        if any(x.is_floating_point() for x in expected):
            for description, call in forward_mode_calls(lambda **x: function(**x)[-1], inputs, name):  # noqa: B023
                with pytest.raises(RuntimeError, match=rf"relops\.{op.name} does not provide forward-mode AD"):
                    pytest.fail(f"{description} with respect to {name} returned {call()}")
        else:
            with forward_ad.dual_level():
                actual = op.run(inputs | {name: forward_ad.make_dual(inputs[name], inputs[name])}, function)
            assert_same_selection(actual, expected)


@on_few_samples
@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
def test_opcheck(op: Selection, sample: Sample, device: str, requires_grad: bool) -> None:
    inputs = op.draw(sample, device)
    for name in op.floats:
        inputs[name].requires_grad_(requires_grad)
    torch.library.opcheck(op.overload, tuple(op.raw(inputs).values()))


@on_few_samples
def test_compile(op: Selection, sample: Sample, device: str, fresh_compiler: None) -> None:
    inputs = op.draw(sample, device)
    compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):  # the number of kept boxes depends on the seed
        inputs = op.draw(sample, device, seed=seed)
        assert_same_selection(op.run(inputs, compiled), op.run(inputs))


@on_ops
def test_compile_inductor(op: Selection, device: str, fresh_compiler: None) -> None:
    if device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("inductor needs a C++ compiler")

    # Inductor fuses the operations before and after the op, so this also tests what it assumes about layouts.
    def around(**inputs: Tensor) -> tuple[Tensor, ...]:
        doubled = {name: x * 2 if name in op.floats else x for name, x in inputs.items()}
        return tuple(x * 2 for x in op.run(doubled))

    inputs = op.draw(first_sample(op), device)
    assert_same_selection(op.run(inputs, torch.compile(around, fullgraph=True)), op.run(inputs, around))


@on_ops
def test_compile_does_not_recompile_forever(op: Selection, device: str, fresh_compiler: None) -> None:
    check_recompiles(op, device, assert_same_selection)


@on_few_samples
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_export(op: Selection, sample: Sample, device: str, strict: bool, fresh_compiler: None) -> None:
    inputs, others = (op.draw(sample, device, seed=seed) for seed in (0, 1))
    exported = torch.export.export(AsModule(op.function), (inputs,), strict=strict).module()
    for each in (inputs, others):
        assert_same_selection(op.run(each, lambda **inputs: exported(inputs)), op.run(each))


@on_ops
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_export_dynamic_shapes(op: Selection, device: str, strict: bool, fresh_compiler: None) -> None:
    inputs, larger = (op.draw(op.growing(k), device) for k in (0, 1))
    dynamic = {
        name: dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO) if isinstance(x, Tensor) else None
        for name, x in inputs.items()
    }
    module = AsModule(op.function)
    exported = torch.export.export(module, (inputs,), dynamic_shapes=(dynamic,), strict=strict).module()
    for each in (inputs, larger):
        assert_same_selection(op.run(each, lambda **inputs: exported(inputs)), op.run(each))


VMAPPED = [
    pytest.param(op, sample, id=f"{op.name}-{name}")
    for op in SELECTIONS
    if op.vmapped
    for name, sample in op.samples.items()
]


@pytest.mark.parametrize(("op", "sample"), VMAPPED)
def test_vmap(op: Selection, sample: Sample, device: str) -> None:
    V = 3
    inputs = op.draw(sample, device)
    names = [name for name in op.vmapped if inputs[name] is not None]
    mixed = {name: i % inputs[name].dim() for i, name in enumerate(names)}
    choices = [dict.fromkeys(names, 0), dict.fromkeys(names, -1), mixed, *({name: 1} for name in names)]
    for in_dims in choices:
        given = {name: torch.stack([inputs[name].roll(v, -1) for v in range(V)], dim) for name, dim in in_dims.items()}
        mapped = torch.vmap(lambda entry: op.run(inputs | entry), in_dims=(in_dims,))(given)
        for v in range(V):
            entry = {name: given[name].select(dim, v) for name, dim in in_dims.items()}
            assert_same_selection([x[v] for x in mapped], op.run(inputs | entry))


# ---- Bad input ----


@pytest.mark.quick
@bad_inputs(harmful=False)
def test_bad_input(op: Selection, bad: Bad, device: str) -> None:
    inputs = op.draw(first_sample(op), device)
    with pytest.raises(bad.error, match=bad.message) as raised:
        op.function(**bad.change(inputs))
    assert f"relops.{op.name}: " in str(raised.value)


@bad_inputs(harmful=True)
def test_bad_input_without_the_python_checks(op: Selection, bad: Bad, device: str) -> None:
    """Check that torch.ops.relops.<name>, without the Python checks, raises an error of any type."""
    inputs = bad.change(op.draw(first_sample(op), device))
    if any(x.is_meta for x in tensors_of(inputs).values()):
        pytest.skip("torch dispatches a call with a meta tensor to the fake kernel")
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        op.overload(*op.raw(inputs).values())


@pytest.mark.parametrize("op", [op for op in SELECTIONS if op.widened], ids=lambda op: op.name)
def test_kernels_reject_16_bit_inputs(op: Selection, device: str) -> None:
    """Check that kernels reject 16-bit inputs, which the public functions convert to float32."""
    with pytest.raises(RuntimeError):
        op.overload(*op.raw(op.draw(first_sample(op), device, torch.float16)).values())


# ---- CUDA ----


@needs_cuda
@on_samples
def test_no_synchronization(op: Selection, sample: Sample) -> None:
    inputs = op.draw(sample, "cuda")
    if op.synchronizes(inputs):
        pytest.skip("the size of the output depends on values")
    op.run(inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op.run(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@on_samples
def test_cuda_graph(op: Selection, sample: Sample) -> None:
    inputs = op.draw(sample, "cuda")
    if op.synchronizes(inputs):
        pytest.skip("the size of the output depends on values")
    graph, results = captured(lambda: op.run(inputs))
    for seed in (0, 1):
        others = op.draw(sample, "cuda", seed=seed)
        for name, x in tensors_of(others).items():
            inputs[name].copy_(x)
        graph.replay()
        assert_same_selection(results, op.run(others))


@needs_cuda
@on_samples
def test_cuda_streams(op: Selection, sample: Sample) -> None:
    check_two_streams(op, sample, assert_same_selection)


# ---- Registration and documentation ----


@pytest.mark.quick
@on_ops
def test_kernels_registered(op: Selection) -> None:
    devices = {"CPU"} | ({"CUDA"} if why_no_cuda() is None else set())
    assert devices <= set(_library.op_kernels()[op.name])


@on_ops
def test_docstring_describes_every_argument(op: Selection) -> None:
    doc = op.function.__doc__
    assert "Example" in doc and "Gradients" in doc
    assert all(name in doc for name in op.draw(first_sample(op)))
