"""python -m relops train, eval, predict and propose. Nothing here is imported before a command needs it."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import math
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from relops.training.config import TrainConfig, check_limits

if TYPE_CHECKING:
    from relops.training.data import DetectionData
    from relops.training.prediction import Detector

PACKAGE = Path(__file__).parents[2]
MODEL_OPTIONS = {"backbone": str, "channels": int, "hidden": int}

# In place of the defaults of TrainConfig where the data are shapes; of the options, those that the model has.
SHAPES_DEFAULTS: dict[str, Any] = {
    "options": {
        "backbone": "resnet18-gn-32",
        "channels": 64,
        "hidden": 256,
        "num_samples": 128,
        "sizes": (12, 24, 48, 96, 192),
        "stride": 8,
        "scales": (1.5, 3, 6),
        "min_size": 4,
        "roi": "align",
        "dropout": 0.0,
        "parts": 3,
    },
    "min_size": 128,
    "max_size": 160,
    "cache": True,
    "batch": 4,
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.01,
    "schedule": "cosine",
    "warmup": 50,
    "clip": 10.0,
    "ema": 0.99,
    "checkpoint_every": 100,
    "epochs": 3.5,
}


def add_commands(commands: argparse._SubParsersAction) -> None:
    """To the parser of `python -m relops`: what they set as `run` is called with the arguments."""
    shapes = ", ".join(f"{name} {value}" for name, value in SHAPES_DEFAULTS.items())
    parser = commands.add_parser("train", help="train a detector", epilog=f"Defaults of shapes: {shapes}.")
    types = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        if field.name != "options":
            _add_setting(parser, field, types[field.name])
    for name, kind in MODEL_OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, help="of the model")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="another option of the model; repeatable"
    )
    parser.add_argument("--restart", action="store_true", help="begin anew where the output has a run")
    parser.set_defaults(run=_reports_errors(_train))

    parser = commands.add_parser("eval", help="average precision of a trained detector")
    _add_detector(parser)
    _add_loader(parser)
    parser.add_argument("--proposals", help="file of proposals of the images (Fast R-CNN)")
    parser.add_argument("--voc", action="store_true", help="PASCAL VOC's average precision, too")
    parser.add_argument("--output", type=Path, metavar="FILE", help="for the numbers as JSON")
    parser.set_defaults(run=_reports_errors(_eval))

    parser = commands.add_parser("predict", help="detect objects in images, and draw them")
    _add_detector(parser)
    parser.add_argument(
        "images", nargs="*", type=Path, metavar="IMAGE", help="files, or folders of them; none: those to evaluate on"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for drawings and detections.json")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score (0.5)")
    parser.set_defaults(run=_reports_errors(_predict))

    parser = commands.add_parser("propose", help="write a detector's proposals, to train Fast R-CNN on")
    _add_detector(parser)
    _add_loader(parser)
    parser.add_argument("--split", choices=("train", "test"), required=True)
    parser.add_argument("--train-annotations", metavar="FILE", help="to train on, of coco:DIR (that of the run)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--count", type=int, default=1000, help="of an image, at most (1000)")
    parser.set_defaults(run=_reports_errors(_propose))


def _add_setting(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: Any) -> None:
    """An option, None where it is not given."""
    flag, help = "--" + field.name.replace("_", "-"), field.metadata["help"]
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help)
        return
    kinds = [x for x in typing.get_args(kind) or (kind,) if x in (str, int, float)]
    several = typing.get_origin(kind) is tuple
    shown = " ".join(map(str, field.default)) if several else field.default
    parser.add_argument(
        flag,
        type=kinds[0],
        nargs="+" if several else None,
        choices=field.metadata["choices"],
        help=help if shown in (None, "") else f"{help} ({shown})",
    )


def _add_detector(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "detector", nargs="?", type=Path, metavar="RUN",
        help="folder of a run, or its model.pt or last.pt; where train puts that of --model and --data",
    )  # fmt: skip
    parser.add_argument("--model", default=TrainConfig.model, help="of the run, where RUN is not given")
    parser.add_argument("--data", help="coco:DIR, voc:DIR or shapes[:N] (that of the run)")
    parser.add_argument("--test-annotations", metavar="FILE", help="to evaluate on, of coco:DIR (that of the run)")
    parser.add_argument("--device", help="cpu or cuda (a GPU where there is one)")
    parser.add_argument("--threads", type=int, help="of the CPU")


def _add_loader(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=8, help="images at a time (8)")
    parser.add_argument("--workers", type=int, default=2, help="processes that load images (2)")


def _reports_errors(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Errors of this package are for the user, and end in one line; others are bugs, and keep their traceback."""

    @functools.wraps(command)
    def run(arguments: argparse.Namespace) -> int:
        try:
            return command(arguments)
        except (ValueError, OSError, FloatingPointError, ImportError) as error:
            message = own_message(error)
            if message is None or isinstance(error, BrokenPipeError):
                raise
            message = re.sub(r"\s*\n\s*", " ", message)
            print(f"relops {arguments.command}: {message}", file=sys.stderr)
            return 1 if isinstance(error, FloatingPointError) else 2

    return run


