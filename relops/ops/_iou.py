"""Checks, dtype conversion and registration of box_iou and generalized_box_iou.

torch.jit.script compiles `to_common_compute_dtype` and evaluates its annotations at run time. Therefore this file must
not import annotations from __future__.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from relops._checks import check_device, check_features_or_integers
from relops._dtypes import common_compute_dtype, compute_dtype
from relops._library import check_device_has_kernels
from relops.ops._autograd import fresh_gradients, only_needed, register_differentiable
from relops.ops._vmap import mapped_first


def check_box_pair(op: str, a: Tensor, b: Tensor) -> None:
    for name, boxes in (("a", a), ("b", b)):
        check_features_or_integers(op, name, boxes)
        if boxes.dim() not in (2, 3) or boxes.size(-1) != 4:
            K = name.upper()
            raise ValueError(f"relops.{op}: {name} must be [{K},4] or [N,{K},4], got shape {list(boxes.shape)}")
    both_floating = a.dtype != b.dtype and a.is_floating_point() and b.is_floating_point()
    if both_floating and compute_dtype(a.dtype) != compute_dtype(b.dtype):
        allowed = "float64" if a.dtype == torch.float64 else "float16, bfloat16 or float32"
        raise TypeError(f"relops.{op}: b must be {allowed} when a is {a.dtype}, got {b.dtype}")
    check_device(op, "b", b, "a", a)
    if a.shape[:-2] != b.shape[:-2]:
        rule = "[B,4] when a is [A,4]" if a.dim() == 2 else f"[N,B,4] with N = {a.size(0)} as in a"
        raise ValueError(f"relops.{op}: b must be {rule}, got shape {list(b.shape)}")
    check_device_has_kernels(op, a.device)


def to_common_compute_dtype(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Convert both tensors to the dtype in which the kernels compare them."""
    dtype = common_compute_dtype(a, b)
    return a.to(dtype), b.to(dtype)


def register_box_pair(op: str) -> None:
    """Register an op that maps a [..,A,4] and b [..,B,4] to [..,A,B]."""

    def fake(a: Tensor, b: Tensor) -> Tensor:
        return a.new_empty(*a.shape[:-1], b.size(-2))

    def fake_backward(grad_output: Tensor, a: Tensor, b: Tensor, needs_grad: Sequence[bool]) -> tuple[Tensor, ...]:
        return fresh_gradients((a, b), needs_grad)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs_grad = ctx.needs_input_grad
        return only_needed(
            getattr(torch.ops.relops, f"_{op}_backward")(grad_output, *ctx.saved_tensors, needs_grad), needs_grad
        )

    def vmap(info: Any, in_dims: tuple[Any, ...], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
        """Fold the vmapped dimension into N."""
        a, b = (mapped_first(boxes, dim, info.batch_size) for boxes, dim in zip((a, b), in_dims))
        output = getattr(torch.ops.relops, op)(a.flatten(0, -3), b.flatten(0, -3))
        return output.unflatten(0, a.shape[:-2]), 0

    register_differentiable(op, fake, fake_backward, setup_context, backward)
    torch.library.register_vmap(f"relops::{op}", vmap)
