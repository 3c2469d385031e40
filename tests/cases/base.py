"""What a case is: sample inputs of an op, changes that make them bad, and the op called with them."""

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
# Arguments by name, in the order of the signature; a list of tensors one by one, for Op.assemble to join.
Inputs = dict[str, Any]
# Draws them in float64 on the CPU, so that every device and dtype is given the same numbers.
Sample = Callable[[torch.Generator], Inputs]


@dataclass(frozen=True)
class Bad:
    """A change to valid inputs, and the error that must name the argument and what was got."""

    id: str
    change: Callable[[Inputs], Inputs]
    error: type[Exception] | tuple[type[Exception], ...]
    message: str
    harmless: bool = False  # the kernels make something of it


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    samples: Mapping[str, Sample]
    empty: Mapping[str, Sample]
    growing: Callable[[int], Sample]  # the k-th size of a series whose sizes all differ, without lists of sizes
    vmapped: tuple[str, ...]  # arguments that torch.vmap may map
    bad: tuple[Bad, ...]
    assemble: Callable[[Inputs], Inputs] = dict  # gives the arguments of relops.<name>
    raw: Callable[[Inputs], Inputs] = dict  # gives those of torch.ops.relops.<name>
    wide_output: bool = False  # float32 for 16-bit features

    def output_dtype(self, features: torch.dtype) -> torch.dtype:
        return torch.promote_types(features, torch.float32) if self.wide_output else features

    @property
    def function(self) -> Callable[..., Any]:
        return self.of_inputs(getattr(relops, self.name))

    @property
    def reference(self) -> Callable[..., Any]:
        return self.of_inputs(getattr(reference, self.name))

    def of_inputs(self, function: Callable[..., Any]) -> Callable[..., Any]:
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


def drawn(sample: Sample, device: str, seed: int = 0) -> Inputs:
    inputs = sample(torch.Generator().manual_seed(seed))
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}


@dataclass(frozen=True, kw_only=True)
class Op(Case):
    """A differentiable op with one output."""

    features: tuple[str, ...]  # arguments of the tested dtype
    coordinates: tuple[str, ...]  # arguments that stay float32 beside 16-bit features
    differentiable: tuple[str, ...]
    # How many times further than sums the rounding of what is inside may take it from the twin, of the largest value.
    noise: float = 1.0

    def draw(self, sample: Sample, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
        return self.cast(drawn(sample, device, seed), dtype, torch.promote_types(dtype, torch.float32))

    def cast(self, inputs: Inputs, features: torch.dtype, coordinates: torch.dtype) -> Inputs:
        dtypes = dict.fromkeys(self.features, features) | dict.fromkeys(self.coordinates, coordinates)
        return {name: x.to(dtypes[name]) if name in dtypes and x is not None else x for name, x in inputs.items()}

    def wanted(self, inputs: Inputs) -> tuple[str, ...]:
        """What gradients there are to: an optional argument may be None."""
        return tuple(name for name in self.differentiable if inputs[name] is not None)

    def run(
        self,
        inputs: Inputs,
        function: Callable[..., Tensor] | None = None,
        grad_output: Tensor | None = None,
        wanted: tuple[str, ...] | None = None,
    ) -> dict[str, Tensor]:
        """The output, under its name, and the gradients, under those of their arguments."""
        wanted = self.wanted(inputs) if wanted is None else wanted
        inputs = {name: x.detach().requires_grad_() if name in wanted else x for name, x in inputs.items()}
        output = (function or self.function)(**inputs)
        if wanted:
            output.backward(grad_like(output) if grad_output is None else grad_output)
        return {"output": output.detach()} | {name: inputs[name].grad for name in wanted}

    def run_raw(self, inputs: Inputs) -> Tensor:
        """The output of torch.ops.relops.<name>, whose further outputs are for its backward."""
        outputs = self.overload(*self.raw(inputs).values())
        return outputs if isinstance(outputs, Tensor) else outputs[0]

    def run_twin(self, inputs: Inputs) -> dict[str, Tensor]:
        """The same by the twin, in float64."""
        return self.run(self.cast(inputs, torch.float64, torch.float64), self.reference)


@dataclass(frozen=True, kw_only=True)
class Selection(Case):
    """An op that selects: its outputs are indices, equal to the twin's, and perhaps numbers; none has a gradient."""

    floats: tuple[str, ...]  # arguments of any floating dtype, each
    widened: bool = True  # where these are of 16 bits, before kernels are given them
    # Of outputs, what is equal to the twin's but for rounding of the numbers among it.
    comparable: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = tuple
    waits: Callable[[Inputs], bool] = lambda inputs: False  # for the device: where sizes of outputs depend on values

    def draw(
        self,
        sample: Sample,
        device: str = "cpu",
        dtype: torch.dtype | tuple[torch.dtype, ...] = torch.float32,
        seed: int = 0,
    ) -> Inputs:
        """`dtype`: of all floats, or of each."""
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,) * len(self.floats)
        inputs = drawn(sample, device, seed)
        return inputs | {name: inputs[name].to(dtype) for name, dtype in zip(self.floats, dtypes)}

    def run(self, inputs: Inputs, function: Callable[..., Any] | None = None) -> tuple[Tensor, ...]:
        outputs = (function or self.function)(**inputs)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    def run_twin(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return self.run(inputs, self.reference)


def grad_like(output: Tensor) -> Tensor:
    """A gradient of the output that is the same numbers in every dtype."""
    steps = torch.arange(output.numel(), device=output.device) * 37 % 17 - 8
    return (steps / 8).to(output.dtype).view(output.shape)


# ---- Bad inputs ----


def elsewhere(tensor: Tensor) -> Tensor:
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
    """The kernels compute with any."""
    for value in values:
        error = ValueError if type(value) in (float, int) else TypeError
        message = rf"{name} must be {rule}, got {re.escape(repr(value))}"
        yield Bad(f"{name} {value!r}", put(name, value), error, message, harmless=True)
