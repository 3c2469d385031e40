"""Conversion of the masks of detections to the size of the image."""

from __future__ import annotations

import torch
from torch import Tensor


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Paste the masks of detections into an image.

    Args:
        masks: [D,R,R] probabilities at the centers of the R x R cells of each box.
        boxes: [D,4] x1, y1, x2, y2 in pixels.
        size: (H, W) of the image.

    Returns:
        [D,H,W] bool. A pixel is True if the probability at its center, interpolated bilinearly, is at least one half.
        Pixels outside of the detection's box are False.
    """
    height, width = size
    cell = torch.arange(masks.shape[-1], device=masks.device)

    def weights(low: Tensor, high: Tensor, length: int) -> Tensor:
        """Return the interpolation weights [D,length,R] of a mask's rows or columns at each pixel."""
        pixel = torch.arange(length, device=masks.device) + 0.5
        position = (pixel - low[:, None]) / (high - low).clamp(min=1e-6)[:, None] * len(cell) - 0.5
        return (1 - (position[..., None] - cell).abs()).clamp(min=0)

    x1, y1, x2, y2 = boxes.float().unbind(1)
    rows, columns = weights(y1, y2, height), weights(x1, x2, width)
    pasted = torch.empty(len(masks), height, width, dtype=torch.bool, device=masks.device)
    with torch.autocast(masks.device.type, enabled=False):  # autocast would compute the products in 16 bits
        for i, mask in enumerate(masks.float()):  # one image-sized float map at a time, to save memory
            torch.ge(rows[i] @ mask @ columns[i].T, 0.5, out=pasted[i])
    return pasted
