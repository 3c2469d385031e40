"""Precise RoI Pooling (IoU-Net, https://arxiv.org/abs/1807.11590)."""

import torch
from torch import Tensor

from relops._annotations import Boxes, BroadcastingList2
from relops.ops._regions import as_rows, checked_region, register_differentiable_boxes


def prroi_pool(input: Tensor, boxes: Boxes, output_size: BroadcastingList2[int], spatial_scale: float = 1.0) -> Tensor:
    """Compute the exact mean of the bilinearly interpolated map over each bin of each box.

    The coordinates of each box are multiplied by `spatial_scale`, and the box is divided into PH x PW equal bins.
    Bilinear interpolation of the pixels defines a continuous surface. The value of a bin is the integral of this
    surface over the bin, divided by the area of the bin. The integral is computed exactly instead of from samples, and
    the gradients with respect to the boxes are continuous. The center of pixel 0 has the coordinate 0, and outside of
    the map, the surface falls to zero within one pixel. The value of an empty bin is zero. The definition follows
    IoU-Net (https://arxiv.org/abs/1807.11590).

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
        A tensor [K,C,PH,PW] in the dtype of `input`, channels_last if `input` is. If `input` has a 16-bit dtype, sums
        are computed in float32. The output of a box with a non-finite coordinate is zero.

    Gradients:
        Gradients flow to `input` and `boxes`. Only the gradients that are needed are computed. The gradients of batch
        indices and of boxes with a non-finite coordinate are zero. Second derivatives and forward-mode AD raise a
        RuntimeError. The gradients are bit-identical from run to run.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or device, or a number is out of range. If `boxes` has the
            wrong shape, the error is also an AssertionError, as in torchvision.
        IndexError: If a batch index is outside of [0,N) and the tensors are on the CPU. On CUDA, this check would
            require a synchronization, so the output of a box with such an index is NaN instead.

    Example:
        >>> import torch, relops
        >>> boxes = torch.tensor([[0, 8.0, 8.0, 120.0, 72.0]], requires_grad=True)
        >>> out = relops.prroi_pool(torch.randn(1, 256, 50, 68), boxes, 7, spatial_scale=1 / 4)
        >>> out.sum().backward()
        >>> out.shape, boxes.grad.shape
        (torch.Size([1, 256, 7, 7]), torch.Size([1, 5]))
    """
    if not torch.jit.is_scripting():
        boxes, output_size = checked_region("prroi_pool", input, boxes, output_size, spatial_scale)
    return torch.ops.relops.prroi_pool(input, as_rows(boxes, input), output_size, spatial_scale)


register_differentiable_boxes("prroi_pool")
