"""ZF (Zeiler & Fergus, https://arxiv.org/abs/1311.2901), the small backbone of Faster R-CNN's paper: its five
convolutions, as the released detector has them, with local response normalization over three channels."""

from __future__ import annotations

from typing import Any

from torch import nn

from relops.models.backbones.base import Chain
from relops.models.backbones.norm import make_norm
from relops.models.initialization import zero_bias


class ZF(Chain):
    """Five convolutions to a stride of 16.

    Args:
        norm: None as published (local response normalization behind the first two convolutions), or what ResNet takes,
            behind each.

    Input [N,3,H,W]. `stage_maps` gives the outputs of conv1, conv2 and conv5, at strides 2, 8 and 16.
    """

    def __init__(self, *, norm: str | None = None) -> None:
        super().__init__()
        self.channels, self.strides = [96, 256, 256], [2, 8, 16]

        def behind(channels: int, response: bool) -> list[nn.Module]:
            if norm is not None:
                return [make_norm(norm)(channels), nn.ReLU(inplace=True)]
            relu: list[nn.Module] = [nn.ReLU(inplace=True)]
            return [*relu, nn.LocalResponseNorm(3, 5e-5, 0.75)] if response else relu

        pool = nn.MaxPool2d(3, 2, 1)
        self.conv1 = nn.Sequential(nn.Conv2d(3, 96, 7, 2, 3), *behind(96, True))
        self.conv2 = nn.Sequential(pool, nn.Conv2d(96, 256, 5, 2, 2), *behind(256, True))
        self.conv3 = nn.Sequential(pool, nn.Conv2d(256, 384, 3, 1, 1), *behind(384, False))
        self.conv4 = nn.Sequential(nn.Conv2d(384, 384, 3, 1, 1), *behind(384, False))
        self.conv5 = nn.Sequential(nn.Conv2d(384, 256, 3, 1, 1), *behind(256, False))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                zero_bias(module)

    def parts(self) -> list[list[nn.Module]]:
        """Modules that make each output of `stage_maps` of the one before, for freezing."""
        return [[self.conv1], [self.conv2], [self.conv3, self.conv4, self.conv5]]


def zf(**options: Any) -> ZF:
    """ZF. Options are those of ZF."""
    return ZF(**options)
