"""Backbones and detectors that are built from the operators of relops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from relops.models.backbones.lr_net import LRNet, lr_net26, lr_net50
from relops.models.backbones.resnet import ResNet, resnet18, resnet34, resnet50, resnet101
from relops.models.backbones.vgg import VGG16, vgg16
from relops.models.backbones.zf import ZF, zf
from relops.models.checkpoints.detr import load_detr
from relops.models.checkpoints.sparse_rcnn import load_sparse_rcnn
from relops.models.checkpoints.torchvision import load_backbone, load_torchvision
from relops.models.detectors.base import BaseDetector
from relops.models.detectors.cascade_rcnn import cascade_rcnn
from relops.models.detectors.deformable_detr import deformable_detr
from relops.models.detectors.detr import detr
from relops.models.detectors.fast_rcnn import fast_rcnn
from relops.models.detectors.faster_rcnn import faster_rcnn, faster_rcnn_fpn
from relops.models.detectors.hypernet import hypernet
from relops.models.detectors.mask_rcnn import mask_rcnn
from relops.models.detectors.r_fcn import r_fcn
from relops.models.detectors.relation_networks import relation_networks, relation_networks_fpn
from relops.models.detectors.sparse_rcnn import sparse_rcnn
from relops.models.inference import batch_images, detect
from relops.models.structures import Detections, Targets

#: The functions that build detectors, by the names that `build` and `python -m relops train --model` accept.
DETECTORS: dict[str, Callable[..., BaseDetector]] = {
    "fast_rcnn": fast_rcnn,
    "faster_rcnn": faster_rcnn,
    "faster_rcnn_fpn": faster_rcnn_fpn,
    "mask_rcnn": mask_rcnn,
    "cascade_rcnn": cascade_rcnn,
    "r_fcn": r_fcn,
    "hypernet": hypernet,
    "relation_networks": relation_networks,
    "relation_networks_fpn": relation_networks_fpn,
    "sparse_rcnn": sparse_rcnn,
    "detr": detr,
    "deformable_detr": deformable_detr,
}

__all__ = [
    "DETECTORS",
    "VGG16",
    "ZF",
    "Detections",
    "LRNet",
    "ResNet",
    "Targets",
    "batch_images",
    "build",
    "detect",
    "load_backbone",
    "load_detr",
    "load_sparse_rcnn",
    "load_torchvision",
    *DETECTORS,
    "lr_net26",
    "lr_net50",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "vgg16",
    "zf",
]


def build(name: str, num_classes: int, **options: Any) -> BaseDetector:
    """Build a detector by name.

    Args:
        name: A key of `relops.models.DETECTORS`: "fast_rcnn", "faster_rcnn", "faster_rcnn_fpn", "mask_rcnn",
            "cascade_rcnn", "r_fcn", "hypernet", "relation_networks", "relation_networks_fpn", "sparse_rcnn", "detr" or
            "deformable_detr".
        num_classes: Number of classes, without the background.
        options: Keyword arguments of the function `relops.models.<name>`, for example `backbone="resnet50-frozen"`.

    Returns:
        The detector, in training mode and with randomly initialized parameters.

    Raises:
        ValueError: If the name is unknown, or if the function that builds the detector rejects an option.

    Example:
        >>> import torch, relops
        >>> model = relops.models.build("faster_rcnn_fpn", 3, backbone="resnet18-frozen-8", channels=16, hidden=32)
        >>> detections = model.eval()(torch.randn(1, 3, 64, 64))
        >>> detections.boxes.shape
        torch.Size([1, 100, 4])
    """
    if name not in DETECTORS:
        raise ValueError(f"relops.models: model must be one of {', '.join(DETECTORS)}, got {name!r}")
    return DETECTORS[name](num_classes, **options)
