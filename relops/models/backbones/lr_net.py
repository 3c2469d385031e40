"""LR-Net (Hu et al., Local Relation Networks for Image Recognition, https://arxiv.org/abs/1904.11491).

A ResNet without convolutions beyond 1x1: local relation takes their place. Published are the totals, for images of 224:

    LR-Net-26   14.7 M parameters, 2.6 G multiply-adds, 75.7 % top-1 on ImageNet
    LR-Net-50   23.3 M parameters, 4.3 G multiply-adds, 77.3 %

What is here has 14.62 M, 2.59 G and 23.38 M, 4.24 G, where the multiply-adds are those of convolutions, of the
aggregation of values and of the classifier; similarities and softmax are not among them. The stem's groups are of one
channel each, instead of the other layers' eight: that is an assumption, without which it is 0.2 G less in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from relops.models.backbones.base import Body
from relops.nn.local_relation import LocalRelation


class LRBottleneck(nn.Module):
    """1x1, local relation, 1x1, each normalized, and a shortcut."""

    def __init__(
        self, in_channels: int, width: int, out_channels: int, stride: int, kernel_size: int, dilation: int = 1
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relation = LocalRelation(width, kernel_size, stride, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.relation(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class LRNet(Body):
    """A stem that reduces images to a quarter, and stages of which each but the first halves what it is given.

    Args:
        blocks: bottlenecks of each stage.
        widths: channels inside the bottlenecks of each stage.
        num_classes: outputs of the classifier; None: no classifier, for detectors.
        kernel_size: k of every local relation.
        in_channels: of images.
        stem_channels: of the stem.
        expansion: channels of a stage's output, per those of `stem_channels` * 2^stage.
        dilated: the last stage has no stride, and its windows are dilated instead.

    Input [N,in_channels,H,W], output [N,num_classes]. `stage_maps` gives the outputs of the stages, at strides 4, 8, ..
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int] = (100, 200, 400, 800),
        num_classes: int | None = 1000,
        *,
        kernel_size: int = 7,
        in_channels: int = 3,
        stem_channels: int = 64,
        expansion: int = 4,
        dilated: bool = False,
    ) -> None:
        super().__init__()
        if not blocks or len(blocks) != len(widths):
            raise ValueError(
                "relops.models.LRNet: blocks and widths must have one number for each stage, got "
                f"{list(blocks)} and {list(widths)}"
            )
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, stem_channels, 1, bias=False),
            nn.BatchNorm2d(stem_channels),
            nn.ReLU(inplace=True),
            LocalRelation(stem_channels, kernel_size, stride=2, channels_per_group=1, bias=False),
            nn.BatchNorm2d(stem_channels),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        self.stages = nn.ModuleList()
        self.channels: list[int] = []  # of the outputs of the stages
        channels = stem_channels
        for stage, (count, width) in enumerate(zip(blocks, widths)):
            out_channels = expansion * stem_channels * 2**stage
            dilation = 2 if dilated and stage == len(blocks) - 1 else 1
            layers = []
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 and dilation == 1 else 1
                layers.append(LRBottleneck(channels, width, out_channels, stride, kernel_size, dilation))
                channels = out_channels
            self.stages.append(nn.Sequential(*layers))
            self.channels.append(channels)
        self.strides = [4 * 2**stage for stage in range(len(blocks))]
        if dilated:
            self.strides[-1] //= 2
        self.fc = None if num_classes is None else nn.Linear(channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Of the blocks, as in ResNets: He's normal distribution, and each begins as its shortcut."""
        for module in self.modules():
            if isinstance(module, LRBottleneck):
                for conv in (module.conv1, module.relation.output, module.conv3):
                    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bn3.weight)

    def stage_maps(self, images: Tensor) -> list[Tensor]:
        """[N,channels[i],H / strides[i],W / strides[i]] of each stage, sizes rounded up."""
        x = self.stem(images)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs

    def parts(self) -> list[list[nn.Module]]:
        """Modules that make each output of `stage_maps` of the one before, for freezing."""
        stages = [[stage] for stage in self.stages]
        stages[0].insert(0, self.stem)
        return stages

    def forward(self, images: Tensor) -> Tensor:
        if self.fc is None:
            raise TypeError("relops.models.LRNet: has no classifier (num_classes is None); its maps are in stage_maps")
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(self.stage_maps(images)[-1], 1), 1))


def _lr_net(blocks: tuple[int, ...], num_classes: int | None, stages: int, width: int, **options: Any) -> LRNet:
    widths = [width * n // 64 for n in (100, 200, 400, 800)]
    return LRNet(blocks[:stages], widths[:stages], num_classes, stem_channels=width, **options)


def lr_net26(num_classes: int | None = 1000, *, stages: int = 4, width: int = 64, **options: Any) -> LRNet:
    """LR-Net-26: two bottlenecks a stage.

    Args:
        num_classes: as in LRNet.
        stages: how many of the stages there are.
        width: channels of the stem, 64 as published; those of the stages are in proportion.
        options: of LRNet.
    """
    return _lr_net((2, 2, 2, 2), num_classes, stages, width, **options)


def lr_net50(num_classes: int | None = 1000, *, stages: int = 4, width: int = 64, **options: Any) -> LRNet:
    """LR-Net-50: 3, 4, 6 and 3 bottlenecks a stage. Arguments are those of `lr_net26`."""
    return _lr_net((3, 4, 6, 3), num_classes, stages, width, **options)
