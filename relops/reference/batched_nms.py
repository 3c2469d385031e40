"""Non-maximum suppression within classes, in blocks of boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from relops.reference._dtypes import compute_dtype
from relops.reference._suppression import kept_in_order, present


def batched_nms(
    boxes: Tensor,  # [K,4]
    scores: Tensor,  # [K]
    idxs: Tensor,  # [K]
    iou_threshold: float,
) -> Tensor:  # [kept]
    """Boxes of 16 bits are computed in float32, of 64-bit integers in float64, of other integers in float32."""
    boxes = boxes.detach().to(compute_dtype(boxes))
    order = scores.detach().argsort(descending=True, stable=True)
    order = order[present(boxes, scores)[order]]
    by_class = order[idxs[order].argsort(stable=True)]
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    keep[by_class] = kept_in_order(boxes[by_class], idxs[by_class], iou_threshold)
    return order[keep[order]]
