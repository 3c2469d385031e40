"""Functions that build bodies by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from relops.models.backbones.base import Body
from relops.models.backbones.lr_net import lr_net26, lr_net50
from relops.models.backbones.resnet import resnet18, resnet34, resnet50, resnet101
from relops.models.backbones.vgg import vgg16
from relops.models.backbones.zf import zf

NORM_SUFFIXES = {"bn": "batch", "frozen": "frozen", "gn": "group"}
BODIES: dict[str, Callable[..., Body]] = {
    "lr_net26": lambda **options: lr_net26(None, **options),
    "lr_net50": lambda **options: lr_net50(None, **options),
    "vgg16": lambda **options: vgg16(None, **options),
    "zf": zf,
    "resnet18": lambda **options: resnet18(None, **options),
    "resnet34": lambda **options: resnet34(None, **options),
    "resnet50": lambda **options: resnet50(None, **options),
    "resnet101": lambda **options: resnet101(None, **options),
}

# For each network, the options that it does not support. Both detectors and suffixes of the name set options.
UNSUPPORTED: dict[str, set[str]] = {
    "lr_net26": {"norm"},
    "lr_net50": {"norm"},
    "vgg16": {"dilated", "width"},
    "zf": {"dilated", "stages", "width"},
}


def make_body(name: str, frozen_stages: int = 0, **options: Any) -> Body:
    """Build a body by name, without a classifier.

    Args:
        name: "resnet18", "resnet34", "resnet50", "resnet101", "vgg16", "zf", "lr_net26" or "lr_net50". A ResNet, VGG-16
            or ZF accepts a suffix for the normalization: "-bn", "-frozen" or "-gn". A ResNet or LR-Net also accepts its
            width as the last suffix. The default width is 64. Examples are "resnet18-gn-32" and "lr_net26-32".
        frozen_stages: Number of stages that are not trained, counted from the first.
        options: Keyword arguments of the network, such as `stages` and `dilated` for ResNets and LR-Nets.

    Returns:
        The network with randomly initialized parameters.

    Raises:
        ValueError: If the name is unknown, or the network does not support one of the options.
    """
    match = re.fullmatch(rf"({'|'.join(BODIES)})(?:-({'|'.join(NORM_SUFFIXES)}))?(?:-(\d+))?", name)
    if not match:
        raise ValueError(
            f"relops.models: backbone must be one of {', '.join(BODIES)}, optionally followed by "
            f"-{', -'.join(NORM_SUFFIXES)} and, for a ResNet or LR-Net, by -WIDTH, got {name!r}"
        )
    kind, norm, width = match.groups()
    if norm:
        options["norm"] = NORM_SUFFIXES[norm]
    if width:
        options["width"] = int(width)
    unsupported = sorted(options.keys() & UNSUPPORTED.get(kind, set()))
    if unsupported:
        raise ValueError(
            f"relops.models: backbone must support {', '.join(unsupported)}, which {kind} does not, got {name!r}"
        )
    body = BODIES[kind](**options)
    for part in body.parts()[:frozen_stages]:
        for module in part:
            module.requires_grad_(False)
    return body
