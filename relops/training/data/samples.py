"""Images with their objects, the base class of data sets, and data sets of image files."""

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
    """An image and its T objects. Coordinates are in pixels of `image`, whose upper left corner is at (0, 0).

    Attributes:
        image: [H,W,3] uint8 RGB.
        boxes: [T,4] float32 x1, y1, x2, y2.
        labels: [T] int64, the classes, counted from 0.
        ignore: [T] bool, which is True for crowds (COCO) and difficult objects (VOC). These objects are not used for
            training and do not count in evaluation.
        masks: [T,H,W] bool, or None if the data set has no masks. For an object without a mask, all values are False.
        proposals: [P,4] float32 boxes, or None if there are no proposals.
        image_id: the id of the image in the annotations, or its index if the annotations have no ids.
        file: the path of the image, or the name of a drawn image.
        original_size: (height, width) of the image before `prepare` resized it.
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
    """Return a sample for an image [H,W,3] whose objects are unknown."""
    no_boxes = np.zeros((0, 4), np.float32)
    return Sample(image, no_boxes, np.zeros(0, np.int64), np.zeros(0, bool), None, None, 0, file, image.shape[:2])


@dataclass
class Annotation:
    """The size of an image and its T annotated objects. Evaluation compares detections with these objects.

    Attributes:
        image_id: the id of the image in the annotations, or its index if the annotations have no ids.
        file: the path of the image, or the name of a drawn image.
        height, width: the size of the image in pixels.
        boxes: [T,4] x1, y1, x2, y2, without clipping. Boxes may extend outside the image or be empty.
        labels: [T] int64, the classes, counted from 0.
        ignore: [T] bool, which is True for crowds (COCO) and difficult objects (VOC).
        areas: [T], the areas by which evaluation distinguishes small and large objects. If the data set has masks,
            these are the areas of the masks.
        masks: T segmentations in COCO's formats (polygons, or a compressed or uncompressed RLE), or None if the data
            set has no masks. An entry is [] if the segmentation is empty, and None if the object has no segmentation.
        original_id: the id of the image in the annotation file, or None if it is the same as `image_id`. The two differ
            if ids in the file are strings.
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
        """Return the id of the image in the annotation file."""
        return self.image_id if self.original_id is None else self.original_id


class DetectionData(Dataset, abc.ABC):
    """The images of one split of a data set, with their objects.

    Attributes:
        classes: class names. Label `i` stands for `classes[i]`.
        has_masks: whether samples have masks. False if no object has a mask, or if `use_masks` disabled the masks.
        category_ids: the ids of the classes in COCO's results format.
        pixel_range: the pixel values that are mapped to 0 and 255 in grayscale images with more than 8 bits per pixel,
            or None if there are no such images.
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
        """Return the ground truth of every image, in the order of the images."""

    def check_masks(self) -> None:
        """Raise a UsageError that names the file if a mask is malformed."""

    def use_masks(self, enabled: bool) -> None:
        """If `enabled` is True, check all masks. Otherwise omit the masks from the samples, which saves time."""
        self.has_masks = self.has_masks and enabled
        if self.has_masks:
            self.check_masks()

    def aspect_ratios(self) -> list[float]:
        """Return width / height of every image."""
        return [annotation.width / annotation.height for annotation in self.annotations()]


class FileData(DetectionData):
    """A data set of image files.

    The EXIF orientation is not applied to the pixels, because COCO's tools do not apply it either. Grayscale, palette
    and CMYK images are converted to RGB, and alpha channels are dropped. Grayscale pixels with more than 8 bits are
    scaled to 8 bits with `pixel_range`. Samples contain only the objects to train on: their boxes are clipped to the
    image, and objects whose clipped box is empty are left out. A single warning reports all objects that are left out.

    Args:
        classes: class names.
        annotations: one annotation per image.
        min_extent: the width and the height of a box must exceed this number of pixels.
        category_ids: the ids of the classes in COCO's results format. None means that labels are used as ids.
        pixel_range: the pixel values that are mapped to 0 and 255 in grayscale images with more than 8 bits per pixel.
            None means that the range is determined from a sample of the images.
        sources: for each annotation, the file to name in warnings about its boxes. None means the image file.
    """

    def __init__(
        self,
        classes: Sequence[str],
        annotations: list[Annotation],
        *,
        min_extent: float = 0.0,
        category_ids: Sequence[int | str] | None = None,
        pixel_range: PixelRange | None = None,
        sources: Sequence[str] | None = None,
    ) -> None:
        self.classes = list(classes)
        self.category_ids = list(range(len(classes)) if category_ids is None else category_ids)
        self.has_masks = any(mask for a in annotations for mask in a.masks or ())
        self._annotations = annotations
        self._trainable = [_trainable(a, min_extent) for a in annotations]
        self._warn_about_boxes([a.file for a in annotations] if sources is None else sources)
        self.pixel_range = pixel_range or common_range([a.file for a in annotations])

    def _warn_about_boxes(self, sources: Sequence[str]) -> None:
        dropped = [source for source, kept in zip(sources, self._trainable) for _ in range((~kept).sum())]
        if dropped:
            warnings.warn(
                f"{dropped[0]}: a box must be finite and must not be empty after clipping to its image. Training "
                f"ignores invalid boxes ({len(dropped)} in this data set; the first is in this file)",
                stacklevel=2,
            )
        first = next((source for source, a in zip(sources, self._annotations) if len(a.boxes)), None)
        if first is not None and all((a.boxes < 2).all() and max(a.height, a.width) > 2 for a in self._annotations):
            warnings.warn(
                f"{first}: every box of this data set ends within the first two pixels of its image, so coordinates "
                "seem to be fractions of the image size. Coordinates must be pixels: multiply x by the width and y by "
                "the height of the image",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self._annotations)

    def __getitem__(self, index: int) -> Sample:
        """Read a sample.

        Raises:
            UsageError: If the image cannot be read, or if its size differs from the size in its annotation.
        """
        a, kept = self._annotations[index], self._trainable[index]
        image = read_image(a.file, self.pixel_range)
        if image.shape[:2] != (a.height, a.width):
            raise UsageError(
                f"{a.file}: the image must have the size in its annotation, {a.width} x {a.height} (width x height), "
                f"got {image.shape[1]} x {image.shape[0]}"
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
    """Convert 0, 1, true, false, yes or no, given as a number or as text, to a bool.

    Raises:
        UsageError: If the value is anything else.
    """
    if type(value) in (int, bool) and value in (0, 1):  # the usual case
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


def _trainable(a: Annotation, min_extent: float) -> np.ndarray:
    """Return [T] bool, which is True for the objects that can be used for training."""
    clipped = clip_boxes(a.boxes, a.height, a.width)
    valid = (a.boxes[:, 2:] - a.boxes[:, :2] > min_extent) & (clipped[:, 2:] > clipped[:, :2])
    return valid.all(1) & np.isfinite(a.boxes).all(1)


def clip_boxes(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Clip boxes [T,4] to the image and convert them to float32."""
    return boxes.clip(0, np.array([width, height] * 2)).astype(np.float32)
