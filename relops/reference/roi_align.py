"""RoIAlign (He et al. 2017, https://arxiv.org/abs/1703.06870), as torchvision defines it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from relops.reference._regions import drop_boxes, pair, pool, sampled_taps, split_boxes


def roi_align(
    input: Tensor,  # [N,C,H,W]
    boxes: Tensor | Sequence[Tensor],  # [K,5], or N times [Ki,4]
    output_size: int | Sequence[int],  # PH, PW
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:  # [K,C,PH,PW]
    """16-bit inputs are computed in float32. Features must be finite. First derivatives only."""
    PH, PW = pair(output_size)
    batch, corners, finite = split_boxes(input, boxes)
    x1, y1, x2, y2 = (corners * spatial_scale - (0.5 if aligned else 0)).unbind(1)
    height, width = y2 - y1, x2 - x1
    if not aligned:
        height, width = torch.where(height < 1, 1, height), torch.where(width < 1, 1, width)
    y = sampled_taps(y1, height, PH, sampling_ratio, input.shape[2])
    x = sampled_taps(x1, width, PW, sampling_ratio, input.shape[3])
    return pool(input, batch, drop_boxes(y, finite), x)
