"""Tests that every differentiable op must pass. They run for every op in cases.OPS.

The tests of ops that return indices are in test_contract_selection.py.
"""

from __future__ import annotations

import inspect
import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import cuda_emulation
import pytest
import torch
from cases import OPS, SELECTIONS, Bad, Inputs, Op, Sample, grad_like
from conftest import (
    DTYPES,
    LAYOUTS,
    TRACING_MODES,
    AsModule,
    assert_matches,
    captured,
    check_recompiles,
    check_two_streams,
    determinism,
    faked,
    forward_mode_calls,
    needs_cuda,
    run_python,
    tensors_of,
    traced,
    why_no_cuda,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import relops
from relops import _library


def is_first(op: Op, sample: Sample) -> bool:
    return sample is next(iter(op.samples.values()))


# `make quick` runs the tests that use SAMPLES, but only on the first sample of every op.
SAMPLES = [
    pytest.param(op, sample, id=f"{op.name}-{name}", marks=pytest.mark.quick if is_first(op, sample) else ())
    for op in OPS
    for name, sample in op.samples.items()
]
EMPTY = [pytest.param(op, sample, id=f"{op.name}-{name}") for op in OPS for name, sample in op.empty.items()]
# One sample per op, for tests that would not find more errors with more samples.
FIRST = [pytest.param(op, next(iter(op.samples.values())), id=op.name) for op in OPS]
BAD = [pytest.param(op, bad, id=f"{op.name}-{bad.id}") for op in OPS for bad in op.bad]
HARMFUL = [pytest.param(op, bad, id=f"{op.name}-{bad.id}") for op in OPS for bad in op.bad if not bad.harmless]

# Dtypes of features and coordinates. For 16-bit features, coordinates are float32 or have the same dtype.
DTYPE_PAIRS = [(dtype, torch.promote_types(dtype, torch.float32)) for dtype in DTYPES] + [
    (dtype, dtype) for dtype in DTYPES if dtype.itemsize == 2
]


def in_turn(name: str, choices: Sequence[Any], samples: list[Any]) -> pytest.MarkDecorator:
    """Parametrize a test over samples and choices without running all of their combinations.

    The first sample of an op is combined with every choice. Each of the remaining samples is combined with only one
    choice, and the choices are used in rotation. Use this for tests whose outcome does not depend on the combination of
    a sample and a choice.
    """
    chosen = [
        pytest.param(*sample.values, choice, id=f"{sample.id}-{choice}", marks=sample.marks)
        for i, sample in enumerate(samples)
        for choice in (choices if is_first(*sample.values) else choices[i % len(choices) :][:1])
    ]
    return pytest.mark.parametrize(("op", "sample", name), chosen)


on_samples = pytest.mark.parametrize(("op", "sample"), SAMPLES)
on_first_sample = pytest.mark.parametrize(("op", "sample"), FIRST)
on_ops = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that two results of the same kernels on the same numbers are equal.

    On CUDA, or if memory formats differ, the order of sums may differ, so results are compared with a tolerance.
    """
    cuda_kernels = actual["output"].is_cuda or cuda_emulation.in_use
    in_order = not cuda_kernels and actual["output"].stride() == expected["output"].stride()
    for name, x in actual.items():
        assert x.dtype == expected[name].dtype and x.shape == expected[name].shape, name
        if not in_order:
            assert_matches(x, expected[name].double(), name)
        else:
            assert torch.equal(x, expected[name]), name


# ---- Values and gradients ----


@on_samples
@pytest.mark.parametrize(("features", "coordinates"), DTYPE_PAIRS, ids=str)
def test_matches_twin(op: Op, sample: Sample, device: str, features: torch.dtype, coordinates: torch.dtype) -> None:
    inputs = op.cast(op.draw(sample, device), features, coordinates)
    actual = op.run(inputs)
    expected = op.run_twin(inputs)
    assert actual["output"].dtype == op.output_dtype(features)
    for name, x in actual.items():
        assert_matches(x, expected[name], name, noise=op.noise)


@on_samples
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic(op: Op, sample: Sample, device: str, dtype: torch.dtype, deterministic: None) -> None:
    inputs = op.draw(sample, device, dtype)
    runs = [op.run(inputs) for _ in range(3)]
    expected = op.run_twin(inputs)
    for name, x in runs[0].items():
        assert all(torch.equal(x, run[name]) for run in runs[1:]), name
        assert_matches(x, expected[name], name, noise=op.noise)


@on_ops
def test_deterministic_for_large_inputs(op: Op, device: str, deterministic: None) -> None:
    """Use inputs so large that the order of threads and blocks differs from run to run."""
    inputs = op.draw(op.growing(9), device)
    runs = [op.run(inputs) for _ in range(20 if device == "cuda" else 3)]
    for name, x in runs[0].items():
        assert all(torch.equal(x, run[name]) for run in runs[1:]), name


@on_samples
def test_gradcheck(op: Op, sample: Sample, device: str, deterministic: None) -> None:
    inputs = op.draw(sample, device, torch.float64)
    names = op.needs_grad(inputs)
    leaves = [inputs[name].clone().requires_grad_() for name in names]

    def function(*tensors: Tensor) -> Tensor:
        return op.function(**inputs | dict(zip(names, tensors)))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@on_samples
def test_gradients_of_some_inputs_only(op: Op, sample: Sample, device: str, deterministic: None) -> None:
    inputs = op.draw(sample, device)
    everything = op.run(inputs)
    for name in op.needs_grad(inputs):
        alone = op.run(inputs, needs_grad=(name,))  # the other inputs do not require gradients
        assert_same(alone, everything)
        others = tuple(other for other in op.needs_grad(inputs) if other != name)
        if others:
            assert_same(op.run(inputs, needs_grad=others), everything)


@on_ops
def test_no_graph_without_requires_grad(op: Op, device: str) -> None:
    inputs = op.draw(next(iter(op.samples.values())), device)
    assert not op.function(**inputs).requires_grad


@on_first_sample
def test_double_backward_raises(op: Op, sample: Sample, device: str) -> None:
    inputs = op.draw(sample, device)
    for name in op.differentiable:
        x = inputs[name].clone().requires_grad_()
        (grad,) = torch.autograd.grad(op.function(**inputs | {name: x}).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=rf"relops\.{op.name}: its backward pass is not differentiable"):
            grad.sum().backward()


def floating(inputs: Inputs) -> list[str]:
    return [name for name, x in tensors_of(inputs).items() if x.is_floating_point()]


@on_samples
def test_forward_mode_raises(op: Op, sample: Sample, device: str) -> None:
    """Check that forward-mode AD, which relops does not provide, raises an error instead of returning zeros."""
    inputs = op.draw(sample, device)
    functions = op.function, lambda **inputs: op.run_raw(inputs)
    for i, (name, function) in enumerate(itertools.product(floating(inputs), functions)):
        calls = list(forward_mode_calls(function, inputs, name))
        for description, call in calls if is_first(op, sample) else [calls[i % len(calls)]]:
            with pytest.raises(RuntimeError, match=rf"relops\.{op.name} does not provide forward-mode AD"):
                pytest.fail(f"{description} with respect to {name} returned {call()}")


@on_first_sample
@pytest.mark.parametrize("compiled_outside", [False, True], ids=["jvp of compiled", "compiled jvp"])
def test_forward_mode_raises_in_compiled_code(
    op: Op, sample: Sample, device: str, compiled_outside: bool, fresh_compiler: None
) -> None:
    inputs = op.draw(sample, device)
    name = op.differentiable[0]

    def jvp(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(f, (x,), (x,))

    def call(x: Tensor) -> Tensor:
        return op.function(**inputs | {name: x})

    with pytest.raises(RuntimeError, match=rf"relops\.{op.name} does not provide forward-mode AD"):
        if compiled_outside:
            torch.compile(lambda x: jvp(call, x), backend="aot_eager")(inputs[name])
        else:
            jvp(torch.compile(call, backend="aot_eager"), inputs[name])


class Recorded(TorchDispatchMode):
    """A dispatch mode that records the arguments of all calls of one op."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.op, self.calls = getattr(torch.ops.relops, name).default, []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is self.op:
            self.calls.append(args)
        return func(*args, **kwargs or {})


@on_samples
def test_forward_mode_of_backward_raises(op: Op, sample: Sample, device: str) -> None:
    """Check that forward-mode AD of the backward op raises an error. The op gets the arguments that autograd passes."""
    with Recorded(f"_{op.name}_backward") as recorded:
        op.run(op.draw(sample, device))
    (args,) = recorded.calls
    leaves, spec = tree_flatten(args)
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor) and x.is_floating_point():

            def call(x: Tensor, i: int = i) -> Any:
                return recorded.op(*tree_unflatten([*leaves[:i], x, *leaves[i + 1 :]], spec))

            with pytest.raises(RuntimeError, match=rf"relops\.{op.name} does not provide forward-mode AD"):
                torch.func.jvp(call, (x,), (x,))


