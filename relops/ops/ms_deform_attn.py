"""Multi-scale deformable attention (Deformable DETR, https://arxiv.org/abs/2010.04159)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from relops._autocast import coordinates_under_autocast
from relops._checks import check_coordinates, check_device, check_features, check_mask, check_shape, check_tensor
from relops._dtypes import compute_dtype
from relops._library import check_device_has_kernels
from relops._tracing import has_values, int_tensor
from relops.ops._autograd import fresh_gradients, only_needed, register_differentiable
from relops.ops._vmap import mapped_first

Shapes = Tensor | Sequence[tuple[int, int]]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Shapes,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute weighted sums of bilinear samples of a feature pyramid, for each query and head.

    The output is a sum over all levels l and points p::

        location = sampling_locations[n,q,m,l,p]
        output[n,q,m] = sum over l, p of attention_weights[n,q,m,l,p] * sample(level l of value[n,:,m], location)

    Samples are computed as in ``torch.nn.functional.grid_sample`` with ``align_corners=False`` and
    ``padding_mode="zeros"``: the pixel coordinate is ``location * size - 0.5``, and pixels outside of the level are
    zero. The definition follows Deformable DETR (https://arxiv.org/abs/2010.04159, eq. 3).

    Args:
        value: A tensor [N,S,M,D] of dtype float64, float32, float16 or bfloat16. S is the sum of H * W over all levels.
            The levels are concatenated along this dimension, each in row-major order.
        spatial_shapes: An int64 tensor [L,2] with rows (H,W), or a list of such pairs. For CUDA inputs, a list or a CPU
            tensor is faster than a CUDA tensor, because the kernel does not have to read the sizes from memory. Only
            the sizes in a list or a CPU tensor can be checked without a synchronization.
        level_start_index: An int64 tensor [L] with the index along dimension S at which each level begins. If None,
            each level begins where the previous one ends.
        sampling_locations: A tensor [N,Q,M,L,P,2] with coordinates (x,y) normalized to [0,1] over the level, in the
            dtype of `value`. If `value` has a 16-bit dtype, float32 is also allowed and is recommended, because
            bfloat16 locations near pixel 200 have a resolution of only one pixel. Locations are processed in at least
            float32 precision. A non-finite location contributes zero to the output and gets a gradient of zero.
        attention_weights: A tensor [N,Q,M,L,P] in the dtype of `value`. If `value` has a 16-bit dtype, float32 is also
            allowed.

    Returns:
        A tensor [N,Q,M*D] in the dtype of `value`. If `value` has a 16-bit dtype, sums are computed in float32.

    Gradients:
        Gradients flow to `value`, `sampling_locations` and `attention_weights`. Only the gradients that are needed are
        computed. Second derivatives and forward-mode AD raise a RuntimeError. The gradient of `value` is bit-identical
        from run to run on the CPU, and also on CUDA under ``torch.use_deterministic_algorithms(True)``.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or device, or the sizes of the levels do not add up to S. If
            `spatial_shapes` is a CUDA tensor, this check would require a synchronization, so invalid sizes make the
            output NaN instead.

    Example:
        >>> import torch, relops
        >>> value, shapes = torch.randn(1, 20, 8, 32), [(4, 4), (2, 2)]
        >>> locations, weights = torch.rand(1, 5, 8, 2, 4, 2), torch.full((1, 5, 8, 2, 4), 1 / 8)
        >>> out = relops.ms_deform_attn(value, shapes, None, locations, weights)
        >>> out.shape
        torch.Size([1, 5, 256])
    """
    op = "ms_deform_attn"
    check_features(op, "value", value)
    sampling_locations, attention_weights = coordinates_under_autocast(value, sampling_locations, attention_weights)
    shapes = _check_sampling(
        op,
        value,
        spatial_shapes,
        level_start_index,
        "sampling_locations",
        sampling_locations,
        "attention_weights",
        attention_weights,
    )
    sampling_locations, attention_weights = _same_dtype(sampling_locations, attention_weights)
    return torch.ops.relops.ms_deform_attn(value, shapes, level_start_index, sampling_locations, attention_weights)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Shapes,
    level_start_index: Tensor | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    value_mask: Tensor | None = None,
) -> Tensor:
    """Compute multi-scale deformable attention, including its softmax, sampling locations and padding mask.

    The result is the same as that of the following steps, but neither the forward nor the backward pass stores
    intermediate results in memory::

        value = value with the rows of value_mask set to zero
        locations = reference + offset / (W,H)                              # for reference points
        locations = reference_xy + offset / P * reference_wh * 0.5          # for reference boxes
        weights = softmax of attention_logits over L * P
        output = ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights)

    For each query and head, the last step sums the bilinear samples of all levels at these locations, multiplied by the
    weights. Samples are computed as in ``torch.nn.functional.grid_sample`` with ``align_corners=False`` and
    ``padding_mode="zeros"``: the pixel coordinate is ``location * size - 0.5``, and pixels outside of the level are
    zero. The definition follows Deformable DETR (https://arxiv.org/abs/2010.04159, eq. 3).

    Args:
        value: A tensor [N,S,M,D] of dtype float64, float32, float16 or bfloat16. S is the sum of H * W over all levels.
            The levels are concatenated along this dimension, each in row-major order.
        spatial_shapes: An int64 tensor [L,2] with rows (H,W), or a list of such pairs. For CUDA inputs, a list or a CPU
            tensor is faster than a CUDA tensor, because the kernel does not have to read the sizes from memory. Only
            the sizes in a list or a CPU tensor can be checked without a synchronization.
        level_start_index: An int64 tensor [L] with the index along dimension S at which each level begins. If None,
            each level begins where the previous one ends.
        reference_points: A tensor [N,Q,L,2] with points (x,y), or [N,Q,L,4] with boxes (center x, center y, width,
            height), normalized to [0,1] over the level. The dtype is that of `value`. If `value` has a 16-bit dtype,
            float32 is also allowed.
        sampling_offsets: A tensor [N,Q,M,L,P,2] in the dtype of `value`. If `value` has a 16-bit dtype, float32 is also
            allowed. If the references are points, the unit is one pixel of the level. If they are boxes, the unit is
            half of the box size divided by P.
        attention_logits: A tensor [N,Q,M,L,P] in the dtype of `value`. If `value` has a 16-bit dtype, float32 is also
            allowed.
        value_mask: A bool tensor [N,S] that is True for padding. Padding is treated as zero. If None, there is no
            padding.

    Returns:
        A tensor [N,Q,M*D] in the dtype of `value`. If `value` has a 16-bit dtype, sums are computed in float32.

    Gradients:
        Gradients flow to `value`, `reference_points`, `sampling_offsets` and `attention_logits`. Only the gradients
        that are needed are computed. The gradient of masked values is zero. Second derivatives and forward-mode AD
        raise a RuntimeError. The gradient of `value` is bit-identical from run to run on the CPU, and also on CUDA
        under ``torch.use_deterministic_algorithms(True)``.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or device, or the sizes of the levels do not add up to S. If
            `spatial_shapes` is a CUDA tensor, this check would require a synchronization, so invalid sizes make the
            output NaN instead.

    Example:
        >>> import torch, relops
        >>> value, shapes = torch.randn(1, 20, 8, 32), [(4, 4), (2, 2)]
        >>> reference, offsets = torch.rand(1, 5, 2, 2), torch.randn(1, 5, 8, 2, 4, 2)
        >>> out = relops.ms_deform_attn_fused(value, shapes, None, reference, offsets, torch.randn(1, 5, 8, 2, 4))
        >>> out.shape
        torch.Size([1, 5, 256])
    """
    op = "ms_deform_attn_fused"
    check_features(op, "value", value)
    sampling_offsets, attention_logits, reference_points = coordinates_under_autocast(
        value, sampling_offsets, attention_logits, reference_points
    )
    shapes = _check_sampling(
        op,
        value,
        spatial_shapes,
        level_start_index,
        "sampling_offsets",
        sampling_offsets,
        "attention_logits",
        attention_logits,
    )
    check_coordinates(op, "reference_points", reference_points, "value", value)
    N, Q, _, L, _, _ = sampling_offsets.shape
    check_shape(op, "reference_points", reference_points, "[N,Q,L,2/4]", N, Q, L, (2, 4))
    if value_mask is not None:
        check_mask(op, "value_mask", value_mask, "[N,S]", *value.shape[:2], meaning=" (True = padding)")
        check_device(op, "value_mask", value_mask, "value", value)
    sampling_offsets, attention_logits = _same_dtype(sampling_offsets, attention_logits)
    return torch.ops.relops.ms_deform_attn_fused(
        value,
        shapes,
        level_start_index,
        reference_points.to(compute_dtype(value.dtype)),
        sampling_offsets,
        attention_logits,
        value_mask,
    )


