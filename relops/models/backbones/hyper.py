"""The fused map of HyperNet (Kong et al., https://arxiv.org/abs/1604.00600)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relops.models.backbones.base import Backbone, Body
from relops.models.initialization import zero_bias


class HyperBackbone(Backbone):
    """HyperNet's fusion (Kong et al., https://arxiv.org/abs/1604.00600): three stages, brought to a stride of four.

    A finer map is reduced by a maximum, a coarser one enlarged by a transposed convolution; each then goes through a
    5x5 convolution to 42 channels and local response normalization, and all are concatenated: one map
    [N,126,H/4,W/4].
    """

    STRIDE = 4
    WIDTH = 42  # channels of each stage

    def __init__(self, body: Body, stages: Sequence[int]) -> None:
        super().__init__()
        self.body = body
        self.stages = list(stages)
        self.scale = nn.ModuleList()
        self.conv = nn.ModuleList()
        for i in stages:
            channels, stride = body.channels[i], body.strides[i]
            scale: nn.Module = nn.Identity()
            if stride < self.STRIDE:
                scale = nn.MaxPool2d(self.STRIDE // stride)
            elif stride > self.STRIDE:
                factor = stride // self.STRIDE
                scale = nn.ConvTranspose2d(channels, self.WIDTH, factor, factor)
                channels = self.WIDTH
            self.scale.append(scale)
            self.conv.append(nn.Conv2d(channels, self.WIDTH, 5, 1, 2))
        for module in (*self.scale, *self.conv):
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                zero_bias(module)
        self.norm = nn.LocalResponseNorm(5)
        self.channels, self.strides = [len(self.stages) * self.WIDTH], [self.STRIDE]

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.body.stage_maps(images)
        fused = [self.norm(F.relu(conv(scale(maps[i])))) for i, scale, conv in zip(self.stages, self.scale, self.conv)]
        # Stages of odd size come out larger by the rest.
        height, width = (min(x.shape[d] for x in fused) for d in (2, 3))
        return [torch.cat([x[..., :height, :width] for x in fused], 1)]