# ---- Layouts ----


@on_samples
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_of_inputs(op: Op, sample: Sample, device: str, layout: Callable, dtype: torch.dtype) -> None:
    inputs = op.draw(sample, device, dtype)
    names = (*op.features, *op.coordinates, *op.vmapped)
    laid_out = inputs | {name: layout(inputs[name]) for name in names if inputs[name] is not None}
    assert_same(op.run(laid_out), op.run(inputs))


@on_samples
def test_expanded_inputs(op: Op, sample: Sample, device: str) -> None:
    inputs = op.draw(sample, device)
    expanded = {
        name: x[:1].expand_as(x) if isinstance(x, Tensor) and name in op.vmapped else x for name, x in inputs.items()
    }
    dense = {name: x.contiguous() if isinstance(x, Tensor) else x for name, x in expanded.items()}
    assert_same(op.run(expanded), op.run(dense))


@on_samples
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"], ids=lambda layout: getattr(layout, "__name__", layout))
def test_layouts_of_grad_output(op: Op, sample: Sample, device: str, layout: Callable | str) -> None:
    inputs = op.draw(sample, device)
    output = op.function(**inputs)
    if layout == "expanded":  # the layout of the gradient in out.sum().backward()
        dense = torch.ones_like(output)
        grad = torch.ones((), device=device).expand_as(output)
    else:
        dense = grad_like(output)
        grad = layout(dense)
    assert_same(op.run(inputs, grad_output=grad), op.run(inputs, grad_output=dense))


