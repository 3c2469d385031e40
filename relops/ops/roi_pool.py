"""RoI max pooling (Fast R-CNN, https://arxiv.org/abs/1504.08083)."""

from typing import Any

import torch
from torch import Tensor

from relops._annotations import Boxes, BroadcastingList2
from relops.ops._autograd import register_differentiable
from relops.ops._memory_format import empty, is_channels_last
from relops.ops._regions import as_rows, checked_region, fake_forward, register_vmap


def roi_pool(input: Tensor, boxes: Boxes, output_size: BroadcastingList2[int], spatial_scale: float = 1.0) -> Tensor:
    """Maximum over the pixels of each bin of each box.

    The box, times spatial_scale, is rounded to whole pixels, both ends included, and divided into PH x PW bins, each
    rounded outwards to pixels, so that neighbors may overlap. A bin without pixels is zero. The definition is that of
    Fast R-CNN (https://arxiv.org/abs/1504.08083), values are those of torchvision's op of this name.

    Args:
        input: [N,C,H,W], float64, float32, float16 or bfloat16. channels_last is read as it lies.
        boxes: as in `roi_align`.
        output_size: (PH,PW), or one int for both.
        spatial_scale: pixels of the map per pixel of the image.

    Returns:
        [K,C,PH,PW] in the dtype of input, channels_last if input is. A box with a coordinate that is not finite gives
        zeros.

    Gradients: to input, at the first of equal maxima. None to boxes: rounding has no useful gradient, and boxes.grad
    stays None. Second derivatives and forward-mode AD raise RuntimeError. Backward is bit-identical from run to run.

    Raises:
        TypeError, ValueError, IndexError: as `roi_align`.

    Example:
        >>> boxes = torch.tensor([[0, 8.0, 8.0, 120.0, 72.0]])
        >>> relops.roi_pool(torch.randn(1, 256, 50, 68), boxes, (7, 7), spatial_scale=1 / 4)
    """
    if not torch.jit.is_scripting():
        boxes, output_size = checked_region("roi_pool", input, boxes, output_size, spatial_scale)
    return torch.ops.relops.roi_pool(input, as_rows(boxes, input), output_size, spatial_scale)


def _fake_backward(grad_output: Tensor, input: Tensor, *_: object) -> Tensor:
    return empty(input, input.shape, is_channels_last(input))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input, boxes, _, ctx.spatial_scale = inputs
    # The places of the maxima are found again from their values: cheaper than an index per element of the output.
    ctx.save_for_backward(input, boxes, output)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    needs_input, *others = ctx.needs_input_grad
    grad_input = None
    if needs_input:
        grad_input = torch.ops.relops._roi_pool_backward(grad_output, *ctx.saved_tensors, ctx.spatial_scale)
    return grad_input, *[None] * len(others)


register_differentiable("roi_pool", fake_forward, _fake_backward, _setup_context, _backward)
register_vmap("roi_pool")
