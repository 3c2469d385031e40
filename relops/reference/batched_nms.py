"""Non-maximum suppression within classes (https://arxiv.org/abs/1311.2524), computed in blocks of boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from relops.reference._dtypes import compute_dtype
from relops.reference._suppression import present, suppress_sorted


def batched_nms(
    boxes: Tensor,  # [K,4]
    scores: Tensor,  # [K]
    idxs: Tensor,  # [K]
    iou_threshold: float,
) -> Tensor:  # [kept]
    """Apply greedy non-maximum suppression to the boxes of each class separately.

    `idxs` [K] has the class of each box. Boxes [K,4] are visited in descending order of their scores [K]. A box is kept
    unless its IoU with a kept box of the same class exceeds `iou_threshold`. The result [kept] has the indices of the
    kept boxes of all classes, in descending order of score. Boxes with equal scores are in the order of their indices.
    Boxes with a NaN score or a non-finite coordinate are ignored. 64-bit integer boxes are converted to float64. 16-bit
    float boxes and all other integer boxes are converted to float32.
    """
    boxes = boxes.detach().to(compute_dtype(boxes))
    order = scores.detach().argsort(descending=True, stable=True)
    order = order[present(boxes, scores)[order]]
    by_class = order[idxs[order].argsort(stable=True)]
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    keep[by_class] = suppress_sorted(boxes[by_class], idxs[by_class], iou_threshold)
    return order[keep[order]]
