"""Code shared by the region ops: checks, conversion of boxes, fake kernels, autograd and vmap.

torch.jit.script compiles the public functions and `as_rows` and evaluates their annotations at run time. Therefore
neither this file nor the files of the ops may import annotations from __future__.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from relops._annotations import Boxes
from relops._autocast import coordinates_under_autocast
from relops._checks import check_coordinates, check_features
from relops._dtypes import compute_dtype
from relops._library import check_device_has_kernels
from relops.ops._autograd import only_needed, register_differentiable
from relops.ops._memory_format import empty, is_channels_last
from relops.ops._vmap import mapped_first

MAX_SAMPLING_RATIO = 65536  # equal to kMaxSamplingRatio, which bounds loops in the kernels


class BoxesShapeError(ValueError, AssertionError):
    """The error for boxes of a wrong shape. It is also an AssertionError, which torchvision raises."""


# ---- Checks ----


def check_map(op: str, name: str, tensor: Tensor) -> None:
    check_features(op, name, tensor)
    if tensor.dim() != 4:
        raise ValueError(f"relops.{op}: {name} must be [N,C,H,W], got shape {list(tensor.shape)}")
    check_device_has_kernels(op, tensor.device)


def checked_boxes(op: str, boxes: object, features_name: str, features: Tensor) -> Boxes:
    """Check boxes and return them. Under autocast, convert them to a dtype that the op accepts."""
    if isinstance(boxes, Tensor):
        (boxes,) = coordinates_under_autocast(features, boxes)
        _check_columns(op, "boxes", boxes, "[K,5] with rows (batch index, x1, y1, x2, y2)", 5, features_name, features)
        return boxes
    if not isinstance(boxes, (list, tuple)):
        raise TypeError(
            f"relops.{op}: boxes must be a Tensor [K,5] or a list of N Tensors [Ki,4], got {type(boxes).__name__}"
        )
    if len(boxes) != features.size(0):
        raise ValueError(
            f"relops.{op}: boxes must be a list of N = {features.size(0)} Tensors, one per image of {features_name}, "
            f"got {len(boxes)}"
        )
    boxes = coordinates_under_autocast(features, *boxes)
    for i, image_boxes in enumerate(boxes):
        _check_columns(op, f"boxes[{i}]", image_boxes, "[Ki,4] with rows (x1, y1, x2, y2)", 4, features_name, features)
    return boxes


def _check_columns(
    op: str, name: str, boxes: Tensor, rule: str, columns: int, features_name: str, features: Tensor
) -> None:
    check_coordinates(op, name, boxes, features_name, features)
    if boxes.dim() != 2 or boxes.size(1) != columns:
        raise BoxesShapeError(f"relops.{op}: {name} must be {rule}, got shape {list(boxes.shape)}")


def checked_output_size(op: str, output_size: object) -> list[int]:
    """Check output_size and return it as [height, width]."""
    sizes = [output_size, output_size] if isinstance(output_size, int) else output_size
    if not _are_ints(sizes) or len(sizes) != 2 or min(sizes) < 1:
        raise (ValueError if _are_ints(sizes) else TypeError)(
            f"relops.{op}: output_size must be a positive int or two positive ints (height, width), got {output_size!r}"
        )
    return list(sizes)


def _are_ints(x: object) -> TypeGuard[Sequence[int]]:
    return isinstance(x, (list, tuple)) and all(isinstance(size, int) for size in x)


def check_positive(op: str, name: str, number: object) -> None:
    if not isinstance(number, (float, int)) or not 0 < number < math.inf:
        raise (ValueError if isinstance(number, (float, int)) else TypeError)(
            f"relops.{op}: {name} must be a finite positive number, got {number!r}"
        )


def check_sampling_ratio(op: str, sampling_ratio: object) -> None:
    if not _is_int(sampling_ratio) or sampling_ratio > MAX_SAMPLING_RATIO:
        raise (ValueError if _is_int(sampling_ratio) else TypeError)(
            f"relops.{op}: sampling_ratio must be an int of at most {MAX_SAMPLING_RATIO}, got {sampling_ratio!r}"
        )


def _is_int(x: object) -> TypeGuard[int]:
    """Return whether x is an int. A bool does not count, because it was probably meant for the argument `aligned`."""
    return isinstance(x, int) and not isinstance(x, bool)


def check_type(op: str, name: str, value: object, expected: type) -> None:
    if not isinstance(value, expected):
        raise TypeError(f"relops.{op}: {name} must be of type {expected.__name__}, got {value!r}")


def check_divisible(op: str, input: Tensor, output_size: Sequence[int]) -> None:
    if input.size(1) % (output_size[0] * output_size[1]):
        raise ValueError(
            f"relops.{op}: input must have a number of channels divisible by the number of bins, {output_size[0]} x "
            f"{output_size[1]}, got C = {input.size(1)}"
        )


def checked_region(
    op: str, input: Tensor, boxes: object, output_size: object, spatial_scale: object
) -> tuple[Boxes, list[int]]:
    """Check the arguments that all ops with a single feature map have, and return boxes and output_size."""
    check_map(op, "input", input)
    boxes = checked_boxes(op, boxes, "input", input)
    check_positive(op, "spatial_scale", spatial_scale)
    return boxes, checked_output_size(op, output_size)


# ---- Boxes ----


def as_rows(boxes: Boxes, input: Tensor) -> Tensor:
    """Return boxes as rows [K,5] in the dtype in which the kernels compute."""
    dtype = compute_dtype(input.dtype)
    if isinstance(boxes, Tensor):
        rows = boxes
    elif len(boxes) == 0:
        rows = torch.empty([0, 5], dtype=dtype, device=input.device)
    else:
        # The number of kernel launches does not depend on the number of images, because expand launches no kernel. The
        # dtype has at least 32 bits, so that batch indices are not rounded.
        images = torch.arange(len(boxes), dtype=dtype, device=input.device)[:, None].unbind(0)
        indices = torch.cat([image.expand(image_boxes.size(0)) for image, image_boxes in zip(images, boxes)])
        rows = torch.cat([indices[:, None], torch.cat(boxes)], 1)
    return rows.to(dtype)


# ---- Fake kernels ----


def fake_forward(input: Tensor, boxes: Tensor, output_size: Sequence[int], *_: object) -> Tensor:
    return empty(input, (boxes.size(0), input.size(1), *output_size), is_channels_last(input))


def fake_forward_position_sensitive(input: Tensor, boxes: Tensor, output_size: Sequence[int], *_: object) -> Tensor:
    channels = input.size(1) // (output_size[0] * output_size[1])
    return empty(input, (boxes.size(0), channels, *output_size), is_channels_last(input))


def fake_backward(
    grad_output: Tensor, input: Tensor | None, boxes: Tensor, input_shape: Sequence[int], *rest: Any
) -> tuple[Tensor, Tensor]:
    channels_last, (needs_input, needs_boxes) = rest[-2:]
    return (
        empty(grad_output, input_shape, channels_last) if needs_input else grad_output.new_empty(0),
        boxes.new_empty(boxes.shape if needs_boxes else 0),
    )


# ---- Registration ----


def register_differentiable_boxes(op: str, fake: Callable = fake_forward) -> None:
    """Register an op with arguments (input, boxes, output_size, *options) and gradients for input and boxes."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        input, boxes, _, *ctx.options = inputs
        # The op is linear in the input, so only the gradient of the boxes depends on the values of the input.
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, boxes)
        ctx.input_shape, ctx.channels_last = input.shape, is_channels_last(input)

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, boxes = ctx.saved_tensors
        needs_grad, others = ctx.needs_input_grad[:2], ctx.needs_input_grad[2:]
        grads = getattr(torch.ops.relops, f"_{op}_backward")(
            grad_output, input, boxes, ctx.input_shape, *ctx.options, ctx.channels_last, needs_grad
        )
        return *only_needed(grads, needs_grad), *[None] * len(others)

    register_differentiable(op, fake, fake_backward, setup_context, backward)
    register_vmap(op)


