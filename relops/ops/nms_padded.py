"""Non-maximum suppression with an output of fixed size (https://arxiv.org/abs/1311.2524)."""

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
    """Apply non-maximum suppression to an image or a batch, and return exactly `max_output` indices per image.

    Within an image, each box is kept unless its intersection over union (IoU) with a kept box of the same class and of
    higher score exceeds `iou_threshold`. The list of kept indices is truncated or padded to `max_output` entries. For
    each image, the result is the same as that of `relops.nms` (or `relops.batched_nms` if `idxs` is given) for the
    boxes whose score is above `score_threshold`. The shapes of the outputs do not depend on the values of the inputs.
    Therefore, the op never waits for a CUDA device, and it works in CUDA graphs and with `torch.vmap`.

    The algorithm is the greedy non-maximum suppression of R-CNN (Girshick et al. 2014, https://arxiv.org/abs/1311.2524,
    section 2.2). `iou_threshold` is rounded to the dtype of the IoU, so a float32 IoU of 3/10 does not exceed a
    threshold of 0.3. torchvision's CPU kernel suppresses a box with this IoU, because it compares in float64, and the
    float32 number nearest to 3/10 is larger than 0.3. torchvision's CUDA kernel keeps the box.

    Args:
        boxes: A tensor [K,4], or [B,K,4] for a batch, with rows (x1, y1, x2, y2) in any unit. The dtype is float64,
            float32, float16, bfloat16 or an integer dtype. 64-bit integers are converted to float64. 16-bit floats and
            all other integers are converted to float32. Images with fewer than K boxes can be padded with boxes whose
            score is NaN.
        scores: A tensor [K] or [B,K] of dtype float64, float32, float16 or bfloat16. The dtype may differ from that of
            `boxes`. A box with a NaN score or a non-finite coordinate is ignored: it is not kept, and it suppresses no
            other box.
        iou_threshold: A number in [0,1], rounded to the dtype in which the IoU is computed. An IoU equal to the
            threshold does not suppress a box.
        max_output: The number of indices to return for each image, at least 0. It may be larger than K.
        idxs: A tensor [K] or [B,K] of any integer dtype with the class of each box. All values are allowed, including
            negative ones. If None, all boxes of an image have the same class.
        score_threshold: Boxes whose score is not larger than this number are ignored. If None, there is no threshold.
            The number is rounded to the dtype in which it is compared with the scores: float64 for float64 scores, and
            float32 for all other scores.

    Returns:
        A tuple ``(keep, count)``.

        - ``keep``, an int64 tensor [max_output] or [B,max_output], has the indices of the kept boxes within their
          image, in descending order of score, followed by -1 as padding. Boxes with equal scores are in the order of
          their indices.
        - ``count``, an int64 tensor [] or [B], is the number of indices in ``keep`` that are not padding.

    Gradients:
        The result consists of indices and has no gradient.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or device, or a number is out of range.

    Example:
        >>> import torch, relops
        >>> boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [1.0, 0.0, 9.0, 8.0], [20.0, 0.0, 30.0, 5.0]])
        >>> keep, count = relops.nms_padded(boxes, torch.tensor([0.6, 0.9, 0.3]), 0.5, max_output=3)
        >>> keep.tolist(), count.item()
        ([1, 2, -1], 2)
    """
    op = "nms_padded"
    check_boxes(op, boxes, batched=True)
    check_scores(op, scores, boxes)
    check_iou_threshold(op, iou_threshold)
    is_integer = is_int(max_output)
    if not is_integer or max_output < 0:
        raise (ValueError if is_integer else TypeError)(
            f"relops.{op}: max_output must be an int of at least 0, got {max_output!r}"
        )
    if idxs is not None:
        check_idxs(op, idxs, boxes)
        idxs = idxs.to(torch.int64)
    if score_threshold is not None:
        check_number(op, "score_threshold", score_threshold, "a number or None", -math.inf, math.inf)
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
    """Use the vmapped dimension as the batch, or fold it into an existing batch."""
    V = info.batch_size
    boxes, scores = mapped_first(boxes, in_dims[0], V), mapped_first(scores, in_dims[1], V)
    batch = boxes.shape[:-2]  # [V] or [V,B]
    boxes, scores = boxes.flatten(0, -3), scores.flatten(0, -2)
    idxs = None if idxs is None else mapped_first(idxs, in_dims[4], V).flatten(0, -2)
    keep, count = torch.ops.relops.nms_padded(boxes, scores, iou_threshold, max_output, idxs, score_threshold)
    return (keep.unflatten(0, batch), count.unflatten(0, batch)), (0, 0)
