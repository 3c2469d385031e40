"""Data sets in the Pascal VOC format."""

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
    """Open a split of the data set in a folder.

    The folder may have one of two layouts:

    - The folders Annotations and JPEGImages, and lists of images in ImageSets/Main. If test.txt exists, it lists the
      images of "test", and trainval.txt (or train.txt, if trainval.txt is missing) lists the images of "train".
      Otherwise val.txt lists the images of "test", and train.txt lists the images of "train".
    - The folders train/Annotations and train/Images (or train/JPEGImages), and the same folders in test or val.

    An image and its XML file have the same name except for the extension.

    VOC counts pixels from 1, and xmax and ymax are the last pixels inside a box. Therefore x1 = xmin - 1,
    y1 = ymin - 1, x2 = xmax and y2 = ymax. For training, boxes are clipped to the image. Boxes that are empty after
    clipping, and boxes with xmax <= xmin or ymax <= ymin, are left out with a warning. Difficult objects are ignored.

    Each line of a list is the name of an image, with or without its extension. Repeated names count once. In VOC's
    lists for a single class, -1 after the name of an image means that the image has no object of the class. Such images
    are left out.

    Args:
        folder: the folder of the data set.
        split: "train" or "test".
        classes: class names in the order of their labels. None means the sorted class names that occur in "train".
        pixel_range: the pixel values that are mapped to 0 and 255 in grayscale images with more than 8 bits per pixel.
            None means that the range is determined from a sample of the images.

    Raises:
        UsageError: If a file is missing or cannot be read, or if an object belongs to none of the classes. The message
            names the file.
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
            problem = f"must be exactly one file, got {found}" if found else "is missing"
            raise UsageError(f"{image_folder / xml.stem}.*: the image of {xml} {problem}")
        height, width = size or image_size(found[0])
        for name, _, _ in objects:
            if name not in index:
                raise UsageError(f"{xml}: the class of an object must be one of {list(classes)}, got {name!r}")
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
    # VOC's coordinates are inclusive, so a box with xmax = xmin is one pixel wide. Such a box is an annotation error.
    # With a `min_extent` of 1, it is left out.
    return FileData(classes, annotations, min_extent=1.0, pixel_range=pixel_range, sources=list(map(str, xmls)))


def _files(root: Path, split: str) -> tuple[list[Path], Path]:
    """Return the annotation files of a split, and the folder of its images."""
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
    """Return the annotation files of the images that a file in ImageSets lists, in order and without duplicates."""
    try:
        lines = listing.read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"{listing}: the file must be a text file with image names: {error}") from error
    xmls: dict[Path, None] = {}
    for line in filter(None, map(str.strip, lines)):
        number = re.search(r"\s+([+-]?[01])\Z", line)
        name, flag = (line[: number.start()], number[1]) if number else (line, "")
        # The end of an image's name may look like a flag or a file extension, so longer names are tried first.
        stems = [stem for text in (line, name) for stem in (text, ENDING.sub("", text))]
        found = next((i for i, stem in enumerate(stems) if os.path.isfile(folder / f"{stem}.xml")), None)
        if found is None:
            raise UsageError(f"{listing}: each name must have an annotation file in {folder}, got {line!r}")
        if found < 2 or flag != "-1":
            xmls[folder / f"{stems[found]}.xml"] = None
    return list(xmls)


def _first(folder: Path, names: list[str]) -> Path:
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise UsageError(f"{folder}: the folder must contain {' or '.join(names)}")


def _read(xml: Path) -> tuple[tuple[int, int] | None, list[tuple[str, bool, list[float]]], str]:
    """Read an annotation file.

    Returns:
        The (height, width) of the image, or None if the annotation file does not contain them; a list with a tuple for
        each object (class name, whether the object is difficult, [xmin, ymin, xmax, ymax]); and the name of the image
        file, or "" if the annotation file does not contain it.
    """
    try:
        root = ElementTree.parse(xml).getroot()
        if root.tag != "annotation":
            raise UsageError(f"the root must be <annotation>, got <{root.tag}>")
        for element in root.iter():
            # The code below skips elements with unknown names, so misspellings of these two names must be errors.
            for name in ("object", "difficult"):
                if element.tag != name and element.tag.rpartition("}")[2].lower() == name:
                    raise UsageError(f"the name of an element must be <{name}>, got <{element.tag}>")
            if element.tag not in ("object", "part") and element.find("bndbox") is not None:
                raise UsageError(f"<bndbox> must be inside <object>, got <{element.tag}>")
        height, width = (_whole(root.findtext(f"size/{side}") or "0", side) for side in ("height", "width"))
        objects = []
        for element in root.iter("object"):
            corners = []
            for side in ("xmin", "ymin", "xmax", "ymax"):
                text = element.findtext(f"bndbox/{side}")
                if text is None:
                    raise UsageError(f"an object must have an element bndbox/{side}")
                corners.append(float(text))
            name = element.findtext("name", "").strip()
            if not name:
                raise UsageError("an object must have a name, got none")
            try:
                difficult = parse_flag(element.findtext("difficult", "").strip() or "0")
            except ValueError as error:
                raise UsageError(f"difficult {error}") from error
            objects.append((name, difficult, corners))
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: unknown encoding
        raise UsageError(f"{xml}: the file must be a Pascal VOC annotation: {error}") from error
    return (height, width) if min(height, width) > 0 else None, objects, root.findtext("filename", "").strip()


def _whole(text: str, side: str) -> int:
    number = float(text)
    if not number.is_integer():
        raise UsageError(f"{side} must be a whole number of pixels, got {text!r}")
    return int(number)
