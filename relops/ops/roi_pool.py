"""RoI max pooling (Fast R-CNN, https://arxiv.org/abs/1504.08083)."""

from typing import Any

import torch
from torch import Tensor

from relops._annotations import Boxes, BroadcastingList2
from relops.ops._autograd import register_differentiable
from relops.ops._memory_format import empty, is_channels_last
from relops.ops._regions import as_rows, checked_region, fake_forward, register_vmap


def roi_pool(input: Tensor, boxes: Boxes, output_size: BroadcastingList2[int], spatial_scale: float = 1.0) -> Tensor:
    """Compute the maximum of the pixels in each bin of each box.

    The corners of each box are multiplied by `spatial_scale` and rounded to whole pixels. Both corner pixels belong to
    the box. The box is divided into PH x PW bins. The edges of a bin are rounded outward to whole pixels, so
    neighboring bins may overlap. The value of a bin without pixels is zero. The definition follows Fast R-CNN
    (https://arxiv.org/abs/1504.08083), and the values agree with `torchvision.ops.roi_pool`.

    Args:
        input: Feature maps [N,C,H,W] of dtype float64, float32, float16 or bfloat16. channels_last inputs are read
            without a copy.
        boxes: A tensor [K,5] with rows (batch index, x1, y1, x2, y2) in image pixels, or a list of N tensors [Ki,4]
            with rows (x1, y1, x2, y2), one tensor for each image. The dtype is that of `input`. If `input` has a 16-bit
            dtype, float32 is also allowed and is recommended, because bfloat16 coordinates near 200 have a resolution
            of only one pixel. Coordinates are processed in at least float32 precision. A batch index within 2^-10 of an
            integer is rounded to that integer, and any other batch index is truncated toward zero.
        output_size: The number of bins (PH,PW), or one int for both.
        spatial_scale: The number of feature map pixels per image pixel.

    Returns:
        A tensor [K,C,PH,PW] in the dtype of `input`, channels_last if `input` is. The output of a box with a non-finite
        coordinate is zero.

    Gradients:
        Gradients flow to `input`. If several pixels of a bin have the maximum, the gradient goes to the first of them.
        No gradient flows to `boxes`, because their corners are rounded, and ``boxes.grad`` stays None. Second
        derivatives and forward-mode AD raise a RuntimeError. The gradients are bit-identical from run to run.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or device, or a number is out of range. If `boxes` has the
            wrong shape, the error is also an AssertionError, as in torchvision.
        IndexError: If a batch index is outside of [0,N) and the tensors are on the CPU. On CUDA, this check would
            require a synchronization, so the output of a box with such an index is NaN instead.

    Example:
        >>> import torch, relops
        >>> boxes = torch.tensor([[0, 8.0, 8.0, 120.0, 72.0]])
        >>> out = relops.roi_pool(torch.randn(1, 256, 50, 68), boxes, (7, 7), spatial_scale=1 / 4)
        >>> out.shape
        torch.Size([1, 256, 7, 7])
    """
    if not torch.jit.is_scripting():
        boxes, output_size = checked_region("roi_pool", input, boxes, output_size, spatial_scale)
    return torch.ops.relops.roi_pool(input, as_rows(boxes, input), output_size, spatial_scale)


def _fake_backward(grad_output: Tensor, input: Tensor, *_: object) -> Tensor:
    return empty(input, input.shape, is_channels_last(input))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input, boxes, _, ctx.spatial_scale = inputs
    # The backward pass searches for the maxima again, which is cheaper than storing an index for each output element.
    ctx.save_for_backward(input, boxes, output)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    needs_input, *others = ctx.needs_input_grad
    grad_input = None
    if needs_input:
        grad_input = torch.ops.relops._roi_pool_backward(grad_output, *ctx.saved_tensors, ctx.spatial_scale)
    return grad_input, *[None] * len(others)


register_differentiable("roi_pool", fake_forward, _fake_backward, _setup_context, _backward)
register_vmap("roi_pool")
