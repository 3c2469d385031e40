"""The choice of the boxes that losses are computed of: their overlap with objects, and random sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from relops.ops.box_iou import box_iou


def target_overlaps(boxes: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """Return the IoU [N,T,K] of targets [N,T,4] with boxes [N,K,4] or [1,K,4]; -1 for padding (labels [N,T] of -1)."""
    with torch.no_grad():
        iou = box_iou(targets.to(boxes.dtype), boxes.detach().expand(len(targets), -1, -1))
        return iou.masked_fill_((labels < 0)[..., None], -1)


def sample_candidates(
    positive: Tensor, negative: Tensor, count: int, most_positive: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample `count` candidates of each image at random, of which at most `most_positive` are positive.

    Args:
        positive, negative: [N,K] bool.
        count: the number of candidates to sample per image.
        most_positive: the largest number of positive ones among them.

    Returns:
        The indices [N,S] of the chosen candidates, positive ones first, with S = min(count, K), and two masks [N,S]:
        which of them are positive, and which are valid (an image may have too few candidates). Nothing waits for the
        device.
    """
    N, K = positive.shape
    count, most_positive = min(count, K), min(most_positive, K)
    noise = torch.rand(N, K, device=positive.device)
    from_positive, positives = noise.masked_fill(~positive, -1).topk(most_positive, 1)
    from_negative, negatives = noise.masked_fill(~negative, -1).topk(count, 1)
    num_positive = (from_positive >= 0).sum(1, keepdim=True)
    num_negative = (from_negative >= 0).sum(1, keepdim=True)
    slot = torch.arange(count, device=positive.device)
    is_positive = slot < num_positive
    place = torch.where(is_positive, slot, most_positive + slot - num_positive)
    indices = torch.cat([positives, negatives], 1).gather(1, place)
    return indices, is_positive, slot < num_positive + num_negative
