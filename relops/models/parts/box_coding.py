"""Encoding of boxes as deltas from anchors, which detectors regress."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from relops._dtypes import to_compute_dtype
from relops.models.parts.boxes import center_size

# The most that log w and log h may grow by: from 16 to 1000 pixels.
LOG_CLAMP = math.log(1000 / 16)


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: tuple[float, float]) -> Tensor:
    """Return the deltas [...,4] that turn anchors [...,4] into boxes [...,4], by R-CNN's parametrization
    (https://arxiv.org/abs/1311.2524, appendix C): (dx / w, dy / h, log w'/w, log h'/h).

    The first two are multiplied by weights[0], the others by weights[1]. Boxes and anchors must have an extent.
    """
    center, size = center_size(boxes)
    from_center, from_size = center_size(anchors)
    moved, scaled = (center - from_center) / from_size, (size / from_size).log()
    return torch.cat([moved * weights[0], scaled * weights[1]], -1)


def decode_boxes(deltas: Tensor, anchors: Tensor, weights: tuple[float, float], log_clamp: float = LOG_CLAMP) -> Tensor:
    """Invert `encode_boxes`, in float32 or better. Logarithms of sizes grow by log_clamp at most."""
    deltas = to_compute_dtype(deltas)
    from_center, from_size = center_size(anchors)
    center = from_center + deltas[..., :2] / weights[0] * from_size
    half = 0.5 * from_size * (deltas[..., 2:] / weights[1]).clamp(max=log_clamp).exp()
    return torch.cat([center - half, center + half], -1)
