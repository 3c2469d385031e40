"""ResNet (He et al., Deep Residual Learning, https://arxiv.org/abs/1512.03385), with torchvision's names of parameters.

As in torchvision the stride of a bottleneck is in its 3x3 convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from relops.models.backbones.base import Body
from relops.models.backbones.norm import make_norm


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, dilation, dilation, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, dilation, dilation, bias=False)
        self.bn2 = norm(width)
        self.downsample = shortcut(in_channels, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, out_channels, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def shortcut(in_channels: int, out_channels: int, stride: int, norm: Callable[[int], nn.Module]) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))


class ResNet(Body):
    """A stem that reduces images to a quarter, and four stages of which each but the first halves what it is given.

    Args:
        block: BasicBlock or Bottleneck.
        layers: blocks of each stage.
        num_classes: outputs of the classifier; None: no classifier, for detectors.
        norm: "batch", "frozen" (batch normalization with constant statistics and weights) or "group" (32 groups; fewer
            where they would be of one channel).
        dilated: the last stage keeps its size and dilates its 3x3 convolutions by two instead (R-FCN's stride of 16).
        stages: so many there are; fewer than four for detectors that use no more.
        width: channels of the stem, which all others are multiples of.

    Input [N,3,H,W]; output [N,num_classes]. `stage_maps` gives the outputs of the stages. Parameters have torchvision's
    names: a state_dict of its ResNets loads as it is (with "frozen", but for num_batches_tracked, which is dropped).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int | None = 1000,
        *,
        norm: str = "batch",
        dilated: bool = False,
        stages: int = 4,
        width: int = 64,
    ) -> None:
        super().__init__()
        make = make_norm(norm)
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = make(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = width
        self.channels: list[int] = []  # of the outputs of the stages
        self.strides = [4 * 2**stage for stage in range(stages)]
        if dilated:
            self.strides[-1] = self.strides[-2]
        for stage, count in enumerate(layers[:stages]):
            inner = width * 2**stage
            dilation = 2 if dilated and stage == stages - 1 else 1
            stride = 1 if stage == 0 or dilation > 1 else 2
            blocks = []
            for i in range(count):
                blocks.append(block(channels, inner, stride if i == 0 else 1, dilation, make))
                channels = inner * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            self.channels.append(channels)
        self.fc = None if num_classes is None else nn.Linear(channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He's normal distribution; each block begins as its shortcut, but for frozen normalization."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (BasicBlock, Bottleneck)):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                if isinstance(last.weight, nn.Parameter):
                    nn.init.zeros_(last.weight)

    def parts(self) -> list[list[nn.Module]]:
        """Modules that make each output of `stage_maps` of the one before, for freezing."""
        stages = [[self.get_submodule(f"layer{i + 1}")] for i in range(len(self.channels))]
        stages[0] = [self.conv1, self.bn1, *stages[0]]
        return stages

    def stage_maps(self, images: Tensor) -> list[Tensor]:
        """[N,channels[i],H / strides[i],W / strides[i]] of each stage, sizes rounded up."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = []
        for i in range(len(self.channels)):
            x = self.get_submodule(f"layer{i + 1}")(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        if self.fc is None:
            raise TypeError("relops.models.ResNet: has no classifier (num_classes is None); its maps are in stage_maps")
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(self.stage_maps(images)[-1], 1), 1))


def resnet18(num_classes: int | None = 1000, **options: Any) -> ResNet:
    """ResNet-18. Options are those of ResNet."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, **options)


def resnet34(num_classes: int | None = 1000, **options: Any) -> ResNet:
    """ResNet-34. Options are those of ResNet."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, **options)


def resnet50(num_classes: int | None = 1000, **options: Any) -> ResNet:
    """ResNet-50. Options are those of ResNet."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, **options)


def resnet101(num_classes: int | None = 1000, **options: Any) -> ResNet:
    """ResNet-101. Options are those of ResNet."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, **options)
