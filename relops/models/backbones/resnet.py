"""ResNet (Deep Residual Learning, https://arxiv.org/abs/1512.03385), with the parameter names of torchvision.

As in torchvision, the stride of a bottleneck is applied in its 3x3 convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from relops._checks import check_choice
from relops.models.backbones.base import Body
from relops.models.backbones.deformable import DEFORMABLE, begin_as_plain, convert_plain_weights, make_conv3x3
from relops.models.backbones.norm import make_norm
from relops.nn.deform_conv2d import DeformConvWithOffsets


class BasicBlock(nn.Module):
    """A residual block with two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        dilation: int,
        norm: Callable[[int], nn.Module],
        deformable: str | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = make_conv3x3(deformable, in_channels, width, stride, dilation)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = make_conv3x3(deformable, width, width, 1, dilation)
        self.bn2 = norm(width)
        self.downsample = shortcut(in_channels, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """A residual block with three convolutions (1x1, 3x3 and 1x1) and a shortcut."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        dilation: int,
        norm: Callable[[int], nn.Module],
        deformable: str | None = None,
    ) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = make_conv3x3(deformable, width, width, stride, dilation)
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
    """Build the projection of a shortcut, or return None if input and output have the same shape."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))


class ResNet(Body):
    """ResNet for image classification (https://arxiv.org/abs/1512.03385).

    The stem reduces the height and width of the images to a quarter, and each stage except the first halves them again.
    Parameters have the names of torchvision, so a state_dict of torchvision's ResNets can be loaded unchanged. With
    `norm="frozen"`, the num_batches_tracked entries of the state_dict are ignored.

    With `deformable`, the parameters of a deformable convolution have the names of mmcv: weight, conv_offset.weight and
    conv_offset.bias. The network initially has no offsets and computes the same as a plain network. A state_dict of a
    plain ResNet, which has no conv_offset entries, can also be loaded. The offsets then begin at zero. For v2, whose
    masks begin at 0.5, the weights of the deformable convolutions are doubled, so the network again computes the same
    as the plain one.

    Args:
        block: BasicBlock or Bottleneck from relops.models.backbones.resnet.
        layers: Number of blocks in each stage.
        num_classes: Number of outputs of the classifier. None omits the classifier, which detectors do not need.
        norm: Normalization: "batch", "frozen" (batch normalization with constant statistics and weights) or "group" (32
            groups, or fewer if a group would have fewer than two channels).
        dilated: If True, the last stage has a stride of 1 instead of 2, and its 3x3 convolutions are dilated by two.
            R-FCN uses this option to keep a stride of 16.
        stages: Number of stages, at most 4. Detectors omit the stages whose maps they do not need.
        width: Number of channels of the stem. The widths of all other layers are multiples of this number.
        deformable: "v1" replaces the 3x3 convolutions of the last stage with deformable convolutions with four offset
            groups (https://arxiv.org/abs/1703.06211). "v2" replaces those of all stages except the first with modulated
            deformable convolutions (https://arxiv.org/abs/1811.11168). A BasicBlock has two 3x3 convolutions, and a
            Bottleneck has one. None keeps plain convolutions.

    Attributes:
        channels: Number of channels of each stage's map.
        strides: Stride of each stage's map: 4, 8, ...

    Raises:
        ValueError: If `norm` or `deformable` is unknown.

    Example:
        >>> import torch, relops
        >>> from relops.models.backbones.resnet import BasicBlock
        >>> model = relops.models.ResNet(BasicBlock, layers=(1, 1, 1, 1), num_classes=10, width=8)
        >>> out = model(torch.randn(1, 3, 64, 64))
        >>> out.shape
        torch.Size([1, 10])
        >>> maps = model.stage_maps(torch.randn(1, 3, 64, 64))
        >>> [tuple(x.shape) for x in maps]
        [(1, 8, 16, 16), (1, 16, 8, 8), (1, 32, 4, 4), (1, 64, 2, 2)]
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
        deformable: str | None = None,
    ) -> None:
        super().__init__()
        norm_layer = make_norm(norm)
        if deformable is not None:
            check_choice("models", "deformable", deformable, DEFORMABLE)
        first_deformable = {None: stages, "v1": stages - 1, "v2": 1}[deformable]
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = width
        self.channels: list[int] = []  # number of output channels of each stage
        self.strides = [4 * 2**stage for stage in range(stages)]
        if dilated:
            self.strides[-1] = self.strides[-2]
        for stage, count in enumerate(layers[:stages]):
            inner = width * 2**stage
            dilation = 2 if dilated and stage == stages - 1 else 1
            stride = 1 if stage == 0 or dilation > 1 else 2
            blocks = []
            for i in range(count):
                version = deformable if stage >= first_deformable else None
                blocks.append(block(channels, inner, stride if i == 0 else 1, dilation, norm_layer, version))
                channels = inner * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            self.channels.append(channels)
        self.fc = None if num_classes is None else nn.Linear(channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the parameters.

        Weights of convolutions are drawn from He's normal distribution. Unless the normalization is frozen, the weight
        of the last normalization in each block is 0, so the block initially computes only its shortcut. Deformable
        convolutions begin as plain ones.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, DeformConvWithOffsets)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (BasicBlock, Bottleneck)):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                if isinstance(last.weight, nn.Parameter):
                    nn.init.zeros_(last.weight)
        for module in self.modules():
            if isinstance(module, DeformConvWithOffsets):
                begin_as_plain(module)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        convert_plain_weights(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def parts(self) -> list[list[nn.Module]]:
        """Return the modules of each stage, in the order in which they are applied."""
        stages = [[self.get_submodule(f"layer{i + 1}")] for i in range(len(self.channels))]
        stages[0] = [self.conv1, self.bn1, *stages[0]]
        return stages

    def stage_maps(self, images: Tensor) -> list[Tensor]:
        """Return the feature map of each stage.

        Args:
            images: Images [N,3,H,W].

        Returns:
            Maps [N,channels[i],H / strides[i],W / strides[i]], with sizes rounded up.
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = []
        for i in range(len(self.channels)):
            x = self.get_submodule(f"layer{i + 1}")(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: Images [N,3,H,W].

        Returns:
            Logits [N,num_classes].

        Raises:
            TypeError: If the network has no classifier (`num_classes` is None).
        """
        if self.fc is None:
            raise TypeError("relops.models.ResNet: forward needs a classifier, got num_classes=None; use stage_maps")
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(self.stage_maps(images)[-1], 1), 1))


def resnet18(num_classes: int | None = 1000, **options: Any) -> ResNet:
    """Build ResNet-18 (https://arxiv.org/abs/1512.03385).

    Parameters have the names of torchvision, so a state_dict of torchvision's resnet18 can be loaded unchanged.

    Args:
        num_classes: Number of outputs of the classifier. None omits the classifier, which detectors do not need.
        options: Keyword arguments of `ResNet`. `norm` is "batch", "frozen" (batch normalization with constant
            statistics and weights) or "group" (32 groups, or fewer if a group would have fewer than two channels); the
            default is "batch". `dilated=True` replaces the stride of the last stage with dilation. `stages` is the
            number of stages (4 by default), and `width` is the number of channels of the stem (64 by default).
            `deformable` is "v1" or "v2" for deformable convolutions, and None by default.

    Returns:
        A `ResNet` with randomly initialized parameters.

    Raises:
        ValueError: If `norm` or `deformable` is unknown.

    Example:
        >>> import torch, relops
        >>> model = relops.models.resnet18(num_classes=10, width=8)
        >>> out = model(torch.randn(1, 3, 64, 64))
        >>> out.shape
        torch.Size([1, 10])
        >>> maps = model.stage_maps(torch.randn(1, 3, 64, 64))
        >>> maps[-1].shape
        torch.Size([1, 64, 2, 2])
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, **options)


def resnet34(num_classes: int | None = 1000, **options: Any) -> ResNet:
    """Build ResNet-34 (https://arxiv.org/abs/1512.03385).

    Parameters have the names of torchvision, so a state_dict of torchvision's resnet34 can be loaded unchanged.

    Args:
        num_classes: Number of outputs of the classifier. None omits the classifier, which detectors do not need.
        options: Keyword arguments of `ResNet`. `norm` is "batch", "frozen" (batch normalization with constant
            statistics and weights) or "group" (32 groups, or fewer if a group would have fewer than two channels); the
            default is "batch". `dilated=True` replaces the stride of the last stage with dilation. `stages` is the
            number of stages (4 by default), and `width` is the number of channels of the stem (64 by default).
            `deformable` is "v1" or "v2" for deformable convolutions, and None by default.

    Returns:
        A `ResNet` with randomly initialized parameters.

    Raises:
        ValueError: If `norm` or `deformable` is unknown.

    Example:
        >>> import torch, relops
        >>> model = relops.models.resnet34(num_classes=10, width=8)
        >>> out = model(torch.randn(1, 3, 64, 64))
        >>> out.shape
        torch.Size([1, 10])
        >>> maps = model.stage_maps(torch.randn(1, 3, 64, 64))
        >>> maps[-1].shape
        torch.Size([1, 64, 2, 2])
    """
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, **options)


def resnet50(num_classes: int | None = 1000, **options: Any) -> ResNet:
    """Build ResNet-50 (https://arxiv.org/abs/1512.03385).

    Parameters have the names of torchvision, so a state_dict of torchvision's resnet50 can be loaded unchanged.

    Args:
        num_classes: Number of outputs of the classifier. None omits the classifier, which detectors do not need.
        options: Keyword arguments of `ResNet`. `norm` is "batch", "frozen" (batch normalization with constant
            statistics and weights) or "group" (32 groups, or fewer if a group would have fewer than two channels); the
            default is "batch". `dilated=True` replaces the stride of the last stage with dilation. `stages` is the
            number of stages (4 by default), and `width` is the number of channels of the stem (64 by default).
            `deformable` is "v1" or "v2" for deformable convolutions, and None by default.

    Returns:
        A `ResNet` with randomly initialized parameters.

    Raises:
        ValueError: If `norm` or `deformable` is unknown.

    Example:
        >>> import torch, relops
        >>> model = relops.models.resnet50(num_classes=10, width=8)
        >>> out = model(torch.randn(1, 3, 64, 64))
        >>> out.shape
        torch.Size([1, 10])
        >>> maps = model.stage_maps(torch.randn(1, 3, 64, 64))
        >>> maps[-1].shape
        torch.Size([1, 256, 2, 2])
    """
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, **options)


