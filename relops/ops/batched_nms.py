"""Non-maximum suppression within classes (https://arxiv.org/abs/1311.2524)."""

import torch
from torch import Tensor

from relops._dtypes import to_compute_dtype
from relops.ops._suppression import check_boxes, check_idxs, check_iou_threshold, check_scores, unknown_count


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Apply non-maximum suppression to the boxes of each class separately, in one call.

    Within a class, each box is kept unless its intersection over union (IoU) with a kept box of higher score exceeds
    `iou_threshold`. Boxes are visited in descending order of score. Boxes with equal scores are visited in the order of
    their indices. The kept boxes are exactly those that `relops.nms` keeps if it is called for each class separately.
    The op compares the values of `idxs`. It does not separate the classes by adding an offset to the coordinates,
    because such an offset would round the coordinates and fail if they are negative or huge.

    The algorithm is the greedy non-maximum suppression of R-CNN (Girshick et al. 2014, https://arxiv.org/abs/1311.2524,
    section 2.2). The arguments are the same as those of `torchvision.ops.batched_nms`, in the same order.
    `iou_threshold` is rounded to the dtype of the IoU, so a float32 IoU of 3/10 does not exceed a threshold of 0.3.
    torchvision's CPU kernel suppresses a box with this IoU, because it compares in float64, and the float32 number
    nearest to 3/10 is larger than 0.3. torchvision's CUDA kernel keeps the box.

    Args:
        boxes: A tensor [K,4] with rows (x1, y1, x2, y2) in any unit. The dtype is float64, float32, float16, bfloat16
            or an integer dtype. 64-bit integers are converted to float64. 16-bit floats and all other integers are
            converted to float32.
        scores: A tensor [K] of dtype float64, float32, float16 or bfloat16. The dtype may differ from that of `boxes`.
            A box with a NaN score or a non-finite coordinate is ignored: it is not kept, and it suppresses no other
            box.
        idxs: A tensor [K] of any integer dtype with the class (or image, or level) of each box. All values are allowed,
            including negative ones.
        iou_threshold: A number in [0,1], rounded to the dtype in which the IoU is computed. An IoU equal to the
            threshold does not suppress a box.

    Returns:
        An int64 tensor [kept] with the indices of the kept boxes of all classes, in descending order of score. Boxes
        with equal scores are in the order of their indices. On CUDA, the call waits for the device once, because the
        size of the result depends on the number of kept boxes. `relops.nms_padded` does not wait.

    Gradients:
        The result consists of indices and has no gradient.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or device, or `iou_threshold` is out of range.

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
