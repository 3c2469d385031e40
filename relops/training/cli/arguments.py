"""The parser class for all commands, and the arguments that eval, predict and propose have in common."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from relops.training.config import TrainConfig, check_limits
from relops.training.data import DetectionData, open_data
from relops.training.detector import Detector, load_detector
from relops.training.distributed import device_named


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose help may depend on the other arguments of the command.

    Attributes:
        make_epilog: a function that takes the arguments of the command and returns the text at the end of the help, or
            None for no such text.
    """

    make_epilog: Callable[[Sequence[str]], str] | None = None
    _arguments: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments, and keep them for `format_help`, which is called before parsing ends if --help is given."""
        self._arguments = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        """Return the help of the command."""
        if self.make_epilog is not None:
            self.epilog = self.make_epilog(self._arguments)
        return super().format_help()


def add_command(
    commands: argparse._SubParsersAction[CommandParser], name: str, help: str, **options: Any
) -> CommandParser:
    """Add a command to the parser. The description of the command is `help` as a sentence, unless `options` has one."""
    options = {"description": f"{help[0].upper()}{help[1:]}."} | options
    return commands.add_parser(name, help=help, **options)


def default_folder(model: str, data: str) -> str:
    """Return the default output folder of a run with these settings."""
    return os.path.join("runs", f"{model}-" + re.sub(r"[^\w.-]+", "-", data).strip("-"))


def add_detector(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `load` and `open_split` read."""
    parser.add_argument(
        "detector",
        nargs="?",
        type=Path,
        metavar="RUN",
        help="folder of a run, or the file model.pt or last.pt in it (default: runs/MODEL-DATA, the folder that train "
        "creates for the same --model and --data)",
    )
    parser.add_argument(
        "--model",
        default=TrainConfig.model,
        help=f"MODEL in the default of RUN; ignored if RUN is given (default: {TrainConfig.model})",
    )
    parser.add_argument(
        "--data",
        help="data set: coco:DIR, voc:DIR, shapes[:N] or rotated-shapes[:N] (default: the data set of the run)",
    )
    parser.add_argument(
        "--test-annotations",
        metavar="FILE",
        help="annotation file of the test images of coco:DIR (default: the file that the run used or, if --data is "
        "given, the file whose name contains val or test)",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if one is available)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="number of CPU threads (default: the number that torch chooses)"
    )


def add_loader(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the commands that load images in batches."""
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="number of images per batch (default: 8)")
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N", help="number of processes that load images (default: 2)"
    )


def load(arguments: argparse.Namespace) -> Detector:
    """Check the numeric arguments, and load the detector."""
    check_limits(vars(arguments))
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    path = arguments.detector or Path(default_folder(arguments.model, arguments.data or TrainConfig.data))
    return load_detector(path, device_named(arguments.device))


def open_split(
    arguments: argparse.Namespace, detector: Detector, split: str, with_masks: bool = False
) -> DetectionData:
    """Open the data set given by --data, or else the data set of the run, with the classes of the detector."""
    annotations = vars(arguments).get(f"{split}_annotations")
    if annotations is None and arguments.data is None:
        annotations = getattr(detector, f"{split}_annotations")
    spec = arguments.data or detector.data
    data = open_data(spec, split, detector.classes, annotations, detector.pixel_range)
    data.use_masks(with_masks)
    return data
