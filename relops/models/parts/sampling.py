"""Selection of the boxes that losses are computed from, by overlap with objects and random sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from relops.ops.box_iou import box_iou


def target_overlaps(boxes: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """Return the IoU [N,T,K] of targets [N,T,4] with boxes [N,K,4] or [1,K,4].

    Targets with the label -1 in labels [N,T] are padding, and their IoU is -1.
    """
    with torch.no_grad():
        iou = box_iou(targets.to(boxes.dtype), boxes.detach().expand(len(targets), -1, -1))
        return iou.masked_fill_((labels < 0)[..., None], -1)


def sample_candidates(
    positive: Tensor, negative: Tensor, count: int, max_positive: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Randomly sample `count` candidates of each image, of which at most `max_positive` are positive.

    The function does not wait for a CUDA device.

    Args:
        positive, negative: Bool masks [N,K] of the positive and of the negative candidates.
        count: The number of candidates to sample per image.
        max_positive: The maximum number of positive samples per image.

    Returns:
        The indices [N,S] of the sampled candidates, positive ones first, with S = min(count, K), and two masks [N,S].
        The first mask marks the positive samples. The second mask marks the valid samples. It is needed because an
        image may have fewer than S candidates.
    """
    N, K = positive.shape
    count, max_positive = min(count, K), min(max_positive, K)
    noise = torch.rand(N, K, device=positive.device)
    from_positive, positives = noise.masked_fill(~positive, -1).topk(max_positive, 1)
    from_negative, negatives = noise.masked_fill(~negative, -1).topk(count, 1)
    num_positive = (from_positive >= 0).sum(1, keepdim=True)
    num_negative = (from_negative >= 0).sum(1, keepdim=True)
    slot = torch.arange(count, device=positive.device)
    is_positive = slot < num_positive
    column = torch.where(is_positive, slot, max_positive + slot - num_positive)
    indices = torch.cat([positives, negatives], 1).gather(1, column)
    return indices, is_positive, slot < num_positive + num_negative
