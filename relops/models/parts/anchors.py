"""Anchors: the boxes that a region proposal network scores and refines, at every pixel of its maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

RATIOS = 0.5, 1.0, 2.0  # height / width


def paper_anchors(base: int = 16, scales: Sequence[float] = (8, 16, 32)) -> list[list[float]]:
    """Anchors of Faster R-CNN (https://arxiv.org/abs/1506.01497), as the released code rounds them.

    That code counts pixels inclusively, from -83, -39 to 100, 56 in the first; here x2 and y2 are the far edge of the
    last pixel, one more.

    Returns:
        len(RATIOS) * len(scales) of x1, y1, x2, y2, around the first pixel of the map.
    """
    center = (base - 1) / 2
    boxes = []
    for ratio in RATIOS:
        width = round((base * base / ratio) ** 0.5)
        height = round(width * ratio)
        for scale in scales:
            half_width, half_height = (scale * width - 1) / 2, (scale * height - 1) / 2
            boxes.append([center - half_width, center - half_height, center + half_width + 1, center + half_height + 1])
    return boxes


def centered_anchors(size: float) -> list[list[float]]:
    """Anchors of one level of a pyramid, of area size^2, as torchvision rounds them: around 0, 0."""
    boxes = []
    for ratio in RATIOS:
        width, height = round(size / ratio**0.5 / 2), round(size * ratio**0.5 / 2)
        boxes.append([-float(width), -float(height), float(width), float(height)])
    return boxes


class Anchors(nn.Module):
    """Places cell anchors at every pixel of maps.

    Args:
        cells: of each level, k boxes around the first pixel. As many of each.
        strides: of each level, in pixels of the image.
        every: anchors only at every so many pixels of the map, down and across.
    """

    cells: Tensor

    def __init__(self, cells: Sequence[Sequence[Sequence[float]]], strides: Sequence[int], every: int = 1) -> None:
        super().__init__()
        self.strides = [every * stride for stride in strides]
        self.every = every
        self.per_cell = len(cells[0])
        # Not in the state_dict: they are settings, not parameters.
        self.register_buffer("cells", torch.tensor(cells), persistent=False)  # [L,k,4]

    def forward(self, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """[H * W * k,4] of each level of size (H, W): by row, column, cell anchor."""
        anchors = []
        for cells, stride, size in zip(self.cells, self.strides, sizes):
            height, width = (-(-x // self.every) for x in size)
            y = torch.arange(height, device=cells.device, dtype=cells.dtype) * stride
            x = torch.arange(width, device=cells.device, dtype=cells.dtype) * stride
            corner = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).view(-1, 1, 2)
            anchors.append((corner.repeat(1, 1, 2) + cells).view(-1, 4))
        return anchors