def _check_sampling(
    op: str,
    value: Tensor,
    spatial_shapes: Shapes,
    level_start_index: Tensor | None,
    locations_name: str,
    locations: Tensor,
    weights_name: str,
    weights: Tensor,
) -> Tensor:
    """Check the arguments that both ops have in common, and return spatial_shapes as a tensor."""
    if value.dim() != 4:
        raise ValueError(f"relops.{op}: value must be [N,S,M,D], got shape {list(value.shape)}")
    check_coordinates(op, locations_name, locations, "value", value)
    check_coordinates(op, weights_name, weights, "value", value)
    N, S, M, _ = value.shape
    if locations.dim() != 6:
        raise ValueError(f"relops.{op}: {locations_name} must be [N,Q,M,L,P,2], got shape {list(locations.shape)}")
    Q, L, P = locations.shape[1], locations.shape[3], locations.shape[4]
    check_shape(op, locations_name, locations, "[N,Q,M,L,P,2]", N, Q, M, L, P, 2)
    check_shape(op, weights_name, weights, "[N,Q,M,L,P]", N, Q, M, L, P)
    if L == 0 or P == 0:
        raise ValueError(
            f"relops.{op}: {locations_name} must have at least one level and one point, got L = {L}, P = {P}"
        )

    if not isinstance(spatial_shapes, Tensor):
        try:
            sizes = [size for h, w in spatial_shapes for size in (h, w)]
            if any(isinstance(size, float) for size in sizes):
                raise TypeError("torch.tensor would truncate fractions")
            spatial_shapes = int_tensor(sizes).view(-1, 2)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"relops.{op}: spatial_shapes must be an int64 Tensor [L,2] or a list of (H,W), got {spatial_shapes!r}"
            ) from error
    for name, tensor, letters, shape in (
        ("spatial_shapes", spatial_shapes, "[L,2]", (L, 2)),
        ("level_start_index", level_start_index, "[L]", (L,)),
    ):
        if tensor is None:
            continue
        check_tensor(op, name, tensor)
        if tensor.dtype != torch.int64:
            raise TypeError(f"relops.{op}: {name} must be int64, got {tensor.dtype}")
        check_shape(op, name, tensor, letters, *shape)
        if tensor.device.type != "cpu":
            check_device(op, name, tensor, "value", value)
    # The kernel repeats this check, because torch.ops can be called directly.
    if spatial_shapes.device.type == "cpu" and has_values(spatial_shapes, level_start_index):
        _check_levels(op, S, spatial_shapes, level_start_index)
    check_device_has_kernels(op, value.device)
    return spatial_shapes


