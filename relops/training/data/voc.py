"""Data sets in the format of Pascal VOC."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from relops.training.data.images import IMAGE_ENDINGS, PixelRange, image_size, is_image
from relops.training.data.samples import Annotation, FileData, parse_flag
from relops.training.errors import UsageError

ENDING = re.compile("(" + "|".join(map(re.escape, (*IMAGE_ENDINGS, ".xml"))) + ")$", re.IGNORECASE)


def open_voc(folder: str, split: str, classes: Sequence[str] | None, pixel_range: PixelRange | None = None) -> FileData:
    """Open `split` of the data set in `folder`, in either layout:

        Annotations, JPEGImages, ImageSets/Main/*.txt   test is test.txt and train trainval.txt (or train.txt, where it
                                                        is missing); without a test.txt, they are val.txt and train.txt
        train/Annotations, train/Images (or JPEGImages), and the same in test or val; an image is that of the name of
                                                        its XML file

    VOC counts pixels from 1 and its boxes include the last one: x1 = xmin - 1, y1 = ymin - 1, x2 = xmax, y2 = ymax.
    For training, boxes are clipped to the image. Boxes that are empty then, or whose xmax (ymax) is not above xmin
    (ymin), are left out with a warning. Difficult objects are ignored.

    Each line of a list is the name of an image, with or without its ending, and repeated names count once. In VOC's
    lists of a single class, -1 after a name says that the image has no such object; these images are left out.

    Args:
        classes: names; None: those that occur in train, sorted.
        pixel_range: see `FileData`.

    Raises:
        UsageError: naming the file, where one is missing or cannot be read, or an object is of none of the classes.
    """
    root = Path(folder)
    if classes is None:
        names = {name for xml in _files(root, "train")[0] for name, _, _ in _read(xml)[1]}
        classes = sorted(names)
    index = {name: label for label, name in enumerate(classes)}

    xmls, image_folder = _files(root, split)
    images: dict[str, list[str]] = defaultdict(list)
    for path in sorted(image_folder.iterdir()):
        if is_image(path.name):
            images[path.stem].append(str(path))
    annotations = []
    for image_id, xml in enumerate(xmls):
        size, objects, named = _read(xml)
        found = [path for path in images[xml.stem] if Path(path).name == named] or images[xml.stem]
        if len(found) != 1:
            got = f"must be one file, got {found}" if found else "is missing"
            raise UsageError(f"{image_folder / xml.stem}.*: the image of {xml} {got}")
        height, width = size or image_size(found[0])
        for name, _, _ in objects:
            if name not in index:
                raise UsageError(f"{xml}: an object must be of the classes {list(classes)}, got {name!r}")
        boxes = np.array([corners for _, _, corners in objects], np.float64).reshape(-1, 4) - [1, 1, 0, 0]
        annotations.append(
            Annotation(
                image_id,
                found[0],
                height,
                width,
                boxes,
                np.array([index[name] for name, _, _ in objects], np.int64),
                np.array([difficult for _, difficult, _ in objects], bool),
                (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1),
            )
        )
    # VOC's coordinates are inclusive: a box whose xmax equals its xmin, an error of annotation, is one pixel wide.
    return FileData(classes, annotations, least_extent=1.0, pixel_range=pixel_range, sources=list(map(str, xmls)))


def _files(root: Path, split: str) -> tuple[list[Path], Path]:
    """Return the annotations of a split, and the folder of its images."""
    lists = root / "ImageSets" / "Main"
    if lists.is_dir():
        if split == "train":
            names = ["trainval.txt", "train.txt"] if (lists / "test.txt").is_file() else ["train.txt"]
        else:
            names = ["test.txt", "val.txt"]
        listing = _first(lists, names)
        xmls = _listed(listing, root / "Annotations")
        of_split = root
    else:
        of_split = _first(root, ["train"] if split == "train" else ["test", "val"])
        files = (of_split / "Annotations").glob("*")
        xmls = sorted(x for x in files if x.suffix.lower() == ".xml" and not x.name.startswith("._"))
        listing = of_split / "Annotations" / "*.xml"
    if not xmls:
        raise UsageError(f"{listing}: a split must have at least one image, got none")
    return xmls, _first(of_split, ["JPEGImages", "Images"])


def _listed(listing: Path, folder: Path) -> list[Path]:
    """Return the annotations that a list of ImageSets names, each once, in its order."""
    try:
        lines = listing.read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"{listing}: the file must be a list of names: {error}") from error
    xmls: dict[Path, None] = {}
    for line in filter(None, map(str.strip, lines)):
        number = re.search(r"\s+([+-]?[01])\Z", line)
        name, flag = (line[: number.start()], number[1]) if number else (line, "")
        # The number may be a part of the name, and so may the ending.
        stems = [stem for text in (line, name) for stem in (text, ENDING.sub("", text))]
        found = next((i for i, stem in enumerate(stems) if os.path.isfile(folder / f"{stem}.xml")), None)
        if found is None:
            raise UsageError(f"{listing}: a name must be that of a file in {folder}, got {line!r}")
        if found < 2 or flag != "-1":
            xmls[folder / f"{stems[found]}.xml"] = None
    return list(xmls)


def _first(folder: Path, names: list[str]) -> Path:
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise UsageError(f"{folder}: there must be {' or '.join(names)} in it")


def _read(xml: Path) -> tuple[tuple[int, int] | None, list[tuple[str, bool, list[float]]], str]:
    """Return (height, width) if stated; of every object its class, whether it is difficult, and xmin, ymin, xmax, ymax;
    and the name of the image's file, or ""."""
    try:
        root = ElementTree.parse(xml).getroot()
        if root.tag != "annotation":
            raise UsageError(f"the root must be <annotation>, got <{root.tag}>")
        for element in root.iter():
            # Elements with other names are passed over, and these two would be missed.
            for name in ("object", "difficult"):
                if element.tag != name and element.tag.rpartition("}")[2].lower() == name:
                    raise UsageError(f"the name of an element must be <{name}>, got <{element.tag}>")
            if element.tag not in ("object", "part") and element.find("bndbox") is not None:
                raise UsageError(f"<bndbox> must be within <object>, got it within <{element.tag}>")
        height, width = (_whole(root.findtext(f"size/{side}") or "0", side) for side in ("height", "width"))
        objects = []
        for element in root.iter("object"):
            corners = []
            for side in ("xmin", "ymin", "xmax", "ymax"):
                text = element.findtext(f"bndbox/{side}")
                if text is None:
                    raise UsageError(f"an object must have bndbox/{side}")
                corners.append(float(text))
            name = element.findtext("name", "").strip()
            if not name:
                raise UsageError("an object must have a name, got none")
            try:
                difficult = parse_flag(element.findtext("difficult", "").strip() or "0")
            except ValueError as error:
                raise UsageError(f"difficult {error}") from error
            objects.append((name, difficult, corners))
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
        raise UsageError(f"{xml}: the file must be an annotation of Pascal VOC: {error}") from error
    return (height, width) if min(height, width) > 0 else None, objects, root.findtext("filename", "").strip()


def _whole(text: str, side: str) -> int:
    number = float(text)
    if not number.is_integer():
        raise UsageError(f"{side} must be a whole number of pixels, got {text!r}")
    return int(number)
