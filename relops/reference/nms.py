"""Non-maximum suppression: that within classes, of which there is one."""

from __future__ import annotations

import torch
from torch import Tensor

from relops.reference.batched_nms import batched_nms


def nms(
    boxes: Tensor,  # [K,4]
    scores: Tensor,  # [K]
    iou_threshold: float,
) -> Tensor:  # [kept]
    """Boxes of 16 bits are computed in float32, of 64-bit integers in float64, of other integers in float32."""
    return batched_nms(boxes, scores, torch.zeros_like(scores, dtype=torch.int64), iou_threshold)
