"""The classes that describe the test cases of an op: sample inputs, and changes that make these inputs invalid."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import relops
from relops import reference

INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)
# A dict of arguments by name, in the order of the signature. Each tensor of a list argument has its own entry, and
# Case.assemble joins these entries into a list.
Inputs = dict[str, Any]
# Draws inputs in float64 on the CPU, so that every device and dtype gets the same numbers.
Sample = Callable[[torch.Generator], Inputs]


@dataclass(frozen=True)
class Bad:
    """A change that makes valid inputs invalid, and the expected error, which names the argument and the value."""

    id: str
    change: Callable[[Inputs], Inputs]
    error: type[Exception] | tuple[type[Exception], ...]
    message: str
    harmless: bool = False  # only the Python checks must reject the input; kernels may accept it


@dataclass(frozen=True, kw_only=True)
class Case:
    """An op, its sample inputs and its invalid inputs."""

    name: str
    samples: Mapping[str, Sample]
    empty: Mapping[str, Sample]
    # Returns sample k of a series in which all sizes change with k. Sizes are passed as tensors, not as lists.
    growing: Callable[[int], Sample]
    vmapped: tuple[str, ...]  # arguments over which torch.vmap can map
    bad: tuple[Bad, ...]
    assemble: Callable[[Inputs], Inputs] = dict  # converts inputs to the arguments of relops.<name>
    raw: Callable[[Inputs], Inputs] = dict  # converts inputs to the arguments of torch.ops.relops.<name>
    wide_output: bool = False  # the output is float32 for 16-bit features

    def output_dtype(self, features: torch.dtype) -> torch.dtype:
        return torch.promote_types(features, torch.float32) if self.wide_output else features

    @property
    def function(self) -> Callable[..., Any]:
        return self.with_assembled_inputs(getattr(relops, self.name))

    @property
    def reference(self) -> Callable[..., Any]:
        return self.with_assembled_inputs(getattr(reference, self.name))

    def with_assembled_inputs(self, function: Callable[..., Any]) -> Callable[..., Any]:
        assemble = self.assemble
        if assemble is dict:
            return function

        @functools.wraps(function)
        def assembled(**inputs: Any) -> Any:
            return function(**assemble(inputs))

        return assembled

    @property
    def overload(self) -> Any:
        return getattr(torch.ops.relops, self.name).default


def draw_sample(sample: Sample, device: str, seed: int = 0) -> Inputs:
    inputs = sample(torch.Generator().manual_seed(seed))
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}


@dataclass(frozen=True, kw_only=True)
class Op(Case):
    """A differentiable op with one output."""

    features: tuple[str, ...]  # arguments that get the tested dtype
    coordinates: tuple[str, ...]  # arguments that stay float32 if the features have a 16-bit dtype
    differentiable: tuple[str, ...]
    # Multiplies the absolute tolerance, for an op that amplifies the rounding errors of its intermediate values.
    noise: float = 1.0

    def draw(self, sample: Sample, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
        return self.cast(draw_sample(sample, device, seed), dtype, torch.promote_types(dtype, torch.float32))

    def cast(self, inputs: Inputs, features: torch.dtype, coordinates: torch.dtype) -> Inputs:
        dtypes = dict.fromkeys(self.features, features) | dict.fromkeys(self.coordinates, coordinates)
        return {name: x.to(dtypes[name]) if name in dtypes and x is not None else x for name, x in inputs.items()}

    def needs_grad(self, inputs: Inputs) -> tuple[str, ...]:
        """Return the names of the differentiable arguments that are not None."""
        return tuple(name for name in self.differentiable if inputs[name] is not None)

    def run(
        self,
        inputs: Inputs,
        function: Callable[..., Tensor] | None = None,
        grad_output: Tensor | None = None,
        needs_grad: tuple[str, ...] | None = None,
    ) -> dict[str, Tensor]:
        """Run the forward and backward pass. Return a dict with the "output" and the gradient of each argument."""
        needs_grad = self.needs_grad(inputs) if needs_grad is None else needs_grad
        inputs = {name: x.detach().requires_grad_() if name in needs_grad else x for name, x in inputs.items()}
        output = (function or self.function)(**inputs)
        if needs_grad:
            output.backward(grad_like(output) if grad_output is None else grad_output)
        return {"output": output.detach()} | {name: inputs[name].grad for name in needs_grad}

    def run_raw(self, inputs: Inputs) -> Tensor:
        """Return the first output of torch.ops.relops.<name>. Any other outputs are only for the backward pass."""
        outputs = self.overload(*self.raw(inputs).values())
        return outputs if isinstance(outputs, Tensor) else outputs[0]

    def run_twin(self, inputs: Inputs) -> dict[str, Tensor]:
        """Return the output and the gradients of the twin in float64."""
        return self.run(self.cast(inputs, torch.float64, torch.float64), self.reference)


@dataclass(frozen=True, kw_only=True)
class Selection(Case):
    """An op without gradients that returns indices, and possibly scores. Its indices must equal those of its twin."""

    floats: tuple[str, ...]  # floating-point arguments, whose dtypes may differ
    widened: bool = True  # 16-bit arguments are converted to float32 before a kernel is called
    # Converts outputs to a form in which those of the op and of its twin differ only by rounding errors of the scores.
    comparable: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = tuple
    # Returns whether the op must wait for the device, because the sizes of its outputs depend on values.
    synchronizes: Callable[[Inputs], bool] = lambda inputs: False

    def draw(
        self,
        sample: Sample,
        device: str = "cpu",
        dtype: torch.dtype | tuple[torch.dtype, ...] = torch.float32,
        seed: int = 0,
    ) -> Inputs:
        """Draw inputs. `dtype` is the dtype of all float arguments, or a tuple with one dtype per argument."""
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,) * len(self.floats)
        inputs = draw_sample(sample, device, seed)
        return inputs | {name: inputs[name].to(dtype) for name, dtype in zip(self.floats, dtypes)}

    def run(self, inputs: Inputs, function: Callable[..., Any] | None = None) -> tuple[Tensor, ...]:
        outputs = (function or self.function)(**inputs)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    def run_twin(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return self.run(inputs, self.reference)


def grad_like(output: Tensor) -> Tensor:
    """Return a gradient of the shape of `output`, with values that every dtype represents exactly."""
    steps = torch.arange(output.numel(), device=output.device) * 37 % 17 - 8
    return (steps / 8).to(output.dtype).view(output.shape)


# ---- Bad inputs ----


def to_other_device(tensor: Tensor) -> Tensor:
    return tensor.to("cpu" if tensor.is_cuda else "meta")


def change(name: str, f: Callable[[Any], Any]) -> Callable[[Inputs], Inputs]:
    return lambda inputs: inputs | {name: f(inputs[name])}


def put(name: str, value: Any) -> Callable[[Inputs], Inputs]:
    return change(name, lambda _: value)


def bad_options(name: str, error: type[Exception], *values: Any, harmless: bool = False) -> Iterator[Bad]:
    for value in values:
        message = rf"{name}(\[0\])? must be .*got .*{re.escape(repr(value))}"
        yield Bad(f"{name} {value!r}", put(name, value), error, message, harmless)


def bad_numbers(name: str, rule: str, *values: Any) -> Iterator[Bad]:
    """Yield changes that set a number to an invalid value. They are harmless, because kernels accept any number."""
    for value in values:
        error = ValueError if type(value) in (float, int) else TypeError
        message = rf"{name} must be {rule}, got {re.escape(repr(value))}"
        yield Bad(f"{name} {value!r}", put(name, value), error, message, harmless=True)
