"""Non-maximum suppression within classes (https://arxiv.org/abs/1311.2524)."""

import torch
from torch import Tensor

from relops._dtypes import to_compute_dtype
from relops.ops._suppression import check_boxes, check_idxs, check_iou_threshold, check_scores, unknown_count


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Apply non-maximum suppression to the boxes of each class separately, in one call.

    Within a class, each box is kept unless it overlaps a kept box with a higher score by more than `iou_threshold`.
    Boxes are visited in the order of descending scores, and boxes with equal scores in the order of their indices. The
    result is exactly that of a loop over classes with `relops.nms`. The op compares `idxs`, and does not move the
    classes apart by adding an offset to the coordinates, which would round them and fail for negative or huge
    coordinates.

    The definition is the greedy non-maximum suppression of R-CNN (Girshick et al. 2014,
    https://arxiv.org/abs/1311.2524, section 2.2). The arguments and their order are those of
    `torchvision.ops.batched_nms`. The comparison with `iou_threshold` uses the dtype of the IoU, so a float32 IoU of
    3/10 does not exceed a threshold of 0.3. The CPU kernel of torchvision compares in float64, where the float32 number
    nearest to 3/10 is larger than 0.3, and therefore suppresses such a box. The CUDA kernel of torchvision does not.

    Args:
        boxes: A tensor [K,4] with rows (x1, y1, x2, y2) in any unit. The dtype is float64, float32, float16, bfloat16
            or an integer dtype. 64-bit integers are converted to float64, and 16-bit floats and all other integers to
            float32.
        scores: A tensor [K] of dtype float64, float32, float16 or bfloat16. The dtype may differ from that of `boxes`.
            An entry is ignored if its score is NaN or its box has a non-finite coordinate: it is not kept, and it
            suppresses no other box.
        idxs: A tensor [K] with the class (or image, or level) of each box: any values of an integer dtype.
        iou_threshold: A number in [0,1], rounded to the dtype in which the IoU is computed. A box is kept if its IoU
            equals the threshold.

    Returns:
        An int64 tensor [kept] with the indices of the kept boxes of all classes in the order of descending scores.
        Equal scores are in the order of their indices. On CUDA, the call waits for the device once, because the host
        must know the number of kept boxes. `relops.nms_padded` does not wait.

    Gradients:
        The result consists of indices and has no gradient.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or device, or `iou_threshold` is out of its range.

    Example:
        >>> import torch, relops
        >>> boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [1.0, 0.0, 9.0, 8.0], [0.0, 0.0, 8.0, 8.0]])
        >>> scores, classes = torch.tensor([0.6, 0.9, 0.3]), torch.tensor([7, 7, -1])
        >>> keep = relops.batched_nms(boxes, scores, classes, 0.5)
        >>> keep.tolist()
        [1, 2]
    """
    if not torch.jit.is_scripting():
        check_boxes("batched_nms", boxes)
        check_scores("batched_nms", scores, boxes)
        check_idxs("batched_nms", idxs, boxes)
        check_iou_threshold("batched_nms", iou_threshold)
    return torch.ops.relops.batched_nms(
        to_compute_dtype(boxes.detach()), to_compute_dtype(scores.detach()), idxs.to(torch.int64), iou_threshold
    )


@torch.library.register_fake("relops::batched_nms")
def _fake(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    return boxes.new_empty(unknown_count(boxes), dtype=torch.int64)
