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
    """`roi_align` in which every bin looks at channels of its own.

    ``output[k,c,ph,pw]`` is what ``roi_align(..., aligned=True)`` gives for channel ``(c * PH + ph) * PW + pw`` in bin
    (ph,pw). The definition is that of Light-Head R-CNN (https://arxiv.org/abs/1711.07264), values are those of
    torchvision's op of this name.

    Args:
        input: [N,C,H,W] with C divisible by PH * PW, float64, float32, float16 or bfloat16. channels_last is read as it
            lies.
        boxes, output_size, spatial_scale, sampling_ratio: as in `roi_align`.

    Returns:
        [K,C/(PH*PW),PH,PW] in the dtype of input, channels_last if input is. Sums are in float32 for 16-bit input. A
        box with a coordinate that is not finite gives zeros.

    Gradients: to input, and to boxes where they require it, as in `roi_align`; errors likewise.

    Raises:
        TypeError, ValueError, IndexError: as `roi_align`; ValueError also where PH * PW does not divide C.

    Example:
        >>> boxes = torch.tensor([[0, 8.0, 8.0, 120.0, 72.0]])
        >>> relops.ps_roi_align(torch.randn(1, 10 * 7 * 7, 50, 68), boxes, 7, spatial_scale=1 / 4, sampling_ratio=2)
    """
    if not torch.jit.is_scripting():
        boxes, output_size = checked_region("ps_roi_align", input, boxes, output_size, spatial_scale)
        check_sampling_ratio("ps_roi_align", sampling_ratio)
        check_divisible("ps_roi_align", input, output_size)
    return torch.ops.relops.ps_roi_align(input, as_rows(boxes, input), output_size, spatial_scale, sampling_ratio)


register_differentiable_boxes("ps_roi_align", fake_forward_position_sensitive)
