"""Non-maximum suppression of a batch (https://arxiv.org/abs/1311.2524): each class of each image is a group."""

from __future__ import annotations

import torch
from torch import Tensor

from relops.reference._dtypes import compute_dtype
from relops.reference._suppression import present, suppress_sorted


def nms_padded(
    boxes: Tensor,  # [...,K,4]
    scores: Tensor,  # [...,K]
    iou_threshold: float,
    max_output: int,
    idxs: Tensor | None = None,  # [...,K]
    score_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:  # [...,max_output], [...]
    """Apply greedy non-maximum suppression to each image, and return `max_output` indices per image.

    `idxs` [..,K] has the class of each box. The boxes [..,K,4] of an image are visited in descending order of their
    scores [..,K]. A box is kept unless its IoU with a kept box of the same class exceeds `iou_threshold`. The first
    result [..,max_output] has the indices of the kept boxes, in descending order of score, padded with -1. The second
    result [..] is the number of indices that are not padding. Boxes with a NaN score, a non-finite coordinate or a
    score that is not larger than `score_threshold` are ignored. 64-bit integer boxes are converted to float64. 16-bit
    float boxes and all other integer boxes are converted to float32.
    """
    if boxes.dim() == 2:
        keep, count = nms_padded(
            boxes[None], scores[None], iou_threshold, max_output, None if idxs is None else idxs[None], score_threshold
        )
        return keep[0], count[0]
    B, K = scores.shape
    boxes, scores = (x.detach().to(compute_dtype(x)) for x in (boxes, scores))
    groups = torch.arange(B, device=boxes.device)[:, None].expand(B, K)
    if idxs is not None:
        classes, idxs = idxs.unique(return_inverse=True)
        groups = groups * len(classes) + idxs

    order = scores.argsort(descending=True, stable=True)  # [B,K]
    flat = (order + K * torch.arange(B, device=boxes.device)[:, None]).flatten()
    flat = flat[present(boxes, scores, score_threshold).flatten()[flat]]
    flat = flat[groups.flatten()[flat].argsort(stable=True)]
    kept = torch.zeros(B * K, dtype=torch.bool, device=boxes.device)
    kept[flat] = suppress_sorted(boxes.flatten(0, 1)[flat], groups.flatten()[flat], iou_threshold)

    kept = kept.view(B, K).gather(1, order)
    first = (~kept).to(torch.uint8).argsort(stable=True)[:, :max_output]  # kept entries first
    count = kept.sum(1).clamp(max=max_output)
    keep = order.new_full((B, max_output), -1)
    keep[:, :K] = order.gather(1, first)
    return keep.masked_fill(torch.arange(max_output, device=boxes.device) >= count[:, None], -1), count
