"""Feature Pyramid Network (Lin et al., https://arxiv.org/abs/1612.03144)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from relops.models.backbones.base import Backbone, Body
from relops.models.initialization import zero_bias


class FeaturePyramid(nn.Module):
    """Feature Pyramid Network (https://arxiv.org/abs/1612.03144), with the parameter names of torchvision.

    Args:
        in_channels: Number of channels Ci of each input map.
        channels: Number of channels of each output map.

    Example:
        >>> import torch
        >>> from relops.models.backbones.pyramid import FeaturePyramid
        >>> pyramid = FeaturePyramid(in_channels=[16, 32], channels=8)
        >>> maps = pyramid([torch.randn(1, 16, 20, 20), torch.randn(1, 32, 10, 10)])
        >>> [tuple(x.shape) for x in maps]
        [(1, 8, 20, 20), (1, 8, 10, 10), (1, 8, 5, 5)]
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
        """Compute a feature pyramid from the maps of a body.

        Args:
            maps: Maps [N,Ci,Hi,Wi] from fine to coarse.

        Returns:
            Maps [N,channels,Hi,Wi], followed by a map with half the height and width of the last one.
        """
        outputs: list[Tensor] = []
        coarser = None
        for x, inner, layer in reversed(list(zip(maps, self.inner_blocks, self.layer_blocks))):
            x = inner(x)
            if coarser is not None:
                x = x + F.interpolate(coarser, size=x.shape[-2:], mode="nearest")
            coarser = x
            outputs.insert(0, layer(x))
        return [*outputs, F.max_pool2d(outputs[-1], 1, 2)]


class PyramidBackbone(Backbone):
    """A ResNet or LR-Net with four stages, followed by a feature pyramid (https://arxiv.org/abs/1612.03144).

    Args:
        body: ResNet or LR-Net with four stages.
        channels: Number of channels of each output map.

    Raises:
        ValueError: If the body does not have four stages.

    Example:
        >>> import torch, relops
        >>> from relops.models.backbones.pyramid import PyramidBackbone
        >>> backbone = PyramidBackbone(relops.models.resnet18(num_classes=None, width=8), channels=16)
        >>> maps = backbone(torch.randn(1, 3, 64, 64))
        >>> [tuple(x.shape) for x in maps]
        [(1, 16, 16, 16), (1, 16, 8, 8), (1, 16, 4, 4), (1, 16, 2, 2), (1, 16, 1, 1)]
    """

    def __init__(self, body: Body, channels: int = 256) -> None:
        super().__init__()
        if len(body.channels) != 4:
            raise ValueError(f"relops.models: backbone must have four stages, got {len(body.channels)}")
        self.body = body
        self.fpn = FeaturePyramid(body.channels, channels)
        self.channels = [channels] * (len(body.channels) + 1)
        self.strides = [*body.strides, 2 * body.strides[-1]]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the feature pyramid of a batch of images.

        Args:
            images: Images [N,3,H,W].

        Returns:
            Five maps, with strides of 4, 8, 16, 32 and 64.
        """
        return self.fpn(self.body.stage_maps(images))
