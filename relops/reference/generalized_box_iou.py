"""Generalized intersection over union (https://arxiv.org/abs/1902.09630), by broadcasting."""

from __future__ import annotations

import torch
from torch import Tensor

from relops.reference.box_iou import area_if_any, intersection_and_union, pairs, ratio


def generalized_box_iou(
    a: Tensor,  # [..,A,4]
    b: Tensor,  # [..,B,4]
) -> Tensor:  # [..,A,B]
    """16-bit boxes are computed in float32."""
    a, b = pairs(a, b)
    intersection, union = intersection_and_union(a, b)
    hull = area_if_any(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    return ratio(intersection, union) - ratio(hull - union, hull)
