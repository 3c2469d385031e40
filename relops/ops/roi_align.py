"""RoIAlign (Mask R-CNN, https://arxiv.org/abs/1703.06870)."""

import torch
from torch import Tensor

from relops._annotations import Boxes, BroadcastingList2
from relops.ops._regions import as_rows, check_sampling_ratio, check_type, checked_region, register_differentiable_boxes


def roi_align(
    input: Tensor,
    boxes: Boxes,
    output_size: BroadcastingList2[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Mean of bilinear samples on a grid in each bin of each box.

    The box, times spatial_scale, is divided into PH x PW equal bins, and each bin is the mean of the bilinear samples
    at the centers of a grid of n x n cells. A sample more than one pixel outside of the map is zero; nearer ones are
    taken from the border. The definition is that of Mask R-CNN (https://arxiv.org/abs/1703.06870), values are those of
    torchvision's op of this name.

    Args:
        input: [N,C,H,W], float64, float32, float16 or bfloat16. channels_last is read as it lies.
        boxes: [K,5], rows of (batch index, x1, y1, x2, y2) in image pixels; or a list of N tensors [Ki,4] without the
            index. In the dtype of input, or float32 beside a 16-bit input (recommended: a bfloat16 coordinate is off by
            a pixel at 200). Computed in float32 or better.
            A batch index within 2^-10 of an integer is that integer, any other is truncated toward zero.
        output_size: (PH,PW), or one int for both.
        spatial_scale: pixels of the map per pixel of the image.
        sampling_ratio: n, at most 65536; if not positive, the size of the bin in pixels, rounded up, on each axis.
        aligned: True shifts boxes by half a pixel, so that the center of pixel 0 is 0.5, and takes boxes of less than
            a pixel as they are; False widens them to one.

    Returns:
        [K,C,PH,PW] in the dtype of input, channels_last if input is. Sums are in float32 for 16-bit input. A box with
        a coordinate that is not finite gives zeros.

    Gradients: to input, and to boxes where they require it; only those asked for are computed. The batch index gets
    zero, and so does a box that is not finite. Second derivatives and forward-mode AD raise RuntimeError. Backward is
    bit-identical from run to run.

    Raises:
        TypeError: a dtype, or an argument of another type.
        ValueError: a shape, a device, a number out of its range. Of the shape of boxes it is an AssertionError too.
        IndexError: a batch index outside [0,N), on the CPU. On CUDA finding it would cost a synchronization; the row is
            NaN instead.

    Example:
        >>> boxes = torch.tensor([[0, 8.0, 8.0, 120.0, 72.0]])
        >>> relops.roi_align(torch.randn(1, 256, 50, 68), boxes, 7, spatial_scale=1 / 4, sampling_ratio=2, aligned=True)
    """
    if not torch.jit.is_scripting():
        boxes, output_size = checked_region("roi_align", input, boxes, output_size, spatial_scale)
        check_sampling_ratio("roi_align", sampling_ratio)
        check_type("roi_align", "aligned", aligned, bool)
    return torch.ops.relops.roi_align(input, as_rows(boxes, input), output_size, spatial_scale, sampling_ratio, aligned)


register_differentiable_boxes("roi_align")
