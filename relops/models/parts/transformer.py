"""What detectors with a transformer have in common: positions, padding, and the small networks on its outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPERATURE = 10000.0


class Extent(NamedTuple):
    """Which rows [N,h] and columns [N,w] of a map are of the image, not of padding: bool."""

    rows: Tensor
    columns: Tensor

    @property
    def padding(self) -> Tensor:
        """[N,h,w], True = padding."""
        return ~(self.rows[:, :, None] & self.columns[:, None])

    @property
    def ratio(self) -> Tensor:
        """[N,2], the share of columns and of rows that are of the image."""
        return torch.stack([x.float().mean(1) for x in (self.columns, self.rows)], 1)


def extent_of(image_shape: Sequence[int], sizes: Tensor, map_shape: Sequence[int]) -> Extent:
    """Of a map of a batch of images that are padded to image_shape [...,H,W], of which sizes [N,2] (height, width) are
    images. The map's shape is [...,h,w].

    A place belongs to the image if the pixel at its first corner does.
    """
    rows, columns = (
        torch.arange(n, device=sizes.device) * whole // n < sizes[:, i : i + 1]
        for i, (n, whole) in enumerate(zip(map_shape[-2:], image_shape[-2:]))
    )
    return Extent(rows, columns)


def sinusoid(positions: Tensor, width: int) -> Tensor:
    """Positions [...] in radians to [...,width]: sines and cosines in turn, wavelengths up to 10000 times as long."""
    index = torch.arange(width, device=positions.device)
    angles = positions[..., None] / TEMPERATURE ** (2 * (index // 2) / width)
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1).flatten(-2)


def sine_positions(extent: Extent, channels: int, offset: float) -> Tensor:
    """[N,h,w,channels] of a map: half of the row, half of the column, each counted from 1 + offset and brought to 2 pi
    at the image's last."""
    rows, columns = (
        sinusoid((x.cumsum(1) + offset) / (x.sum(1, keepdim=True) + 1e-6) * (2 * math.pi), channels // 2)
        for x in extent
    )
    h, w = rows.shape[1], columns.shape[1]
    return torch.cat([rows[:, :, None].expand(-1, -1, w, -1), columns[:, None].expand(-1, h, -1, -1)], -1)


def xavier_weights(module: nn.Module) -> None:
    """All that is no vector in it, from Xavier's uniform distribution."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


class MLP(nn.Module):
    """Linear layers with ReLU between them, all of one width but the last."""

    def __init__(self, channels: int, out_channels: int, num_layers: int) -> None:
        super().__init__()
        widths = [channels] * (num_layers - 1) + [out_channels]
        self.layers = nn.ModuleList(nn.Linear(channels, width) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """Base of encoder and decoder layers: their last half."""

    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, hidden)
        self.linear2 = nn.Linear(hidden, channels)
        self.dropout = nn.Dropout(dropout)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x)))))


class Layers(nn.Module):
    """An encoder's or a decoder's."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
