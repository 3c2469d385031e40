"""What the ops on boxes without features share: checks, the dtype they compute in, sizes that fakes cannot know.

torch.jit.script compiles `nms`, `batched_nms`, `box_iou`, `generalized_box_iou` and what these call. It reads
annotations as objects, so neither this file nor those of the ops import annotations from __future__.
"""

import torch
from torch import Tensor

from relops._library import check_device_has_kernels
from relops.ops._checks import (
    check_device,
    check_features,
    check_features_or_integers,
    check_integers,
    check_number,
    check_shape,
)


def check_boxes(op: str, boxes: object, batched: bool = False) -> None:
    check_features_or_integers(op, "boxes", boxes)
    if boxes.dim() not in ((2, 3) if batched else (2,)) or boxes.size(-1) != 4:
        shapes = "[K,4] or [B,K,4]" if batched else "[K,4]"
        raise ValueError(f"relops.{op}: boxes must be {shapes}, got shape {list(boxes.shape)}")
    check_device_has_kernels(op, boxes.device)


def check_scores(op: str, scores: object, boxes: Tensor) -> None:
    check_features(op, "scores", scores)
    _check_per_box(op, "scores", scores, boxes)


def check_idxs(op: str, idxs: object, boxes: Tensor) -> None:
    check_integers(op, "idxs", idxs)
    _check_per_box(op, "idxs", idxs, boxes)


def _check_per_box(op: str, name: str, tensor: Tensor, boxes: Tensor) -> None:
    check_device(op, name, tensor, "boxes", boxes)
    check_shape(op, name, tensor, "[K]" if boxes.dim() == 2 else "[B,K]", *boxes.shape[:-1])


def check_iou_threshold(op: str, iou_threshold: object) -> None:
    check_number(op, "iou_threshold", iou_threshold, "in [0,1]", 0.0, 1.0)


def box_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that kernels compute boxes of `dtype` in."""
    wide = dtype == torch.float64 or dtype == torch.int64 or dtype == torch.uint64
    return torch.float64 if wide else torch.float32


def wider_box_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """Return the dtype that kernels compute both tensors in."""
    dtype = box_dtype(a.dtype)
    return dtype if dtype == torch.float64 or a.dtype == b.dtype else box_dtype(b.dtype)


def computed(tensor: Tensor) -> Tensor:
    """Convert to the dtype that kernels compute in."""
    return tensor.to(box_dtype(tensor.dtype))


def unknown_count(boxes: Tensor) -> int | torch.SymInt:
    """For fakes: how many boxes are kept. Of none, none: inductor cannot index them by an unknown number of indices."""
    K = boxes.size(0)
    return 0 if isinstance(K, int) and K == 0 else torch.library.get_ctx().new_dynamic_size()
