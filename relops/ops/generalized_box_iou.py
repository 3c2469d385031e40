"""Generalized intersection over union (https://arxiv.org/abs/1902.09630), every box of a with every one of b."""

import torch
from torch import Tensor

from relops.ops._iou import check_box_pair, computed_pair, register_box_pair


def generalized_box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalized intersection over union (https://arxiv.org/abs/1902.09630) of every box of a with every box of b.

    IoU - (C - U) / C, with U the area of the union and C that of the smallest box around both: from -1 for boxes far
    apart to 1 for equal ones, with a gradient also where they are disjoint. The first term is 0 where U is, the second
    where C is. Values are those of torchvision's op of this name, and the same bit for bit on CPU and CUDA.

    Args:
        a: [A,4] or [N,A,4]: x1, y1, x2, y2 in any unit, x1 <= x2 and y1 <= y2. float64, float32, float16, bfloat16 or
            integers. 64-bit integers are computed in float64, 16-bit floats and all other integers in float32, under
            autocast as well.
        b: [B,4], or [N,B,4] with the N of a. float64 where a is, or any of the others; integers beside any.

    Returns:
        [A,B], or [N,A,B] of a[n] with b[n]. In the dtype that is computed in. A NaN coordinate makes the
        row or column of its box NaN. Infinite coordinates give what arithmetic makes of them, and so do inverted boxes,
        whose area is negative if they are inverted in one direction.

    Gradients: to a and b where they require it; only those asked for are computed, and no [A,B] intermediate is made.
    Two equal coordinates share their gradient half and half; boxes that touch have that of boxes that overlap; a term
    that is 0 because it would be divided by 0 has none. Second derivatives and forward-mode AD raise RuntimeError.
    Backward is bit-identical from run to run.

    Raises:
        TypeError: a dtype, or an argument that is no tensor.
        ValueError: a shape or a device.

    Example:
        >>> a = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
        >>> relops.generalized_box_iou(a, torch.tensor([[1.0, 0.0, 3.0, 2.0], [2.0, 2.0, 3.0, 3.0]]))  # [[1/3, -4/9]]
    """
    if not torch.jit.is_scripting():
        check_box_pair("generalized_box_iou", a, b)
    return torch.ops.relops.generalized_box_iou(*computed_pair(a, b))


register_box_pair("generalized_box_iou")