@pytest.mark.parametrize(("op", "sample"), EMPTY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_empty(op: Op, sample: Sample, device: str, dtype: torch.dtype) -> None:
    inputs = op.draw(sample, device, dtype)
    results = op.run(inputs)
    meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in inputs.items()}
    assert results["output"].shape == op.run_raw(meta).shape
    assert not results["output"].any()
    for name in op.needs_grad(inputs):
        assert results[name].shape == inputs[name].shape and not results[name].any(), name


# ---- Tracing, compilation and transforms ----


@on_samples
def test_meta_tensors(op: Op, sample: Sample) -> None:
    """Check the shape, strides and dtype of the output for meta tensors, which infer shapes without a compiler."""
    inputs = op.draw(sample)
    meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in inputs.items()}
    actual, expected = op.function(**meta), op.function(**inputs)
    assert actual.is_meta and actual.dtype == expected.dtype
    assert actual.shape == expected.shape and actual.stride() == expected.stride()


@pytest.mark.parametrize(("op", "sample"), [*SAMPLES, *EMPTY])
def test_fake_tensors(op: Op, sample: Sample, device: str) -> None:
    inputs = op.draw(sample, device)
    with FakeTensorMode() as mode:
        actual = op.run(faked(mode, inputs))
    for name, expected in op.run(inputs).items():
        x = actual[name]
        assert isinstance(x, FakeTensor) and x.dtype == expected.dtype and x.device == expected.device, name
        assert x.shape == expected.shape and x.stride() == expected.stride(), name


