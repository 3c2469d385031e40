"""Non-maximum suppression (https://arxiv.org/abs/1311.2524), as the case of a single class."""

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

    In the order of descending scores [K], each box is kept unless its IoU with a kept box exceeds `iou_threshold`. The
    result [kept] has the indices of the kept boxes in the order of descending scores. Equal scores are in the order of
    their indices. Entries with a NaN score or a non-finite box are ignored. 16-bit boxes are converted to float32,
    64-bit integers to float64, and all other integers to float32.
    """
    return batched_nms(boxes, scores, torch.zeros_like(scores, dtype=torch.int64), iou_threshold)
