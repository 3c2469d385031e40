"""python -m relops train"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import os
import sys
import typing
from typing import Any

from relops import models
from relops.models.backbones.build import BODIES
from relops.training.cli.arguments import default_folder
from relops.training.config import TrainConfig, check_limits
from relops.training.engine import train
from relops.training.errors import UsageError
from relops.training.log import in_words
from relops.training.signals import Interrupted

BACKBONES = f"{', '.join(BODIES)}; some of them take endings, as in resnet50-frozen and resnet18-gn-32"
# The type and help of options of models that have a flag of their own, besides --option.
MODEL_OPTIONS: dict[str, tuple[type, str]] = {
    "backbone": (str, f"network that the model is built on: {BACKBONES}"),
    "channels": (int, "channels of the maps that the model works on"),
    "hidden": (int, "width of the model's fully connected layers"),
}

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


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command, with a flag for each setting of TrainConfig."""
    shapes = ", ".join(f"{name} {value}" for name, value in SHAPES_DEFAULTS.items())
    parser = commands.add_parser("train", help="train a detector", epilog=f"Defaults of shapes: {shapes}.")
    types = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        if field.name != "options":
            _add_setting(parser, field, types[field.name])
    parser.add_argument("--restart", action="store_true", help="begin anew where the output has a run")
    group = parser.add_argument_group(
        "options of the model", f"Python's help(relops.models.{TrainConfig.model}) lists all that this model has."
    )
    for name, (kind, help) in MODEL_OPTIONS.items():
        group.add_argument(f"--{name}", type=kind, help=help)
    group.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="any option of the model; repeatable"
    )
    parser.set_defaults(run=run)


def _add_setting(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: Any) -> None:
    """Add a flag, whose value is None where it is not given."""
    flag, help = "--" + field.name.replace("_", "-"), field.metadata["help"]
    if field.name == "model":
        help += f": {', '.join(models.DETECTORS)}"
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help)
        return
    kinds = [x for x in typing.get_args(kind) or (kind,) if x in (str, int, float)]
    several, default = typing.get_origin(kind) is tuple, typing.cast(Any, field.default)
    shown = " ".join(map(str, default)) if several else default
    parser.add_argument(
        flag,
        type=kinds[0],
        nargs="+" if several else None,
        choices=field.metadata["choices"],
        help=help if shown in (None, "") else f"{help} ({shown})",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train, and print the metrics. An interrupt after a checkpoint is told from errors by the status."""
    config = train_config(arguments)
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


def train_config(arguments: argparse.Namespace) -> TrainConfig:
    """Return the settings that were given, over the defaults for the data."""
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    given: dict[str, Any] = {name: x for name in names if (x := getattr(arguments, name, None)) is not None}
    if "milestones" in given:
        given["milestones"] = tuple(given["milestones"])
    options = {name: value for name in MODEL_OPTIONS if (value := getattr(arguments, name)) is not None}
    check_limits(options)
    options |= dict(map(_option, arguments.option))
    model, data = (given.get(name, getattr(TrainConfig, name)) for name in ("model", "data"))
    if data.partition(":")[0] == "shapes":
        defaults = SHAPES_DEFAULTS | ({"epochs": None} if "iterations" in given else {})
        known = inspect.signature(models.DETECTORS[model]).parameters if model in models.DETECTORS else ()
        options = {name: value for name, value in defaults.pop("options").items() if name in known} | options
        given = defaults | given
    return TrainConfig(**{"output": default_folder(model, data)} | given | {"options": options})


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise UsageError(f"--option must be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # a string without quotes
        return name, value
