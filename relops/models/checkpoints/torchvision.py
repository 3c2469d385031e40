"""Loading of weights under torchvision's names: those of classifiers, and of its detectors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from relops.models.backbones.norm import FrozenBatchNorm2d
from relops.models.detectors.base import BaseDetector
from relops.models.parts.roi_heads import TwoFC


def load_backbone(model: BaseDetector, state_dict: Mapping[str, Tensor]) -> None:
    """Load the weights of a classifier into a detector's backbone, and fc6 and fc7 of a VGG-16 into its head.

    Args:
        model: a detector.
        state_dict: of the classifier, torchvision's or ours; what the detector does not have is left out.

    Raises:
        ValueError: a parameter that is missing, or of another shape.
    """
    targets = {name: (name, value) for name, value in model.backbone.body.state_dict().items()}
    head = getattr(getattr(model, "roi_heads", None), "box_head", None)
    if "classifier.0.weight" in state_dict and isinstance(head, TwoFC):
        for layer, name in ((head.fc6, "classifier.0"), (head.fc7, "classifier.3")):
            targets |= {f"{name}.{x}": (f"{name}.{x}", value) for x, value in layer.state_dict().items()}
    with torch.no_grad():
        for name, value in targets.values():
            if name not in state_dict:
                raise ValueError(f"relops.models: state_dict must have {name}, which the backbone has")
            if state_dict[name].shape != value.shape:
                raise ValueError(
                    f"relops.models: {name} of state_dict must be {list(value.shape)}, got "
                    f"{list(state_dict[name].shape)}"
                )
            value.copy_(state_dict[name])


def load_torchvision(model: nn.Module, state_dict: Mapping[str, Tensor], norm_eps: float | None = None) -> None:
    """Load a state_dict of torchvision's fasterrcnn_resnet50_fpn or maskrcnn_resnet50_fpn, of any of its versions.

    Args:
        model: `faster_rcnn_fpn` or `mask_rcnn` of as many classes, without the background (90 for COCO).
        state_dict: torchvision's. Names that older versions gave are renamed; all others are ours.
        norm_eps: of the backbone's frozen normalization. torchvision makes it 0 where it loads its own COCO_V1 weights;
            None leaves it at 1e-5, as for all others.

    Raises:
        RuntimeError: a parameter that is missing, or left over, or of another shape.
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
