"""Images with their objects: what every data set gives, and data sets whose images are files."""

from __future__ import annotations

import abc
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from relops.training.data.images import PixelRange, common_range, read_image
from relops.training.data.masks import checked_mask, decode_mask
from relops.training.errors import UsageError


@dataclass
class Sample:
    """An image and its T objects. Coordinates are in pixels of `image`; that of the upper left corner is (0, 0).

    Attributes:
        image: [H,W,3] uint8 RGB.
        boxes: [T,4] float32 x1, y1, x2, y2.
        labels: [T] int64, classes from 0.
        ignore: [T] bool: crowd (COCO) or difficult (VOC): neither trained on nor counted in evaluation.
        masks: [T,H,W] bool, all False for an object that has none; or None where the data has none.
        proposals: [P,4] float32 boxes, or None where there are none.
        image_id: that of the data set's annotations; where they have none, the index.
        file: path of the image; of a drawn one, its name.
        original_size: (height, width) of the image before `prepare`.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    masks: np.ndarray | None
    proposals: np.ndarray | None
    image_id: int
    file: str
    original_size: tuple[int, int]


def image_sample(image: np.ndarray, file: str) -> Sample:
    """Return a sample of an image [H,W,3] whose objects are not known."""
    none = np.zeros((0, 4), np.float32)
    return Sample(image, none, np.zeros(0, np.int64), np.zeros(0, bool), None, None, 0, file, image.shape[:2])


@dataclass
class Annotation:
    """The size of an image and all objects of its annotation file, which is what evaluation needs of it.

    Attributes:
        image_id, file, labels, ignore: as in `Sample`.
        height, width: in pixels.
        boxes: [T,4] x1, y1, x2, y2 as the file has them: they may leave the image, and have no width or height.
        areas: [T], which tell small objects from large ones: of the mask where the data has masks.
        masks: T segmentations as COCO has them (polygons, or either kind of RLE), [] for one that is empty and None for
            an object without one; or None where the data has none.
        original_id: the image's id in its file where image_id is another, as where ids are strings.
    """

    image_id: int
    file: str
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    areas: np.ndarray
    masks: list[Any] | None = None
    original_id: int | str | None = None

    @property
    def own_id(self) -> int | str:
        """The image's id in its file."""
        return self.image_id if self.original_id is None else self.original_id


class DetectionData(Dataset, abc.ABC):
    """Images with objects of one split.

    Attributes:
        classes: names; label i is classes[i].
        has_masks: some object has a mask, and masks are made: see `use_masks`.
        category_ids: by which COCO's results name the classes.
        pixel_range: the values that become 0 and 255 in images whose pixels are not bytes, or None.
    """

    classes: list[str]
    has_masks: bool
    category_ids: list[int | str]
    pixel_range: PixelRange | None = None

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    @abc.abstractmethod
    def annotations(self) -> list[Annotation]:
        """Ground truth of every image, in the order of the images."""

    def check_masks(self) -> None:
        """Raise UsageError, naming the file, where a mask is malformed."""

    def use_masks(self, wanted: bool) -> None:
        """Check the masks if they are wanted; otherwise do not make them, which saves time."""
        self.has_masks = self.has_masks and wanted
        if self.has_masks:
            self.check_masks()

    def aspect_ratios(self) -> list[float]:
        """Width / height of every image."""
        return [annotation.width / annotation.height for annotation in self.annotations()]


