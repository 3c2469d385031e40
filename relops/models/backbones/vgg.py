"""VGG-16 (Simonyan & Zisserman, https://arxiv.org/abs/1409.1556), with torchvision's names of parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from relops.models.backbones.base import Chain
from relops.models.backbones.norm import make_norm
from relops.models.initialization import zero_bias

CONVS = (64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)


class VGG16(Chain):
    """Five stages of 3x3 convolutions, each behind the first after a maximum over 2x2.

    Args:
        num_classes: outputs of the classifier; None: no classifier, for detectors.
        norm: None as published, or what ResNet takes (torchvision's vgg16_bn is "batch").
        stages: so many there are; fewer than five for detectors that use no more.

    Input [N,3,H,W]; output [N,num_classes]. `stage_maps` gives conv1_2, conv2_2, conv3_3, conv4_3 and conv5_3, at
    strides 1 to 16: the last maximum (pool5) is the classifier's only. A state_dict of torchvision's loads as it is.
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
        """Modules that make each output of `stage_maps` of the one before, for freezing."""
        parts: list[list[nn.Module]] = [[]]
        for layer in self.features[:-1]:
            if isinstance(layer, nn.MaxPool2d):
                parts.append([])
            parts[-1].append(layer)
        return parts

    def forward(self, images: Tensor) -> Tensor:
        if self.classifier is None:
            raise TypeError("relops.models.VGG16: has no classifier (num_classes is None); its maps are in stage_maps")
        x = nn.functional.adaptive_avg_pool2d(self.features(images), 7)
        return self.classifier(torch.flatten(x, 1))


def vgg16(num_classes: int | None = 1000, **options: Any) -> VGG16:
    """VGG-16. Options are those of VGG16."""
    return VGG16(num_classes, **options)
