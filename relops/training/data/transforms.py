"""Resizing and flipping of images and their objects."""

from __future__ import annotations

import dataclasses

import numpy as np
from torch.utils.data import Dataset

from relops.training._optional import require
from relops.training.data.samples import DetectionData, Sample


def prepare(sample: Sample, min_size: int, max_size: int, *, flip: bool = False, flip_vertical: bool = False) -> Sample:
    """Resize and flip a sample.

    The aspect ratio is kept. The shorter side of the image becomes `min_size`, unless the longer side would then exceed
    `max_size`; in that case the longer side becomes `max_size`. The new height and width are rounded to whole pixels.
    Images are resized with bilinear interpolation, with antialiasing when they become smaller, and masks with
    nearest-neighbor interpolation. The coordinates of boxes and proposals are multiplied by the exact ratio of the new
    size to the old size in each direction.

    Args:
        sample: the sample, which is not changed.
        min_size: the length in pixels of the shorter side.
        max_size: the maximum length in pixels of the longer side.
        flip: flip the resized image and its objects horizontally.
        flip_vertical: flip the resized image and its objects vertically.
    """
    pil = require("PIL.Image", "pillow")
    height, width = sample.image.shape[:2]
    scale = min(min_size / min(height, width), max_size / max(height, width))
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    image, masks = sample.image, sample.masks
    if (new_height, new_width) != (height, width):
        image = np.array(pil.fromarray(image).resize((new_width, new_height), pil.Resampling.BILINEAR))
        if masks is not None:
            rows = ((np.arange(new_height) + 0.5) * (height / new_height)).astype(int)
            columns = ((np.arange(new_width) + 0.5) * (width / new_width)).astype(int)
            masks = masks[:, rows[:, None], columns]
    horizontal, vertical = slice(None, None, -1 if flip else 1), slice(None, None, -1 if flip_vertical else 1)
    image = np.ascontiguousarray(image[vertical, horizontal])
    if masks is not None:
        masks = np.ascontiguousarray(masks[:, vertical, horizontal])

    ratio = np.array([new_width / width, new_height / height] * 2)

    def transform(boxes: np.ndarray) -> np.ndarray:
        x1, y1, x2, y2 = (boxes * ratio).clip(0, [new_width, new_height] * 2).T
        if flip:
            x1, x2 = new_width - x2, new_width - x1
        if flip_vertical:
            y1, y2 = new_height - y2, new_height - y1
        return np.stack([x1, y1, x2, y2], 1).astype(np.float32)

    return dataclasses.replace(
        sample,
        image=image,
        boxes=transform(sample.boxes),
        masks=masks,
        proposals=None if sample.proposals is None else transform(sample.proposals),
    )


class Transformed(Dataset):
    """The resized and flipped samples of a data set, indexed by (epoch, index).

    Whether a sample is flipped depends only on the seed, the epoch and the index.

    Args:
        data: the data set.
        min_size, max_size: limits of the image size in pixels, see `prepare`.
        augment: flip half of the images horizontally.
        seed: the random seed, which must not be negative.
        vertical_flip: if `augment` is True, also flip half of the images vertically.
        cache: keep resized samples in the memory of this process. Each worker of a loader has its own cache.
    """

    def __init__(
        self,
        data: DetectionData,
        min_size: int,
        max_size: int,
        augment: bool = False,
        seed: int = 0,
        vertical_flip: bool = False,
        cache: bool = False,
    ) -> None:
        self.data, self.min_size, self.max_size = data, min_size, max_size
        self.augment, self.seed, self.vertical_flip = augment, seed, vertical_flip
        self._cache: dict[int, Sample] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        sample = self._resized(index)
        horizontal, vertical = np.random.default_rng((self.seed, epoch, index)).random(2) < 0.5
        flip, flip_vertical = self.augment and horizontal, self.augment and self.vertical_flip and vertical
        if not (flip or flip_vertical):
            return sample
        height, width = sample.image.shape[:2]
        return prepare(sample, min(height, width), max(height, width), flip=flip, flip_vertical=flip_vertical)

    def _resized(self, index: int) -> Sample:
        if self._cache is None:
            return prepare(self.data[index], self.min_size, self.max_size)
        if index not in self._cache:
            self._cache[index] = prepare(self.data[index], self.min_size, self.max_size)
        return self._cache[index]
