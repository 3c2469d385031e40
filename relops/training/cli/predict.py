"""The command `python -m relops predict`."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from relops.training._files import check_file, make_folder, write_json
from relops.training._optional import require_all
from relops.training.cli.arguments import add_command, add_detector, load, open_split
from relops.training.data import Sample
from relops.training.data.images import IMAGE_ENDINGS, PixelRange, common_range, is_image, read_image
from relops.training.data.masks import encode_mask
from relops.training.data.samples import image_sample
from relops.training.detector import Detector
from relops.training.errors import UsageError
from relops.training.prediction import Objects, detect, draw


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    parser = add_command(commands, "predict", "detect objects in images and draw them")
    add_detector(parser)
    parser.add_argument(
        "images",
        nargs="*",
        type=Path,
        metavar="IMAGE",
        help="image file, or folder of images (default: the test images of the data set)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for drawings and detections.json (required)"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.5, metavar="X", help="minimum score of a detection (default: 0.5)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Detect objects in images, and write drawings and detections.json.

    Images that cannot be read are reported and skipped. In this case, the exit status is 1.
    """
    require_all("pillow")
    output: Path = arguments.output
    for path in filter(os.path.isdir, arguments.images):
        if os.path.realpath(path) == os.path.realpath(output):
            raise UsageError(
                f"{output}: output must not be a folder of input images, because the next run would also read the "
                "drawings"
            )
    detector = load(arguments)
    if detector.model.uses_proposals:
        raise UsageError(f"model {detector.name} needs proposals, but predict does not accept any")
    images = _images(arguments, detector)
    drawings = _drawings(output, [file for file, _ in images])

    results = {}
    for (file, read), drawing in zip(images, drawings):
        try:
            sample = read()
        except UsageError as error:
            print(f"relops predict: {error}", file=sys.stderr)
            continue
        found = detect(detector, sample, arguments.threshold)
        draw(detector, sample, found, drawing)
        results[file] = _json_objects(found, detector.classes)
        print(f"{file}: {len(found.boxes)}")
    write_json(output / "detections.json", results)
    return 0 if len(results) == len(images) else 1


def _images(arguments: argparse.Namespace, detector: Detector) -> list[tuple[str, Callable[[], Sample]]]:
    """Return the path of each image and a function that reads the image.

    The images are those given as arguments or, if there are none, the test images of the data set.
    """
    if not arguments.images:
        data = open_split(arguments, detector, "test")
        return [(a.file, functools.partial(data.__getitem__, i)) for i, a in enumerate(data.annotations())]
    files = _image_files(arguments.images)
    pixel_range = detector.pixel_range or common_range(files)
    return [(file, functools.partial(_read, file, pixel_range)) for file in files]


def _image_files(paths: list[Path]) -> list[str]:
    """Return the given files, and all image files in the given folders."""
    files: list[Path] = []
    for path in paths:
        expanded = [path]
        if os.path.isdir(path):
            expanded = sorted(path / name for name in os.listdir(path) if is_image(name))
        if not expanded:
            raise UsageError(f"{path}: a folder must contain images, got no file of type {', '.join(IMAGE_ENDINGS)}")
        files += expanded
    return list(map(str, files))


def _read(file: str, pixel_range: PixelRange | None) -> Sample:
    return image_sample(read_image(file, pixel_range), file)


def _drawings(output: Path, files: list[str]) -> list[Path]:
    """Create the output folder, and return the path of each image's drawing.

    Raises:
        UsageError: If two images have the same name, or if a drawing would overwrite an image.
    """
    by_name: dict[str, str] = {}
    for file in files:
        other = by_name.setdefault(Path(file).name, file)
        if other is not file:
            raise UsageError(f"no two images may have the same file name, got {other} and {file}")
    make_folder(output)
    check_file(output / "detections.json")
    drawings = [output / f"{Path(file).name}.png" for file in files]
    images = set(map(os.path.realpath, files))
    for drawing in drawings:
        if os.path.realpath(drawing) in images:
            raise UsageError(f"{drawing}: output must be a folder in which no input image is overwritten")
    return drawings


def _json_objects(found: Objects, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the detected objects in the format of detections.json."""
    return [
        {
            "class": classes[label],
            "score": round(float(score), 4),
            "box": [round(float(x), 2) for x in box],
            **({} if found.masks is None else {"segmentation": encode_mask(found.masks[i])}),
        }
        for i, (label, score, box) in enumerate(zip(found.labels, found.scores, found.boxes))
    ]
