"""Generalized intersection over union of all pairs of boxes (https://arxiv.org/abs/1902.09630)."""

import torch
from torch import Tensor

from relops.ops._iou import check_box_pair, register_box_pair, to_common_compute_dtype


def generalized_box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Compute the generalized intersection over union (GIoU) of every box of `a` with every box of `b`.

    The value is ``IoU - (C - U) / C``, where U is the area of the union of the two boxes, and C is the area of the
    smallest box that contains both. It ranges from -1 for boxes that are far apart to 1 for equal boxes. Unlike the
    IoU, it has a gradient even if the boxes are disjoint. The term IoU is 0 if U is 0, and the second term is 0 if C is
    0. The definition follows Generalized IoU (Rezatofighi et al. 2019, https://arxiv.org/abs/1902.09630). The values
    agree with `torchvision.ops.generalized_box_iou`, and are bit-identical on CPU and CUDA.

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
        between them. Boxes that touch without overlapping get the same gradient as if they overlapped. A term that is 0
        because its denominator is 0 has no gradient. Second derivatives and forward-mode AD raise a RuntimeError. The
        gradients are bit-identical from run to run.

    Raises:
        TypeError: If an argument is not a tensor or has the wrong dtype.
        ValueError: If an argument has the wrong shape or device.

    Example:
        >>> import torch, relops
        >>> a = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
        >>> b = torch.tensor([[1.0, 0.0, 3.0, 2.0], [2.0, 2.0, 3.0, 3.0]])
        >>> giou = relops.generalized_box_iou(a, b)
        >>> giou.shape, [round(x, 4) for x in giou[0].tolist()]
        (torch.Size([1, 2]), [0.3333, -0.4444])
    """
    if not torch.jit.is_scripting():
        check_box_pair("generalized_box_iou", a, b)
    return torch.ops.relops.generalized_box_iou(*to_common_compute_dtype(a, b))


register_box_pair("generalized_box_iou")
