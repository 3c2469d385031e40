"""The settings of a run, which are the options of `python -m relops train`."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from relops.training.errors import UsageError
from relops.training.optimization import OPTIMIZERS, SCHEDULES

# Settings that may change when a run goes on: its results do not depend on them, but for rounding.
FREE = ("output", "epochs", "cache", "workers", "device", "threads", "eval_every", "checkpoint_every", "log_every")

# The least and the largest value of numbers. The largest ones are what C's integers hold, and what a process can start.
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


def check_limits(values: Mapping[str, Any], **others: tuple[int, int]) -> None:
    """Check numbers among settings or arguments of a command, by name; None stands for one that is not given."""
    for name, (least, most) in (LIMITS | others).items():
        value = values.get(name)
        if value is not None and not least <= value <= most:
            bound = "finite" if value == math.inf else f"at most {most}" if value > most else f"at least {least}"
            raise UsageError(f"{name} must be {bound}, got {value}")


def setting(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run, each with its help. The defaults suit images like those of COCO."""

    data: str = setting("shapes", "to train on and to evaluate on: coco:DIR, voc:DIR, or shapes[:N]")
    train_annotations: str | None = setting(None, "file of annotations to train on (coco:DIR; found by its name)")
    test_annotations: str | None = setting(None, "file of annotations to evaluate on (coco:DIR; found by its name)")
    output: str = setting("", "folder of all files of the run (runs/MODEL-DATA)")
    model: str = setting("faster_rcnn_fpn", "which detector")
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    backbone_weights: str | None = setting(
        None, "file with the state_dict of a classifier to begin with, as torchvision has it"
    )
    proposals: str | None = setting(None, "file of proposals of the images to train on (Fast R-CNN)")
    test_proposals: str | None = setting(None, "file of proposals of the images to evaluate on (Fast R-CNN)")

    iterations: int | None = setting(None, "length of the run")
    epochs: float | None = setting(None, "length of the run, where --iterations is not given (12)")
    batch: int = setting(2, "images of an iteration, in each process")
    seed: int = setting(0, "random seed of initial weights, order of images, augmentation and sampling")

    optimizer: str = setting("sgd", "how gradients become steps", OPTIMIZERS)
    lr: float = setting(0.0025, "learning rate; with sgd, about 0.02 for 16 images an iteration over all processes")
    weight_decay: float = setting(1e-4, "weight decay of all parameters but vectors, which are biases and scales")
    momentum: float = setting(0.9, "momentum of sgd")
    backbone_lr: float = setting(1.0, "learning rate of the backbone, as a factor of --lr")
    schedule: str = setting("step", "how the learning rate changes over the run", SCHEDULES)
    milestones: tuple[float, ...] = setting((0.67, 0.89), "fractions of the run at which a step is down to a tenth")
    warmup: int = setting(500, "iterations over which the learning rate rises at first")
    clip: float | None = setting(None, "largest norm of the gradient; longer ones are shortened to it")
    ema: float | None = setting(None, "decay of a moving average of weights, which is then what is evaluated")
    amp: bool = setting(False, "autocast to bfloat16")
    channels_last: bool = setting(False, "memory format of images and convolutions")

    min_size: int = setting(800, "shorter side of images")
    max_size: int = setting(1333, "longer side of images, at most")
    vertical_flip: bool = setting(False, "flip images upside down, too")
    cache: bool = setting(False, "keep resized images in memory, in each process that loads them")

    workers: int = setting(2, "processes that load images, for each process that trains")
    threads: int | None = setting(None, "threads of the CPU, in each process")
    device: str | None = setting(None, "cpu or cuda (a GPU where there is one)")
    eval_every: int | None = setting(None, "iterations from one evaluation to the next (at the end only)")
    checkpoint_every: int = setting(500, "iterations from one checkpoint to the next")
    log_every: int = setting(20, "iterations from one line of the log to the next")

    def __post_init__(self) -> None:
        for name in ("lr", "epochs", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} must be positive, got {value}")
        check_limits(vars(self), max_size=(self.min_size, COUNT[1]))
        if not all(0 <= milestone <= 1 for milestone in self.milestones):
            raise UsageError(f"milestones must be in [0,1], got {self.milestones}")
        if self.iterations is not None and self.epochs is not None:
            raise UsageError(f"iterations and epochs exclude each other, got {self.iterations} and {self.epochs}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise UsageError(f"ema must be in [0,1), got {self.ema}")
        for name, choices in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    def determining(self) -> dict[str, Any]:
        """Return the settings that the results depend on."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in FREE}
