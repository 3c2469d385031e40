"""Non-maximum suppression within classes."""

import torch
from torch import Tensor

from relops._dtypes import to_compute_dtype
from relops.ops._suppression import check_boxes, check_idxs, check_iou_threshold, check_scores, unknown_count


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """`relops.nms` among the boxes of each class, in one call.

    It equals a loop over classes exactly: idxs are compared, and boxes are not moved apart by an offset, which rounds
    coordinates and goes wrong with negative or huge ones. Arguments and their order are those of
    torchvision.ops.batched_nms.

    Args:
        boxes: [K,4], as in `relops.nms`.
        scores: [K], as in `relops.nms`.
        idxs: [K], the class (or image, or level) of each box: any values of an integer dtype.
        iou_threshold: as in `relops.nms`, also in how an IoU that equals it differs from torchvision.

    Returns:
        [kept] int64: indices of the kept boxes of all classes together, by descending score, of equal scores the lower
        index first. On CUDA this waits for the device once; `relops.nms_padded` does not.

    Gradients: none, the result is indices.

    Raises:
        TypeError: a dtype, or an argument of another type.
        ValueError: a shape, a device, an iou_threshold out of its range.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [1.0, 0.0, 9.0, 8.0], [0.0, 0.0, 8.0, 8.0]])
        >>> relops.batched_nms(boxes, torch.tensor([0.6, 0.9, 0.3]), torch.tensor([7, 7, -1]), 0.5)  # tensor([1, 2])
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
