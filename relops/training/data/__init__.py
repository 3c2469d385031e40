"""Data sets, and the conversion of their images to batches.

A training run creates its batches as follows::

    data = open_data("voc:VOC2007", "train")
    prepared = Transformed(data, min_size=600, max_size=1000, augment=True)
    sampler = EpochSampler(len(data), batch_size=4, seed=0, aspect_ratios=data.aspect_ratios())
    loader = DataLoader(prepared, batch_sampler=sampler.batches(first_iteration=0), collate_fn=collate)
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence

from relops.training.data.batches import Batch, collate
from relops.training.data.coco import open_coco
from relops.training.data.images import PixelRange
from relops.training.data.proposals import save_proposals, with_proposals
from relops.training.data.sampler import EpochSampler
from relops.training.data.samples import Annotation, DetectionData, FileData, Sample
from relops.training.data.shapes import ShapesData
from relops.training.data.transforms import Transformed, prepare
from relops.training.data.voc import open_voc
from relops.training.errors import UsageError

__all__ = [
    "DRAWN",
    "Annotation",
    "Batch",
    "DetectionData",
    "EpochSampler",
    "Sample",
    "Transformed",
    "collate",
    "open_data",
    "prepare",
    "save_proposals",
    "with_proposals",
]

DRAWN = ("shapes", "rotated-shapes")  # the kinds of data sets that are drawn and not read from files


def open_data(
    spec: str,
    split: str,
    classes: Sequence[str] | None = None,
    annotations: str | None = None,
    pixel_range: PixelRange | None = None,
) -> DetectionData:
    """Open one split of a data set.

    Args:
        spec: `voc:DIR` for the Pascal VOC format, `coco:DIR` for the COCO format, or `shapes:N` for N drawn training
            images and N // 5 drawn test images. `shapes` means `shapes:1000`. `rotated-shapes` and `rotated-shapes:N`
            are the same with rotated and stretched shapes.
        split: "train" or "test".
        classes: class names in the order of their labels. For test data, pass the classes of the training data. None
            means the classes that occur in the training split (VOC), or the categories of the file (COCO).
        annotations: the annotation file of a COCO data set. None means that the file is found by its name.
        pixel_range: the pixel values that are mapped to 0 and 255 in grayscale images with more than 8 bits per pixel.
            For test data, pass the range of the training data. None means that the range is determined from a sample of
            the images.

    Raises:
        UsageError: If an argument or a file is invalid. The message names the argument or file, the rule that it
            breaks, and the invalid value.
    """
    if split not in ("train", "test"):
        raise UsageError(f"split must be 'train' or 'test', got {split!r}")
    kind, _, source = spec.partition(":")
    if annotations is not None and kind != "coco":
        raise UsageError(f"annotations can only be given for coco:DIR, got {annotations!r} for data {spec!r}")
    if kind in ("voc", "coco") and source:
        if not os.path.isdir(source):
            raise UsageError(f"data {spec!r}: {source} must be a folder")
        if kind == "voc":
            return open_voc(source, split, classes, pixel_range)
        return open_coco(source, split, classes, annotations, pixel_range)
    has_count = re.fullmatch("[0-9]{1,9}", source) and int(source) >= 5
    if kind not in DRAWN or not (spec == kind or has_count):
        raise UsageError(
            "data must be coco:DIR, voc:DIR, shapes, shapes:N, rotated-shapes or rotated-shapes:N with N from 5 to "
            f"999999999, got {spec!r}"
        )
    count = int(source or 1000)
    data = ShapesData(split, count if split == "train" else count // 5, rotated=kind == "rotated-shapes")
    if classes is not None and list(classes) != data.classes:
        raise UsageError(f"classes of {spec} must be {data.classes}, got {list(classes)}")
    return data


def warn_of_common_images(train: DetectionData, test: DetectionData) -> None:
    """Warn if image files belong to both the training data and the test data."""
    if not isinstance(train, FileData) or not isinstance(test, FileData):
        return
    trained = {os.path.realpath(a.file) for a in train.annotations()}
    common = [a.file for a in test.annotations() if os.path.realpath(a.file) in trained]
    if common:
        warnings.warn(
            f"{common[0]}: a test image should not also be a training image, but {len(common)} of {len(test)} test "
            "images are",
            stacklevel=2,
        )
