"""Detection in images of any size: resizing, batching, and conversion of the results to the original image size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relops.models.parts.masks import paste_masks

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # statistics of ImageNet


def batch_images(images: Sequence[Tensor], min_size: int = 800, max_size: int = 1333) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize and resize images and pad them to one batch, as torchvision's detectors do.

    Args:
        images: RGB images [3,H,W] of a floating-point dtype, with values from 0 to 1.
        min_size: Length in pixels to which the shorter side of each image is resized.
        max_size: Maximum length in pixels of the longer side. If the longer side would exceed this length, it is
            resized to `max_size`, and the shorter side becomes smaller than `min_size`.

    Returns:
        A tuple of three tensors. The first holds the images [N,3,H,W], padded with zeros on the right and at the bottom
        so that H and W are multiples of 32. The second holds the sizes [N,2], the height and width of each resized
        image without padding. The third holds the factors [N,2] by which the height and width of each image were
        multiplied.

    Raises:
        ValueError: If there is no image, or an image is not a floating-point tensor [3,H,W].

    Example:
        >>> import torch, relops
        >>> images = [torch.rand(3, 60, 80), torch.rand(3, 50, 50)]
        >>> batch, sizes, scales = relops.models.batch_images(images, min_size=64, max_size=96)
        >>> batch.shape
        torch.Size([2, 3, 64, 96])
        >>> sizes.tolist()
        [[64.0, 85.0], [64.0, 64.0]]
    """
    if not images:
        raise ValueError("relops.models: images must contain at least one image, got none")
    resized, scales = [], []
    for i, image in enumerate(images):
        if image.dim() != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise ValueError(
                f"relops.models: images[{i}] must be a floating-point tensor [3,H,W], got {image.dtype} "
                f"{list(image.shape)}"
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
        model: Detector in evaluation mode.
        images: RGB images [3,H,W] of a floating-point dtype, with values from 0 to 1. They are normalized and resized,
            and then padded to one batch.
        min_size: Length in pixels to which the shorter side of each image is resized.
        max_size: Maximum length in pixels of the longer side. If the longer side would exceed this length, it is
            resized to `max_size`, and the shorter side becomes smaller than `min_size`.

    Returns:
        A dict for each image, with the entries "boxes" [D,4] as x1, y1, x2, y2 in pixels of the image, "scores" [D] and
        "labels" [D] (classes from 0). The objects are sorted by descending score. If the detector predicts masks, the
        dict also has the entry "masks", a bool tensor [D,H,W]. The number D of objects is read from the device, so the
        call waits for the device.

    Raises:
        ValueError: If an image is not a floating-point tensor [3,H,W].

    Example:
        >>> import torch, relops
        >>> model = relops.models.faster_rcnn_fpn(3, backbone="resnet18-frozen-8", channels=16, hidden=32)
        >>> images = [torch.rand(3, 60, 80), torch.rand(3, 50, 50)]
        >>> results = relops.models.detect(model.eval(), images, min_size=64, max_size=96)
        >>> len(results), sorted(results[0])
        (2, ['boxes', 'labels', 'scores'])
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
