"""Soft-NMS (https://arxiv.org/abs/1704.04503)."""

import torch
from torch import Tensor

from relops._checks import LARGEST, SMALLEST, check_choice, check_number
from relops._dtypes import common_compute_dtype
from relops.ops._autograd import register_no_gradient
from relops.ops._suppression import check_boxes, check_idxs, check_iou_threshold, check_scores, unknown_count

METHODS = ("linear", "gaussian")


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    method: str = "gaussian",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 1e-3,
    idxs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Suppression that lowers the scores of overlapping boxes instead of dropping them.

    The box of the highest score is kept, the lower index of equal ones, and the scores of the others of its class are
    multiplied by 1 - IoU where IoU > iou_threshold ("linear"), or by exp(-IoU^2 / sigma) ("gaussian"); then the same
    among the others, as long as there is one whose score is larger than score_threshold. The definition is that of
    Bodla et al. 2017 (https://arxiv.org/abs/1704.04503), IoU that of `relops.nms`.

    Args:
        boxes: [K,4] or [B,K,4], as in `relops.nms`. Give a batch, boxes[None], where nothing may wait for the device:
            its result has a size known beforehand, so that it can be captured in a CUDA graph.
        scores: [K] or [B,K], as in `relops.nms`. If boxes are float64 or 64-bit integers, or scores float64, both
            are computed in float64, else in float32.
        method: "gaussian" or "linear".
        iou_threshold: of "linear", in [0,1]; "gaussian" does not use it.
        sigma: of "gaussian", a finite positive number; "linear" does not use it.
        score_threshold: finite and at least 0. An entry whose score is not larger is as if absent, from the beginning
            or once it has been lowered so far.
        idxs: [K] or [B,K], as in `relops.batched_nms`; None: all boxes of an image are of one class.

    Returns:
        For boxes [K,4]: keep [kept] int64, indices by descending decayed score, and those scores [kept]; on CUDA their
        length makes this wait for the device once. For a batch: keep [B,K] padded with -1, and scores [B,K] padded
        with 0. Scores have the dtype of the scores given.

    Gradients: none, neither to boxes nor to scores. Forward-mode AD raises RuntimeError.

    Raises:
        TypeError: a dtype, or an argument of another type.
        ValueError: a shape, a device, an unknown method, a number out of its range.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [1.0, 0.0, 9.0, 8.0], [20.0, 0.0, 30.0, 5.0]])
        >>> keep, decayed = relops.soft_nms(boxes, torch.tensor([0.6, 0.9, 0.3]))  # [1, 2, 0], [0.9, 0.3, 0.18]
    """
    op = "soft_nms"
    check_boxes(op, boxes, batched=True)
    check_scores(op, scores, boxes)
    check_choice(op, "method", method, METHODS)
    check_iou_threshold(op, iou_threshold)
    check_number(op, "sigma", sigma, "positive and finite", SMALLEST, LARGEST)
    check_number(op, "score_threshold", score_threshold, "finite and at least 0", 0.0, LARGEST)
    if idxs is not None:
        check_idxs(op, idxs, boxes)
        idxs = idxs.to(torch.int64)
    dtype = common_compute_dtype(boxes, scores)
    keep, decayed = torch.ops.relops.soft_nms(
        boxes.to(dtype),
        scores.to(dtype),
        method,
        iou_threshold,
        sigma,
        score_threshold,
        idxs,
    )
    return keep, decayed.to(scores.dtype)


@torch.library.register_fake("relops::soft_nms")
def _fake(
    boxes: Tensor,
    scores: Tensor,
    method: str = "gaussian",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 1e-3,
    idxs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shape = scores.shape if boxes.dim() == 3 else (unknown_count(boxes),)
    return boxes.new_empty(shape, dtype=torch.int64), scores.new_empty(shape)


register_no_gradient("soft_nms")
