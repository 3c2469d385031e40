"""Precise RoI Pooling (IoU-Net, https://arxiv.org/abs/1807.11590)."""

import torch
from torch import Tensor

from relops._annotations import Boxes, BroadcastingList2
from relops.ops._regions import as_rows, checked_region, register_differentiable_boxes


def prroi_pool(input: Tensor, boxes: Boxes, output_size: BroadcastingList2[int], spatial_scale: float = 1.0) -> Tensor:
    """Mean of the bilinear surface over each bin of each box, as an exact integral.

    The box, times spatial_scale, is divided into PH x PW equal bins, and each bin is the integral, over it, of the
    surface that interpolates the pixels bilinearly, divided by the area of the bin: no sampling, and gradients to the
    boxes that are continuous. The center of pixel 0 is 0, and the surface falls to zero within a pixel outside of the
    map. An empty bin is zero. The definition is that of IoU-Net (https://arxiv.org/abs/1807.11590).

    Args:
        input: [N,C,H,W], float64, float32, float16 or bfloat16. channels_last is read as it lies.
        boxes: as in `roi_align`.
        output_size: (PH,PW), or one int for both.
        spatial_scale: pixels of the map per pixel of the image.

    Returns:
        [K,C,PH,PW] in the dtype of input, channels_last if input is. Sums are in float32 for 16-bit input. A box with
        a coordinate that is not finite gives zeros.

    Gradients: to input, and to boxes where they require it, as in `roi_align`; errors likewise.

    Raises:
        TypeError, ValueError, IndexError: as `roi_align`.

    Example:
        >>> boxes = torch.tensor([[0, 8.0, 8.0, 120.0, 72.0]], requires_grad=True)
        >>> relops.prroi_pool(torch.randn(1, 256, 50, 68), boxes, 7, spatial_scale=1 / 4).sum().backward()
    """
    if not torch.jit.is_scripting():
        boxes, output_size = checked_region("prroi_pool", input, boxes, output_size, spatial_scale)
    return torch.ops.relops.prroi_pool(input, as_rows(boxes, input), output_size, spatial_scale)


register_differentiable_boxes("prroi_pool")
