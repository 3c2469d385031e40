"""Registration of fake kernels and backward formulas, and of errors for forward-mode AD and second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad


class _Library(torch.library.Library):
    """A library whose autograd kernels raise an error for tangents. Plain torch would silently drop them."""

    def impl(self, op_name: str, fn: Callable[..., Any], dispatch_key: str = "", **options: Any) -> None:
        op = op_name.removeprefix("_").removesuffix("_backward")

        def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
            if forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled():
                _refuse_tangents(op, args)
            return fn(keyset, *args)

        super().impl(op_name, kernel, dispatch_key, **options)


_library = _Library("relops", "IMPL")


def register_autograd(op: str, backward: Callable[..., Any], setup_context: Callable[..., Any] | None = None) -> None:
    """Register a backward formula as torch.library.register_autograd does, and make forward-mode AD raise an error."""
    torch.library.register_autograd(f"relops::{op}", backward, setup_context=setup_context, lib=_library)


def register_differentiable(
    op: str,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    setup_context: Callable[..., Any],
    backward: Callable[..., Any],
) -> None:
    """Register the fake kernels of `op` and its backward op, and a backward formula that calls the backward op."""
    torch.library.register_fake(f"relops::{op}", fake)
    torch.library.register_fake(f"relops::_{op}_backward", fake_backward)
    register_autograd(op, backward, setup_context=setup_context)
    register_no_double_backward(op)


def fresh_gradients(tensors: Iterable[Tensor], needs_grad: Iterable[bool]) -> tuple[Tensor, ...]:
    """Allocate a gradient for each tensor. Gradients that are not needed are empty."""
    return tuple(tensor.new_empty(tensor.shape if needed else 0) for tensor, needed in zip(tensors, needs_grad))


def only_needed(grads: Iterable[Tensor], needs_grad: Iterable[bool]) -> tuple[Tensor | None, ...]:
    """Replace gradients that are not needed with None. A backward op returns them as empty tensors."""
    return tuple(grad if needed else None for grad, needed in zip(grads, needs_grad))


def register_no_double_backward(op: str) -> None:
    """Make second derivatives of the op raise an error. Otherwise, they would be silently wrong."""

    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(
            f"relops.{op}: its backward pass is not differentiable, so it has no second derivatives. Call backward "
            "without create_graph=True."
        )

    register_autograd(f"_{op}_backward", backward)


def register_no_gradient(op: str) -> None:
    """Prevent the outputs of the op from requiring gradients, and make forward-mode AD raise a RuntimeError."""
    overload = getattr(torch.ops.relops, op).default

    def fall_through(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _library.impl(op, fall_through, "Autograd", with_keyset=True)


def _refuse_tangents(op: str, args: tuple[Any, ...]) -> None:
    if any(forward_ad.unpack_dual(x).tangent is not None for x in _tensors(args)):
        raise RuntimeError(
            f"relops.{op} does not provide forward-mode AD (torch.func.jvp, jacfwd, linearize and hessian, "
            "torch.autograd.forward_ad). Use reverse mode: backward or torch.autograd.grad."
        )


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    """Yield all tensors in the arguments, and also the tensors that torch.func transforms have wrapped."""
    for x in args:
        if isinstance(x, (list, tuple)):
            yield from _tensors(x)
        elif isinstance(x, Tensor):
            yield x
            while torch._C._functorch.is_functorch_wrapped_tensor(x):
                x = torch._C._functorch.get_unwrapped(x)
                yield x