@in_turn("tracing_mode", TRACING_MODES, [*SAMPLES, *EMPTY])
def test_make_fx(op: Op, sample: Sample, device: str, tracing_mode: str) -> None:
    """Trace the forward and backward pass into one graph."""
    inputs, others = (op.draw(sample, device, seed=seed) for seed in (0, 1))
    graph = traced(op.run, inputs, tracing_mode)
    for each in (inputs, others):
        assert_same(graph(each), op.run(each))


@on_samples
def test_opcheck(op: Op, sample: Sample, device: str) -> None:
    """Run opcheck with inputs that require gradients, and for the first sample also with inputs that require none.

    opcheck checks less without gradients, so one sample is enough.
    """
    inputs = op.draw(sample, device)
    if is_first(op, sample):
        torch.library.opcheck(op.overload, tuple(op.raw(inputs).values()))
    for name in op.needs_grad(inputs):
        inputs[name].requires_grad_()
    # By default opcheck compares two backward passes with a very small tolerance, but the fast sums on CUDA have no
    # fixed order.
    torch.library.opcheck(op.overload, tuple(op.raw(inputs).values()), rtol=1e-4, atol=1e-5)


@on_samples
def test_compile(op: Op, sample: Sample, device: str, fresh_compiler: None) -> None:
    inputs = op.draw(sample, device)
    assert_same(op.run(inputs, torch.compile(op.function, fullgraph=True, backend="aot_eager")), op.run(inputs))


@on_first_sample
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_inductor(op: Op, sample: Sample, device: str, dtype: torch.dtype, fresh_compiler: None) -> None:
    if device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("inductor needs a C++ compiler")
    inputs = op.draw(sample, device, dtype)

    # Inductor fuses the operations before and after the op, so this also tests what it assumes about layouts.
    def around(**inputs: Tensor) -> Tensor:
        scaled = {name: x * 1.0 if name in op.differentiable else x for name, x in inputs.items()}
        return op.function(**scaled).flip(-1) * 2

    actual = op.run(inputs, torch.compile(around, fullgraph=True))
    expected = op.run(op.cast(inputs, torch.float64, torch.float64), around)
    for name, x in actual.items():
        assert_matches(x, expected[name], name, noise=op.noise)


@on_ops
def test_compile_does_not_recompile_forever(op: Op, device: str, fresh_compiler: None) -> None:
    check_recompiles(op, device, assert_same)


@in_turn("strict", [False, True], SAMPLES)
def test_export(op: Op, sample: Sample, device: str, strict: bool, fresh_compiler: None) -> None:
    inputs = op.draw(sample, device)
    exported = torch.export.export(AsModule(op.function), (inputs,), strict=strict).module()
    assert_same({"output": exported(inputs)}, {"output": op.function(**inputs)})


@on_ops
def test_export_dynamic_shapes(op: Op, device: str, fresh_compiler: None) -> None:
    inputs, larger = (op.draw(op.growing(k), device) for k in (0, 1))
    names = {*op.features, *op.coordinates, *op.vmapped}
    dynamic = {
        name: dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO)
        if name in names and isinstance(x, Tensor)
        else tree_map(lambda _: None, x)
        for name, x in inputs.items()
    }
    exported = torch.export.export(AsModule(op.function), (inputs,), dynamic_shapes=(dynamic,)).module()
    assert_same({"output": exported(larger)}, {"output": op.function(**larger)})


