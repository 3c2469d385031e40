"""Position-sensitive RoIAlign (Light-Head R-CNN, https://arxiv.org/abs/1711.07264)."""

import torch
from torch import Tensor

from relops._annotations import Boxes, BroadcastingList2
from relops.ops._regions import (
    as_rows,
    check_divisible,
    check_sampling_ratio,
    checked_region,
    fake_forward_position_sensitive,
    register_differentiable_boxes,
)


def ps_roi_align(
    input: Tensor,
    boxes: Boxes,
    output_size: BroadcastingList2[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
) -> Tensor:
    """Compute RoIAlign with separate input channels for each bin.

    ``output[k,c,ph,pw]`` is the mean of the bilinear samples of input channel ``(c * PH + ph) * PW + pw`` in bin
    (ph,pw) of box k. The coordinates of each box are multiplied by `spatial_scale` and shifted by half a pixel, so that
    the center of pixel 0 has the coordinate 0.5. The box is then divided into PH x PW equal bins, and each bin into a
    grid of n x n cells, where `sampling_ratio` determines n. The samples are at the centers of the cells. A sample more
    than one pixel outside of the map is zero. A sample at most one pixel outside has the value at the border. Each
    value is the same as that of `relops.roi_align` with ``aligned=True`` for the same input channel and bin. The
    definition follows Light-Head R-CNN (https://arxiv.org/abs/1711.07264), and the values agree with
    `torchvision.ops.ps_roi_align`.

    Args:
        input: Feature maps [N,C,H,W] of dtype float64, float32, float16 or bfloat16. C must be divisible by PH * PW.
            channels_last inputs are read without a copy.
        boxes: A tensor [K,5] with rows (batch index, x1, y1, x2, y2) in image pixels, or a list of N tensors [Ki,4]
            with rows (x1, y1, x2, y2), one tensor for each image. The dtype is that of `input`. If `input` has a 16-bit
            dtype, float32 is also allowed and is recommended, because bfloat16 coordinates near 200 have a resolution
            of only one pixel. Coordinates are processed in at least float32 precision. A batch index within 2^-10 of an
            integer is rounded to that integer, and any other batch index is truncated toward zero.
        output_size: The number of bins (PH,PW), or one int for both.
        spatial_scale: The number of feature map pixels per image pixel.
        sampling_ratio: The number n of samples along each axis of a bin, at most 65536. If it is not positive, the
            number of samples along an axis is the size of the bin in feature map pixels, rounded up.

    Returns:
        A tensor [K,C/(PH*PW),PH,PW] in the dtype of `input`, channels_last if `input` is. If `input` has a 16-bit
        dtype, sums are computed in float32. The output of a box with a non-finite coordinate is zero.

    Gradients:
        Gradients flow to `input` and `boxes`. Only the gradients that are needed are computed. The gradients of batch
        indices and of boxes with a non-finite coordinate are zero. Second derivatives and forward-mode AD raise a
        RuntimeError. The gradients are bit-identical from run to run.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or device, a number is out of range, or C is not divisible by
            PH * PW. If `boxes` has the wrong shape, the error is also an AssertionError, as in torchvision.
        IndexError: If a batch index is outside of [0,N) and the tensors are on the CPU. On CUDA, this check would
            require a synchronization, so the output of a box with such an index is NaN instead.

    Example:
        >>> import torch, relops
        >>> input = torch.randn(1, 10 * 7 * 7, 50, 68)
        >>> boxes = torch.tensor([[0, 8.0, 8.0, 120.0, 72.0]])
        >>> out = relops.ps_roi_align(input, boxes, 7, spatial_scale=1 / 4, sampling_ratio=2)
        >>> out.shape
        torch.Size([1, 10, 7, 7])
    """
    if not torch.jit.is_scripting():
        boxes, output_size = checked_region("ps_roi_align", input, boxes, output_size, spatial_scale)
        check_sampling_ratio("ps_roi_align", sampling_ratio)
        check_divisible("ps_roi_align", input, output_size)
    return torch.ops.relops.ps_roi_align(input, as_rows(boxes, input), output_size, spatial_scale, sampling_ratio)


register_differentiable_boxes("ps_roi_align", fake_forward_position_sensitive)
