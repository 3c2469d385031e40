"""Deformable convolution, v1 and v2 (https://arxiv.org/abs/1703.06211, https://arxiv.org/abs/1811.11168)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from relops._autocast import coordinates_under_autocast, parameters_under_autocast
from relops._checks import (
    check_coordinates,
    check_features,
    check_features_like,
    check_like,
    check_shape,
    checked_pair,
)
from relops._dtypes import compute_dtype
from relops._library import check_device_has_kernels
from relops.ops._autograd import only_needed, register_differentiable
from relops.ops._memory_format import empty, is_channels_last
from relops.ops._tf32 import tf32_allowed
from relops.ops._vmap import mapped_first

MAX_SIZE = 2**24  # kMaxDeformSize in the kernels


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = (1, 1),
    padding: int | Sequence[int] = (0, 0),
    dilation: int | Sequence[int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Compute a 2-D convolution whose kernel elements sample the input at offsets from their regular positions.

    A kernel element is called a tap. Tap t is in row i = t // kw and column j = t % kw of the kernel::

        y = stride_h * ho - padding_h + dilation_h * i + dy[n,g,t,ho,wo]
        x = stride_w * wo - padding_w + dilation_w * j + dx[n,g,t,ho,wo]
        output[n,o,ho,wo] = bias[o] + sum over c, t of weight[o,c,t] * mask[n,g,t,ho,wo] * sample(input[n,c], y, x)

    The sum extends over the input channels c of the group of output channel o, and g is the offset group of channel c.
    A sample is the bilinear interpolation of the four pixels around (y, x). Pixels outside of the map are zero, and the
    sample of a non-finite position is zero. With a mask, the definition is that of Deformable ConvNets v2
    (https://arxiv.org/abs/1811.11168). Without a mask, all factors are 1, which is v1
    (https://arxiv.org/abs/1703.06211). Arguments and values agree with those of ``torchvision.ops.deform_conv2d``.

    The kernels sample a tile of output pixels at a time and multiply it by the weight at once. Neither the forward nor
    the backward pass stores the samples of a whole image. On the CPU, the additional memory does not depend on the size
    of the map. With 256 output channels, it is 1 MB per thread in the forward pass, and 2 MB per thread plus 2 MB in
    the backward pass. If `input` has a 16-bit dtype, `weight` is converted to float32, and the backward pass sums the
    gradients of `input` and `weight` in float32 tensors of the same shape. On CUDA, `weight` and, unless it is
    channels_last, `input` are copied.

    Args:
        input: A tensor [N,C,H,W] of dtype float64, float32, float16 or bfloat16. H and W are at most 2^24.
            channels_last inputs are read without a copy.
        offset: A tensor [N,2*G*kh*kw,Ho,Wo] with offsets in pixels of `input`, in the dtype of `input`. If `input` has
            a 16-bit dtype, float32 is also allowed and is recommended, because bfloat16 offsets above 2 pixels have
            errors of more than 1/256 pixel. The channels are (dy, dx) of each tap of the first offset group, followed
            by the other groups. The number of channels determines the number of offset groups G, which must divide C.
            Offset group g moves the channels from ``g * C / G`` to ``(g + 1) * C / G - 1``. Positions are computed in
            at least float32 precision.
        weight: A tensor [Co,C/groups,kh,kw] in the dtype of `input`. The second size determines the number of groups,
            which must divide C and Co.
        bias: A tensor [Co] in the dtype of `input`. If None, the bias is zero.
        stride: The distance in pixels between neighboring outputs, an int from 1 to 2^24 or a pair of ints (vertical,
            horizontal).
        padding: The number of zeros that surround the map on each side, an int from 0 to 2^24 or a pair of ints.
        dilation: The distance in pixels between neighboring taps, an int from 1 to 2^24 or a pair of ints.
        mask: A tensor [N,G*kh*kw,Ho,Wo] with the factor of each sample, in the dtype of `input`. If `input` has a
            16-bit dtype, float32 is also allowed. If None, all factors are 1.

    Returns:
        A tensor [N,Co,Ho,Wo] in the dtype of `input`, channels_last if `input` is. The sizes are
        ``Ho = (H + 2 * padding_h - dilation_h * (kh - 1) - 1) // stride_h + 1`` and the corresponding Wo. If `input`
        has a 16-bit dtype, samples and sums are computed in float32. On CUDA, float32 matrices are multiplied in TF32
        if ``torch.backends.cuda.matmul.fp32_precision`` is "tf32".

    Gradients:
        Gradients flow to `input`, `offset`, `weight`, `bias` and `mask`. Only the gradients that are needed are
        computed. A sample at a non-finite position has no gradient with respect to its offset, its mask and `input`.
        The derivative of a sample with respect to its position jumps at whole positions, where it is the derivative
        from the right. At position -1 it is zero, unlike in torchvision. Second derivatives and forward-mode AD raise a
        RuntimeError. The gradients are bit-identical from run to run on the CPU, and also on CUDA under
        ``torch.use_deterministic_algorithms(True)``.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or device, a number is out of range, or the kernel is larger than
            the padded map.

    Example:
        >>> import torch, relops
        >>> input, weight = torch.randn(1, 16, 20, 30), torch.randn(32, 16, 3, 3)
        >>> offset, mask = torch.randn(1, 2 * 3 * 3, 20, 30), torch.rand(1, 3 * 3, 20, 30)
        >>> out = relops.deform_conv2d(input, offset, weight, padding=1, mask=mask)
        >>> out.shape
        torch.Size([1, 32, 20, 30])
    """
    op = "deform_conv2d"
    check_features(op, "input", input)
    if input.dim() != 4:
        raise ValueError(f"relops.{op}: input must be [N,C,H,W], got shape {list(input.shape)}")
    N, C, H, W = input.shape
    if H > MAX_SIZE or W > MAX_SIZE:
        raise ValueError(f"relops.{op}: input must have H and W of at most {MAX_SIZE}, got shape {list(input.shape)}")
    weight, bias = parameters_under_autocast(input, weight, bias)
    check_features_like(op, "weight", weight, "[Co,C/groups,kh,kw]", "input", input)
    Co = weight.shape[0]
    _check_weight(op, C, weight)
    if bias is not None:
        check_like(op, "bias", bias, "input", input)
        check_shape(op, "bias", bias, "[Co]", Co)
    stride = checked_pair(op, "stride", stride, 1, MAX_SIZE)
    padding = checked_pair(op, "padding", padding, 0, MAX_SIZE)
    dilation = checked_pair(op, "dilation", dilation, 1, MAX_SIZE)
    Ho, Wo = _output_size((H, W), weight.shape[2:], stride, padding, dilation)
    if Ho < 1 or Wo < 1:
        raise ValueError(
            f"relops.{op}: weight must have a kernel that fits into the padded map, got a kernel of "
            f"{weight.shape[2]} x {weight.shape[3]} with dilation {dilation} and a map of {H} x {W} with "
            f"padding {padding}"
        )

    (offset,), (mask,) = coordinates_under_autocast(input, offset), coordinates_under_autocast(input, mask)
    check_coordinates(op, "offset", offset, "input", input)
    taps = weight.shape[2] * weight.shape[3]
    letters = "[N,2*G*kh*kw,Ho,Wo]"
    if offset.dim() != 4:
        raise ValueError(f"relops.{op}: offset must be {letters}, got shape {list(offset.shape)}")
    G = offset.shape[1] // (2 * taps)
    if G == 0 or offset.shape[1] % (2 * taps) != 0 or C % G != 0:
        raise ValueError(
            f"relops.{op}: offset must be {letters} with 2*kh*kw = {2 * taps} and a number of offset groups G that "
            f"divides C = {C}, got shape {list(offset.shape)}"
        )
    check_shape(op, "offset", offset, letters, N, 2 * G * taps, Ho, Wo)
    if mask is not None:
        check_coordinates(op, "mask", mask, "input", input)
        check_shape(op, "mask", mask, "[N,G*kh*kw,Ho,Wo]", N, G * taps, Ho, Wo)
    check_device_has_kernels(op, input.device)
    wide = compute_dtype(input.dtype)
    return torch.ops.relops.deform_conv2d(
        input,
        offset.to(wide),
        weight,
        bias,
        stride,
        padding,
        dilation,
        None if mask is None else mask.to(wide),
        input.is_cuda and tf32_allowed(),
    )


