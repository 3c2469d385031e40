"""Code shared by the twins of the suppression ops: selection of valid boxes, and suppression of sorted boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from relops.reference._iou import broadcast_pairs, intersection_and_union

# Boxes are processed in blocks, and a block is compared with one tile of later boxes at a time. With these sizes, a
# block and a tile fit into the CPU caches, and few kernel launches are needed on a GPU.
BLOCK, TILE_CPU, TILE_CUDA = 256, 256, 65536


def overlaps(a: Tensor, b: Tensor, iou_threshold: float) -> Tensor:
    """Return a mask [A,B] of the pairs of boxes a [A,4] and b [B,4] whose IoU exceeds iou_threshold.

    The IoU of two boxes without area is NaN, which does not exceed the threshold.
    """
    intersection, union = intersection_and_union(*broadcast_pairs(a, b))
    return intersection.div_(union) > iou_threshold


def present(boxes: Tensor, scores: Tensor, score_threshold: float | None = None) -> Tensor:
    """Return a mask of the valid boxes: corners are finite, and scores are not NaN and exceed the threshold."""
    valid = boxes.isfinite().all(-1) & ~scores.isnan()
    return valid if score_threshold is None else valid & (scores > score_threshold)


def suppress_sorted(boxes: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Return a mask [K] of the kept boxes, for boxes [K,4] sorted by group [K] and then by descending score.

    A block may contain many small groups, but only its last group can have boxes after the block. First, the boxes of
    the block suppress one another within each group. Then the kept boxes of the last group suppress the later boxes of
    this group. The boxes that remain in the group form the next blocks.
    """
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    indices = torch.arange(len(boxes), device=boxes.device)
    ends = torch.unique_consecutive(groups, return_counts=True)[1].cumsum(0)
    tile = TILE_CUDA if boxes.is_cuda else TILE_CPU
    start = 0
    while start < len(boxes):
        block = indices[start : start + BLOCK]
        last = groups[block[-1]]
        start = int(ends[torch.searchsorted(ends, block[-1], right=True)])
        rest = indices[block[-1] + 1 : start]
        while len(block):
            kept = block[survivors(overlaps(boxes[block], boxes[block], iou_threshold) & same_group(groups[block]))]
            keep[kept] = True
            kept_of_last = boxes[kept[groups[kept] == last]]
            suppressed = [overlaps(kept_of_last, part, iou_threshold).any(0) for part in boxes[rest].split(tile)]
            rest = rest[~torch.cat(suppressed)] if suppressed else rest
            block, rest = rest[:BLOCK], rest[BLOCK:]
    return keep


def same_group(groups: Tensor) -> Tensor:
    return groups[:, None] == groups


def survivors(suppresses: Tensor) -> Tensor:
    """Return a mask [K] of the kept boxes. A kept box i suppresses each box j > i for which suppresses[i,j] is True.

    Initially, all boxes are kept. The suppression is repeated until the mask no longer changes.
    """
    earlier = suppresses.triu(1)
    keep = torch.ones(len(earlier), dtype=torch.bool, device=earlier.device)
    while True:
        updated = ~(earlier & keep[:, None]).any(0)
        if torch.equal(updated, keep):
            return keep
        keep = updated
