"""Boxes of a batch: regression deltas, clipping, sampling. Boxes are [N,K,4], x1, y1, x2, y2 in pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from relops._tracing import has_values
from relops.ops.box_iou import box_iou

# Of log w and log h: a box grows at most from 16 to 1000 pixels.
LOG_CLAMP = math.log(1000 / 16)


def widened(x: Tensor) -> Tensor:
    """In float32 where it has 16 bits: scores and boxes are never computed in fewer."""
    return x if x.dtype == torch.float64 else x.float()


def center_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """[...,4] to centers [...,2] and sizes [...,2]."""
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * size, size


def encode(boxes: Tensor, anchors: Tensor, weights: tuple[float, float]) -> Tensor:
    """(dx / w, dy / h, log w'/w, log h'/h) that make anchors [...,4] into boxes [...,4], R-CNN's parametrization
    (https://arxiv.org/abs/1311.2524, appendix C). The first two are multiplied by weights[0], the others by weights[1].

    Both must have an extent.
    """
    center, size = center_size(boxes)
    from_center, from_size = center_size(anchors)
    moved, scaled = (center - from_center) / from_size, (size / from_size).log()
    return torch.cat([moved * weights[0], scaled * weights[1]], -1)


def decode(deltas: Tensor, anchors: Tensor, weights: tuple[float, float], log_clamp: float = LOG_CLAMP) -> Tensor:
    """The inverse of `encode`; logarithms of sizes grow at most by log_clamp. Computed in float32 or better."""
    deltas = widened(deltas)
    from_center, from_size = center_size(anchors)
    center = from_center + deltas[..., :2] / weights[0] * from_size
    half = 0.5 * from_size * (deltas[..., 2:] / weights[1]).clamp(max=log_clamp).exp()
    return torch.cat([center - half, center + half], -1)


def extent(sizes: Tensor) -> Tensor:
    """[N,2] (height, width) to [N,1,4] (width, height, width, height), what boxes are fractions of."""
    return sizes.flip(-1).repeat(1, 2)[:, None]


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """[N,K,4] to the images, sizes [N,2] (height, width)."""
    return boxes.clamp(min=0).minimum(extent(sizes).to(boxes.dtype))


def smaller_than(boxes: Tensor, size: float) -> Tensor:
    """[...,4] to [...]: True where a side is shorter than size, or not a number."""
    return ~(boxes[..., 2:] - boxes[..., :2] >= size).all(-1)


def match(boxes: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """IoU [N,T,K] of targets [N,T,4] with boxes [N,K,4] or [1,K,4]; -1 for padding (labels [N,T] of -1)."""
    with torch.no_grad():
        iou = box_iou(targets.to(boxes.dtype), boxes.detach().expand(len(targets), -1, -1))
        return iou.masked_fill_((labels < 0)[..., None], -1)


def sample(positive: Tensor, negative: Tensor, count: int, most_positive: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses at random, image by image, from candidates [N,K] bool: at most so many positive, and negative to fill up.

    Returns:
        indices [N,S] of the chosen, positive ones first, with S = min(count, K), and two masks [N,S]: which of them are
        positive, and which are there at all (there may be too few candidates). No synchronization.
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


def take(x: Tensor, indices: Tensor) -> Tensor:
    """x [N,K,...] at indices [N,S]: [N,S,...]."""
    return x.gather(1, indices.view(*indices.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))


def as_rows(boxes: Tensor) -> Tensor:
    """[N,K,4] as rows [N*K,5] (image, x1, y1, x2, y2) for the region ops."""
    N, K = boxes.shape[:2]
    image = torch.arange(N, device=boxes.device, dtype=boxes.dtype).repeat_interleave(K, output_size=N * K)
    return torch.cat([image[:, None], boxes.reshape(-1, 4)], 1)


def present(boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor | None]:
    """Boxes [N,K,4] `as_rows`, without padding where that costs nothing.

    On the CPU rows [R,5] of those valid [N,K] and their places [R] in the flattened [N*K]; on other devices, where
    counting them would wait for the device, all rows and None.
    """
    rows = as_rows(boxes)
    if not valid.is_cpu or not has_values(valid):
        return rows, None
    place = valid.flatten().nonzero().squeeze(1)
    return rows[place], place


def at_places(x: Tensor, place: Tensor | None) -> Tensor:
    """Of x [N,K,...] the rows that `present` gave, [R,...]."""
    x = x.flatten(0, 1)
    return x if place is None else x[place]


def spread(x: Tensor, place: Tensor | None, N: int, K: int) -> Tensor:
    """Rows [R,...] that `present` gave back to [N,K,...], zeros elsewhere."""
    if place is not None:
        x = x.new_zeros(N * K, *x.shape[1:]).index_copy_(0, place, x)
    return x.view(N, K, *x.shape[1:])
