"""Intersection over union (Jaccard index) of all pairs of boxes (https://doi.org/10.1007/s11263-009-0275-4)."""

import torch
from torch import Tensor

from relops.ops._iou import check_box_pair, register_box_pair, to_common_compute_dtype


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Compute the intersection over union (IoU, Jaccard index) of every box of `a` with every box of `b`.

    The IoU of two boxes is the area of their intersection divided by the area of their union. It is 0 if the union has
    no area. The definition follows the PASCAL VOC challenge (Everingham et al. 2010,
    https://doi.org/10.1007/s11263-009-0275-4). The values agree with `torchvision.ops.box_iou`, and are bit-identical
    on CPU and CUDA.

    Args:
        a: A tensor [A,4] or [N,A,4] with rows (x1, y1, x2, y2) in any unit, where x1 <= x2 and y1 <= y2. The dtype is
            float64, float32, float16, bfloat16 or an integer dtype. 64-bit integers are converted to float64. 16-bit
            floats and all other integers are converted to float32. Autocast does not change these conversions.
        b: A tensor [B,4], or [N,B,4] with the same N as `a`, with rows (x1, y1, x2, y2). If `a` is float64, `b` must be
            float64 or an integer dtype. If `a` is float32, float16 or bfloat16, `b` must have one of these three dtypes
            or an integer dtype. If `a` has an integer dtype, `b` may have any of the supported dtypes.

    Returns:
        A tensor [A,B], or [N,A,B] in which entry n compares ``a[n]`` with ``b[n]``. The dtype is float64 if `a` or `b`
        is float64 or has a 64-bit integer dtype, and float32 otherwise. If a box has a NaN coordinate, its row or
        column of the result is NaN. Infinite coordinates and inverted boxes get no special treatment. For example, a
        box that is inverted along one axis has a negative area.

    Gradients:
        Gradients flow to `a` and `b`. Only the gradients that are needed are computed, and no intermediate tensor of
        size [A,B] is allocated. The gradient of a minimum or maximum of two equal coordinates is divided equally
        between them. Boxes that touch without overlapping get the same gradient as if they overlapped. The gradient is
        zero if the union has no area. Second derivatives and forward-mode AD raise a RuntimeError. The gradients are
        bit-identical from run to run.

    Raises:
        TypeError: If an argument is not a tensor or has the wrong dtype.
        ValueError: If an argument has the wrong shape or device.

    Example:
        >>> import torch, relops
        >>> a = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
        >>> b = torch.tensor([[1.0, 0.0, 3.0, 2.0], [2.0, 2.0, 3.0, 3.0]])
        >>> iou = relops.box_iou(a, b)
        >>> iou.shape, [round(x, 4) for x in iou[0].tolist()]
        (torch.Size([1, 2]), [0.3333, 0.0])
    """
    if not torch.jit.is_scripting():
        check_box_pair("box_iou", a, b)
    return torch.ops.relops.box_iou(*to_common_compute_dtype(a, b))


register_box_pair("box_iou")
