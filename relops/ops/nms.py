"""Non-maximum suppression (https://arxiv.org/abs/1311.2524)."""

import torch
from torch import Tensor

from relops._dtypes import to_compute_dtype
from relops.ops._suppression import check_boxes, check_iou_threshold, check_scores, unknown_count


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Keep each box unless its IoU with a kept box of higher score exceeds `iou_threshold`.

    Boxes are visited in descending order of score. Boxes with equal scores are visited in the order of their indices.
    The intersection over union (IoU) of two boxes is 0 if neither box has an area. CPU and CUDA compute the IoU with
    the same operations, in float64 if the boxes are float64 or 64-bit integers, and in float32 otherwise. The algorithm
    is the greedy non-maximum suppression of R-CNN (Girshick et al. 2014, https://arxiv.org/abs/1311.2524, section 2.2).
    The arguments are the same as those of `torchvision.ops.nms`, in the same order. The result agrees with
    torchvision's except in two cases:

    - `iou_threshold` is rounded to the dtype of the IoU, so a float32 IoU of 3/10 does not exceed a threshold of 0.3.
      torchvision's CPU kernel suppresses a box with this IoU, because it compares in float64, and the float32 number
      nearest to 3/10 is larger than 0.3. torchvision's CUDA kernel keeps the box.
    - If boxes have equal scores, torchvision does not specify their order.

    Args:
        boxes: A tensor [K,4] with rows (x1, y1, x2, y2) in any unit. The dtype is float64, float32, float16, bfloat16
            or an integer dtype. 64-bit integers are converted to float64. 16-bit floats and all other integers are
            converted to float32.
        scores: A tensor [K] of dtype float64, float32, float16 or bfloat16. The dtype may differ from that of `boxes`.
            A box with a NaN score or a non-finite coordinate is ignored: it is not kept, and it suppresses no other
            box.
        iou_threshold: A number in [0,1], rounded to the dtype in which the IoU is computed. An IoU equal to the
            threshold does not suppress a box.

    Returns:
        An int64 tensor [kept] with the indices of the kept boxes, in descending order of score. On CUDA, the call waits
        for the device once, because the size of the result depends on the number of kept boxes. `relops.nms_padded`
        does not wait.

    Gradients:
        The result consists of indices and has no gradient.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or device, or `iou_threshold` is out of range.

    Example:
        >>> import torch, relops
        >>> boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [1.0, 0.0, 9.0, 8.0], [20.0, 0.0, 30.0, 5.0]])
        >>> keep = relops.nms(boxes, torch.tensor([0.6, 0.9, 0.3]), 0.5)
        >>> keep.tolist()
        [1, 2]
    """
    if not torch.jit.is_scripting():
        check_boxes("nms", boxes)
        check_scores("nms", scores, boxes)
        check_iou_threshold("nms", iou_threshold)
    return torch.ops.relops.nms(to_compute_dtype(boxes.detach()), to_compute_dtype(scores.detach()), iou_threshold)


@torch.library.register_fake("relops::nms")
def _fake(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return boxes.new_empty(unknown_count(boxes), dtype=torch.int64)