def resnet101(num_classes: int | None = 1000, **options: Any) -> ResNet:
    """Build ResNet-101 (https://arxiv.org/abs/1512.03385).

    Parameters have the names of torchvision, so a state_dict of torchvision's resnet101 can be loaded unchanged.

    Args:
        num_classes: Number of outputs of the classifier. None omits the classifier, which detectors do not need.
        options: Keyword arguments of `ResNet`. `norm` is "batch", "frozen" (batch normalization with constant
            statistics and weights) or "group" (32 groups, or fewer if a group would have fewer than two channels); the
            default is "batch". `dilated=True` replaces the stride of the last stage with dilation. `stages` is the
            number of stages (4 by default), and `width` is the number of channels of the stem (64 by default).
            `deformable` is "v1" or "v2" for deformable convolutions, and None by default.

    Returns:
        A `ResNet` with randomly initialized parameters.

    Raises:
        ValueError: If `norm` or `deformable` is unknown.

    Example:
        >>> import torch, relops
        >>> model = relops.models.resnet101(num_classes=10, width=8)
        >>> out = model(torch.randn(1, 3, 64, 64))
        >>> out.shape
        torch.Size([1, 10])
        >>> maps = model.stage_maps(torch.randn(1, 3, 64, 64))
        >>> maps[-1].shape
        torch.Size([1, 256, 2, 2])
    """
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, **options)