def own_message(error: Exception) -> str | None:
    """The message of an error that this package raised, here or in a process that loads data, or of one of the system's
    that names a file; None of any other."""
    message = str(error)
    where = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    if "Original Traceback" in message:  # as a DataLoader puts what its worker raised
        trace, _, message = message.rstrip().rpartition(f"\n{type(error).__name__}: ")
        where = re.findall(r'File "(.*?)", line', trace)
    if isinstance(error, OSError) and error.filename is not None:
        return message
    return message if where and Path(where[-1]).is_relative_to(PACKAGE) else None


def train_config(arguments: argparse.Namespace) -> TrainConfig:
    """What was given, over the defaults for the data."""
    from relops import models

    names = [field.name for field in dataclasses.fields(TrainConfig)]
    given = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    given |= {"milestones": tuple(given["milestones"])} if "milestones" in given else {}
    options = {name: value for name in MODEL_OPTIONS if (value := getattr(arguments, name)) is not None}
    check_limits(options)
    options |= dict(map(_option, arguments.option))
    settings = TrainConfig(**given)
    if settings.data.partition(":")[0] == "shapes":
        given = {k: v for k, v in SHAPES_DEFAULTS.items() if k not in ("options", "epochs")} | given
        if settings.iterations is None:
            given.setdefault("epochs", SHAPES_DEFAULTS["epochs"])
        if settings.model in models.DETECTORS:
            known = inspect.signature(models.DETECTORS[settings.model]).parameters
            options = {k: v for k, v in SHAPES_DEFAULTS["options"].items() if k in known} | options
    given.setdefault("output", default_folder(settings.model, settings.data))
    return TrainConfig(**given | {"options": options})


def default_folder(model: str, data: str) -> str:
    return os.path.join("runs", f"{model}-" + re.sub(r"[^\w.-]+", "-", data).strip("-"))


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"--option must be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # a string without quotes
        return name, value


def _train(arguments: argparse.Namespace) -> int:
    config = train_config(arguments)
    from relops.training.engine import Interrupted, train
    from relops.training.log import in_words

    is_main = os.environ.get("RANK", "0") == "0"
    try:
        metrics = train(config, arguments.restart)
    except Interrupted as stop:
        if is_main:
            print(f"{stop} in {config.output}. The same command goes on from there", file=sys.stderr)
        return 128 + stop.number
    if is_main:
        print(f"{in_words(metrics)}  in {config.output}")
    return 0


def _load(arguments: argparse.Namespace) -> Detector:
    from relops.training.distributed import device_named
    from relops.training.prediction import load_detector

    check_limits(vars(arguments))
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    path = arguments.detector or Path(default_folder(arguments.model, arguments.data or TrainConfig.data))
    return load_detector(path, device_named(arguments.device))


def _open_data(
    arguments: argparse.Namespace, detector: Detector, split: str, with_masks: bool = False
) -> DetectionData:
    from relops.training.data import open_data

    annotations = vars(arguments).get(f"{split}_annotations")
    if annotations is None and arguments.data is None:
        annotations = getattr(detector, f"{split}_annotations")
    spec = arguments.data or detector.data
    data = open_data(spec, split, detector.classes, annotations, detector.pixel_range)
    data.use_masks(with_masks)
    return data


def _eval(arguments: argparse.Namespace) -> int:
    from relops.training._files import check_file, write_json
    from relops.training._optional import require_all
    from relops.training.data import with_proposals
    from relops.training.distributed import World
    from relops.training.log import without_nan
    from relops.training.prediction import evaluate

    require_all("pillow", "faster-coco-eval")
    detector = _load(arguments)
    data = _open_data(arguments, detector, "test", with_masks=detector.model.uses_masks)
    if detector.uses_proposals:
        if arguments.proposals is None:
            raise ValueError(f"model {detector.name} is given proposals: --proposals must name a file of them")
        data = with_proposals(data, arguments.proposals)
    if arguments.output is not None:
        check_file(arguments.output)
    world = World(0, 1, next(detector.model.parameters()).device)
    sizes = detector.min_size, detector.max_size
    evaluator = evaluate(detector.model, data, arguments.batch, *sizes, world, arguments.workers)
    metrics = evaluator.summarize()
    if arguments.voc:
        metrics |= {f"VOC {name}": value for name, value in evaluator.voc().items()}
    if arguments.output is not None:
        write_json(arguments.output, without_nan(metrics))
    for name, value in metrics.items():
        print(f"{name:32}{'none there' if math.isnan(value) else f'{value:.4f}'}")
    return 0