def register_vmap(op: str) -> None:
    """Register a vmap rule that folds the vmapped dimension into N and K."""

    def rule(info: Any, in_dims: tuple[Any, ...], input: Tensor, boxes: Tensor, *rest: Any) -> tuple[Tensor, int]:
        N = None
        if in_dims[0] is not None:
            input = input.movedim(in_dims[0], 0)
            N = input.size(1)
            input = input.flatten(0, 1)
        boxes = boxes_per_entry(boxes, in_dims[1], info.batch_size, N)
        output = getattr(torch.ops.relops, op)(input, boxes.flatten(0, 1), *rest)
        return output.unflatten(0, boxes.shape[:2]), 0

    torch.library.register_vmap(f"relops::{op}", rule)


def _image_index(index: Tensor) -> Tensor:
    """Convert batch indices to whole numbers in the same way as region_image in the kernels."""
    nearest = index.round()
    return torch.where((index - nearest).abs() <= 2**-10, nearest, index.trunc())


def boxes_per_entry(boxes: Tensor, dim: int | None, batch_size: int, N: int | None) -> Tensor:
    """Return the boxes of all vmap entries as [B,K,5], with batch indices that refer to the folded batch.

    N is the number of images of each entry, or None if all entries have the same images.
    """
    boxes = mapped_first(boxes, dim, batch_size)
    if N is None:
        return boxes
    index = _image_index(boxes[..., :1])
    offset = N * torch.arange(batch_size, dtype=boxes.dtype, device=boxes.device)[:, None, None]
    # A batch index outside of [0,N) must stay invalid. It must not select an image of another entry.
    index = torch.where((index >= 0) & (index < N), index + offset, -1)
    return torch.cat([index, boxes[..., 1:]], -1)
