"""Feature Pyramid Network (Lin et al., https://arxiv.org/abs/1612.03144)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from relops.models.backbones.base import Backbone, Body
from relops.models.initialization import zero_bias


class FeaturePyramid(nn.Module):
    """Feature Pyramid Network (Lin et al., https://arxiv.org/abs/1612.03144), with torchvision's names of parameters.

    Maps [N,Ci,Hi,Wi] from fine to coarse become as many [N,channels,Hi,Wi] and one at half the last one's size.
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256) -> None:
        super().__init__()
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(c, channels, 1)) for c in in_channels)
        self.layer_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1)) for _ in in_channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                zero_bias(module)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        outputs: list[Tensor] = []
        above = None
        for x, inner, layer in reversed(list(zip(maps, self.inner_blocks, self.layer_blocks))):
            x = inner(x)
            if above is not None:
                x = x + F.interpolate(above, size=x.shape[-2:], mode="nearest")
            above = x
            outputs.insert(0, layer(x))
        return [*outputs, F.max_pool2d(outputs[-1], 1, 2)]


class PyramidBackbone(Backbone):
    """A ResNet's (or LR-Net's) four stages and their pyramid: maps at strides 4, 8, 16, 32 and 64."""

    def __init__(self, body: Body, channels: int = 256) -> None:
        super().__init__()
        if len(body.channels) != 4:
            raise ValueError(f"relops.models: backbone must have four stages, got one of {len(body.channels)}")
        self.body = body
        self.fpn = FeaturePyramid(body.channels, channels)
        self.channels = [channels] * (len(body.channels) + 1)
        self.strides = [*body.strides, 2 * body.strides[-1]]

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.fpn(self.body.stage_maps(images))
