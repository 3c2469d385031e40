"""Data sets of drawn shapes. Each image depends only on the data set, its split and its index."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from relops.training.data.masks import encode_mask
from relops.training.data.samples import Annotation, DetectionData, Sample

HEIGHT, WIDTH = 128, 160
MAX_OBJECTS = 6
MIN_SIZE, MAX_SIZE = 12, 60
MIN_VISIBLE = 0.6
MAX_ASPECT = 3.0  # of rotated shapes


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x**2 + y**2 <= 1


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(abs(x), abs(y)) <= 1


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (abs(y) <= 1) & (2 * abs(x) <= 1 + y)


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return abs(np.hypot(x, y) - 0.75) <= 0.25


# Each function returns whether points are inside a shape. The shape lies in the square in which x and y are in [-1,1].
# The y axis points downwards.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "ring": _ring,
}


class ShapesData(DetectionData):
    """A data set of drawn images, 160 pixels wide and 128 high, with up to 6 objects on a noisy background.

    The objects are circles, squares, triangles and rings with sizes of 12 to 60 pixels. At most 40 % of an object may
    be hidden by other objects. Masks contain the visible pixels of an object, and boxes are tight around the masks.
    Colors are random but differ clearly from the background.

    Args:
        split: "train" or "test".
        length: the number of images.
        rotated: if True, each object is also stretched by a random factor from 1 to 3, without changing its area, and
            rotated by a random angle. The sizes of 12 to 60 pixels are those before stretching.
    """

    def __init__(self, split: str, length: int, rotated: bool = False) -> None:
        self.classes, self.has_masks = list(SHAPES), True
        self.category_ids = list(range(len(SHAPES)))
        self._split, self._length, self._rotated = split, length, rotated

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        sample = self._drawn(index)
        return sample if self.has_masks else dataclasses.replace(sample, masks=None)

    def _drawn(self, index: int) -> Sample:
        """Draw an image, and return it as a sample with masks."""
        image, labels, masks = _draw(np.random.default_rng((self._split == "test", index)), self._rotated)
        boxes = np.array([_bounds(mask) for mask in masks], np.float32).reshape(-1, 4)
        file = f"{'rotated-' if self._rotated else ''}shapes[{self._split}][{index}]"
        return Sample(image, boxes, labels, np.zeros(len(boxes), bool), masks, None, index, file, (HEIGHT, WIDTH))

    def annotations(self) -> list[Annotation]:
        return list(self._annotations())

    def _annotations(self) -> Iterator[Annotation]:
        for index in range(len(self)):
            x = self._drawn(index)
            assert x.masks is not None
            masks = [encode_mask(mask) for mask in x.masks] if self.has_masks else None
            areas = x.masks.sum((1, 2)).astype(np.float32)
            yield Annotation(index, x.file, HEIGHT, WIDTH, x.boxes, x.labels, x.ignore, areas, masks)

    def aspect_ratios(self) -> list[float]:
        return [WIDTH / HEIGHT] * len(self)


def _draw(rng: np.random.Generator, rotated: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a drawn image [H,W,3] uint8, and labels [T] int64 and masks [T,H,W] bool of its objects."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32) + np.float32(0.5)
    background = rng.uniform(40, 216, 3).astype(np.float32)
    across, down, phase = (rng.uniform([-0.08, -0.08, 0], [0.08, 0.08, 2 * np.pi])).astype(np.float32)
    waves = 12 * np.sin(across * x + down * y + phase)
    image = background + waves[..., None]

    labels, masks = [], np.zeros((0, HEIGHT, WIDTH), bool)
    areas = np.zeros(0)  # number of pixels of each object, including hidden pixels
    for _ in range(rng.integers(MAX_OBJECTS + 1)):
        label, radius = int(rng.integers(len(SHAPES))), rng.uniform(MIN_SIZE, MAX_SIZE) / 2
        aspect, angle = (MAX_ASPECT ** rng.uniform(), rng.uniform(0, 2 * math.pi)) if rotated else (1.0, 0.0)
        # The square around the shape becomes a rectangle with these half sides.
        length, thickness = radius * math.sqrt(aspect), radius / math.sqrt(aspect)
        cos, sin = math.cos(angle), math.sin(angle)
        extent_x = length * abs(cos) + thickness * abs(sin)
        extent_y = length * abs(sin) + thickness * abs(cos)
        center_x, center_y = rng.uniform(extent_x, WIDTH - extent_x), rng.uniform(extent_y, HEIGHT - extent_y)
        color = rng.uniform(0, 255, 3)
        dx, dy = x - center_x, y - center_y
        mask = list(SHAPES.values())[label]((cos * dx + sin * dy) / length, (cos * dy - sin * dx) / thickness)
        visible = masks & ~mask
        if (visible.sum((1, 2)) < MIN_VISIBLE * areas).any() or np.abs(color - background).max() < 60:
            continue
        labels.append(label)
        masks, areas = np.concatenate([visible, mask[None]]), np.append(areas, mask.sum())
        image[mask] = color

    image += 8 * rng.standard_normal(image.shape, np.float32)
    return image.clip(0, 255).astype(np.uint8), np.array(labels, np.int64), masks


def _bounds(mask: np.ndarray) -> list[int]:
    """Return x1, y1, x2, y2 of the smallest box that contains all True pixels of a mask."""
    xs, ys = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return [xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]
