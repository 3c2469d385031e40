"""Non-maximum suppression whose output has a size known beforehand."""

import math
from typing import Any

import torch
from torch import Tensor

from relops._checks import check_number, is_int
from relops._dtypes import to_compute_dtype
from relops.ops._suppression import check_boxes, check_idxs, check_iou_threshold, check_scores
from relops.ops._vmap import mapped_first


def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    idxs: Tensor | None = None,
    score_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`relops.nms` or `relops.batched_nms`, of one image or each of a batch, cut or padded to max_output boxes.

    As its shapes depend on no value, it never waits for a CUDA device, can be captured in a CUDA graph, and can be
    mapped by torch.vmap. It gives what the other two give, image by image, of the entries whose score is larger than
    score_threshold.

    Args:
        boxes: [K,4] or [B,K,4], as in `relops.nms`. Images with fewer boxes than K can be filled up with scores of NaN.
        scores: [K] or [B,K], as in `relops.nms`.
        iou_threshold: as in `relops.nms`, also in how an IoU that equals it differs from torchvision.
        max_output: how many indices are wanted of each image, at least 0; it may be more than K.
        idxs: [K] or [B,K], as in `relops.batched_nms`; None: all boxes of an image are of one class.
        score_threshold: an entry whose score is not larger is as if absent; None: all count. Rounded to the dtype that
            scores are compared in, float64 for float64 scores and else float32.

    Returns:
        keep [max_output] or [B,max_output] int64: indices into the image's boxes by descending score, of equal scores
        the lower index first, then -1; and count [] or [B] int64: how many of them are no padding.

    Gradients: none, the result is indices.

    Raises:
        TypeError: a dtype, or an argument of another type.
        ValueError: a shape, a device, a number out of its range.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [1.0, 0.0, 9.0, 8.0], [20.0, 0.0, 30.0, 5.0]])
        >>> keep, count = relops.nms_padded(boxes, torch.tensor([0.6, 0.9, 0.3]), 0.5, 3)  # [1, 2, -1], 2
    """
    op = "nms_padded"
    check_boxes(op, boxes, batched=True)
    check_scores(op, scores, boxes)
    check_iou_threshold(op, iou_threshold)
    whole = is_int(max_output)
    if not whole or max_output < 0:
        raise (ValueError if whole else TypeError)(
            f"relops.{op}: max_output must be an int of at least 0, got {max_output!r}"
        )
    if idxs is not None:
        check_idxs(op, idxs, boxes)
        idxs = idxs.to(torch.int64)
    if score_threshold is not None:
        check_number(op, "score_threshold", score_threshold, "or None", -math.inf, math.inf)
    return torch.ops.relops.nms_padded(
        to_compute_dtype(boxes.detach()),
        to_compute_dtype(scores.detach()),
        iou_threshold,
        max_output,
        idxs,
        score_threshold,
    )


@torch.library.register_fake("relops::nms_padded")
def _fake(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    idxs: Tensor | None = None,
    score_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    batch = boxes.shape[:-2]
    return boxes.new_empty(*batch, max_output, dtype=torch.int64), boxes.new_empty(batch, dtype=torch.int64)


@torch.library.register_vmap("relops::nms_padded")
def _vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    idxs: Tensor | None = None,
    score_threshold: float | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """vmap is a batch, or folds its dimension into the one there is."""
    V = info.batch_size
    boxes, scores = mapped_first(boxes, in_dims[0], V), mapped_first(scores, in_dims[1], V)
    images = boxes.shape[:-2]  # V, or V and B
    boxes, scores = boxes.flatten(0, -3), scores.flatten(0, -2)
    idxs = None if idxs is None else mapped_first(idxs, in_dims[4], V).flatten(0, -2)
    keep, count = torch.ops.relops.nms_padded(boxes, scores, iou_threshold, max_output, idxs, score_threshold)
    return (keep.unflatten(0, images), count.unflatten(0, images)), (0, 0)
