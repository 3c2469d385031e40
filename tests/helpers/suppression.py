"""For the tests of the suppression ops: clustered boxes, and a check of which boxes must be kept."""

from __future__ import annotations

import torch
from torch import Tensor


def clustered(counts: list[int], boxes_per_object: float = 30.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes [K,4] and scores [K] in float64, and idxs [K].

    Class c has counts[c] boxes. Boxes are clustered around small and large objects.
    """
    generator = torch.Generator().manual_seed(seed)
    idxs = torch.cat([torch.full((count,), c) for c, count in enumerate(counts)])
    K = len(idxs)
    objects = max(1, int(K / boxes_per_object))
    centers = 1000 * torch.rand(objects, 2, generator=generator, dtype=torch.float64)
    extents = 8 * 40 ** torch.rand(objects, 2, generator=generator, dtype=torch.float64)
    chosen = torch.randint(objects, (K,), generator=generator)
    extent = extents[chosen] * (0.2 * torch.randn(K, 2, generator=generator, dtype=torch.float64)).exp()
    center = centers[chosen] + 0.15 * extent * torch.randn(K, 2, generator=generator, dtype=torch.float64)
    boxes = torch.cat([center - extent / 2, center + extent / 2], 1)
    scores = torch.rand(K, generator=generator, dtype=torch.float64)
    order = torch.randperm(K, generator=generator)
    return boxes[order], scores[order], idxs[order]


def assert_greedy(keep: Tensor, boxes: Tensor, scores: Tensor, iou_threshold: float) -> None:
    """Assert that `keep` is the only set of boxes that greedy suppression can keep.

    No kept box overlaps another kept box, and every removed box overlaps a kept box of better rank.
    """
    K = len(boxes)
    rank = torch.empty(K, dtype=torch.int64, device=keep.device)
    rank[scores.argsort(descending=True, stable=True)] = torch.arange(K, device=keep.device)
    assert (rank[keep].diff() > 0).all()
    x1, y1, x2, y2 = boxes.unbind(1)
    area = (x2 - x1) * (y2 - y1)
    suppressed = torch.zeros(K, dtype=torch.bool, device=keep.device)
    for i in keep.tolist():
        width = (x2.clamp(max=x2[i]) - x1.clamp(min=x1[i])).clamp(min=0)
        height = (y2.clamp(max=y2[i]) - y1.clamp(min=y1[i])).clamp(min=0)
        both = width * height
        suppressed |= (both / (area + area[i] - both) > iou_threshold) & (rank > rank[i])
    kept = torch.zeros_like(suppressed)
    kept[keep] = True
    assert torch.equal(kept, ~suppressed)