def _check_weight(op: str, C: int, weight: Tensor) -> None:
    """Check the shape of a 4-D weight."""
    Co, group_inputs, kh, kw = weight.shape
    if not (1 <= kh <= MAX_SIZE and 1 <= kw <= MAX_SIZE):
        raise ValueError(
            f"relops.{op}: weight must have a kernel of 1 x 1 to {MAX_SIZE} x {MAX_SIZE}, got shape "
            f"{list(weight.shape)}"
        )
    if C == 0 or group_inputs == 0:
        valid = C == group_inputs  # an input without channels has one group
    else:
        valid = C % group_inputs == 0 and Co % (C // group_inputs) == 0
    if not valid:
        raise ValueError(
            f"relops.{op}: weight must be [Co,C/groups,kh,kw] with a number of groups that divides C = {C} and Co, got "
            f"shape {list(weight.shape)}"
        )


def _output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Return (Ho,Wo) for a map of `size` = (H,W) and a kernel of `kernel` = (kh,kw)."""
    return [(x + 2 * p - d * (k - 1) - 1) // s + 1 for x, k, s, p, d in zip(size, kernel, stride, padding, dilation)]


def _fake(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    Ho, Wo = offset.shape[2:]
    return empty(input, (input.shape[0], weight.shape[0], Ho, Wo), is_channels_last(input))


def _fake_backward(
    grad_output: Tensor, input: Tensor, offset: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    *_, mask, _, _, needs_grad = args
    needs_input, needs_offset, needs_weight, needs_bias, needs_mask = needs_grad

    def like(x: Tensor, needed: bool) -> Tensor:
        return empty(x, x.shape, is_channels_last(x)) if needed else x.new_empty(0)

    return (
        like(input, needs_input),
        like(offset, needs_offset),
        weight.new_empty(weight.shape if needs_weight else 0),
        weight.new_empty(weight.shape[0] if needs_bias else 0),
        offset.new_empty(0) if mask is None else like(mask, needs_mask),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input, offset, weight, _, stride, padding, dilation, mask, allow_tf32 = inputs
    ctx.save_for_backward(input, offset, weight, mask)
    ctx.settings, ctx.allow_tf32 = (stride, padding, dilation), allow_tf32


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, weight, mask = ctx.saved_tensors
    needs_grad = [*ctx.needs_input_grad[:4], ctx.needs_input_grad[7]]
    deterministic = torch.are_deterministic_algorithms_enabled()
    grads = torch.ops.relops._deform_conv2d_backward(
        grad_output, input, offset, weight, *ctx.settings, mask, ctx.allow_tf32, deterministic, needs_grad
    )
    *grads, grad_mask = only_needed(grads, needs_grad)
    return *grads, None, None, None, grad_mask, None


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    """Fold the vmapped dimension into N."""
    for i, name in ((2, "weight"), (3, "bias")):
        if in_dims[i] is not None:
            raise ValueError(f"relops.deform_conv2d: vmap over {name} is not supported")
    folded = list(args)
    for i in (0, 1, 7):  # input, offset and mask
        if args[i] is not None:
            folded[i] = mapped_first(args[i], in_dims[i], info.batch_size).flatten(0, 1)
    return torch.ops.relops.deform_conv2d(*folded).unflatten(0, (info.batch_size, -1)), 0


register_differentiable("deform_conv2d", _fake, _fake_backward, _setup_context, _backward)
torch.library.register_vmap("relops::deform_conv2d", _vmap)
