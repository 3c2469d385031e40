"""Images with their objects: what every data set gives, and how files become it."""

from __future__ import annotations

import abc
import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from torch.utils.data import Dataset

MODULES = {"pillow": "PIL.Image", "faster-coco-eval": "faster_coco_eval", "matplotlib": "matplotlib.figure"}


@dataclass
class Sample:
    """An image and its T objects. Coordinates are in pixels of `image`; that of the upper left corner is (0, 0).

    Attributes:
        image: [H,W,3] uint8 RGB.
        boxes: [T,4] float32 x1, y1, x2, y2.
        labels: [T] int64, classes from 0.
        ignore: [T] bool: crowd (COCO) or difficult (VOC): neither trained on nor counted in evaluation.
        masks: [T,H,W] bool, or None where the data has none.
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


@dataclass
class Annotation:
    """What evaluation needs of an image, without the image.

    Attributes:
        image_id, file, boxes, labels, ignore: as in `Sample`.
        height, width: in pixels.
        areas: [T] float32, which tell small objects from large ones: of the mask where the data has masks.
        masks: T segmentations as COCO has them (polygons, or either kind of RLE), or None.
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


class DetectionData(Dataset, abc.ABC):
    """Images with objects of one split.

    Attributes:
        classes: names; label i is classes[i].
        has_masks: every object has a mask. Set to False, masks are not made, which saves time.
        category_ids: by which COCO's results name the classes.
    """

    classes: list[str]
    has_masks: bool
    category_ids: list[int]

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    @abc.abstractmethod
    def annotations(self) -> list[Annotation]:
        """Ground truth of every image, in the order of the images."""

    def aspect_ratios(self) -> list[float]:
        """Width / height of every image."""
        return [annotation.width / annotation.height for annotation in self.annotations()]


class FileData(DetectionData):
    """Images in files.

    An image is read as its pixels lie in the file: an EXIF orientation is not applied, as COCO's tools do not either.
    Gray, palette, CMYK and 16-bit images become RGB, alpha is dropped.

    Args:
        annotations: one per image.
        dropped: files that the objects without a proper box were in, one by one: reported as a warning.
    """

    def __init__(
        self,
        classes: Sequence[str],
        annotations: list[Annotation],
        dropped: Sequence[str] = (),
        has_masks: bool = False,
        category_ids: Sequence[int] | None = None,
    ) -> None:
        self.classes, self.has_masks = list(classes), has_masks
        self.category_ids = list(range(len(classes)) if category_ids is None else category_ids)
        self._annotations = annotations
        if dropped:
            warnings.warn(
                f"{dropped[0]}: a box must be finite and have width and height within its image; left out "
                f"{len(dropped)} of this data set, the first of them here",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self._annotations)

    def __getitem__(self, index: int) -> Sample:
        """Raises ValueError, naming the file, where the image cannot be read or has not the size of its annotation."""
        a = self._annotations[index]
        image = read_image(a.file)
        if image.shape[:2] != (a.height, a.width):
            raise ValueError(
                f"{a.file}: the image must have the size that its annotation states, {a.width} x {a.height} (width x "
                f"height), got {image.shape[1]} x {image.shape[0]}"
            )
        masks = None
        if self.has_masks:
            masks = np.zeros((len(a.boxes), a.height, a.width), bool)
            for mask, segmentation in zip(masks, a.masks):
                mask[:] = decode_mask(segmentation, a.height, a.width, a.file)
        return Sample(
            image, a.boxes.copy(), a.labels.copy(), a.ignore.copy(), masks, None, a.image_id, a.file, image.shape[:2]
        )

    def annotations(self) -> list[Annotation]:
        return self._annotations


def require(module: str, package: str) -> ModuleType:
    """Import of a package that only training needs."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package that is broken, or does not fit another one, raises anything
        raise ImportError(
            f"{package} is needed for this and cannot be imported ({error}): pip install 'relops[train]'"
        ) from error


def require_all(*packages: str) -> None:
    """Import what a command will need, of MODULES, before the command begins. The error names all that are missing."""
    missing = []
    for package in packages:
        try:
            require(MODULES[package], package)
        except ImportError as error:
            missing.append(f"{package} ({error.__cause__})")
    if missing:
        raise ImportError(
            f"packages are needed for this and cannot be imported: {', '.join(missing)}: pip install 'relops[train]'"
        )


def read_image(file: str) -> np.ndarray:
    """[H,W,3] uint8 RGB. A file that is not there or cannot be read whole is a ValueError that names it."""
    pil = require("PIL.Image", "pillow")
    try:
        with pil.open(file) as image:
            if image.mode.startswith("I"):  # PIL would clip 16 bits at 255
                image = pil.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            return np.array(image.convert("RGB"))
    except Exception as error:  # of a broken file, PIL's plugins raise anything
        raise ValueError(f"{file}: the file must be an image, and cannot be read as one: {error}") from error


def image_size(file: str) -> tuple[int, int]:
    """(height, width), from the head of the file."""
    pil = require("PIL.Image", "pillow")
    try:
        with pil.open(file) as image:
            return image.height, image.width
    except Exception as error:  # of a broken file, PIL's plugins raise anything
        raise ValueError(f"{file}: the file must be an image, and cannot be read as one: {error}") from error


def clip_boxes(boxes: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [T,4] float32 within the image, and which of them, [T] bool, are finite and have width and height."""
    proper = np.isfinite(boxes).all(1)
    boxes = boxes.clip(0, np.array([width, height] * 2)).astype(np.float32)
    return boxes, proper & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def decode_mask(segmentation: Any, height: int, width: int, file: str) -> np.ndarray:
    """[H,W] bool of polygons or an RLE, as COCO has them."""
    coco = require("faster_coco_eval.core.mask", "faster-coco-eval")
    try:
        mask = coco.decode(coco.segmToRle(segmentation, width, height))
    except Exception as error:  # whatever the bindings make of a segmentation that is none
        raise ValueError(f"{file}: a segmentation must be polygons or an RLE: {error}") from error
    if mask.shape != (height, width):
        raise ValueError(
            f"{file}: a segmentation must have the size [height,width] of its image, [{height},{width}], got "
            f"{list(mask.shape)}"
        )
    return mask.astype(bool)


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed RLE of a mask [H,W]: lengths of the runs of 0 and 1 in turn, column by column, 0 first."""
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(ends, prepend=0, append=flat.size).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}
