"""Data sets in the format of COCO."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relops.training._samples import Annotation, FileData, clip_boxes


def open_coco(folder: str, split: str, classes: Sequence[str] | None) -> FileData:
    """`split` of the data set in `folder`.

    Train is annotations/instances_*train*.json, test instances_*val*.json or else instances_*test*.json. The images of
    instances_train2017.json are looked for in train2017, images/train2017, images and `folder` itself. Objects with
    iscrowd are those to ignore. There are masks if every object of the file has a segmentation.

    Args:
        classes: names, which labels are numbered by; None: the categories of the file by ascending id.

    Raises:
        ValueError: naming the file, where one is missing or cannot be read, or an object is of none of the classes.
    """
    file = _annotation_file(Path(folder), split)
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: the file must be JSON: {error}") from error
    try:
        return _read(Path(folder), file, content, classes)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: the file must be COCO's instances: {type(error).__name__} {error}") from error


def _annotation_file(folder: Path, split: str) -> Path:
    files = sorted((folder / "annotations").glob("instances_*.json"))
    for word in ["train"] if split == "train" else ["val", "test"]:
        found = [file for file in files if word in file.name]
        if len(found) > 1:
            raise ValueError(f"{folder / 'annotations'}: one file must be the split, got {[f.name for f in found]}")
        if found:
            return found[0]
    pattern = "*train*.json" if split == "train" else "*val*.json or instances_*test*.json"
    raise ValueError(f"{folder}: there must be annotations/instances_{pattern} in it")


def _read(folder: Path, file: Path, content: dict[str, Any], classes: Sequence[str] | None) -> FileData:
    categories = sorted(content["categories"], key=lambda category: category["id"])
    names = {category["id"]: category["name"] for category in categories}
    classes = list(names.values()) if classes is None else list(classes)
    label_of = {category: classes.index(name) for category, name in names.items() if name in classes}
    id_of = {label: category for category, label in label_of.items()}
    if len(set(names.values())) != len(categories):
        raise ValueError(f"{file}: ids and names of categories must differ, got {categories}")

    objects = defaultdict(list)
    for item in content["annotations"]:
        objects[item["image_id"]].append(item)
        if item["category_id"] not in label_of:
            got = names.get(item["category_id"], item["category_id"])
            raise ValueError(f"{file}: object {item['id']} must be of the classes {classes}, got {got!r}")
    has_masks = bool(objects) and all(item.get("segmentation") for of_image in objects.values() for item in of_image)

    part = file.stem.removeprefix("instances_")
    folders = [folder / part, folder / "images" / part, folder / "images", folder]
    annotations, dropped = [], []
    for image in content["images"]:
        path = next((p for f in folders if os.path.isfile(p := os.path.join(f, image["file_name"]))), None)
        if path is None:
            raise ValueError(f"{image['file_name']}: the image of {file} must be in one of {[str(f) for f in folders]}")
        height, width, of_image = image["height"], image["width"], objects.pop(image["id"], [])
        try:
            boxes = np.array([item["bbox"] for item in of_image], np.float64).reshape(len(of_image), 4)
        except ValueError as error:
            raise ValueError(f"{file}: bbox must be 4 numbers, of image {image['id']}: {error}") from error
        boxes[:, 2:] += boxes[:, :2]
        boxes, proper = clip_boxes(boxes, height, width)
        dropped += [path] * int((~proper).sum())
        kept = [item for item, keep in zip(of_image, proper) if keep]
        boxes = boxes[proper]
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        annotations.append(
            Annotation(
                image["id"],
                path,
                height,
                width,
                boxes,
                np.array([label_of[item["category_id"]] for item in kept], np.int64),
                np.array([item.get("iscrowd", 0) for item in kept], bool),
                np.array([item.get("area", area) for item, area in zip(kept, areas)], np.float32),
                [item["segmentation"] for item in kept] if has_masks else None,
            )
        )
    if objects:
        raise ValueError(f"{file}: objects must be of the file's images, got image_id {next(iter(objects))}")
    if not annotations:
        raise ValueError(f"{file}: a split must have at least one image, got none")
    category_ids = [id_of.get(label, -1 - label) for label in range(len(classes))]  # below 0: not in this file
    return FileData(classes, annotations, dropped, has_masks, category_ids)
