"""Soft-NMS (https://arxiv.org/abs/1704.04503), using precomputed decay factors of all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from relops.reference._dtypes import compute_dtype
from relops.reference._iou import broadcast_pairs, intersection_and_union
from relops.reference._suppression import present


def soft_nms(
    boxes: Tensor,  # [K,4] or [B,K,4]
    scores: Tensor,  # [K] or [B,K]
    method: str = "gaussian",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 1e-3,
    idxs: Tensor | None = None,  # [K] or [B,K]
) -> tuple[Tensor, Tensor]:  # [kept] each, or [B,K] each
    """Apply Soft-NMS to boxes [K,4] with scores [K], or to a batch of boxes [B,K,4] with scores [B,K].

    Each step keeps the remaining box with the highest score, and multiplies the scores of the other remaining boxes of
    its class by ``1 - IoU`` if the IoU exceeds `iou_threshold` (method "linear"), or by ``exp(-IoU^2 / sigma)`` (method
    "gaussian"). The loop stops when no score is larger than `score_threshold`.

    The results are the indices of the kept boxes and their decayed scores. Both are [kept] for boxes [K,4]. Both are
    [B,K] for a batch, with indices padded with -1 and scores padded with 0. Boxes and scores are converted to float64
    if one of them is float64 or the boxes are 64-bit integers, and to float32 otherwise.
    """
    if boxes.dim() == 2:
        keep, decayed = soft_nms(
            boxes[None],
            scores[None],
            method,
            iou_threshold,
            sigma,
            score_threshold,
            None if idxs is None else idxs[None],
        )
        kept = keep[0] >= 0
        return keep[0, kept], decayed[0, kept]
    dtype = compute_dtype(boxes, scores)
    boxes, current = boxes.detach().to(dtype), scores.detach().to(dtype)
    B, K = scores.shape

    intersection, union = intersection_and_union(*broadcast_pairs(boxes, boxes))
    iou = intersection / union
    if method == "linear":
        decays, factors = iou > iou_threshold, 1 - iou
    else:
        decays, factors = iou > 0, torch.exp(-(iou * iou) / sigma)
    if idxs is not None:
        decays &= idxs[:, :, None] == idxs[:, None, :]
    factors = torch.where(decays, factors, 1)  # [B,K,K]; a NaN IoU has the factor 1

    images, removed = torch.arange(B, device=boxes.device), -torch.inf
    current = torch.where(present(boxes, current), current, removed)
    keep = torch.full((B, K), -1, device=boxes.device)
    decayed = torch.zeros_like(current)
    for step in range(K):
        current = torch.where(current > score_threshold, current, removed)
        best, i = current.max(1)  # the lowest index among equal scores
        found = best > score_threshold
        if not found.any():
            break
        keep[:, step] = torch.where(found, i, -1)
        decayed[:, step] = torch.where(found, best, 0)
        current = current * factors[images, i]
        current[images, i] = removed
    return keep, decayed.to(scores.dtype)
