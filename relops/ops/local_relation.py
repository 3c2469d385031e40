"""Local relation: windows aggregated with weights of similarity and geometry (https://arxiv.org/abs/1904.11491)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from relops._autocast import under_autocast, widest_under_autocast
from relops._checks import check_choice, check_coordinates, check_features, check_features_like, check_shape, check_size
from relops._dtypes import compute_dtype
from relops._library import check_device_has_kernels
from relops.ops._autograd import only_needed, register_differentiable
from relops.ops._memory_format import empty, is_channels_last
from relops.ops._vmap import mapped_first

MAX_KERNEL_SIZE = 63  # kMaxKernelSize of the kernels
MAX_STEP = 2**24  # of stride and dilation
SIMILARITIES = ("squared_difference", "absolute_difference", "product")
BORDERS = ("mask", "zero")


def local_relation(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prior: Tensor | None = None,
    *,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    similarity: str = "squared_difference",
    border: str = "mask",
) -> Tensor:
    """Means of values over windows of k x k pixels, weighted by how similar queries and keys are and where they lie.

    ``output[n,c,ho,wo] = sum over taps t of softmax over t(phi(query[n,g,ho,wo], key[n,g,y,x]) + prior[g,t])
    value[n,c,y,x]``, g being the group of channel c. Queries and keys are one number per pixel and group. Tap (i, j) of
    output (ho, wo) is pixel ``(stride * ho + dilation * (i - k // 2), stride * wo + dilation * (j - k // 2))``: the
    window is centered, an even k having one more tap before the center than after. With m = ceil(C / G), group g owns
    channels [g * m, min((g + 1) * m, C)): C need not be a multiple of G. The definition is that of Local Relation
    Networks (https://arxiv.org/abs/1904.11491). Neither windows nor weights are in memory, in either direction.

    Args:
        query: [N,G,Ho,Wo] with Ho = ceil(H / stride) and Wo = ceil(W / stride), in the dtype of value.
        key: [N,G,H,W] in the dtype of value.
        value: [N,C,H,W], float64, float32, float16 or bfloat16. channels_last is read as it lies.
        prior: [G,k,k], in the dtype of value, or float32 beside 16-bit values; None: zeros.
        kernel_size: k, from 1 to 63.
        stride: pixels from an output to the next, from 1 to 2^24.
        dilation: pixels from a tap to the next, from 1 to 2^24.
        similarity: phi, "squared_difference": -(q - k)^2; "absolute_difference": -|q - k|; "product": q * k.
        border: taps outside the map leave the softmax ("mask"), or have key 0 and value 0 ("zero").

    Returns:
        [N,C,Ho,Wo] in the dtype of value, channels_last if value is. Sums are in float32 for 16-bit values.

    Gradients: to query, key, value and prior; only those asked for are computed. That of |q - k| at 0 is 0. Second
    derivatives and forward-mode AD raise RuntimeError. Backward is bit-identical from run to run.

    Raises:
        TypeError: a dtype, or an argument of another type.
        ValueError: a shape, a device, a name that is unknown, a number out of its range.

    Example:
        >>> query, key, value = torch.randn(2, 32, 56, 56), torch.randn(2, 32, 56, 56), torch.randn(2, 256, 56, 56)
        >>> relops.local_relation(query, key, value, torch.zeros(32, 7, 7), kernel_size=7)  # [2,256,56,56]
    """
    op = "local_relation"
    query, key, value = widest_under_autocast(query, key, value)
    check_features(op, "value", value)
    if value.dim() != 4:
        raise ValueError(f"relops.{op}: value must be [N,C,H,W], got shape {list(value.shape)}")
    for name, number, most in (
        ("kernel_size", kernel_size, MAX_KERNEL_SIZE),
        ("stride", stride, MAX_STEP),
        ("dilation", dilation, MAX_STEP),
    ):
        check_size(op, name, number, most)
    check_features_like(op, "query", query, "[N,G,Ho,Wo]", "value", value)
    check_features_like(op, "key", key, "[N,G,H,W]", "value", value)
    N, C, H, W = value.shape
    G = key.shape[1]
    check_shape(op, "key", key, "[N,G,H,W]", N, G, H, W)
    check_shape(op, "query", query, "[N,G,Ho,Wo]", N, G, (H + stride - 1) // stride, (W + stride - 1) // stride)
    if G == 0 and C != 0:
        raise ValueError(f"relops.{op}: key must have at least one group for the C = {C} channels of value, got G = 0")
    (prior,) = under_autocast(value, prior)
    if prior is not None:
        check_coordinates(op, "prior", prior, "value", value)
        check_shape(op, "prior", prior, "[G,k,k]", G, kernel_size, kernel_size)
        prior = prior.to(compute_dtype(value.dtype))
    check_choice(op, "similarity", similarity, SIMILARITIES)
    check_choice(op, "border", border, BORDERS)
    check_device_has_kernels(op, value.device)
    return torch.ops.relops.local_relation(query, key, value, prior, kernel_size, stride, dilation, similarity, border)


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return empty(value, (*value.shape[:2], *query.shape[2:]), is_channels_last(value))


def _fake_backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *maps, prior = args[:4]
    *needs_maps, needs_prior = args[-1]
    grads = [
        empty(x, x.shape, is_channels_last(x)) if needed else x.new_empty(0) for x, needed in zip(maps, needs_maps)
    ]
    return *grads, maps[2].new_empty(0) if prior is None or not needs_prior else prior.new_empty(prior.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    needs_grad = list(ctx.needs_input_grad[:4])
    grads = torch.ops.relops._local_relation_backward(grad_output, *ctx.saved_tensors, *ctx.settings, needs_grad)
    return *only_needed(grads, needs_grad), *(None,) * 5


def _vmap(
    info: Any, in_dims: tuple[Any, ...], query: Tensor, key: Tensor, value: Tensor, prior: Tensor | None, *settings: Any
) -> tuple[Tensor, int]:
    """Its dimension is folded into N."""
    if in_dims[3] is not None:
        raise ValueError("relops.local_relation: vmap over prior is not supported")
    maps = [mapped_first(x, dim, info.batch_size).flatten(0, 1) for x, dim in zip((query, key, value), in_dims)]
    output = torch.ops.relops.local_relation(*maps, prior, *settings)
    return output.unflatten(0, (info.batch_size, -1)), 0


register_differentiable("local_relation", _fake, _fake_backward, _setup_context, _backward)
torch.library.register_vmap("relops::local_relation", _vmap)