class FileData(DetectionData):
    """Images in files.

    An image is read as its pixels lie in the file: an EXIF orientation is not applied, as COCO's tools do not either.
    Gray, palette and CMYK images become RGB, alpha is dropped, and pixels that are not bytes are scaled to bytes by
    `pixel_range`. Samples have the objects to train on: boxes are clipped to the image, and objects whose box is empty
    then are left out, with one warning for the data set.

    Args:
        classes: names.
        annotations: one per image.
        least_extent: which the width and height of a box must be above.
        category_ids: see `DetectionData`; None: labels.
        pixel_range: see `DetectionData`; None: that of a part of the images.
        sources: a file per annotation, which warnings about its boxes name; None: the images.
    """

    def __init__(
        self,
        classes: Sequence[str],
        annotations: list[Annotation],
        *,
        least_extent: float = 0.0,
        category_ids: Sequence[int | str] | None = None,
        pixel_range: PixelRange | None = None,
        sources: Sequence[str] | None = None,
    ) -> None:
        self.classes = list(classes)
        self.category_ids = list(range(len(classes)) if category_ids is None else category_ids)
        self.has_masks = any(mask for a in annotations for mask in a.masks or ())
        self._annotations = annotations
        self._trained = [_trained(a, least_extent) for a in annotations]
        self._warn_of_boxes([a.file for a in annotations] if sources is None else sources)
        self.pixel_range = pixel_range or common_range([a.file for a in annotations])

    def _warn_of_boxes(self, sources: Sequence[str]) -> None:
        dropped = [source for source, kept in zip(sources, self._trained) for _ in range((~kept).sum())]
        if dropped:
            warnings.warn(
                f"{dropped[0]}: a box must be finite and have width and height within its image; training has left "
                f"out {len(dropped)} of this data set, the first of them here",
                stacklevel=2,
            )
        first = next((source for source, a in zip(sources, self._annotations) if len(a.boxes)), None)
        if first is not None and all((a.boxes < 2).all() and max(a.height, a.width) > 2 for a in self._annotations):
            warnings.warn(
                f"{first}: every box of this data set ends within the first two pixels of its image, as if "
                "coordinates were fractions of the image's size. They must be pixels: multiply x by the width and y "
                "by the height",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self._annotations)

    def __getitem__(self, index: int) -> Sample:
        """Raise UsageError, naming the file, where the image cannot be read or has not the size of its annotation."""
        a, kept = self._annotations[index], self._trained[index]
        image = read_image(a.file, self.pixel_range)
        if image.shape[:2] != (a.height, a.width):
            raise UsageError(
                f"{a.file}: the image must have the size that its annotation states, {a.width} x {a.height} (width x "
                f"height), got {image.shape[1]} x {image.shape[0]}"
            )
        masks = None
        if self.has_masks:
            masks = np.zeros((int(kept.sum()), a.height, a.width), bool)
            for mask, i in zip(masks, np.flatnonzero(kept)):
                if a.masks is not None and a.masks[i] is not None:
                    mask[:] = decode_mask(a.masks[i], a.height, a.width, a.file)
        boxes = clip_boxes(a.boxes[kept], a.height, a.width)
        return Sample(image, boxes, a.labels[kept], a.ignore[kept], masks, None, a.image_id, a.file, image.shape[:2])

    def annotations(self) -> list[Annotation]:
        return self._annotations

    def check_masks(self) -> None:
        for a in self._annotations:
            for mask in a.masks or ():
                if mask is not None:
                    checked_mask(mask, a.height, a.width, a.file)


def parse_flag(value: Any) -> bool:
    """Return what 0, 1, True, False, yes and no mean, as numbers or text. Anything else is a UsageError."""
    if type(value) in (int, bool) and value in (0, 1):  # nearly always
        return value == 1
    text = str(value).strip().lower()
    if text in ("true", "yes"):
        return True
    if text in ("false", "no"):
        return False
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if number not in (0, 1):
        raise UsageError(f"must be 0 or 1, got {value!r}")
    return number == 1


def _trained(a: Annotation, least_extent: float) -> np.ndarray:
    """Return which objects can be trained on: [T] bool."""
    clipped = clip_boxes(a.boxes, a.height, a.width)
    proper = (a.boxes[:, 2:] - a.boxes[:, :2] > least_extent) & (clipped[:, 2:] > clipped[:, :2])
    return proper.all(1) & np.isfinite(a.boxes).all(1)


def clip_boxes(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return [T,4] float32 boxes within the image."""
    return boxes.clip(0, np.array([width, height] * 2)).astype(np.float32)
