"""Position-sensitive RoIAlign (Light-Head R-CNN, https://arxiv.org/abs/1711.07264), as torchvision defines it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from relops.reference._regions import drop_boxes, pair, pool, sampled_taps, split_boxes


def ps_roi_align(
    input: Tensor,  # [N,C,H,W]
    boxes: Tensor | Sequence[Tensor],  # [K,5], or N times [Ki,4]
    output_size: int | Sequence[int],  # PH, PW
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
) -> Tensor:  # [K,C/(PH*PW),PH,PW]
    """16-bit inputs are computed in float32. Features must be finite. First derivatives only."""
    PH, PW = pair(output_size)
    batch, corners, finite = split_boxes(input, boxes)
    x1, y1, x2, y2 = (corners * spatial_scale - 0.5).unbind(1)
    y = sampled_taps(y1, y2 - y1, PH, sampling_ratio, input.shape[2])
    x = sampled_taps(x1, x2 - x1, PW, sampling_ratio, input.shape[3])
    return pool(input, batch, drop_boxes(y, finite), x, position_sensitive=True)
