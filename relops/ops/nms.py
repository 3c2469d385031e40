"""Non-maximum suppression."""

import torch
from torch import Tensor

from relops._dtypes import to_compute_dtype
from relops.ops._suppression import check_boxes, check_iou_threshold, check_scores, unknown_count


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Keeps a box unless it overlaps a kept box of higher score by more than iou_threshold.

    Boxes are taken by descending score, of equal scores the lower index first; the intersection over union (IoU) of two
    is one expression in float32 (float64 for float64 boxes), the same on both devices, and 0 for two boxes without
    area. Arguments and their order are those of torchvision.ops.nms.

    IoU is compared with iou_threshold in its own dtype: an IoU of exactly 3/10 is not larger than 0.3. torchvision's
    CPU kernel compares them in float64, where the float32 number next to 3/10 is larger than 0.3, and suppresses such a
    box; its CUDA kernel does not. It leaves open which of two boxes with equal scores comes first.

    Args:
        boxes: [K,4], rows of (x1, y1, x2, y2) in any unit; float64, float32, float16, bfloat16 or integers. 64-bit
            integers are computed in float64, 16-bit floats and all other integers in float32.
        scores: [K], one of these floating dtypes, not necessarily that of boxes. An entry with a NaN score, or a box
            that is not finite, is as if absent: it is not kept and suppresses nothing.
        iou_threshold: in [0,1], rounded to the dtype that IoU is computed in. A box whose IoU equals it is kept.

    Returns:
        [kept] int64: indices of the kept boxes, by descending score. Its length has to be known to the host, so that on
        CUDA this waits for the device once; `relops.nms_padded` does not.

    Gradients: none, the result is indices.

    Raises:
        TypeError: a dtype, or an argument of another type.
        ValueError: a shape, a device, an iou_threshold out of its range.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [1.0, 0.0, 9.0, 8.0], [20.0, 0.0, 30.0, 5.0]])
        >>> relops.nms(boxes, torch.tensor([0.6, 0.9, 0.3]), 0.5)  # tensor([1, 2])
    """
    if not torch.jit.is_scripting():
        check_boxes("nms", boxes)
        check_scores("nms", scores, boxes)
        check_iou_threshold("nms", iou_threshold)
    return torch.ops.relops.nms(to_compute_dtype(boxes.detach()), to_compute_dtype(scores.detach()), iou_threshold)


@torch.library.register_fake("relops::nms")
def _fake(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return boxes.new_empty(unknown_count(boxes), dtype=torch.int64)
