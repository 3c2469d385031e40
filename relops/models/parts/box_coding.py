"""Encoding of boxes as deltas from anchors. Detectors predict these deltas."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from relops._dtypes import to_compute_dtype
from relops.models.parts.boxes import center_size

# The maximum growth of log w and log h. It corresponds to growth from 16 to 1000 pixels.
LOG_CLAMP = math.log(1000 / 16)


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: tuple[float, float]) -> Tensor:
    """Return the deltas [...,4] that turn anchors [...,4] into boxes [...,4].

    For an anchor of size (w, h) and a box of size (w', h') whose centers differ by (dx, dy), the deltas are (dx / w, dy
    / h, log w'/w, log h'/h), as in R-CNN (https://arxiv.org/abs/1311.2524, appendix C). The first two deltas are
    multiplied by weights[0] and the last two by weights[1]. The width and height of boxes and anchors must be positive.
    """
    center, size = center_size(boxes)
    anchor_center, anchor_size = center_size(anchors)
    shift, log_scale = (center - anchor_center) / anchor_size, (size / anchor_size).log()
    return torch.cat([shift * weights[0], log_scale * weights[1]], -1)


def decode_boxes(deltas: Tensor, anchors: Tensor, weights: tuple[float, float], log_clamp: float = LOG_CLAMP) -> Tensor:
    """Invert `encode_boxes` in at least float32 precision.

    The width and height of a box grow by a factor of at most exp(log_clamp).
    """
    deltas = to_compute_dtype(deltas)
    anchor_center, anchor_size = center_size(anchors)
    center = anchor_center + deltas[..., :2] / weights[0] * anchor_size
    half = 0.5 * anchor_size * (deltas[..., 2:] / weights[1]).clamp(max=log_clamp).exp()
    return torch.cat([center - half, center + half], -1)
