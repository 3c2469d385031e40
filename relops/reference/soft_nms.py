"""Soft-NMS (https://arxiv.org/abs/1704.04503): the factors of all pairs at once, then a step for each kept box."""

from __future__ import annotations

import torch
from torch import Tensor

from relops.reference._dtypes import compute_dtype
from relops.reference._iou import intersection_and_union, pairs
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
    """Boxes and scores are computed in float64 if either is, or boxes are 64-bit integers, else in float32."""
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

    intersection, union = intersection_and_union(*pairs(boxes, boxes))
    iou = intersection / union
    if method == "linear":
        lowered, factors = iou > iou_threshold, 1 - iou
    else:
        lowered, factors = iou > 0, torch.exp(-(iou * iou) / sigma)
    if idxs is not None:
        lowered &= idxs[:, :, None] == idxs[:, None, :]
    factors = torch.where(lowered, factors, 1)  # [B,K,K]; of an IoU that is NaN too

    images, out = torch.arange(B, device=boxes.device), -torch.inf
    current = torch.where(present(boxes, current), current, out)
    keep = torch.full((B, K), -1, device=boxes.device)
    decayed = torch.zeros_like(current)
    for step in range(K):
        current = torch.where(current > score_threshold, current, out)
        best, i = current.max(1)  # the first of equal ones
        some = best > score_threshold
        if not some.any():
            break
        keep[:, step] = torch.where(some, i, -1)
        decayed[:, step] = torch.where(some, best, 0)
        current = current * factors[images, i]
        current[images, i] = out
    return keep, decayed.to(scores.dtype)
