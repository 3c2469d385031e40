"""Non-maximum suppression (https://arxiv.org/abs/1311.2524), computed by batched_nms with a single class."""

from __future__ import annotations

import torch
from torch import Tensor

from relops.reference.batched_nms import batched_nms


def nms(
    boxes: Tensor,  # [K,4]
    scores: Tensor,  # [K]
    iou_threshold: float,
) -> Tensor:  # [kept]
    """Apply greedy non-maximum suppression to boxes [K,4].

    Boxes are visited in descending order of their scores [K]. A box is kept unless its IoU with a kept box exceeds
    `iou_threshold`. The result [kept] has the indices of the kept boxes, in descending order of score. Boxes with equal
    scores are in the order of their indices. Boxes with a NaN score or a non-finite coordinate are ignored. 64-bit
    integer boxes are converted to float64. 16-bit float boxes and all other integer boxes are converted to float32.
    """
    return batched_nms(boxes, scores, torch.zeros_like(scores, dtype=torch.int64), iou_threshold)
