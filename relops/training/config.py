"""The settings of a run, which are the arguments of `python -m relops train`."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from relops.training.errors import UsageError
from relops.training.optimization import OPTIMIZERS, SCHEDULES

EPOCHS = 12  # the length of a run if neither iterations nor epochs are given

# Settings that may be changed when a run resumes. They do not affect the results, except for rounding errors.
FREE = ("output", "epochs", "cache", "workers", "device", "threads", "eval_every", "checkpoint_every", "log_every")

# The minimum and maximum of each numeric setting or argument. The maxima are the largest values of C's number types,
# and 4096 for the number of threads or processes.
COUNT = 1, 2**31 - 1
FINITE = 0, sys.float_info.max
LIMITS = {
    "iterations": COUNT,
    "batch": COUNT,
    "min_size": COUNT,
    "eval_every": COUNT,
    "checkpoint_every": COUNT,
    "log_every": COUNT,
    "count": COUNT,
    "warmup": (0, 2**31 - 1),
    "seed": (0, 2**63 - 1),
    "threads": (1, 4096),
    "workers": (0, 4096),
    "epochs": FINITE,
    "lr": FINITE,
    "clip": FINITE,
    "weight_decay": FINITE,
    "momentum": FINITE,
    "backbone_lr": FINITE,
    "channels": COUNT,
    "hidden": COUNT,
    "threshold": (0, 1),
}


def check_limits(values: Mapping[str, Any], **extra_limits: tuple[int, int]) -> None:
    """Raise UsageError if a numeric setting or argument is outside its limits. None is always allowed."""
    for name, (minimum, maximum) in (LIMITS | extra_limits).items():
        value = values.get(name)
        if value is not None and not minimum <= value <= maximum:
            bound = (
                "finite" if value == math.inf else f"at most {maximum}" if value > maximum else f"at least {minimum}"
            )
            raise UsageError(f"{name} must be {bound}, got {value}")


def setting(
    group: str,
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    default_text: str | None = None,
    metavar: str | None = None,
) -> Any:
    """Return a dataclass field for one setting.

    Args:
        group: the heading of `train --help` under which the setting is listed.
        default: the default value.
        help: the description of the setting.
        choices: the allowed values, or None for any.
        default_text: a phrase that describes the default in the help, or None to print the default value.
        metavar: the name of the value in the help, or None to derive the name from the type.
    """
    metadata = {"group": group, "help": help, "choices": choices, "default_text": default_text, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run with their help texts. The defaults suit images like those of COCO."""

    data: str = setting(
        "data",
        "shapes",
        "data set to train and evaluate on: coco:DIR, voc:DIR, shapes[:N] for N drawn images, or rotated-shapes[:N] "
        "for N drawn images of rotated and stretched shapes",
    )
    train_annotations: str | None = setting(
        "data",
        None,
        "annotation file of the training images of coco:DIR",
        default_text="the file whose name contains train",
        metavar="FILE",
    )
    test_annotations: str | None = setting(
        "data",
        None,
        "annotation file of the test images of coco:DIR",
        default_text="the file whose name contains val or test",
        metavar="FILE",
    )
    output: str = setting("run", "", "folder for all files of the run", default_text="runs/MODEL-DATA", metavar="DIR")
    model: str = setting("model", "faster_rcnn_fpn", "detector to train, one of the models listed below")
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    backbone_weights: str | None = setting(
        "model",
        None,
        "file with the state_dict of a torchvision or relops classifier, from which the backbone is initialized",
        default_text="random weights",
        metavar="FILE",
    )
    proposals: str | None = setting(
        "data",
        None,
        "file with proposals for the training images; only fast_rcnn needs this file",
        default_text="none",
        metavar="FILE",
    )
    test_proposals: str | None = setting(
        "data",
        None,
        "file with proposals for the test images; only fast_rcnn needs this file",
        default_text="none",
        metavar="FILE",
    )

    iterations: int | None = setting(
        "optimization", None, "number of training iterations", default_text="determined by --epochs"
    )
    epochs: float | None = setting(
        "optimization", None, "number of passes over the training images", default_text=str(EPOCHS)
    )
    batch: int = setting("optimization", 2, "number of images per iteration in each process")
    seed: int = setting("run", 0, "random seed for initial weights, image order, augmentation and sampling")

    optimizer: str = setting("optimization", "sgd", "optimizer", OPTIMIZERS)
    lr: float = setting(
        "optimization", 0.0025, "learning rate; with sgd, about 0.02 suits 16 images per iteration over all processes"
    )
    weight_decay: float = setting(
        "optimization", 1e-4, "weight decay of all parameters except vectors (biases and scales)"
    )
    momentum: float = setting("optimization", 0.9, "momentum of sgd")
    backbone_lr: float = setting("optimization", 1.0, "learning rate of the backbone as a multiple of --lr")
    schedule: str = setting("optimization", "step", "learning rate schedule", SCHEDULES)
    milestones: tuple[float, ...] = setting(
        "optimization",
        (0.67, 0.89),
        "fractions of the run after which the step schedule divides the learning rate by 10",
    )
    warmup: int = setting("optimization", 500, "number of iterations at the start during which the learning rate rises")
    clip: float | None = setting("optimization", None, "maximum norm of the gradient", default_text="no clipping")
    ema: float | None = setting(
        "optimization",
        None,
        "decay of a moving average of the weights; the average is then evaluated and saved instead of the weights",
        default_text="no average",
    )
    amp: bool = setting("optimization", False, "autocast to bfloat16")
    channels_last: bool = setting(
        "optimization", False, "use the channels_last memory format for images and convolutions"
    )

    min_size: int = setting("images", 800, "length in pixels to which the shorter side of an image is resized")
    max_size: int = setting("images", 1333, "maximum length in pixels of the longer side of a resized image")
    vertical_flip: bool = setting("images", False, "flip half of the training images upside down")
    cache: bool = setting("images", False, "keep resized images in the memory of each process that loads them")

    workers: int = setting("run", 2, "number of processes that load images for each training process")
    threads: int | None = setting(
        "run", None, "number of CPU threads in each process", default_text="the number that torch chooses"
    )
    device: str | None = setting("run", None, "cpu, cuda or cuda:N", default_text="a GPU if one is available")
    eval_every: int | None = setting(
        "run", None, "number of iterations between evaluations", default_text="evaluate only at the end"
    )
    checkpoint_every: int = setting("run", 500, "number of iterations between checkpoints")
    log_every: int = setting("run", 20, "number of iterations between lines of the log")

    def __post_init__(self) -> None:
        for name in ("lr", "epochs", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} must be positive, got {value}")
        check_limits(vars(self), max_size=(self.min_size, COUNT[1]))
        if not all(0 <= milestone <= 1 for milestone in self.milestones):
            raise UsageError(f"milestones must be in [0,1], got {self.milestones}")
        if self.iterations is not None and self.epochs is not None:
            raise UsageError(f"iterations and epochs must not both be given, got {self.iterations} and {self.epochs}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise UsageError(f"ema must be in [0,1), got {self.ema}")
        for name, choices in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    def determining(self) -> dict[str, Any]:
        """Return the settings on which the results depend."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in FREE}
