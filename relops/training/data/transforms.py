"""Resizing and flipping of images together with their objects."""

from __future__ import annotations

import dataclasses

import numpy as np
from torch.utils.data import Dataset

from relops.training._optional import require
from relops.training.data.samples import DetectionData, Sample


def prepare(sample: Sample, min_size: int, max_size: int, *, flip: bool = False, flip_vertical: bool = False) -> Sample:
    """Resize a sample so that its shorter side is min_size, or its longer one max_size if that makes it smaller.

    The image is interpolated bilinearly, with antialiasing where it shrinks; masks take the nearest pixel. Boxes and
    proposals are scaled by the ratio of the sizes, which are whole pixels, in each direction. Flips come after that.
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

    def placed(boxes: np.ndarray) -> np.ndarray:
        x1, y1, x2, y2 = (boxes * ratio).clip(0, [new_width, new_height] * 2).T
        if flip:
            x1, x2 = new_width - x2, new_width - x1
        if flip_vertical:
            y1, y2 = new_height - y2, new_height - y1
        return np.stack([x1, y1, x2, y2], 1).astype(np.float32)

    return dataclasses.replace(
        sample,
        image=image,
        boxes=placed(sample.boxes),
        masks=masks,
        proposals=None if sample.proposals is None else placed(sample.proposals),
    )


class Transformed(Dataset):
    """The samples of a data set after `prepare`, by (epoch, index). Flips depend on these and the seed alone.

    Args:
        data: the samples.
        min_size, max_size: see `prepare`.
        augment: flip left and right half of the images.
        seed: not negative.
        vertical_flip: with augment, turn upside down half of the images too.
        cache: keep resized samples in the memory of this process; each worker of a loader has its own.
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
