"""Anchors: boxes at every pixel of the feature maps, which a region proposal network scores and refines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

RATIOS = 0.5, 1.0, 2.0  # height / width


def paper_anchors(base: int = 16, scales: Sequence[float] = (8, 16, 32)) -> list[list[float]]:
    """Return the anchors of Faster R-CNN (https://arxiv.org/abs/1506.01497), rounded as in the released code.

    In the released code, x2 and y2 denote the last pixel inside the box, and the first anchor is (-84, -40, 99, 55). In
    relops, x2 and y2 denote the far edge of that pixel and are larger by one. The first anchor is (-84, -40, 100, 56).

    Returns:
        len(RATIOS) * len(scales) boxes x1, y1, x2, y2 around the first pixel of the map.
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
    """Return the anchors of one pyramid level, centered at (0, 0) with an area of size^2, rounded as in torchvision."""
    boxes = []
    for ratio in RATIOS:
        width, height = round(size / ratio**0.5 / 2), round(size * ratio**0.5 / 2)
        boxes.append([-float(width), -float(height), float(width), float(height)])
    return boxes


class Anchors(nn.Module):
    """The anchors of all levels: copies of the same boxes at every pixel.

    Args:
        cells: For each level, the k cell anchors, which are boxes around the first pixel. The number k is the same for
            all levels.
        strides: The stride of each level, in pixels of the image.
        step: Anchors are placed at every step-th pixel of a map, vertically and horizontally.
    """

    cells: Tensor

    def __init__(self, cells: Sequence[Sequence[Sequence[float]]], strides: Sequence[int], step: int = 1) -> None:
        super().__init__()
        self.strides = [step * stride for stride in strides]
        self.step = step
        self.per_cell = len(cells[0])
        # The cell anchors are not in the state_dict, because they are settings and not parameters.
        self.register_buffer("cells", torch.tensor(cells), persistent=False)  # [L,k,4]

    def forward(self, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Return the anchors [H*W*k,4] of each level of size (H, W), ordered by row, column and cell anchor."""
        anchors = []
        for cells, stride, size in zip(self.cells, self.strides, sizes):
            height, width = (-(-x // self.step) for x in size)
            y = torch.arange(height, device=cells.device, dtype=cells.dtype) * stride
            x = torch.arange(width, device=cells.device, dtype=cells.dtype) * stride
            corner = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).view(-1, 1, 2)
            anchors.append((corner.repeat(1, 1, 2) + cells).view(-1, 4))
        return anchors
