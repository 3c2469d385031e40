"""Backbones of detectors: a network's stage maps, made into the list of maps that a detector works on."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relops.models.lr_net import lr_net26, lr_net50
from relops.models.resnet import resnet18, resnet34, resnet50, resnet101
from relops.models.vgg import vgg16
from relops.models.zf import zf

NORM_SUFFIXES = {"bn": "batch", "frozen": "frozen", "gn": "group"}
BODIES: dict[str, Callable[..., nn.Module]] = {
    "lr_net26": lambda **options: lr_net26(None, **options),
    "lr_net50": lambda **options: lr_net50(None, **options),
    "vgg16": lambda **options: vgg16(None, **options),
    "zf": zf,
    "resnet18": lambda **options: resnet18(None, **options),
    "resnet34": lambda **options: resnet34(None, **options),
    "resnet50": lambda **options: resnet50(None, **options),
    "resnet101": lambda **options: resnet101(None, **options),
}


def make_body(name: str, frozen_stages: int = 0, **options: object) -> nn.Module:
    """A backbone network by name, without its classifier.

    Args:
        name: vgg16, zf, resnet18, resnet34, resnet50, resnet101, lr_net26 or lr_net50. All but the last two may have a
            normalization behind it, -bn, -frozen or -gn; ResNets and LR-Nets may have a width behind that, 64 where
            there is none, as in resnet18-gn-32 and lr_net26-32.
        frozen_stages: so many stages are not trained.
        options: of the network (`stages` and `dilated` of ResNets and LR-Nets).
    """
    found = re.fullmatch(rf"({'|'.join(BODIES)})(?:-({'|'.join(NORM_SUFFIXES)}))?(?:-(\d+))?", name)
    if not found:
        raise ValueError(
            f"relops.models: backbone must be one of {', '.join(BODIES)}, with -{', -'.join(NORM_SUFFIXES)} or "
            f"nothing behind it, and of a ResNet or LR-Net -WIDTH behind that, got {name!r}"
        )
    kind, norm, width = found.groups()
    if norm:
        options["norm"] = NORM_SUFFIXES[norm]
    if width:
        options["width"] = int(width)
    body = BODIES[kind](**options)
    for part in body.parts()[:frozen_stages]:
        for module in part:
            module.requires_grad_(False)
    return body


class StageBackbone(nn.Module):
    """Some stage maps as they are.

    Attributes:
        channels, strides: of the maps.
    """

    def __init__(self, body: nn.Module, stages: Sequence[int]) -> None:
        super().__init__()
        self.body = body
        self.stages = list(stages)
        self.channels = [body.channels[i] for i in stages]
        self.strides = [body.strides[i] for i in stages]

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.body.stage_maps(images)
        return [maps[i] for i in self.stages]


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
                nn.init.zeros_(module.bias)

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


class PyramidBackbone(nn.Module):
    """A ResNet's (or LR-Net's) four stages and their pyramid: maps at strides 4, 8, 16, 32 and 64."""

    def __init__(self, body: nn.Module, channels: int = 256) -> None:
        super().__init__()
        if len(body.channels) != 4:
            raise ValueError(f"relops.models: backbone must have four stages, got one of {len(body.channels)}")
        self.body = body
        self.fpn = FeaturePyramid(body.channels, channels)
        self.channels = [channels] * (len(body.channels) + 1)
        self.strides = [*body.strides, 2 * body.strides[-1]]

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.fpn(self.body.stage_maps(images))


class HyperBackbone(nn.Module):
    """HyperNet's fusion (Kong et al., https://arxiv.org/abs/1604.00600): three stages, brought to a stride of four.

    A finer map is reduced by a maximum, a coarser one enlarged by a transposed convolution; each then goes through a
    5x5 convolution to `width` channels and local response normalization, and all are concatenated: one map
    [N,3 * width,H/4,W/4].
    """

    STRIDE = 4

    def __init__(self, body: nn.Module, stages: Sequence[int], width: int = 42) -> None:
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
                scale = nn.ConvTranspose2d(channels, width, factor, factor)
                channels = width
            self.scale.append(scale)
            self.conv.append(nn.Conv2d(channels, width, 5, 1, 2))
        for module in (*self.scale, *self.conv):
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        self.norm = nn.LocalResponseNorm(5)
        self.channels, self.strides = [len(self.stages) * width], [self.STRIDE]

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.body.stage_maps(images)
        fused = [self.norm(F.relu(conv(scale(maps[i])))) for i, scale, conv in zip(self.stages, self.scale, self.conv)]
        # Stages of odd size come out larger by the rest.
        height, width = (min(x.shape[d] for x in fused) for d in (2, 3))
        return [torch.cat([x[..., :height, :width] for x in fused], 1)]
