"""Soft-NMS (https://arxiv.org/abs/1704.04503)."""

import torch
from torch import Tensor

from relops._checks import MAX_FINITE, MIN_POSITIVE, check_choice, check_number
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
    """Apply Soft-NMS, which lowers the scores of overlapping boxes instead of removing the boxes.

    The box with the highest score is kept. If several boxes have this score, the one with the lowest index is kept. The
    scores of the remaining boxes of the same class are then multiplied by ``1 - IoU`` if the IoU exceeds
    `iou_threshold` (method "linear"), or by ``exp(-IoU^2 / sigma)`` (method "gaussian"). These two steps are repeated
    with the remaining boxes until no score is larger than `score_threshold`. The IoU is the intersection over union of
    the kept box and the remaining box. It is 0 if neither of them has an area. The definition follows Soft-NMS (Bodla
    et al. 2017, https://arxiv.org/abs/1704.04503).

    Args:
        boxes: A tensor [K,4], or [B,K,4] for a batch, with rows (x1, y1, x2, y2) in any unit. The dtype is float64,
            float32, float16, bfloat16 or an integer dtype. For a batch, the output has a fixed size, so the call does
            not wait for a CUDA device and can be captured in a CUDA graph. To process a single image without waiting
            for the device, pass a batch of one, ``boxes[None]`` and ``scores[None]``.
        scores: A tensor [K] or [B,K] of dtype float64, float32, float16 or bfloat16. The dtype may differ from that of
            `boxes`. A box with a NaN score or a non-finite coordinate is ignored: it is not kept, and it suppresses no
            other box. Boxes and scores are converted to float64 if the boxes are float64 or 64-bit integers, or the
            scores are float64. Otherwise, they are converted to float32.
        method: "gaussian" or "linear".
        iou_threshold: A number in [0,1]. It is used only if `method` is "linear".
        sigma: A finite positive number. It is used only if `method` is "gaussian".
        score_threshold: A finite number of at least 0. A box is ignored if its original or lowered score is not larger
            than this number.
        idxs: A tensor [K] or [B,K] of any integer dtype with the class of each box. All values are allowed, including
            negative ones. If None, all boxes of an image have the same class.

    Returns:
        A tuple ``(keep, decayed)``. ``keep`` is int64, and ``decayed`` has the dtype of `scores`.

        - For boxes [K,4], ``keep`` [kept] has the indices of the kept boxes, in descending order of lowered score, and
          ``decayed`` [kept] has the lowered scores. On CUDA, the call waits for the device once, because the size of
          the result depends on the number of kept boxes.
        - For boxes [B,K,4], ``keep`` is [B,K], padded with -1, and ``decayed`` is [B,K], padded with 0.

    Gradients:
        No gradients flow to `boxes` or `scores`. Forward-mode AD raises a RuntimeError.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or device, `method` is unknown, or a number is out of range.

    Example:
        >>> import torch, relops
        >>> boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [1.0, 0.0, 9.0, 8.0], [20.0, 0.0, 30.0, 5.0]])
        >>> keep, decayed = relops.soft_nms(boxes, torch.tensor([0.6, 0.9, 0.3]))
        >>> keep.tolist(), [round(score, 2) for score in decayed.tolist()]
        ([1, 2, 0], [0.9, 0.3, 0.18])
    """
    op = "soft_nms"
    check_boxes(op, boxes, batched=True)
    check_scores(op, scores, boxes)
    check_choice(op, "method", method, METHODS)
    check_iou_threshold(op, iou_threshold)
    check_number(op, "sigma", sigma, "a finite positive number", MIN_POSITIVE, MAX_FINITE)
    check_number(op, "score_threshold", score_threshold, "a finite number of at least 0", 0.0, MAX_FINITE)
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