@on_samples
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(op: Op, sample: Sample, device: str, autocast_dtype: torch.dtype) -> None:
    """Check that every mixture of dtypes works under autocast without explicit casts.

    Under autocast, linear layers return 16-bit tensors, and tensors that pass through no linear layer stay float32.
    """
    f32 = torch.float32
    narrow_features = op.cast(op.draw(sample, device), autocast_dtype, f32)
    narrow_coordinates = op.cast(op.draw(sample, device), f32, autocast_dtype)
    mixtures = [(narrow_features, narrow_features), (narrow_coordinates, op.cast(narrow_coordinates, f32, f32))]
    for first in op.coordinates[:1]:
        if narrow_features[first] is None:
            continue
        one_narrow = narrow_features | {first: narrow_features[first].to(autocast_dtype)}
        mixtures.append((one_narrow, op.cast(one_narrow, autocast_dtype, f32)))

    def autocast(**inputs: Tensor) -> Tensor:
        with torch.autocast(device, autocast_dtype):
            return op.function(**inputs)

    for given, equivalent in mixtures:
        actual, expected = op.run(given, autocast), op.run(equivalent)
        assert_same(actual, {name: x.to(actual[name].dtype) for name, x in expected.items()})
        assert all(actual[name].dtype == given[name].dtype for name in op.needs_grad(given))
        assert actual["output"].dtype == op.output_dtype(given[op.features[0]].dtype)


@on_first_sample
def test_vmap(op: Op, sample: Sample, device: str) -> None:
    B = 3
    inputs = op.draw(sample, device)
    names = [name for name in op.vmapped if inputs[name] is not None]
    scale = torch.linspace(0.9, 1.1, B, device=device)

    def batched(name: str, dim: int) -> Tensor:
        """Stack B variants of an argument: features times `scale[b]`, or other arguments with rows rolled by b."""
        x = inputs[name]
        entries = [x * scale[b].to(x.dtype) if name in op.features else x.roll(b, 0) for b in range(B)]
        return torch.stack(entries, dim)

    choices = [dict.fromkeys(names, 0), dict.fromkeys(names, -1), {name: i % 3 for i, name in enumerate(names)}]
    for in_dims in [*choices, *({name: 1} for name in names)]:
        given = {name: batched(name, dim) for name, dim in in_dims.items()}

        def mapped(**given: Tensor) -> Tensor:
            return torch.vmap(lambda entry: op.function(**inputs | entry), in_dims=(in_dims,))(given)  # noqa: B023

        def looped(**given: Tensor) -> Tensor:
            entries = [{name: given[name].select(dim, b) for name, dim in in_dims.items()} for b in range(B)]  # noqa: B023
            return torch.stack([op.function(**inputs | entry) for entry in entries])

        needs_grad = tuple(name for name in given if name in op.differentiable)
        actual, expected = (op.run(given, f, needs_grad=needs_grad) for f in (mapped, looped))
        for name, x in actual.items():  # the order of sums over the batch differs
            assert_matches(x, expected[name].double(), f"{name}, mapped over {in_dims}")


# ---- Bad input ----


@pytest.mark.quick
@pytest.mark.parametrize(("op", "bad"), BAD)
def test_bad_input(op: Op, bad: Bad, device: str) -> None:
    inputs = op.draw(next(iter(op.samples.values())), device)
    with pytest.raises(bad.error, match=bad.message) as raised:
        op.function(**bad.change(inputs))
    assert f"relops.{op.name}: " in str(raised.value)


@pytest.mark.parametrize(("op", "bad"), HARMFUL)
def test_bad_input_without_the_python_checks(op: Op, bad: Bad, device: str) -> None:
    """Check that torch.ops.relops.<name>, without the Python checks, raises an error of any type."""
    inputs = bad.change(op.draw(next(iter(op.samples.values())), device))
    if any(isinstance(x, Tensor) and x.is_meta for x in inputs.values()):
        pytest.skip("torch dispatches a call with a meta tensor to the fake kernel")
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        output = op.run_raw(inputs)
        # If sizes are on the device, the host cannot check them. The output is then NaN, which the tests of the op
        # check.
        assert not output.is_cuda


