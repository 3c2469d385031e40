"""Data sets in the COCO format."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relops.training.data.images import PixelRange
from relops.training.data.masks import mask_area, shown, usable_mask
from relops.training.data.samples import Annotation, FileData, parse_flag
from relops.training.errors import UsageError

# Words in the name of an annotation file that say which split the file belongs to.
JOINT = {"trainval"}
TRAIN = {"train", "training"} | JOINT
VALIDATION = {"val", "valid", "validation"}
TEST = {"test", "testing"}
NOT_INSTANCES = {"captions", "info", "keypoints", "panoptic", "stuff"}  # in file names of COCO's other tasks


def open_coco(
    folder: str,
    split: str,
    classes: Sequence[str] | None,
    annotations: str | None = None,
    pixel_range: PixelRange | None = None,
) -> FileData:
    """Open a split of the data set in a folder.

    If `annotations` is None, the annotation file is found in annotations/ by the words in its name. For the split
    "train", the name must contain the word train. For "test", it must contain val or, if there is no such file, test.
    Words are separated by "_", "-" and ".", and may end in digits, as in instances_train2017.json and val.json. A file
    whose name contains trainval, or both train and val, belongs to "train". In this case, the name of the file for
    "test" must contain test. If several files match, files whose names contain the word instances are preferred. If no
    file or more than one file remains, `annotations` must name the file.

    The images of instances_train2017.json, for example, are searched for in the folders train2017, images/train2017,
    images and `folder` itself. Objects with iscrowd=1 are ignored. An object without a usable segmentation has no mask.

    Args:
        folder: the folder of the data set.
        split: "train" or "test".
        classes: class names in the order of their labels. None means the categories of the file by ascending id.
        annotations: the path of the annotation file, which may be relative to `folder` or to its folder annotations.
            None means that the file is found by its name.
        pixel_range: the pixel values that are mapped to 0 and 255 in grayscale images with more than 8 bits per pixel.
            None means that the range is determined from a sample of the images.

    Raises:
        UsageError: If a file is missing or cannot be read, or if an object belongs to none of the classes. The message
            names the file.
    """
    file = _annotation_file(Path(folder), split) if annotations is None else _named_file(Path(folder), annotations)
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file}: the file must contain valid JSON: {error}") from error
    return _Reader(Path(folder), file, content, classes).read(pixel_range)


def _words(file: Path) -> set[str]:
    # Remove numbers at the end of words, such as the year or size in "train2017" and "trainval35k".
    return {re.sub(r"\d+k?$", "", word) for word in re.split(r"[\W_]+", file.stem.lower())}


def _annotation_folder(folder: Path) -> Path:
    return next((x for x in sorted(folder.iterdir()) if x.is_dir() and x.name.lower() == "annotations"), folder)


def _annotation_file(folder: Path, split: str) -> Path:
    files = [
        file
        for file in sorted(_annotation_folder(folder).iterdir())
        if file.suffix.lower() == ".json" and not file.name.startswith("._")
    ]
    words = {file: _words(file) for file in files}
    candidates = [file for file in files if "instances" in words[file] or not words[file] & NOT_INSTANCES]
    trained = [file for file in candidates if words[file] & TRAIN]
    others = [file for file in candidates if file not in trained]
    if split == "train":
        kinds, rule = [trained], "instances_*train*.json"
    elif any(words[file] & (JOINT | VALIDATION) for file in trained):
        kinds, rule = [[]], f"instances_*test*.json (the split train uses {[file.name for file in trained]})"
    else:
        kinds = [[file for file in others if words[file] & VALIDATION]]
        rule = "instances_*val*.json or annotations/instances_*test*.json"
    if split == "test":
        kinds.append([file for file in others if words[file] & TEST])
    found = next(filter(None, kinds), [])
    found = [file for file in found if "instances" in words[file]] or found
    if len(found) == 1:
        return found[0]
    raise UsageError(
        f"{folder}: the folder must contain exactly one file annotations/{rule}, got "
        f"{[file.name for file in found or files]}. Name the file with --{split}-annotations"
    )


def _named_file(folder: Path, name: str) -> Path:
    for path in (_annotation_folder(folder) / name, folder / name, Path(name)):
        if path.is_file():
            return path
    raise UsageError(
        f"{name}: the annotation file must exist at this path, which may be relative to {folder} or its annotations "
        "folder"
    )


class _Reader:
    """A reader for the content of one annotation file. Its errors name the file and an entry such as images[3]."""

    def __init__(self, folder: Path, file: Path, content: Any, classes: Sequence[str] | None) -> None:
        self.folder, self.file = folder, file
        self.labels: list[int] = []  # the labels of all objects
        self.problems: list[str] = []  # what makes segmentations unusable
        self.entries = {name: self._list(content, name) for name in ("images", "annotations", "categories")}
        categories = self.entries["categories"]
        names = {self._id("categories", i, "id"): self._name(i) for i in range(len(categories))}
        if len(set(names.values())) != len(categories):
            raise UsageError(f"{file}: ids and names of categories must be unique, got {categories}")
        # Numeric ids come before ids that are strings, because Python cannot compare numbers with strings.
        self.names = dict(sorted(names.items(), key=lambda item: (isinstance(item[0], str), item[0])))
        self.classes = list(self.names.values()) if classes is None else list(classes)
        self.label_of = {id: self.classes.index(name) for id, name in self.names.items() if name in self.classes}

    def read(self, pixel_range: PixelRange | None) -> FileData:
        of_image = self._objects_by_image()
        ids = [self._id("images", i, "id") for i in range(len(self.entries["images"]))]
        if not ids:
            raise UsageError(f"{self.file}: a split must have at least one image, got none")
        files = [self._image_file(i) for i in range(len(ids))]
        first: dict[int | str, str] = {}
        for id, path in zip(ids, files):
            if id in first:
                raise UsageError(f"{self.file}: image ids must be unique, got {id!r} for both {first[id]} and {path}")
            first[id] = path
        unknown = next((id for id in of_image if id not in first), None)
        if unknown is not None:
            raise UsageError(f"{self.file}: image_id must be the id of an image in this file, got {unknown!r}")
        path, times = Counter(map(os.path.normpath, files)).most_common(1)[0]
        if times > 1:
            warnings.warn(
                f"{self.file}: each image should have one entry, got {times} entries for {path}", stacklevel=2
            )

        numbers = own_ids = [image["id"] for image in self.entries["images"]]
        original_ids = [None] * len(ids)
        if any(isinstance(id, str) for id in own_ids):
            # Number the images in the sorted order of their ids, because pycocotools sorts detections with equal scores
            # in this order.
            order = sorted(range(len(own_ids)), key=lambda i: (isinstance(own_ids[i], str), own_ids[i]))
            numbers, original_ids = np.argsort(order).tolist(), own_ids
        annotations = [
            self._annotation(i, numbers[i], original_ids[i], files[i], of_image.get(id, [])) for i, id in enumerate(ids)
        ]
        self._report_masks(annotations)
        return FileData(self.classes, annotations, category_ids=self._category_ids(), pixel_range=pixel_range)

    def _annotation(
        self, i: int, image_id: int, original_id: int | str | None, path: str, objects: list[int]
    ) -> Annotation:
        height, width = (self._extent(i, key) for key in ("height", "width"))
        boxes, masks, areas = self._boxes(objects), [], []
        for j, (box_width, box_height) in zip(objects, boxes[:, 2:].tolist()):
            entry = self.entries["annotations"][j]
            mask, area = entry.get("segmentation") or None, _positive(entry.get("area"))
            if mask is not None:
                try:
                    mask, problem = usable_mask(mask, height, width)
                    if problem:
                        self.problems.append(f"annotations[{j}] of {path} has {problem}")
                    if mask:
                        area = area or mask_area(mask, height, width)
                except ValueError:
                    pass  # `FileData.check_masks` raises an error for malformed masks if masks are used
            masks.append(mask)
            areas.append(area or max(0.0, box_width) * max(0.0, box_height))
        boxes[:, 2:] += boxes[:, :2]
        return Annotation(
            image_id,
            path,
            height,
            width,
            boxes,
            np.array([self.labels[j] for j in objects], np.int64),
            np.array([self._is_crowd(j) for j in objects], bool),
            np.array(areas, np.float64),
            masks,
            original_id,
        )

    def _report_masks(self, annotations: list[Annotation]) -> None:
        """Warn about objects without a mask, and set the masks of all annotations to None if no object has a mask."""
        masks = [mask for a in annotations for mask in a.masks or ()]
        without, total = sum(not mask for mask in masks), len(masks)
        if without == total:
            for a in annotations:
                a.masks = None
        text = f"{without} of {total} objects have no mask, so only their boxes are used in training"
        if self.problems:
            named, more = "; ".join(self.problems[:5]), len(self.problems) - 5
            text += f". Unusable parts of segmentations are ignored: {named}" + f"; and {more} more" * (more > 0)
        if self.problems or 0 < without < total:
            warnings.warn(f"{self.file}: {text}", stacklevel=2)

    def _objects_by_image(self) -> dict[int | str, list[int]]:
        """Group the indices of all annotations by image id, and append the label of each annotation to `labels`."""
        of_image = defaultdict(list)
        for j, entry in enumerate(self.entries["annotations"]):
            of_image[self._id("annotations", j, "image_id")].append(j)
            category = self._id("annotations", j, "category_id")
            if category not in self.label_of:
                raise UsageError(
                    f"{self.file}: the class of object {entry.get('id')} must be one of {self.classes}, got "
                    f"{self.names.get(category, category)!r}"
                )
            self.labels.append(self.label_of[category])
        return of_image

    def _category_ids(self) -> list[int | str]:
        """Return the category id of each class. Classes that are not in the file get ids below all ids in the file."""
        ids = {self._id("categories", i, "id"): entry["id"] for i, entry in enumerate(self.entries["categories"])}
        id_of = {label: ids[id] for id, label in self.label_of.items()}
        lowest = min([0, *(id for id in ids if isinstance(id, int))])
        return [id_of.get(label, lowest - 1 - label) for label in range(len(self.classes))]

    def _image_file(self, i: int) -> str:
        name = self._get("images", i, "file_name")
        if not isinstance(name, str) or not name or "\0" in name:
            raise self._wrong("images", i, "file_name", "the name of a file")
        part = re.sub("^instances_", "", self.file.stem, flags=re.IGNORECASE)
        folders = [self.folder / part, self.folder / "images" / part, self.folder / "images", self.folder]
        for spelling in dict.fromkeys([name, name.replace("\\", "/")]):  # paths from Windows have backslashes
            for folder in folders:
                if os.path.isfile(path := os.path.join(folder, spelling)):
                    return path
        raise UsageError(f"{name}: this image of {self.file} must be in one of the folders {list(map(str, folders))}")

    def _boxes(self, objects: list[int]) -> np.ndarray:
        """Return the boxes of objects as [T,4] float64 x, y, width, height."""
        rows = [self._get("annotations", j, "bbox") for j in objects]
        boxes = _numbers(rows)
        if boxes is None or boxes.shape != (len(rows), 4):
            for j, row in zip(objects, map(_numbers, rows)):
                if row is None or row.shape != (4,):
                    raise self._wrong("annotations", j, "bbox", "4 numbers")
            return np.zeros((0, 4))
        return boxes

    def _extent(self, i: int, key: str) -> int:
        value = _numbers(self._get("images", i, key))
        if value is None or value.ndim != 0 or not 1 <= value < 2**31 or value % 1 != 0:
            raise self._wrong("images", i, key, "a positive number of pixels")
        return int(value)

    def _is_crowd(self, j: int) -> bool:
        try:
            return parse_flag(self.entries["annotations"][j].get("iscrowd", 0))
        except ValueError as error:
            raise self._wrong("annotations", j, "iscrowd", "0 or 1") from error

    def _name(self, i: int) -> str:
        name = self._get("categories", i, "name")
        if not isinstance(name, (str, int)) or isinstance(name, bool) or name == "":
            raise self._wrong("categories", i, "name", "a name")
        try:
            str(name).encode()
        except UnicodeEncodeError as error:
            raise self._wrong("categories", i, "name", "text") from error
        return str(name)

    def _id(self, name: str, i: int, key: str) -> int | str:
        """Return an id. A string that contains an integer is converted to that integer."""
        value = self._get(name, i, key)
        if type(value) is int and -(2**63) <= value < 2**63:
            return value
        if not isinstance(value, str):
            raise self._wrong(name, i, key, "a signed integer of at most 64 bits or a string")
        return int(value) if re.fullmatch(r"0|-?[1-9]\d{0,17}", value) else value

    def _list(self, content: Any, name: str) -> list[dict[str, Any]]:
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise UsageError(f"{self.file}: the file must have COCO's instances format, with a list {name!r}")
        for i, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise UsageError(f"{self.file}: {name}[{i}] must be an object, got {shown(entry)}")
        return entries

    def _get(self, name: str, i: int, key: str) -> Any:
        entry = self.entries[name][i]
        if key not in entry:
            raise UsageError(f"{self.file}: {name}[{i}] must have {key!r}, got {shown(entry)}")
        return entry[key]

    def _wrong(self, name: str, i: int, key: str, rule: str) -> UsageError:
        return UsageError(f"{self.file}: {key} must be {rule}, got {shown(self.entries[name][i][key])} in {name}[{i}]")


def _numbers(value: Any) -> np.ndarray | None:
    """Convert numbers, which may be written as strings, to float64, or return None if that is not possible."""
    try:
        return np.array(value, np.float64)
    except (ValueError, TypeError, OverflowError):
        return None


def _positive(value: Any) -> float:
    """Return a positive, finite number unchanged, and 0 for anything else."""
    if type(value) is float:  # the usual case
        return value if 0 < value < math.inf else 0.0
    number = _numbers(value)
    return float(number) if number is not None and number.ndim == 0 and 0 < number < math.inf else 0.0
