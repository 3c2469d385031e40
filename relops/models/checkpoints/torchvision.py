"""Loading of weights from classifiers and from torchvision's detectors."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from relops.models.backbones.deformable import convert_plain_weights
from relops.models.backbones.norm import FrozenBatchNorm2d
from relops.models.detectors.base import BaseDetector
from relops.models.parts.roi_heads import TwoFC


def load_backbone(model: BaseDetector, state_dict: Mapping[str, Tensor]) -> None:
    """Load the weights of a classifier into the backbone of a detector.

    The fully connected layers fc6 and fc7 of a VGG-16 are also loaded into the head of the detector if the head has
    these layers. The weights of a plain ResNet can also be loaded into a ResNet with deformable convolutions, which
    then computes the same as the plain one until it is trained.

    Args:
        model: Detector.
        state_dict: Parameters of a classifier of relops or torchvision. Parameters that the detector does not have are
            ignored, except offset convolutions.

    Raises:
        ValueError: If a parameter is missing or has the wrong shape, or if a layer has an offset convolution in
            `state_dict` but not in the detector.

    Example:
        >>> import torch, relops
        >>> model = relops.models.faster_rcnn_fpn(3, backbone="resnet18-frozen-8", channels=16, hidden=32)
        >>> classifier = relops.models.resnet18(num_classes=10, width=8)
        >>> relops.models.load_backbone(model, classifier.state_dict())
        >>> torch.equal(model.backbone.body.conv1.weight, classifier.conv1.weight)
        True
    """
    state_dict = dict(state_dict)
    convert_plain_weights(model.backbone.body, state_dict)
    targets = {name: (name, value) for name, value in model.backbone.body.state_dict().items()}
    head = getattr(getattr(model, "roi_heads", None), "box_head", None)
    if "classifier.0.weight" in state_dict and isinstance(head, TwoFC):
        for layer, name in ((head.fc6, "classifier.0"), (head.fc7, "classifier.3")):
            targets |= {f"{name}.{x}": (f"{name}.{x}", value) for x, value in layer.state_dict().items()}
    for name in state_dict:
        weight = re.sub(r"(\.conv)?_offset\..*", ".weight", name)  # of the layer that the offset convolution is for
        if weight != name and weight in targets and name not in targets:
            raise ValueError(
                "relops.models: backbone must have deformable convolutions (-dcn or -dcnv2) in all layers that have "
                f"them in state_dict, got {name} for a plain convolution"
            )
    with torch.no_grad():
        for name, value in targets.values():
            if name not in state_dict:
                raise ValueError(f"relops.models: state_dict must have {name}, which the detector needs")
            if state_dict[name].shape != value.shape:
                raise ValueError(
                    f"relops.models: {name} of state_dict must be {list(value.shape)}, got "
                    f"{list(state_dict[name].shape)}"
                )
            value.copy_(state_dict[name])


def load_torchvision(model: nn.Module, state_dict: Mapping[str, Tensor], norm_eps: float | None = None) -> None:
    """Load a state_dict of torchvision's fasterrcnn_resnet50_fpn or maskrcnn_resnet50_fpn.

    State_dicts of all versions of torchvision can be loaded. Parameter names of older versions are translated, and all
    other names are the same in relops. The weights that torchvision publishes are loaded as follows::

        model = relops.models.faster_rcnn_fpn(90)
        state_dict = torch.load("fasterrcnn_resnet50_fpn_coco-258fb6c6.pth")
        relops.models.load_torchvision(model, state_dict, norm_eps=0.0)

    Args:
        model: Detector built by `relops.models.faster_rcnn_fpn` or `relops.models.mask_rcnn` with the same number of
            classes. relops does not count the background as a class, so a model for torchvision's COCO weights has 90
            classes.
        state_dict: Parameters of torchvision's detector. A state_dict of relops is also accepted.
        norm_eps: Epsilon of the frozen normalization layers in the backbone. Use 0 for torchvision's COCO_V1 weights,
            as torchvision itself does. None keeps 1e-5, which is correct for all other weights.

    Raises:
        RuntimeError: If a parameter is missing, unexpected or of the wrong shape.

    Example:
        >>> import torch, relops
        >>> options = dict(backbone="resnet18-frozen-8", channels=16, hidden=32)
        >>> model, trained = relops.models.faster_rcnn_fpn(3, **options), relops.models.faster_rcnn_fpn(3, **options)
        >>> relops.models.load_torchvision(model, trained.state_dict())
        >>> torch.equal(model.rpn.head.cls_logits.weight, trained.rpn.head.cls_logits.weight)
        True
    """
    renamed = {}
    for name, value in state_dict.items():
        for block in ("inner_blocks", "layer_blocks"):
            for i in range(4):
                name = name.replace(f"fpn.{block}.{i}.weight", f"fpn.{block}.{i}.0.weight")
                name = name.replace(f"fpn.{block}.{i}.bias", f"fpn.{block}.{i}.0.bias")
        for end in ("weight", "bias"):
            name = name.replace(f"rpn.head.conv.{end}", f"rpn.head.conv.0.0.{end}")
            for i in range(4):
                name = name.replace(f"mask_head.mask_fcn{i + 1}.{end}", f"mask_head.{i}.0.{end}")
        renamed[name] = value
    model.load_state_dict(renamed)
    if norm_eps is not None:
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.eps = norm_eps
