"""What the twins of the suppression ops share: which entries count, and who is kept of boxes in order."""

from __future__ import annotations

import torch
from torch import Tensor

from relops.reference._iou import intersection_and_union, pairs

# Boxes settled at a time, and later ones they are compared with at a time: what the caches of a CPU hold, and on a GPU
# few launches.
BLOCK, TILE_CPU, TILE_CUDA = 256, 256, 65536


def overlaps(a: Tensor, b: Tensor, iou_threshold: float) -> Tensor:  # [A,4], [B,4] -> bool [A,B]
    """IoU > iou_threshold. NaN, as of two boxes without area, is not."""
    intersection, union = intersection_and_union(*pairs(a, b))
    return intersection.div_(union) > iou_threshold


def present(boxes: Tensor, scores: Tensor, score_threshold: float | None = None) -> Tensor:
    """Which entries count."""
    counts = boxes.isfinite().all(-1) & ~scores.isnan()
    return counts if score_threshold is None else counts & (scores > score_threshold)


def kept_in_order(boxes: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:  # [K,4], [K] -> bool [K]
    """Who is kept of boxes that are sorted by group, and in a group by descending score.

    A block of boxes is settled among itself; those of it that are kept then suppress what follows in the group of the
    last, and what is left of that is the next block. A block may hold many small groups.
    """
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    everything = torch.arange(len(boxes), device=boxes.device)
    ends = torch.unique_consecutive(groups, return_counts=True)[1].cumsum(0)
    tile = TILE_CUDA if boxes.is_cuda else TILE_CPU
    start = 0
    while start < len(boxes):
        block = everything[start : start + BLOCK]
        last = groups[block[-1]]
        start = int(ends[torch.searchsorted(ends, block[-1], right=True)])
        rest = everything[block[-1] + 1 : start]
        while len(block):
            winners = block[settled(overlaps(boxes[block], boxes[block], iou_threshold) & same(groups[block]))]
            keep[winners] = True
            rivals = boxes[winners[groups[winners] == last]]
            beaten = [overlaps(rivals, part, iou_threshold).any(0) for part in boxes[rest].split(tile)]
            rest = rest[~torch.cat(beaten)] if beaten else rest
            block, rest = rest[:BLOCK], rest[BLOCK:]
    return keep


def same(groups: Tensor) -> Tensor:
    return groups[:, None] == groups


def settled(suppresses: Tensor) -> Tensor:  # bool [K,K] -> bool [K]
    """Who is kept where i suppresses a later j if it is kept itself: repeated until nothing changes."""
    earlier = suppresses.triu(1)
    keep = torch.ones(len(earlier), dtype=torch.bool, device=earlier.device)
    while True:
        changed = ~(earlier & keep[:, None]).any(0)
        if torch.equal(changed, keep):
            return keep
        keep = changed
