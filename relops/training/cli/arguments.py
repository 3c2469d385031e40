"""The arguments that eval, predict and propose have in common, and the detector and data that they name."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import torch

from relops.training.config import TrainConfig, check_limits
from relops.training.data import DetectionData, open_data
from relops.training.detector import Detector, load_detector
from relops.training.distributed import device_named


def default_folder(model: str, data: str) -> str:
    """Return the folder that the files of a run are in where none is named."""
    return os.path.join("runs", f"{model}-" + re.sub(r"[^\w.-]+", "-", data).strip("-"))


def add_detector(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `load` and `open_split` read."""
    parser.add_argument(
        "detector",
        nargs="?",
        type=Path,
        metavar="RUN",
        help="folder of a run, or its model.pt or last.pt; where train puts that of --model and --data",
    )
    parser.add_argument("--model", default=TrainConfig.model, help="model of the run, where RUN is not given")
    parser.add_argument("--data", help="coco:DIR, voc:DIR or shapes[:N] (that of the run)")
    parser.add_argument("--test-annotations", metavar="FILE", help="to evaluate on, of coco:DIR (that of the run)")
    parser.add_argument("--device", help="cpu or cuda (a GPU where there is one)")
    parser.add_argument("--threads", type=int, help="threads of the CPU")


def add_loader(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of those that take images in batches."""
    parser.add_argument("--batch", type=int, default=8, help="images at a time (8)")
    parser.add_argument("--workers", type=int, default=2, help="processes that load images (2)")


def load(arguments: argparse.Namespace) -> Detector:
    """Check the numbers among the arguments, and load the detector."""
    check_limits(vars(arguments))
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    path = arguments.detector or Path(default_folder(arguments.model, arguments.data or TrainConfig.data))
    return load_detector(path, device_named(arguments.device))


def open_split(
    arguments: argparse.Namespace, detector: Detector, split: str, with_masks: bool = False
) -> DetectionData:
    """Open the data that the arguments name, or else those of the detector's run, by the detector's classes."""
    annotations = vars(arguments).get(f"{split}_annotations")
    if annotations is None and arguments.data is None:
        annotations = getattr(detector, f"{split}_annotations")
    spec = arguments.data or detector.data
    data = open_data(spec, split, detector.classes, annotations, detector.pixel_range)
    data.use_masks(with_masks)
    return data
