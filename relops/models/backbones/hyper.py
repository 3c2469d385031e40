"""The backbone of HyperNet (Kong et al., https://arxiv.org/abs/1604.00600)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relops.models.backbones.base import Backbone, Body
from relops.models.initialization import zero_bias


class HyperBackbone(Backbone):
    """The backbone of HyperNet (https://arxiv.org/abs/1604.00600), which combines the maps of several stages into one.

    A map with a stride below 4 is reduced by max pooling, and a map with a stride above 4 is enlarged by a transposed
    convolution. Each map then goes through a 5x5 convolution to 42 channels, a ReLU and local response normalization.
    Finally, all maps are concatenated.

    Args:
        body: Network that computes the maps.
        stages: Indices of the stages that are combined. HyperNet combines three stages.

    Example:
        >>> import torch, relops
        >>> from relops.models.backbones.hyper import HyperBackbone
        >>> backbone = HyperBackbone(relops.models.vgg16(num_classes=None), stages=[0, 2, 4])
        >>> maps = backbone(torch.randn(1, 3, 32, 64))
        >>> [x.shape for x in maps]
        [torch.Size([1, 126, 8, 16])]
    """

    STRIDE = 4
    WIDTH = 42  # number of output channels per stage

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
        """Compute the fused map of a batch of images.

        Args:
            images: Images [N,3,H,W].

        Returns:
            A list with one map [N,42 * S,H/4,W/4] for S stages.
        """
        maps = self.body.stage_maps(images)
        fused = [self.norm(F.relu(conv(scale(maps[i])))) for i, scale, conv in zip(self.stages, self.scale, self.conv)]
        # The sizes of maps are rounded up, so an enlarged map can be larger than the other maps.
        height, width = (min(x.shape[d] for x in fused) for d in (2, 3))
        return [torch.cat([x[..., :height, :width] for x in fused], 1)]
