"""VGG-16 (https://arxiv.org/abs/1409.1556), with the parameter names of torchvision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from relops.models.backbones.base import Chain
from relops.models.backbones.norm import make_norm
from relops.models.initialization import zero_bias

CONVS = (64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)


class VGG16(Chain):
    """VGG-16 for image classification (https://arxiv.org/abs/1409.1556).

    The network has five stages of 3x3 convolutions, with 2x2 max pooling between the stages. `stage_maps` returns the
    maps of conv1_2, conv2_2, conv3_3, conv4_3 and conv5_3, with strides of 1, 2, 4, 8 and 16. Only the classifier uses
    the last max pooling (pool5). Parameters have the names of torchvision, so a state_dict of torchvision's vgg16 can
    be loaded unchanged. With `norm="batch"`, the same holds for vgg16_bn.

    Args:
        num_classes: Number of outputs of the classifier. None omits the classifier, which detectors do not need.
        norm: Normalization after each convolution: None (as published), "batch", "frozen" (batch normalization with
            constant statistics and weights) or "group" (32 groups, or fewer if a group would have fewer than two
            channels).
        stages: Number of stages, at most 5. Detectors omit the stages whose maps they do not need.

    Attributes:
        channels: Number of channels of each stage's map.
        strides: Stride of each stage's map: 1, 2, ...

    Raises:
        ValueError: If `norm` is unknown.

    Example:
        >>> import torch, relops
        >>> model = relops.models.VGG16(num_classes=None, stages=3)
        >>> maps = model.stage_maps(torch.randn(1, 3, 32, 32))
        >>> [tuple(x.shape) for x in maps]
        [(1, 64, 32, 32), (1, 128, 16, 16), (1, 256, 8, 8)]
    """

    def __init__(self, num_classes: int | None = 1000, *, norm: str | None = None, stages: int = 5) -> None:
        super().__init__()
        self.channels = [stage[-1] for stage in CONVS[:stages]]
        self.strides = [2**stage for stage in range(stages)]
        layers: list[nn.Module] = []
        channels = 3
        for stage in CONVS[:stages]:
            for width in stage:
                layers.append(nn.Conv2d(channels, width, 3, 1, 1))
                if norm is not None:
                    layers.append(make_norm(norm)(width))
                layers.append(nn.ReLU(inplace=True))
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = None
        if num_classes is not None:
            self.classifier = nn.Sequential(
                nn.Linear(512 * 7 * 7, 4096),
                nn.ReLU(inplace=True),
                nn.Dropout(),
                nn.Linear(4096, 4096),
                nn.ReLU(inplace=True),
                nn.Dropout(),
                nn.Linear(4096, num_classes),
            )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                zero_bias(module)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                zero_bias(module)

    def parts(self) -> list[list[nn.Module]]:
        """Return the modules of each stage, in the order in which they are applied."""
        parts: list[list[nn.Module]] = [[]]
        for layer in self.features[:-1]:
            if isinstance(layer, nn.MaxPool2d):
                parts.append([])
            parts[-1].append(layer)
        return parts

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: Images [N,3,H,W].

        Returns:
            Logits [N,num_classes].

        Raises:
            TypeError: If the network has no classifier (`num_classes` is None).
        """
        if self.classifier is None:
            raise TypeError("relops.models.VGG16: forward needs a classifier, got num_classes=None; use stage_maps")
        x = nn.functional.adaptive_avg_pool2d(self.features(images), 7)
        return self.classifier(torch.flatten(x, 1))


def vgg16(num_classes: int | None = 1000, **options: Any) -> VGG16:
    """Build VGG-16 (https://arxiv.org/abs/1409.1556).

    Parameters have the names of torchvision, so a state_dict of torchvision's vgg16 can be loaded unchanged. With
    `norm="batch"`, the same holds for vgg16_bn.

    Args:
        num_classes: Number of outputs of the classifier. None omits the classifier, which detectors do not need.
        options: Keyword arguments of `VGG16`. `norm` is None (as published), "batch", "frozen" (batch normalization
            with constant statistics and weights) or "group" (32 groups, or fewer if a group would have fewer than two
            channels). `stages` is the number of stages, 5 by default.

    Returns:
        A `VGG16` with randomly initialized parameters.

    Raises:
        ValueError: If `norm` is unknown.

    Example:
        >>> import torch, relops
        >>> model = relops.models.vgg16(num_classes=None, norm="frozen", stages=3)
        >>> maps = model.stage_maps(torch.randn(1, 3, 32, 32))
        >>> [tuple(x.shape) for x in maps]
        [(1, 64, 32, 32), (1, 128, 16, 16), (1, 256, 8, 8)]
    """
    return VGG16(num_classes, **options)
