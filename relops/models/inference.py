"""Detection in images of any size: resizing, batching, and conversion of the results back to the images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relops.models.parts.masks import paste_masks

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def batch_images(images: Sequence[Tensor], min_size: int = 800, max_size: int = 1333) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize, resize and pad images to one batch, as torchvision's detectors do.

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
    """Detect objects in images of any size.

    Args:
        model: a detector, in evaluation mode.
        images: as in `batch_images`, and so are the sizes.

    Returns:
        A dict for each image, by descending score: boxes [D,4] in its pixels, scores [D], labels [D] (classes from 0),
        and from detectors with masks, masks [D,H,W] bool. D is read from the device, which this waits for.

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
            result["masks"] = paste_masks(detections.masks[i, :count], boxes, (image.shape[1], image.shape[2]))
        results.append(result)
    return results
