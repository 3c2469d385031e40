"""Local relation: aggregation over windows, weighted by similarity and position (https://arxiv.org/abs/1904.11491)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from relops._autocast import coordinates_under_autocast, promote_under_autocast
from relops._checks import check_choice, check_coordinates, check_features, check_features_like, check_shape, check_size
from relops._dtypes import compute_dtype
from relops._library import check_device_has_kernels
from relops.ops._autograd import only_needed, register_differentiable
from relops.ops._memory_format import empty, is_channels_last
from relops.ops._vmap import mapped_first

MAX_KERNEL_SIZE = 63  # kMaxKernelSize in the kernels
MAX_STEP = 2**24  # the maximum stride and dilation
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
    """Aggregate values over k x k windows with weights that depend on similarity and relative position.

    Each output is a weighted mean over the positions of a window, which are called taps::

        weight[t] = softmax over t of (phi(query[n,g,ho,wo], key[n,g,y,x]) + prior[g,t])
        output[n,c,ho,wo] = sum over t of weight[t] * value[n,c,y,x]

    Tap t reads pixel (y, x), and g is the group of channel c. The query and the key have a single number for each pixel
    and group. Tap (i, j) of output (ho, wo) reads the pixel
    ``(stride * ho + dilation * (i - k // 2), stride * wo + dilation * (j - k // 2))``. The window is centered. If k is
    even, it has one more tap before the center than after it. C need not be a multiple of G: with ``m = ceil(C / G)``,
    group g consists of the channels from ``g * m`` to ``min((g + 1) * m, C) - 1``. The definition follows Local
    Relation Networks (https://arxiv.org/abs/1904.11491). Neither the forward nor the backward pass stores windows or
    weights in memory.

    Args:
        query: A tensor [N,G,Ho,Wo] in the dtype of `value`, where ``Ho = ceil(H / stride)`` and
            ``Wo = ceil(W / stride)``.
        key: A tensor [N,G,H,W] in the dtype of `value`.
        value: A tensor [N,C,H,W] of dtype float64, float32, float16 or bfloat16. channels_last values are read without
            a copy.
        prior: A tensor [G,k,k] in the dtype of `value`. If `value` has a 16-bit dtype, float32 is also allowed. If
            None, the prior is zero.
        kernel_size: The window size k, from 1 to 63.
        stride: The distance in pixels between neighboring outputs, from 1 to 2^24.
        dilation: The distance in pixels between neighboring taps, from 1 to 2^24.
        similarity: The function phi(q, k). "squared_difference" is ``-(q - k)^2``, "absolute_difference" is
            ``-|q - k|``, and "product" is ``q * k``.
        border: The treatment of taps outside of the map. "mask" excludes them from the softmax, and "zero" gives them
            the key 0 and the value 0.

    Returns:
        A tensor [N,C,Ho,Wo] in the dtype of `value`, channels_last if `value` is. If `value` has a 16-bit dtype, sums
        are computed in float32.

    Gradients:
        Gradients flow to `query`, `key`, `value` and `prior`. Only the gradients that are needed are computed. The
        derivative of ``|q - k|`` at 0 is 0. Second derivatives and forward-mode AD raise a RuntimeError. The gradients
        are bit-identical from run to run.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or device, `similarity` or `border` is unknown, or a number is
            out of range.

    Example:
        >>> import torch, relops
        >>> query, key, value = torch.randn(2, 4, 14, 14), torch.randn(2, 4, 14, 14), torch.randn(2, 32, 14, 14)
        >>> out = relops.local_relation(query, key, value, torch.zeros(4, 7, 7), kernel_size=7)
        >>> out.shape
        torch.Size([2, 32, 14, 14])
    """
    op = "local_relation"
    query, key, value = promote_under_autocast(query, key, value)
    check_features(op, "value", value)
    if value.dim() != 4:
        raise ValueError(f"relops.{op}: value must be [N,C,H,W], got shape {list(value.shape)}")
    for name, number, max_size in (
        ("kernel_size", kernel_size, MAX_KERNEL_SIZE),
        ("stride", stride, MAX_STEP),
        ("dilation", dilation, MAX_STEP),
    ):
        check_size(op, name, number, max_size)
    check_features_like(op, "query", query, "[N,G,Ho,Wo]", "value", value)
    check_features_like(op, "key", key, "[N,G,H,W]", "value", value)
    N, C, H, W = value.shape
    G = key.shape[1]
    check_shape(op, "key", key, "[N,G,H,W]", N, G, H, W)
    check_shape(op, "query", query, "[N,G,Ho,Wo]", N, G, (H + stride - 1) // stride, (W + stride - 1) // stride)
    if G == 0 and C != 0:
        raise ValueError(f"relops.{op}: key must have at least one group for the C = {C} channels of value, got G = 0")
    (prior,) = coordinates_under_autocast(value, prior)
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
    """Fold the vmapped dimension into N."""
    if in_dims[3] is not None:
        raise ValueError("relops.local_relation: vmap over prior is not supported")
    maps = [mapped_first(x, dim, info.batch_size).flatten(0, 1) for x, dim in zip((query, key, value), in_dims)]
    output = torch.ops.relops.local_relation(*maps, prior, *settings)
    return output.unflatten(0, (info.batch_size, -1)), 0


register_differentiable("local_relation", _fake, _fake_backward, _setup_context, _backward)
torch.library.register_vmap("relops::local_relation", _vmap)