def _image_files(paths: list[Path]) -> list[str]:
    """The files given, and those in the folders given."""
    from relops.training.data.images import IMAGE_ENDINGS, is_image

    files: list[Path] = []
    for path in paths:
        inside = [path]
        if os.path.isdir(path):
            inside = sorted(path / name for name in os.listdir(path) if is_image(name))
        if not inside:
            raise ValueError(f"{path}: a folder must have images in it, got none of {', '.join(IMAGE_ENDINGS)}")
        files += inside
    return list(map(str, files))


def _predict(arguments: argparse.Namespace) -> int:
    from relops.training._files import check_file, make_folder, write_json
    from relops.training._optional import require_all
    from relops.training.data.images import common_range, read_image
    from relops.training.data.masks import encode_mask
    from relops.training.prediction import detect, draw, image_sample

    require_all("pillow")
    output = arguments.output
    for path in filter(os.path.isdir, arguments.images):
        if os.path.realpath(path) == os.path.realpath(output):
            raise ValueError(
                f"{output}: output must not be a folder of images, where drawings would be images next time"
            )
    detector = _load(arguments)
    if detector.uses_proposals:
        raise ValueError(f"model {detector.name} is given proposals, which image files have not")
    if arguments.images:
        files = _image_files(arguments.images)
        pixel_range = detector.pixel_range or common_range(files)
        read = [
            functools.partial(lambda file: image_sample(read_image(file, pixel_range), file), file) for file in files
        ]
    else:
        data = _open_data(arguments, detector, "test")
        files = [annotation.file for annotation in data.annotations()]
        read = [functools.partial(data.__getitem__, index) for index in range(len(data))]
    by_name: dict[str, str] = {}
    for file in files:
        other = by_name.setdefault(Path(file).name, file)
        if other is not file:
            raise ValueError(f"names of images must differ, got {other} and {file}")
    make_folder(output)
    check_file(output / "detections.json")
    drawings = [output / f"{Path(file).name}.png" for file in files]
    images = set(map(os.path.realpath, files))
    for drawing in drawings:
        if os.path.realpath(drawing) in images:
            raise ValueError(f"{drawing}: output must be a folder where no image is overwritten, got one of the images")

    results, failed = {}, False
    for file, drawing, read_sample in zip(files, drawings, read):
        try:
            sample = read_sample()
        except ValueError as error:
            print(f"relops predict: {error}", file=sys.stderr)
            failed = True
            continue
        found = detect(detector, sample, arguments.threshold)
        draw(detector, sample, found, drawing)
        results[file] = [
            {
                "class": detector.classes[label],
                "score": round(float(score), 4),
                "box": [round(float(x), 2) for x in box],
                **({} if found.masks is None else {"segmentation": encode_mask(found.masks[i])}),
            }
            for i, (label, score, box) in enumerate(zip(found.labels, found.scores, found.boxes))
        ]
        print(f"{file}: {len(found.boxes)}")
    write_json(output / "detections.json", results)
    return 1 if failed else 0


def _propose(arguments: argparse.Namespace) -> int:
    from relops.training._files import check_file
    from relops.training._optional import require_all
    from relops.training.data import save_proposals
    from relops.training.prediction import propose

    require_all("pillow")
    detector = _load(arguments)
    if detector.uses_proposals or not hasattr(detector.model, "propose"):
        raise ValueError(f"model {detector.name} makes no proposals")
    data = _open_data(arguments, detector, arguments.split)
    check_file(arguments.output)
    proposals = propose(detector, data, arguments.count, arguments.batch, arguments.workers)
    own_ids = {annotation.image_id: annotation.own_id for annotation in data.annotations()}
    save_proposals(arguments.output, {own_ids[image_id]: boxes for image_id, boxes in proposals.items()})
    print(f"{sum(map(len, proposals.values()))} proposals of {len(proposals)} images in {arguments.output}")
    return 0
