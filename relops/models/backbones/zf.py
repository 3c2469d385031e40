"""The network of Zeiler and Fergus (https://arxiv.org/abs/1311.2901), the small backbone of the Faster R-CNN paper.

As in the released detector, the network has five convolutions and local response normalization over three channels.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from relops.models.backbones.base import Chain
from relops.models.backbones.norm import make_norm
from relops.models.initialization import zero_bias


class ZF(Chain):
    """The network of Zeiler and Fergus (https://arxiv.org/abs/1311.2901), without its classifier.

    The network has five convolutions. `stage_maps` returns the maps of conv1, conv2 and conv5, with strides of 2, 8 and
    16.

    Args:
        norm: Normalization. None uses local response normalization after the first two convolutions, as published.
            "batch", "frozen" (batch normalization with constant statistics and weights) and "group" (32 groups, or
            fewer if a group would have fewer than two channels) are used after every convolution.

    Attributes:
        channels: Number of channels of each stage's map.
        strides: Stride of each stage's map.

    Raises:
        ValueError: If `norm` is unknown.

    Example:
        >>> import torch, relops
        >>> maps = relops.models.ZF().stage_maps(torch.randn(1, 3, 64, 64))
        >>> [tuple(x.shape) for x in maps]
        [(1, 96, 32, 32), (1, 256, 8, 8), (1, 256, 4, 4)]
    """

    def __init__(self, *, norm: str | None = None) -> None:
        super().__init__()
        self.channels, self.strides = [96, 256, 256], [2, 8, 16]

        def norm_and_relu(channels: int, response: bool) -> list[nn.Module]:
            if norm is not None:
                return [make_norm(norm)(channels), nn.ReLU(inplace=True)]
            relu: list[nn.Module] = [nn.ReLU(inplace=True)]
            return [*relu, nn.LocalResponseNorm(3, 5e-5, 0.75)] if response else relu

        pool = nn.MaxPool2d(3, 2, 1)
        self.conv1 = nn.Sequential(nn.Conv2d(3, 96, 7, 2, 3), *norm_and_relu(96, True))
        self.conv2 = nn.Sequential(pool, nn.Conv2d(96, 256, 5, 2, 2), *norm_and_relu(256, True))
        self.conv3 = nn.Sequential(pool, nn.Conv2d(256, 384, 3, 1, 1), *norm_and_relu(384, False))
        self.conv4 = nn.Sequential(nn.Conv2d(384, 384, 3, 1, 1), *norm_and_relu(384, False))
        self.conv5 = nn.Sequential(nn.Conv2d(384, 256, 3, 1, 1), *norm_and_relu(256, False))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                zero_bias(module)

    def parts(self) -> list[list[nn.Module]]:
        """Return the modules of each stage, in the order in which they are applied."""
        return [[self.conv1], [self.conv2], [self.conv3, self.conv4, self.conv5]]


def zf(**options: Any) -> ZF:
    """Build the network of Zeiler and Fergus (https://arxiv.org/abs/1311.2901), without a classifier.

    Args:
        options: Keyword arguments of `ZF`. With `norm=None`, the first two convolutions are followed by local response
            normalization, as published. With "batch", "frozen" (batch normalization with constant statistics and
            weights) or "group" (32 groups, or fewer if a group would have fewer than two channels), every convolution
            is followed by that normalization.

    Returns:
        A `ZF` with randomly initialized parameters.

    Raises:
        ValueError: If `norm` is unknown.

    Example:
        >>> import torch, relops
        >>> maps = relops.models.zf(norm="group").stage_maps(torch.randn(1, 3, 64, 64))
        >>> [tuple(x.shape) for x in maps]
        [(1, 96, 32, 32), (1, 256, 8, 8), (1, 256, 4, 4)]
    """
    return ZF(**options)
