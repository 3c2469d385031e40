"""Data sets, and the way from them to batches.

The images of a training step come about so:

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


def open_data(
    spec: str,
    split: str,
    classes: Sequence[str] | None = None,
    annotations: str | None = None,
    pixel_range: PixelRange | None = None,
) -> DetectionData:
    """Open one split of a data set.

    Args:
        spec: `voc:DIR` (see `voc.open_voc`), `coco:DIR` (see `coco.open_coco`), or `shapes:N` for N drawn training
            images and N // 5 test images; `shapes` is `shapes:1000`.
        split: "train" or "test".
        classes: names that labels are numbered by: those of the training data for test data. None: those that occur in
            train (VOC), or the file's categories (COCO).
        annotations: the file of annotations of a COCO data set; None: found by its name (see `coco.open_coco`).
        pixel_range: the values that become 0 and 255 in images whose pixels are not bytes: those of the training data
            for test data. None: found in a part of the images.

    Raises:
        UsageError: naming the argument or file, the rule, and what was got.
    """
    if split not in ("train", "test"):
        raise UsageError(f"split must be 'train' or 'test', got {split!r}")
    kind, _, where = spec.partition(":")
    if annotations is not None and kind != "coco":
        raise UsageError(f"annotations must name a file of coco:DIR, got {annotations!r} for data {spec!r}")
    if kind in ("voc", "coco") and where:
        if not os.path.isdir(where):
            raise UsageError(f"data {spec!r}: {where} must be a folder")
        if kind == "voc":
            return open_voc(where, split, classes, pixel_range)
        return open_coco(where, split, classes, annotations, pixel_range)
    if spec != "shapes" and not (kind == "shapes" and re.fullmatch("[0-9]{1,9}", where) and int(where) >= 5):
        raise UsageError(f"data must be coco:DIR, voc:DIR, shapes or shapes:N with N from 5 to 999999999, got {spec!r}")
    count = int(where or 1000)
    data = ShapesData(split, count if split == "train" else count // 5)
    if classes is not None and list(classes) != data.classes:
        raise UsageError(f"classes of {spec} must be {data.classes}, got {list(classes)}")
    return data


def warn_of_common_images(train: DetectionData, test: DetectionData) -> None:
    """Warn where images in files are both trained and evaluated on."""
    if not isinstance(train, FileData) or not isinstance(test, FileData):
        return
    trained = {os.path.realpath(a.file) for a in train.annotations()}
    common = [a.file for a in test.annotations() if os.path.realpath(a.file) in trained]
    if common:
        warnings.warn(
            f"{common[0]}: images to evaluate on should not be trained on, got {len(common)} such images of "
            f"{len(test)}",
            stacklevel=2,
        )