@needs_cuda
@on_samples
def test_no_synchronization(op: Op, sample: Sample) -> None:
    inputs = op.draw(sample, "cuda")
    grad = grad_like(op.function(**inputs))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op.run(inputs, grad_output=grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@on_samples
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
def test_cuda_graph(op: Op, sample: Sample, deterministic: bool) -> None:
    """Capture the forward and backward pass once, and replay them with other inputs."""
    inputs = op.draw(sample, "cuda")
    names = op.needs_grad(inputs)
    leaves = [inputs[name].requires_grad_() for name in names]
    grad = grad_like(op.function(**inputs))

    def step() -> tuple[Tensor, ...]:
        output = op.function(**inputs)
        return output.detach(), *torch.autograd.grad(output, leaves, grad)

    with determinism(deterministic):
        graph, results = captured(step)
        for seed in (0, 1):
            others = op.draw(sample, "cuda", seed=seed)
            with torch.no_grad():
                for name, x in tensors_of(others).items():
                    inputs[name].copy_(x)
            graph.replay()
            replayed, expected = dict(zip(("output", *names), results)), op.run(others)
            assert_same(replayed, expected)
            if deterministic:
                assert all(torch.equal(x, expected[name]) for name, x in replayed.items())


@needs_cuda
@on_samples
def test_cuda_streams(op: Op, sample: Sample) -> None:
    check_two_streams(op, sample, assert_same)


@pytest.mark.quick
@on_ops
def test_kernels_registered(op: Op) -> None:
    kernels = _library.op_kernels()
    devices = {"CPU"} | ({"CUDA"} if why_no_cuda() is None else set())
    for name in (op.name, f"_{op.name}_backward"):
        assert devices <= set(kernels[name]), name


@pytest.mark.quick
def test_every_public_op_has_cases() -> None:
    """Check that every public op has test cases, so that all contract tests and `make quick` include it."""
    public = {name for name in _library.op_kernels() if not name.startswith("_")}
    assert public == {op.name for op in (*OPS, *SELECTIONS)}
    assert public == {name for name in relops.__all__ if not isinstance(getattr(relops, name), ModuleType)}
    assert {sample.values[0].name for sample in SAMPLES if sample.marks} == {op.name for op in OPS}


def test_import_defines_every_op() -> None:
    """Check that `import relops` defines each op under all of its names, and that its modules can be imported."""
    names = [op.name for op in (*OPS, *SELECTIONS)]
    process = run_python(
        f"""
import relops, torch
for name in {names!r}:
    function = getattr(relops, name)
    assert function.__name__ == name and callable(function)
    assert getattr(relops.ops, name) is function
    assert callable(getattr(relops.reference, name))
    assert callable(getattr(torch.ops.relops, name))
from relops.ops.roi_align import roi_align
from relops.reference.roi_align import roi_align as twin
assert roi_align is relops.roi_align and twin is relops.reference.roi_align
"""
    )
    assert process.returncode == 0, process.stderr


def test_public_functions_have_annotations() -> None:
    functions = [getattr(relops, op.name) for op in (*OPS, *SELECTIONS)]
    modules = [getattr(relops.nn, name) for name in relops.nn.__all__]
    for function in (*functions, *modules):
        for name, parameter in inspect.signature(function).parameters.items():
            assert parameter.annotation not in (None, inspect.Parameter.empty), (function, name)
            if name == "output_size":
                assert parameter.annotation == int | Sequence[int], function


@on_ops
def test_docstring_describes_every_argument(op: Op) -> None:
    doc = op.function.__doc__
    assert "Example" in doc and "Gradients" in doc
    assert all(name in doc for name in op.assemble(op.draw(next(iter(op.samples.values())))))
