"""Argument checks of the suppression ops, and the symbolic output size of their fake kernels.

torch.jit.script compiles `nms` and `batched_nms` and evaluates their annotations at run time. Therefore the files of
these two ops must not import annotations from __future__.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relops._checks import (
    check_device,
    check_features,
    check_features_or_integers,
    check_integers,
    check_number,
    check_shape,
)
from relops._library import check_device_has_kernels


def check_boxes(op: str, boxes: Tensor, batched: bool = False) -> None:
    check_features_or_integers(op, "boxes", boxes)
    if boxes.dim() not in ((2, 3) if batched else (2,)) or boxes.size(-1) != 4:
        shapes = "[K,4] or [B,K,4]" if batched else "[K,4]"
        raise ValueError(f"relops.{op}: boxes must be {shapes}, got shape {list(boxes.shape)}")
    check_device_has_kernels(op, boxes.device)


def check_scores(op: str, scores: Tensor, boxes: Tensor) -> None:
    check_features(op, "scores", scores)
    _check_per_box(op, "scores", scores, boxes)


def check_idxs(op: str, idxs: Tensor, boxes: Tensor) -> None:
    check_integers(op, "idxs", idxs)
    _check_per_box(op, "idxs", idxs, boxes)


def _check_per_box(op: str, name: str, tensor: Tensor, boxes: Tensor) -> None:
    check_device(op, name, tensor, "boxes", boxes)
    check_shape(op, name, tensor, "[K]" if boxes.dim() == 2 else "[B,K]", *boxes.shape[:-1])


def check_iou_threshold(op: str, iou_threshold: object) -> None:
    check_number(op, "iou_threshold", iou_threshold, "a number in [0,1]", 0.0, 1.0)


def unknown_count(boxes: Tensor) -> int | torch.SymInt:
    """Return the output size for fake kernels: a new symbolic size, or 0 if there are no boxes."""
    K = boxes.size(0)
    # Inductor cannot index an empty tensor with an unknown number of indices.
    return 0 if isinstance(K, int) and K == 0 else torch.library.get_ctx().new_dynamic_size()
