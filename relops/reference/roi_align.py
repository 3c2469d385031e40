"""RoIAlign (He et al. 2017, https://arxiv.org/abs/1703.06870), as torchvision defines it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from relops.reference._regions import pool, sampled_taps, size_pair, split_boxes, zero_boxes


def roi_align(
    input: Tensor,  # [N,C,H,W]
    boxes: Tensor | Sequence[Tensor],  # [K,5], or N tensors [Ki,4]
    output_size: int | Sequence[int],  # PH, PW
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:  # [K,C,PH,PW]
    """Compute the mean of bilinear samples on a grid in each bin of each box.

    The coordinates of each box are multiplied by `spatial_scale`, and the box is divided into PH x PW equal bins. Each
    bin is divided into a grid of n x n cells, and its value is the mean of the bilinear samples at the centers of the
    cells. If `sampling_ratio` is positive, n is `sampling_ratio`. Otherwise, n is the size of the bin in pixels,
    rounded up. A sample more than one pixel outside of the map is zero. A sample at most one pixel outside has the
    value at the border. If `aligned` is True, boxes are shifted by half a pixel. Otherwise, they are enlarged to a
    width and height of at least one pixel.

    `input` is [N,C,H,W], `boxes` are [K,5] with rows (batch index, x1, y1, x2, y2) or a list of N tensors [Ki,4], and
    the result is [K,C,PH,PW]. For 16-bit inputs, all computations use float32. Features must be finite. Only first
    derivatives are available.
    """
    PH, PW = size_pair(output_size)
    batch, corners, finite = split_boxes(input, boxes)
    x1, y1, x2, y2 = (corners * spatial_scale - (0.5 if aligned else 0)).unbind(1)
    height, width = y2 - y1, x2 - x1
    if not aligned:
        height, width = torch.where(height < 1, 1, height), torch.where(width < 1, 1, width)
    y = sampled_taps(y1, height, PH, sampling_ratio, input.shape[2])
    x = sampled_taps(x1, width, PW, sampling_ratio, input.shape[3])
    return pool(input, batch, zero_boxes(y, finite), x)
