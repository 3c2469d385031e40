"""LR-Net (Local Relation Networks for Image Recognition, https://arxiv.org/abs/1904.11491).

LR-Net is a ResNet in which local relation layers replace all convolutions larger than 1x1. The published totals for
images of 224 x 224 pixels are::

    LR-Net-26   14.7 M parameters, 2.6 G multiply-adds, 75.7 % top-1 accuracy on ImageNet
    LR-Net-50   23.3 M parameters, 4.3 G multiply-adds, 77.3 %

In this implementation, LR-Net-26 has 14.62 M parameters and 2.59 G multiply-adds, and LR-Net-50 has 23.38 M parameters
and 4.24 G multiply-adds. These multiply-adds include the convolutions, the aggregation of values and the classifier,
but neither the similarities nor the softmax. The local relation layer of the stem has one channel per group, whereas
all other layers have eight. The single channel per group in the stem is an assumption. With eight channels per group,
both networks would have 0.2 G fewer multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from relops.models.backbones.base import Body
from relops.nn.local_relation import LocalRelation


class LRBottleneck(nn.Module):
    """A residual block with a 1x1 convolution, a local relation layer, a 1x1 convolution and a shortcut."""

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
    """Local Relation Network for image classification (https://arxiv.org/abs/1904.11491).

    The stem reduces the height and width of the images to a quarter, and each stage except the first halves them again.

    Args:
        blocks: Number of bottlenecks in each stage.
        widths: Number of channels inside the bottlenecks of each stage.
        num_classes: Number of outputs of the classifier. None omits the classifier, which detectors do not need.
        kernel_size: Side length k of the windows in all local relation layers.
        in_channels: Number of channels of the images.
        stem_channels: Number of channels of the stem.
        expansion: Stage i, counted from 0, has expansion * stem_channels * 2^i output channels.
        dilated: If True, the last stage has a stride of 1 instead of 2, and its windows are dilated by two.

    Attributes:
        channels: Number of channels of each stage's map.
        strides: Stride of each stage's map: 4, 8, ...

    Raises:
        ValueError: If `blocks` and `widths` do not have the same length, or are empty.

    Example:
        >>> import torch, relops
        >>> model = relops.models.LRNet(blocks=(1, 1), widths=(16, 32), num_classes=10, stem_channels=8)
        >>> out = model(torch.randn(1, 3, 32, 32))
        >>> out.shape
        torch.Size([1, 10])
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
        self.channels: list[int] = []  # number of output channels of each stage
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
        """Initialize the blocks as in ResNets.

        Weights of convolutions are drawn from He's normal distribution. The weight of the last normalization in each
        block is 0, so the block initially computes only its shortcut.
        """
        for module in self.modules():
            if isinstance(module, LRBottleneck):
                for conv in (module.conv1, module.relation.output, module.conv3):
                    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bn3.weight)

    def stage_maps(self, images: Tensor) -> list[Tensor]:
        """Return the feature map of each stage.

        Args:
            images: Images [N,in_channels,H,W].

        Returns:
            Maps [N,channels[i],H / strides[i],W / strides[i]], with sizes rounded up.
        """
        x = self.stem(images)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs

    def parts(self) -> list[list[nn.Module]]:
        """Return the modules of each stage, in the order in which they are applied."""
        stages = [[stage] for stage in self.stages]
        stages[0].insert(0, self.stem)
        return stages

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: Images [N,in_channels,H,W].

        Returns:
            Logits [N,num_classes].

        Raises:
            TypeError: If the network has no classifier (`num_classes` is None).
        """
        if self.fc is None:
            raise TypeError("relops.models.LRNet: forward needs a classifier, got num_classes=None; use stage_maps")
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(self.stage_maps(images)[-1], 1), 1))


def _lr_net(blocks: tuple[int, ...], num_classes: int | None, stages: int, width: int, **options: Any) -> LRNet:
    """Build an LR-Net whose stage widths are proportional to the width of the stem."""
    widths = [width * n // 64 for n in (100, 200, 400, 800)]
    return LRNet(blocks[:stages], widths[:stages], num_classes, stem_channels=width, **options)


def lr_net26(num_classes: int | None = 1000, *, stages: int = 4, width: int = 64, **options: Any) -> LRNet:
    """Build LR-Net-26 (https://arxiv.org/abs/1904.11491), which has two bottlenecks per stage.

    Args:
        num_classes: Number of outputs of the classifier. None omits the classifier, which detectors do not need.
        stages: Number of stages, at most 4. Detectors omit the stages whose maps they do not need.
        width: Number of channels of the stem, 64 in the paper. The widths of the stages are proportional to this
            number.
        options: Further keyword arguments of `LRNet`: `kernel_size` (side length of the windows, 7 by default),
            `in_channels` (number of channels of the images, 3 by default), `expansion` (4 by default) and `dilated`
            (False by default).

    Returns:
        An `LRNet` with randomly initialized parameters.

    Example:
        >>> import torch, relops
        >>> model = relops.models.lr_net26(num_classes=10, stages=2, width=16)
        >>> out = model(torch.randn(1, 3, 32, 32))
        >>> out.shape
        torch.Size([1, 10])
    """
    return _lr_net((2, 2, 2, 2), num_classes, stages, width, **options)


def lr_net50(num_classes: int | None = 1000, *, stages: int = 4, width: int = 64, **options: Any) -> LRNet:
    """Build LR-Net-50 (https://arxiv.org/abs/1904.11491), which has 3, 4, 6 and 3 bottlenecks in its stages.

    Args:
        num_classes: Number of outputs of the classifier. None omits the classifier, which detectors do not need.
        stages: Number of stages, at most 4. Detectors omit the stages whose maps they do not need.
        width: Number of channels of the stem, 64 in the paper. The widths of the stages are proportional to this
            number.
        options: Further keyword arguments of `LRNet`: `kernel_size` (side length of the windows, 7 by default),
            `in_channels` (number of channels of the images, 3 by default), `expansion` (4 by default) and `dilated`
            (False by default).

    Returns:
        An `LRNet` with randomly initialized parameters.

    Example:
        >>> import torch, relops
        >>> model = relops.models.lr_net50(num_classes=10, stages=2, width=16)
        >>> out = model(torch.randn(1, 3, 32, 32))
        >>> out.shape
        torch.Size([1, 10])
    """
    return _lr_net((3, 4, 6, 3), num_classes, stages, width, **options)
