"""Position-sensitive RoIAlign (Light-Head R-CNN, https://arxiv.org/abs/1711.07264), as torchvision defines it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from relops.reference._regions import pool, sampled_taps, size_pair, split_boxes, zero_boxes


def ps_roi_align(
    input: Tensor,  # [N,C,H,W]
    boxes: Tensor | Sequence[Tensor],  # [K,5], or N tensors [Ki,4]
    output_size: int | Sequence[int],  # PH, PW
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
) -> Tensor:  # [K,C/(PH*PW),PH,PW]
    """Compute RoIAlign with separate input channels for each bin.

    ``output[k,c,ph,pw]`` is the mean of the bilinear samples of input channel ``(c * PH + ph) * PW + pw`` at the
    centers of the n x n cells of a grid in bin (ph,pw) of box k. The coordinates of boxes are multiplied by
    `spatial_scale` and shifted by half a pixel. If `sampling_ratio` is positive, n is `sampling_ratio`. Otherwise, n is
    the size of the bin in pixels, rounded up. A sample more than one pixel outside of the map is zero. A sample at most
    one pixel outside has the value at the border.

    `input` is [N,C,H,W], `boxes` are [K,5] with rows (batch index, x1, y1, x2, y2) or a list of N tensors [Ki,4], and
    the result is [K,C/(PH*PW),PH,PW]. For 16-bit inputs, all computations use float32. Features must be finite. Only
    first derivatives are available.
    """
    PH, PW = size_pair(output_size)
    batch, corners, finite = split_boxes(input, boxes)
    x1, y1, x2, y2 = (corners * spatial_scale - 0.5).unbind(1)
    y = sampled_taps(y1, y2 - y1, PH, sampling_ratio, input.shape[2])
    x = sampled_taps(x1, x2 - x1, PW, sampling_ratio, input.shape[3])
    return pool(input, batch, zero_boxes(y, finite), x, position_sensitive=True)
