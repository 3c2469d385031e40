"""Detection in images as they come: resizing, batching and back, and weights that others trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relops.models._norm import FrozenBatchNorm2d
from relops.models.mask_rcnn import paste_masks

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def batch_images(images: Sequence[Tensor], min_size: int = 800, max_size: int = 1333) -> tuple[Tensor, Tensor, Tensor]:
    """Normalizes, resizes and pads images to one batch, as torchvision's detectors do.

    Args:
        images: each [3,H,W], values from 0 to 1.
        min_size, max_size: the shorter side becomes the first, unless the longer would be more than the second.

    Returns:
        images [N,3,H,W] with zeros to the right and below, H and W multiples of 32; sizes [N,2] of each (height, width)
        in it; and scales [N,2], by which they were multiplied.
    """
    resized, scales = [], []
    for i, image in enumerate(images):
        if image.dim() != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise ValueError(
                f"relops.models: images[{i}] must be [3,H,W] of floating point, got {image.dtype} {list(image.shape)}"
            )
        size = image.shape[1:]
        scale = min(min_size / min(size), max_size / max(size))
        image = (image - image.new_tensor(MEAN)[:, None, None]) / image.new_tensor(STD)[:, None, None]
        image = F.interpolate(
            image[None], scale_factor=scale, mode="bilinear", recompute_scale_factor=True, align_corners=False
        )[0]
        resized.append(image)
        scales.append([image.shape[1] / size[0], image.shape[2] / size[1]])
    height, width = (32 * -(-max(x.shape[d] for x in resized) // 32) for d in (1, 2))
    batch = resized[0].new_zeros(len(resized), 3, height, width)
    for i, image in enumerate(resized):
        batch[i, :, : image.shape[1], : image.shape[2]] = image
    sizes = [list(x.shape[1:]) for x in resized]
    return batch, batch.new_tensor(sizes), batch.new_tensor(scales)


@torch.no_grad()
def detect(
    model: nn.Module, images: Sequence[Tensor], min_size: int = 800, max_size: int = 1333
) -> list[dict[str, Tensor]]:
    """Objects in images of any size.

    Args:
        model: a detector, in evaluation mode.
        images: as in `batch_images`, and so are the sizes.

    Returns:
        Of each image boxes [D,4] in its pixels, scores [D], labels [D] (classes from 0), by descending score, and from
        detectors of masks masks [D,H,W] bool. Their number is read from the device.

    Example:
        >>> model = relops.models.faster_rcnn_fpn(90)
        >>> relops.models.load_torchvision(model, torch.load("fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"))
        >>> objects = relops.models.detect(model.eval(), [image])[0]
    """
    batch, sizes, scales = batch_images(images, min_size, max_size)
    detections = model(batch, sizes)
    results = []
    for i, image in enumerate(images):
        count = int((detections.labels[i] >= 0).sum())
        boxes = detections.boxes[i, :count] / scales[i].flip(0).repeat(2)
        result = {"boxes": boxes, "scores": detections.scores[i, :count], "labels": detections.labels[i, :count]}
        if detections.masks is not None:
            result["masks"] = paste_masks(detections.masks[i, :count], boxes, tuple(image.shape[1:]))
        results.append(result)
    return results


def load_backbone(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Loads what a classifier learned into a detector's backbone, and fc6 and fc7 of VGG-16 into its head.

    Args:
        model: a detector.
        state_dict: of the classifier, torchvision's or ours; what the detector does not have is left out.

    Raises:
        ValueError: a parameter that is missing, or of another shape.
    """
    targets = {name: (name, value) for name, value in model.backbone.body.state_dict().items()}
    head = getattr(getattr(model, "roi_heads", None), "box_head", None)
    if "classifier.0.weight" in state_dict and hasattr(head, "fc6"):
        for name, value in head.state_dict().items():
            targets[name] = (name.replace("fc6", "classifier.0").replace("fc7", "classifier.3"), value)
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
    """Loads a state_dict of torchvision's fasterrcnn_resnet50_fpn or maskrcnn_resnet50_fpn, of any of its versions.

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
