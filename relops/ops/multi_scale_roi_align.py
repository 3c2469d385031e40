"""RoIAlign on a feature pyramid (Feature Pyramid Networks, https://arxiv.org/abs/1612.03144)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from relops._annotations import Boxes, BroadcastingList2
from relops._autocast import is_autocasting
from relops._checks import check_device
from relops.ops._autograd import only_needed, register_differentiable
from relops.ops._memory_format import empty, is_channels_last
from relops.ops._regions import (
    as_rows,
    boxes_per_entry,
    check_map,
    check_positive,
    check_sampling_ratio,
    check_type,
    checked_boxes,
    checked_output_size,
)
from relops.ops._vmap import mapped_first

OP = "multi_scale_roi_align"


def multi_scale_roi_align(
    inputs: list[Tensor],
    boxes: Boxes,
    output_size: BroadcastingList2[int],
    spatial_scales: list[float],
    sampling_ratio: int = 2,
    aligned: bool = False,
    canonical_box_size: float = 224.0,
    canonical_level: int = 4,
) -> Tensor:
    """`roi_align` of each box on the level of a pyramid that fits its size, in one launch.

    A box is taken from level ``floor(canonical_level + log2(sqrt(area) / canonical_box_size) + 1e-6)``, or from the
    nearest of those given, where level l has spatial_scale 2^-l. The definition is that of Feature Pyramid Networks
    (https://arxiv.org/abs/1612.03144, eq. 1), values are those of torchvision's MultiScaleRoIAlign.

    Args:
        inputs: the levels, finest first: L tensors [N,C,Hl,Wl] of one dtype, float64, float32, float16 or bfloat16,
            with N and C in common. Where one is channels_last, all are read so, as they lie if they are. At most 16 on
            CUDA.
        boxes: as in `roi_align`, in image pixels.
        output_size: (PH,PW), or one int for both.
        spatial_scales: L numbers, pixels of the level per pixel of the image: powers of 1/2, each half the one before.
        sampling_ratio, aligned: as in `roi_align`.
        canonical_box_size: the side of a square box, in image pixels, that belongs to canonical_level.
        canonical_level: the level of such a box; 4 is the level of spatial_scale 1/16.

    Returns:
        [K,C,PH,PW] in the dtype of inputs, channels_last if a level is. Sums are in float32 for 16-bit inputs. A box
        with a coordinate that is not finite gives zeros.

    Gradients: to inputs, and to boxes where they require it, as in `roi_align`; the choice of the level is not
    differentiated. Errors as there.

    Raises:
        TypeError, ValueError, IndexError: as `roi_align`; ValueError also for levels that do not go together and for
            spatial_scales that break the rule.

    Example:
        >>> levels, boxes = [torch.randn(2, 256, 200 >> i, 272 >> i) for i in range(4)], [torch.rand(9, 4) * 800] * 2
        >>> relops.multi_scale_roi_align(levels, boxes, 7, [1 / 4, 1 / 8, 1 / 16, 1 / 32])
    """
    if not torch.jit.is_scripting():
        inputs = _checked_levels(inputs)
        boxes = checked_boxes(OP, boxes, "inputs", inputs[0])
        output_size = checked_output_size(OP, output_size)
        _check_scales(spatial_scales, len(inputs))
        check_sampling_ratio(OP, sampling_ratio)
        check_type(OP, "aligned", aligned, bool)
        check_positive(OP, "canonical_box_size", canonical_box_size)
        check_type(OP, "canonical_level", canonical_level, int)
    return torch.ops.relops.multi_scale_roi_align(
        inputs,
        as_rows(boxes, inputs[0]),
        output_size,
        spatial_scales,
        sampling_ratio,
        aligned,
        canonical_box_size,
        canonical_level,
    )


def _checked_levels(inputs: object) -> list[Tensor]:
    if not isinstance(inputs, (list, tuple)):
        raise TypeError(f"relops.{OP}: inputs must be a list of Tensors [N,C,Hl,Wl], got {type(inputs).__name__}")
    if not inputs:
        raise ValueError(f"relops.{OP}: inputs must hold at least one level, got none")
    first = inputs[0]
    for i, level in enumerate(inputs):
        name = f"inputs[{i}]"
        check_map(OP, name, level)
        check_device(OP, name, level, "inputs[0]", first)
        if level.shape[:2] != first.shape[:2]:
            raise ValueError(
                f"relops.{OP}: {name} must be [N,C,Hl,Wl] with N, C = {first.size(0)}, {first.size(1)} of inputs[0], "
                f"got shape {list(level.shape)}"
            )
    if is_autocasting(first):
        # Layers that made the levels need not agree on a dtype there.
        dtype = first.dtype
        for level in inputs:
            dtype = torch.promote_types(dtype, level.dtype)
        return [level.to(dtype) for level in inputs]
    for i, level in enumerate(inputs):
        if level.dtype != first.dtype:
            raise TypeError(f"relops.{OP}: inputs[{i}] must be {first.dtype} as inputs[0] is, got {level.dtype}")
    return list(inputs)


def _check_scales(spatial_scales: object, levels: int) -> None:
    if not isinstance(spatial_scales, (list, tuple)):
        raise TypeError(f"relops.{OP}: spatial_scales must be a list of floats, got {type(spatial_scales).__name__}")
    for i, scale in enumerate(spatial_scales):
        check_positive(OP, f"spatial_scales[{i}]", scale)
    if len(spatial_scales) != levels:
        raise ValueError(
            f"relops.{OP}: spatial_scales must hold a number for each of the {levels} levels of inputs, got "
            f"{len(spatial_scales)}"
        )
    halving = all(scale == spatial_scales[0] / 2**i for i, scale in enumerate(spatial_scales))
    if math.frexp(spatial_scales[0])[0] != 0.5 or not halving:
        raise ValueError(
            f"relops.{OP}: spatial_scales must be powers of 1/2, each half the one before, got {list(spatial_scales)}"
        )


def _any_channels_last(inputs: list[Tensor]) -> bool:
    return any(is_channels_last(level) for level in inputs)


def _fake_forward(inputs: list[Tensor], boxes: Tensor, output_size: Sequence[int], *_: object) -> Tensor:
    return empty(inputs[0], (boxes.size(0), inputs[0].size(1), *output_size), _any_channels_last(inputs))


def _level_shapes(input_shape: Sequence[int]) -> list[tuple[int, ...]]:
    """From [N,C,H0,W0,H1,W1,..]."""
    N, C, *sizes = input_shape
    return [(N, C, H, W) for H, W in zip(sizes[::2], sizes[1::2])]


def _fake_backward(
    grad_output: Tensor, inputs: list[Tensor], boxes: Tensor, input_shape: Sequence[int], *rest: Any
) -> tuple[list[Tensor], Tensor]:
    channels_last, (*needs_levels, needs_boxes) = rest[-2:]
    return (
        [
            empty(grad_output, shape, channels_last) if needed else grad_output.new_empty(0)
            for shape, needed in zip(_level_shapes(input_shape), needs_levels)
        ],
        boxes.new_empty(boxes.shape if needs_boxes else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    levels, boxes, _, *ctx.options = inputs
    # Here, unlike in backward, needs_input_grad lists the levels one by one.
    needs_boxes = ctx.needs_input_grad[len(levels)]
    ctx.save_for_backward(boxes, *(levels if needs_boxes else []))
    ctx.input_shape = [*levels[0].shape[:2], *(size for level in levels for size in level.shape[2:])]
    ctx.channels_last = _any_channels_last(levels)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    boxes, *levels = ctx.saved_tensors
    needs_levels, needs_boxes, *others = ctx.needs_input_grad
    grad_levels, grad_boxes = torch.ops.relops._multi_scale_roi_align_backward(
        grad_output, levels, boxes, ctx.input_shape, *ctx.options, ctx.channels_last, [*needs_levels, needs_boxes]
    )
    return (
        list(only_needed(grad_levels, needs_levels)),
        grad_boxes if needs_boxes else None,
        *[None] * len(others),
    )


def _vmap(info: Any, in_dims: tuple[Any, ...], inputs: list[Tensor], boxes: Tensor, *rest: Any) -> tuple[Tensor, int]:
    """Folds its dimension into N, of all levels if of any, and K."""
    N = None
    if any(dim is not None for dim in in_dims[0]):
        inputs = [mapped_first(level, dim, info.batch_size) for level, dim in zip(inputs, in_dims[0])]
        N = inputs[0].size(1)
        inputs = [level.flatten(0, 1) for level in inputs]
    boxes = boxes_per_entry(boxes, in_dims[1], info.batch_size, N)
    output = torch.ops.relops.multi_scale_roi_align(inputs, boxes.flatten(0, 1), *rest)
    return output.unflatten(0, boxes.shape[:2]), 0


register_differentiable(OP, _fake_forward, _fake_backward, _setup_context, _backward)
torch.library.register_vmap(f"relops::{OP}", _vmap)
