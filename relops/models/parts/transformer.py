"""Parts that several transformer detectors use: positional encodings, padding, and small networks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPERATURE = 10000.0


class Extent(NamedTuple):
    """The rows and columns of a map that belong to the image and not to the padding.

    Attributes:
        rows: [N,h] bool.
        columns: [N,w] bool.
    """

    rows: Tensor
    columns: Tensor

    @property
    def padding(self) -> Tensor:
        """The mask [N,h,w] of the pixels that are padding."""
        return ~(self.rows[:, :, None] & self.columns[:, None])

    @property
    def ratio(self) -> Tensor:
        """The fractions [N,2] of the columns and of the rows that belong to the image."""
        return torch.stack([x.float().mean(1) for x in (self.columns, self.rows)], 1)


def extent_of(image_shape: Sequence[int], sizes: Tensor, map_shape: Sequence[int]) -> Extent:
    """Return the extent of the images in a map of a padded batch.

    A pixel of the map belongs to the image if the image contains the upper left corner of that pixel.

    Args:
        image_shape: [...,H,W] of the padded images.
        sizes: [N,2] height and width of each image without its padding.
        map_shape: [...,h,w] of the map.
    """
    rows, columns = (
        torch.arange(n, device=sizes.device) * padded // n < sizes[:, i : i + 1]
        for i, (n, padded) in enumerate(zip(map_shape[-2:], image_shape[-2:]))
    )
    return Extent(rows, columns)


def sinusoid(positions: Tensor, width: int) -> Tensor:
    """Encode positions [...] in radians as alternating sines and cosines [...,width].

    The wavelengths range from 2 pi to almost 10000 * 2 pi.
    """
    index = torch.arange(width, device=positions.device)
    angles = positions[..., None] / TEMPERATURE ** (2 * (index // 2) / width)
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1).flatten(-2)


def sine_positions(extent: Extent, channels: int, offset: float) -> Tensor:
    """Return the positional encoding [N,h,w,channels] of a map.

    The first half of the channels encodes the row and the second half the column. The positions of rows and columns are
    counted from 1 + offset, divided by the number of rows or columns of the image, and multiplied by 2 pi.
    """
    rows, columns = (
        sinusoid((x.cumsum(1) + offset) / (x.sum(1, keepdim=True) + 1e-6) * (2 * math.pi), channels // 2)
        for x in extent
    )
    h, w = rows.shape[1], columns.shape[1]
    return torch.cat([rows[:, :, None].expand(-1, -1, w, -1), columns[:, None].expand(-1, h, -1, -1)], -1)


def xavier_weights(module: nn.Module) -> None:
    """Initialize all parameters with two or more dimensions from Xavier's uniform distribution."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


class MLP(nn.Module):
    """Linear layers with ReLU between them. All layers except the last one keep the width of the input."""

    def __init__(self, channels: int, out_channels: int, num_layers: int) -> None:
        super().__init__()
        widths = [channels] * (num_layers - 1) + [out_channels]
        self.layers = nn.ModuleList(nn.Linear(channels, width) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """The base class of encoder and decoder layers, which provides their feed-forward network."""

    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, hidden)
        self.linear2 = nn.Linear(hidden, channels)
        self.dropout = nn.Dropout(dropout)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x)))))


class Layers(nn.Module):
    """The layers of an encoder or a decoder, which the detector calls one by one."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
