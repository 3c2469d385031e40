"""RoIAlign on the pyramid level that fits the size of each box (FPN, https://arxiv.org/abs/1612.03144, eq. 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from relops.reference._dtypes import compute_dtype
from relops.reference._regions import box_rows
from relops.reference.roi_align import roi_align


def multi_scale_roi_align(
    inputs: Sequence[Tensor],  # L tensors [N,C,Hl,Wl], finest first
    boxes: Tensor | Sequence[Tensor],  # [K,5], or N tensors [Ki,4]
    output_size: int | Sequence[int],  # PH, PW
    spatial_scales: Sequence[float],  # L powers of 1/2
    sampling_ratio: int = 2,
    aligned: bool = False,
    canonical_box_size: float = 224.0,
    canonical_level: int = 4,
) -> Tensor:  # [K,C,PH,PW]
    """Compute RoIAlign for each box on the pyramid level that fits the size of the box.

    Level l has a spatial scale of 2^-l. A box is assigned to level
    ``floor(canonical_level + log2(sqrt(area) / canonical_box_size) + 1e-6)``, or to the nearest level in `inputs` if
    that level is missing.

    `inputs` are L tensors [N,C,Hl,Wl], finest first, and `spatial_scales` are L powers of 1/2. `boxes` are [K,5] with
    rows (batch index, x1, y1, x2, y2) or a list of N tensors [Ki,4], and the result is [K,C,PH,PW]. For 16-bit inputs,
    all computations use float32. Features must be finite. Only first derivatives are available.
    """
    boxes = box_rows(boxes)
    finest, coarsest = (round(-math.log2(spatial_scales[end])) for end in (0, -1))
    x1, y1, x2, y2 = boxes[:, 1:].detach().to(compute_dtype(inputs[0])).unbind(1)
    side = ((x2 - x1) * (y2 - y1)).clamp(min=0).sqrt()
    level = (canonical_level + (side / canonical_box_size).log2() + 1e-6).floor().clamp(finest, coarsest) - finest

    positions, pooled = [], []
    for index, (input, scale) in enumerate(zip(inputs, spatial_scales)):
        # The level of a non-finite box may be NaN. Such a box is assigned to the finest level, but its output is zero
        # on any level.
        positions.append((level.nan_to_num() == index).nonzero()[:, 0])
        pooled.append(roi_align(input, boxes[positions[-1]], output_size, scale, sampling_ratio, aligned))
    return torch.cat(pooled)[torch.cat(positions).argsort()]
