"""Position-sensitive RoI pooling (R-FCN, https://arxiv.org/abs/1605.06409)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from relops._annotations import Boxes, BroadcastingList2
from relops.ops._autograd import register_differentiable
from relops.ops._memory_format import empty, is_channels_last
from relops.ops._regions import as_rows, check_divisible, checked_region, fake_forward_position_sensitive, register_vmap


def ps_roi_pool(input: Tensor, boxes: Boxes, output_size: BroadcastingList2[int], spatial_scale: float = 1.0) -> Tensor:
    """Mean over the pixels of each bin of each box, in which every bin looks at channels of its own.

    The corners of the box, times spatial_scale, are rounded to whole pixels, the last not included, the box is divided
    into PH x PW bins, each rounded outwards to pixels, and ``output[k,c,ph,pw]`` is the mean of channel
    ``(c * PH + ph) * PW + pw`` over bin (ph,pw); a bin without pixels is zero. The definition is that of R-FCN
    (https://arxiv.org/abs/1605.06409), values are those of torchvision's op of this name, whose bins leave out the last
    row and the last column of the map.

    Args:
        input: [N,C,H,W] with C divisible by PH * PW, float64, float32, float16 or bfloat16. channels_last is read as it
            lies.
        boxes, output_size, spatial_scale: as in `roi_pool`.

    Returns:
        [K,C/(PH*PW),PH,PW] in the dtype of input, channels_last if input is. Sums are in float32 for 16-bit input. A
        box with a coordinate that is not finite gives zeros.

    Gradients: to input. None to boxes: rounding has no useful gradient, and boxes.grad stays None. Second derivatives
    and forward-mode AD raise RuntimeError. Backward is bit-identical from run to run.

    Raises:
        TypeError, ValueError, IndexError: as `roi_align`; ValueError also where PH * PW does not divide C.

    Example:
        >>> boxes = torch.tensor([[0, 8.0, 8.0, 120.0, 72.0]])
        >>> relops.ps_roi_pool(torch.randn(1, 21 * 7 * 7, 50, 68), boxes, 7, spatial_scale=1 / 4)
    """
    if not torch.jit.is_scripting():
        boxes, output_size = checked_region("ps_roi_pool", input, boxes, output_size, spatial_scale)
        check_divisible("ps_roi_pool", input, output_size)
    return torch.ops.relops.ps_roi_pool(input, as_rows(boxes, input), output_size, spatial_scale)


def _fake_backward(
    grad_output: Tensor, boxes: Tensor, input_shape: Sequence[int], spatial_scale: float, channels_last: bool
) -> Tensor:
    return empty(grad_output, input_shape, channels_last)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input, boxes, _, ctx.spatial_scale = inputs
    ctx.save_for_backward(boxes)
    ctx.input_shape, ctx.channels_last = input.shape, is_channels_last(input)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    needs_input, *others = ctx.needs_input_grad
    grad_input = None
    if needs_input:
        grad_input = torch.ops.relops._ps_roi_pool_backward(
            grad_output, *ctx.saved_tensors, ctx.input_shape, ctx.spatial_scale, ctx.channels_last
        )
    return grad_input, *[None] * len(others)


register_differentiable("ps_roi_pool", fake_forward_position_sensitive, _fake_backward, _setup_context, _backward)
register_vmap("ps_roi_pool")
