"""Data sets in the format of Pascal VOC."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from relops.training._samples import Annotation, FileData, clip_boxes, image_size

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def open_voc(folder: str, split: str, classes: Sequence[str] | None) -> FileData:
    """`split` of the data set in `folder`, in either layout:

        Annotations, JPEGImages, ImageSets/Main/*.txt   test is test.txt and train trainval.txt (or train.txt, where it
                                                        is missing); without a test.txt, they are val.txt and train.txt
        train/Annotations, train/Images (or JPEGImages), and the same in test or val; an image is that of the name of
                                                        its XML file

    VOC counts pixels from 1 and its boxes include the last one: x1 = xmin - 1, y1 = ymin - 1, x2 = xmax, y2 = ymax.
    Boxes are clipped to the image; those that nothing is left of, or whose xmax (ymax) is not above xmin (ymin), are
    left out with a warning. Difficult objects are those to ignore.

    Args:
        classes: names; None: those that occur in train, sorted.

    Raises:
        ValueError: naming the file, where one is missing or cannot be read, or an object is of none of the classes.
    """
    root = Path(folder)
    if classes is None:
        names = {name for xml in _files(root, "train")[0] for name, _, _ in _read(xml)[1]}
        classes = sorted(names)
    index = {name: label for label, name in enumerate(classes)}

    xmls, image_folder = _files(root, split)
    images = {path.stem: str(path) for path in sorted(image_folder.iterdir()) if path.suffix.lower() in IMAGES}
    annotations, dropped = [], []
    for image_id, xml in enumerate(xmls):
        if xml.stem not in images:
            raise ValueError(f"{image_folder / xml.stem}.*: the image of {xml} is missing")
        size, objects = _read(xml)
        height, width = size or image_size(images[xml.stem])
        for name, _, _ in objects:
            if name not in index:
                raise ValueError(f"{xml}: an object must be of the classes {list(classes)}, got {name!r}")
        corners = np.array([corners for _, _, corners in objects], np.float32).reshape(-1, 4)
        boxes, proper = clip_boxes(corners - np.float32([1, 1, 0, 0]), height, width)
        # Inclusive coordinates make one pixel of a box without width, which is a slip of the mouse.
        proper &= (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])
        dropped += [str(xml)] * int((~proper).sum())
        boxes = boxes[proper]
        annotations.append(
            Annotation(
                image_id,
                images[xml.stem],
                height,
                width,
                boxes,
                np.array([index[name] for name, _, _ in objects], np.int64)[proper],
                np.array([difficult for _, difficult, _ in objects], bool)[proper],
                (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
            )
        )
    return FileData(classes, annotations, dropped)


def _files(root: Path, split: str) -> tuple[list[Path], Path]:
    """Annotations of a split, and the folder of its images."""
    lists = root / "ImageSets" / "Main"
    if lists.is_dir():
        if split == "train":
            names = ["trainval.txt", "train.txt"] if (lists / "test.txt").is_file() else ["train.txt"]
        else:
            names = ["test.txt", "val.txt"]
        listing = _first(lists, names)
        # Lists of a single class have a second column.
        stems = [line.split()[0] for line in listing.read_text().splitlines() if line.strip()]
        xmls = [root / "Annotations" / f"{stem}.xml" for stem in stems]
        of_split = root
    else:
        of_split = _first(root, ["train"] if split == "train" else ["test", "val"])
        xmls = sorted((of_split / "Annotations").glob("*.xml"))
        listing = of_split / "Annotations" / "*.xml"
    if not xmls:
        raise ValueError(f"{listing}: a split must have at least one image, got none")
    return xmls, _first(of_split, ["JPEGImages", "Images"])


def _first(folder: Path, names: list[str]) -> Path:
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder}: there must be {' or '.join(names)} in it")


def _read(xml: Path) -> tuple[tuple[int, int] | None, list[tuple[str, bool, list[float]]]]:
    """(height, width) if stated, and of every object: class, whether difficult, xmin, ymin, xmax, ymax."""
    try:
        root = ElementTree.parse(xml).getroot()
        size = tuple(int(root.findtext(f"size/{side}", "0")) for side in ("height", "width"))
        objects = []
        for element in root.iter("object"):
            corners = [
                float(element.findtext(f"bndbox/{side}", "missing")) for side in ("xmin", "ymin", "xmax", "ymax")
            ]
            name = element.findtext("name", "").strip()
            objects.append((name, element.findtext("difficult", "0").strip() == "1", corners))
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{xml}: the file must be an annotation of Pascal VOC: {error}") from error
    return size if math.prod(size) > 0 else None, objects
