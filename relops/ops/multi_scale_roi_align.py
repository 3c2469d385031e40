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
    """Compute RoIAlign for each box on the pyramid level that fits the size of the box, in a single launch.

    Level l of the pyramid has a spatial scale of 2^-l. A box is assigned to level
    ``floor(canonical_level + log2(sqrt(area) / canonical_box_size) + 1e-6)``, or to the nearest level in `inputs` if
    that level is missing. The coordinates of the box are then multiplied by the scale of its level, and the box is
    divided into PH x PW equal bins. Each bin is divided into a grid of n x n cells, where `sampling_ratio` determines
    n. The value of a bin is the mean of the bilinear samples at the centers of its cells. A sample more than one pixel
    outside of the level is zero. A sample at most one pixel outside has the value at the border. The definition follows
    Feature Pyramid Networks (https://arxiv.org/abs/1612.03144, eq. 1), and the values agree with
    `torchvision.ops.MultiScaleRoIAlign`.

    Args:
        inputs: A list of L feature maps [N,C,Hl,Wl], finest level first. All levels have the same N, C and dtype. The
            dtype is float64, float32, float16 or bfloat16. If at least one level is channels_last, all levels are read
            as channels_last, and only levels in another format are copied. CUDA supports at most 16 levels.
        boxes: A tensor [K,5] with rows (batch index, x1, y1, x2, y2) in image pixels, or a list of N tensors [Ki,4]
            with rows (x1, y1, x2, y2), one tensor for each image. The dtype is that of `inputs`. If `inputs` have 16
            bits, float32 is also allowed and is recommended, because bfloat16 coordinates near 200 have a resolution of
            only one pixel. Coordinates are processed in at least float32 precision. A batch index within 2^-10 of an
            integer is rounded to that integer, and any other batch index is truncated toward zero.
        output_size: The number of bins (PH,PW), or one int for both.
        spatial_scales: A list with the number of level pixels per image pixel, for each of the L levels. The scales
            must be powers of 1/2, and each must be half of the previous one.
        sampling_ratio: The number n of samples along each axis of a bin, at most 65536. If it is not positive, the
            number of samples along an axis is the size of the bin in pixels of the level, rounded up.
        aligned: If True, boxes are shifted by half a pixel, so that the center of pixel 0 has the coordinate 0.5, and
            boxes smaller than one pixel keep their size. If False, the center of pixel 0 has the coordinate 0, and
            boxes are enlarged to a width and height of at least one pixel of the level.
        canonical_box_size: The side length, in image pixels, of a square box that is assigned to `canonical_level`.
        canonical_level: The level to which a square box with the side length `canonical_box_size` is assigned. Level 4
            has the spatial scale 1/16.

    Returns:
        A tensor [K,C,PH,PW] in the dtype of `inputs`, channels_last if at least one level is. If `inputs` have a 16-bit
        dtype, sums are computed in float32. The output of a box with a non-finite coordinate is zero.

    Gradients:
        Gradients flow to `inputs` and `boxes`. Only the gradients that are needed are computed. The gradients of batch
        indices and of boxes with a non-finite coordinate are zero. The assignment of boxes to levels is not
        differentiated. Second derivatives and forward-mode AD raise a RuntimeError. The gradients are bit-identical
        from run to run.

    Raises:
        TypeError: If an argument has the wrong type or dtype, or the levels differ in dtype.
        ValueError: If an argument has the wrong shape or device, `inputs` is empty, the levels differ in N, C or
            device, a number is out of range, or `spatial_scales` are not powers of 1/2, each half of the previous
            one. If `boxes` has the wrong shape, the error is also an AssertionError, as in torchvision.
        IndexError: If a batch index is outside of [0,N) and the tensors are on the CPU. On CUDA, this check would
            require a synchronization, so the output of a box with such an index is NaN instead.

    Example:
        >>> import torch, relops
        >>> levels = [torch.randn(2, 16, 64 >> i, 80 >> i) for i in range(4)]
        >>> corners = torch.rand(9, 2) * 200
        >>> boxes = torch.cat([corners, corners + 50], dim=1)  # the same boxes for both images
        >>> out = relops.multi_scale_roi_align(levels, [boxes, boxes], 7, [1 / 4, 1 / 8, 1 / 16, 1 / 32])
        >>> out.shape
        torch.Size([18, 16, 7, 7])
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
        raise ValueError(f"relops.{OP}: inputs must contain at least one level, got none")
    first = inputs[0]
    for i, level in enumerate(inputs):
        name = f"inputs[{i}]"
        check_map(OP, name, level)
        check_device(OP, name, level, "inputs[0]", first)
        if level.shape[:2] != first.shape[:2]:
            raise ValueError(
                f"relops.{OP}: {name} must be [N,C,Hl,Wl] with N, C = {first.size(0)}, {first.size(1)} as in "
                f"inputs[0], got shape {list(level.shape)}"
            )
    if is_autocasting(first):
        # Under autocast, the layers that compute the levels may return different dtypes.
        dtype = first.dtype
        for level in inputs:
            dtype = torch.promote_types(dtype, level.dtype)
        return [level.to(dtype) for level in inputs]
    for i, level in enumerate(inputs):
        if level.dtype != first.dtype:
            raise TypeError(
                f"relops.{OP}: inputs[{i}] must be {first.dtype}, the dtype of inputs[0], got {level.dtype}"
            )
    return list(inputs)


def _check_scales(spatial_scales: object, levels: int) -> None:
    if not isinstance(spatial_scales, (list, tuple)):
        raise TypeError(f"relops.{OP}: spatial_scales must be a list of floats, got {type(spatial_scales).__name__}")
    for i, scale in enumerate(spatial_scales):
        check_positive(OP, f"spatial_scales[{i}]", scale)
    if len(spatial_scales) != levels:
        raise ValueError(
            f"relops.{OP}: spatial_scales must contain one number for each of the {levels} levels of inputs, got "
            f"{len(spatial_scales)}"
        )
    halving = all(scale == spatial_scales[0] / 2**i for i, scale in enumerate(spatial_scales))
    if math.frexp(spatial_scales[0])[0] != 0.5 or not halving:
        raise ValueError(
            f"relops.{OP}: spatial_scales must be powers of 1/2, each half of the previous one, got "
            f"{list(spatial_scales)}"
        )


def _any_channels_last(inputs: list[Tensor]) -> bool:
    return any(is_channels_last(level) for level in inputs)


def _fake_forward(inputs: list[Tensor], boxes: Tensor, output_size: Sequence[int], *_: object) -> Tensor:
    return empty(inputs[0], (boxes.size(0), inputs[0].size(1), *output_size), _any_channels_last(inputs))


def _level_shapes(input_shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the shape of each level, given [N,C,H0,W0,H1,W1,..]."""
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
    # In setup_context, needs_input_grad is flat and has an element for each level. In backward, it is nested.
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
    """Fold the vmapped dimension into K, and also into N of all levels if at least one level is vmapped."""
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
