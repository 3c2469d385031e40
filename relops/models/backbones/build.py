"""Functions that build bodies by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from relops.models.backbones.base import Body
from relops.models.backbones.lr_net import LRNet, lr_net26, lr_net50
from relops.models.backbones.resnet import ResNet, resnet18, resnet34, resnet50, resnet101
from relops.models.backbones.vgg import VGG16, vgg16
from relops.models.backbones.zf import ZF, zf

NORM_SUFFIXES = {"bn": "batch", "frozen": "frozen", "gn": "group"}
DEFORMABLE_SUFFIXES = {"dcn": "v1", "dcnv2": "v2"}
# The factory and the class of each network. The parameters of both are the options that the network supports.
BODIES: dict[str, tuple[Callable[..., Body], type[Body]]] = {
    "lr_net26": (lr_net26, LRNet),
    "lr_net50": (lr_net50, LRNet),
    "vgg16": (vgg16, VGG16),
    "zf": (zf, ZF),
    "resnet18": (resnet18, ResNet),
    "resnet34": (resnet34, ResNet),
    "resnet50": (resnet50, ResNet),
    "resnet101": (resnet101, ResNet),
}


def make_body(name: str, frozen_stages: int = 0, **options: Any) -> Body:
    """Build a body by name, without a classifier.

    Args:
        name: "resnet18", "resnet34", "resnet50", "resnet101", "vgg16", "zf", "lr_net26" or "lr_net50". A ResNet, VGG-16
            or ZF accepts a suffix for the normalization: "-bn", "-frozen" or "-gn". The next suffix of a ResNet can be
            "-dcn" for deformable convolutions in its last stage, or "-dcnv2" for modulated deformable convolutions in
            all stages except the first. A ResNet or LR-Net also accepts its width as the last suffix. The default width
            is 64. Examples are "resnet18-gn-32", "resnet101-frozen-dcn", "resnet18-gn-dcnv2-32" and "lr_net26-32".
        frozen_stages: Number of stages that are not trained, counted from the first.
        options: Keyword arguments of the network, such as `stages` and `dilated` for ResNets and LR-Nets.

    Returns:
        The network with randomly initialized parameters.

    Raises:
        ValueError: If the name is unknown, or the network does not support one of the options.
    """
    bodies, norms, versions = ("|".join(x) for x in (BODIES, NORM_SUFFIXES, DEFORMABLE_SUFFIXES))
    match = re.fullmatch(rf"({bodies})(?:-({norms}))?(?:-({versions}))?(?:-(\d+))?", name)
    if not match:
        raise ValueError(
            f"relops.models: backbone must be one of {', '.join(BODIES)}, optionally followed by "
            f"-{', -'.join(NORM_SUFFIXES)}, then, for a ResNet, by -{', -'.join(DEFORMABLE_SUFFIXES)}, and then, for a "
            f"ResNet or LR-Net, by -WIDTH, got {name!r}"
        )
    kind, norm, version, width = match.groups()
    if norm:
        options["norm"] = NORM_SUFFIXES[norm]
    if version:
        options["deformable"] = DEFORMABLE_SUFFIXES[version]
    if width:
        options["width"] = int(width)
    factory, network = BODIES[kind]
    supported = inspect.signature(factory).parameters.keys() | inspect.signature(network).parameters.keys()
    unsupported = sorted(options.keys() - supported)
    if unsupported:
        raise ValueError(
            f"relops.models: backbone must support {', '.join(unsupported)}, which {kind} does not, got {name!r}"
        )
    if "num_classes" in supported:
        options["num_classes"] = None  # no classifier
    body = factory(**options)
    for part in body.parts()[:frozen_stages]:
        for module in part:
            module.requires_grad_(False)
    return body
