"""What the tests of the suppression ops share: clustered boxes, and the property that defines who is kept."""

from __future__ import annotations

import torch
from torch import Tensor


def clustered(sizes: list[int], boxes_per_object: float = 30.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """boxes [K,4], scores [K] and idxs [K] float64, with sizes[c] boxes of class c, around objects of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    idxs = torch.cat([torch.full((size,), c) for c, size in enumerate(sizes)])
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
    """No kept box overlaps another, every other overlaps a kept one that comes before it: only one set is like that."""
    K = len(boxes)
    rank = torch.empty(K, dtype=torch.int64, device=keep.device)
    rank[scores.argsort(descending=True, stable=True)] = torch.arange(K, device=keep.device)
    assert (rank[keep].diff() > 0).all()
    x1, y1, x2, y2 = boxes.unbind(1)
    area = (x2 - x1) * (y2 - y1)
    beaten = torch.zeros(K, dtype=torch.bool, device=keep.device)
    for i in keep.tolist():
        width = (x2.clamp(max=x2[i]) - x1.clamp(min=x1[i])).clamp(min=0)
        height = (y2.clamp(max=y2[i]) - y1.clamp(min=y1[i])).clamp(min=0)
        both = width * height
        beaten |= (both / (area + area[i] - both) > iou_threshold) & (rank > rank[i])
    kept = torch.zeros_like(beaten)
    kept[keep] = True
    assert torch.equal(kept, ~beaten)