def _check_levels(op: str, S: int, spatial_shapes: Tensor, level_start_index: Tensor | None) -> None:
    shapes = spatial_shapes.tolist()
    if any(h < 0 or w < 0 for h, w in shapes) or sum(h * w for h, w in shapes) != S:
        raise ValueError(
            f"relops.{op}: spatial_shapes must add up to S = {S}, the second dimension of value, got "
            f"{[tuple(shape) for shape in shapes]} = {sum(h * w for h, w in shapes)}"
        )
    if level_start_index is None or level_start_index.device.type != "cpu":
        return
    for level, (start, (h, w)) in enumerate(zip(level_start_index.tolist(), shapes)):
        if not 0 <= start <= S - h * w:
            raise ValueError(
                f"relops.{op}: level_start_index must keep each level within S = {S}, got {start} for level {level} "
                f"of {h} x {w}"
            )


def _same_dtype(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _fake_forward(
    value: Tensor, spatial_shapes: Any, level_start_index: Any, locations: Tensor, *rest: object
) -> Tensor:
    N, _, M, D = value.shape
    return value.new_empty(N, locations.shape[1], M * D)


def _fake_forward_fused(
    value: Tensor, spatial_shapes: Any, level_start_index: Any, reference_points: Any, offsets: Tensor, *_: object
) -> Tensor:
    return _fake_forward(value, spatial_shapes, level_start_index, offsets)


def _fake_backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
    value, _, _, locations, weights = args[:5]
    return fresh_gradients((value, locations, weights), args[-1])


def _fake_backward_fused(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
    value, _, _, reference_points, offsets, logits = args[:6]
    return fresh_gradients((value, reference_points, offsets, logits), args[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, torch.ops.relops._ms_deform_attn_backward, grad_output)


def _setup_context_fused(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    # The dispatcher omits value_mask if it is None, its default value.
    ctx.save_for_backward(*inputs, *[None] * (7 - len(inputs)))


def _backward_fused(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, torch.ops.relops._ms_deform_attn_fused_backward, grad_output)


def _gradients(ctx: Any, backward_op: Callable[..., Any], grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of all inputs. Those of the level shapes, the level starts and the mask are None."""
    needs_value, _, _, *needs_others = ctx.needs_input_grad[:6]
    needs_grad = [needs_value, *needs_others]
    grads = backward_op(grad_output, *ctx.saved_tensors, torch.are_deterministic_algorithms_enabled(), needs_grad)
    value, *others = only_needed(grads, needs_grad)
    return value, None, None, *others, *[None] * (len(ctx.needs_input_grad) - 6)


def _vmap(op: Any, batched_arguments: tuple[int, ...]) -> Callable[..., tuple[Tensor, int]]:
    """Return a vmap rule that folds the vmapped dimension into N. All entries must have the same levels."""

    def fold(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        if any(dim is not None for i, dim in enumerate(in_dims) if i not in batched_arguments):
            raise ValueError(f"relops.{op.__name__}: vmap over spatial_shapes or level_start_index is not supported")
        folded = list(args)
        for i in batched_arguments:
            if i >= len(args) or args[i] is None:
                continue
            folded[i] = mapped_first(args[i], in_dims[i], info.batch_size).flatten(0, 1)
        return op(*folded).unflatten(0, (info.batch_size, -1)), 0

    return fold


register_differentiable("ms_deform_attn", _fake_forward, _fake_backward, _setup_context, _backward)
register_differentiable(
    "ms_deform_attn_fused", _fake_forward_fused, _fake_backward_fused, _setup_context_fused, _backward_fused
)
torch.library.register_vmap("relops::ms_deform_attn", _vmap(torch.ops.relops.ms_deform_attn, (0, 3, 4)))
torch.library.register_vmap(
    "relops::ms_deform_attn_fused", _vmap(torch.ops.relops.ms_deform_attn_fused, (0, 3, 4, 5, 6))
)
