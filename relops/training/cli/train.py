"""The command `python -m relops train`."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import os
import sys
import typing
from collections.abc import Sequence
from typing import Any

from relops import models
from relops.training.cli.arguments import add_command, default_folder
from relops.training.cli.descriptions import models_help
from relops.training.config import TrainConfig, check_limits
from relops.training.data import DRAWN
from relops.training.engine import train
from relops.training.errors import UsageError
from relops.training.log import in_words
from relops.training.signals import Interrupted

# These model options can be set with their own flags, as well as with --option.
MODEL_OPTIONS: dict[str, tuple[type, str]] = {
    "backbone": (str, "backbone, one of those listed below (default: depends on the model)"),
    "channels": (int, "number of channels of the feature maps (default: depends on the model)"),
    "hidden": (int, "width of the fully connected layers (default: depends on the model)"),
}

# For drawn data sets, these defaults replace the defaults of TrainConfig and of the models. Options that a model does
# not have are ignored.
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
    """Add the command to the parser, with a flag for each setting of TrainConfig."""
    parser = add_command(
        commands,
        "train",
        "train a detector",
        description="Train a detector, or resume its training.\n\n"
        "`train --model NAME --help` also describes the options of that model.",
        usage="%(prog)s [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.make_epilog = _epilog
    groups = {name: parser.add_argument_group(name) for name in ("data", "images", "model", "optimization", "run")}
    types = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        if field.name != "options":
            _add_setting(groups[field.metadata["group"]], field, types[field.name])
    groups["run"].add_argument(
        "--restart", action="store_true", help="start over even if the output folder has a checkpoint (default: no)"
    )
    for name, (kind, help) in MODEL_OPTIONS.items():
        groups["model"].add_argument(f"--{name}", type=kind, metavar="N" if kind is int else None, help=help)
    groups["model"].add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set any option of the model; may be repeated (default: see the list of models below)",
    )
    parser.set_defaults(run=run)


def _add_setting(group: argparse._ArgumentGroup, field: dataclasses.Field, kind: Any) -> None:
    """Add a flag for a setting. The parsed value is None if the flag is not given."""
    flag, help, text = "--" + field.name.replace("_", "-"), field.metadata["help"], field.metadata["default_text"]
    default = typing.cast(Any, field.default)
    if kind is bool:
        help += f" (default: {'yes' if default else 'no'})"
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help)
        return
    value_type = next(x for x in typing.get_args(kind) or (kind,) if x in (str, int, float))
    is_tuple = typing.get_origin(kind) is tuple
    if text is None:
        text = " ".join(map(str, default)) if is_tuple else default
    group.add_argument(
        flag,
        type=value_type,
        nargs="+" if is_tuple else None,
        choices=field.metadata["choices"],
        metavar=field.metadata["metavar"] or {int: "N", float: "X"}.get(value_type),
        help=f"{help} (default: {text})",
    )


def _epilog(arguments: Sequence[str]) -> str:
    """Return the text at the end of the help. It describes the options of a model if --model is given."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--model")
    try:
        model = finder.parse_known_args(arguments)[0].model
    except argparse.ArgumentError:  # --model has no value
        model = None
    settings = {name: value for name, value in SHAPES_DEFAULTS.items() if name != "options"}
    return models_help(model, settings, SHAPES_DEFAULTS["options"])


def run(arguments: argparse.Namespace) -> int:
    """Train a detector and print its metrics.

    Returns:
        0 if training is complete, or 128 plus the signal number if a signal stopped the run.
    """
    config = train_config(arguments)
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        metrics = train(config, arguments.restart)
    except Interrupted as stop:
        if is_main:
            print(f"{stop} in {config.output}. Run the same command again to resume", file=sys.stderr)
        return 128 + stop.number
    if is_main:
        print(f"{config.output}: {in_words(metrics)}")
    return 0


def train_config(arguments: argparse.Namespace) -> TrainConfig:
    """Return the settings given on the command line, with the defaults of the data set for all other settings."""
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    given: dict[str, Any] = {name: x for name in names if (x := getattr(arguments, name, None)) is not None}
    if "milestones" in given:
        given["milestones"] = tuple(given["milestones"])
    options = {name: value for name in MODEL_OPTIONS if (value := getattr(arguments, name)) is not None}
    check_limits(options)
    options |= dict(map(_option, arguments.option))
    model, data = (given.get(name, getattr(TrainConfig, name)) for name in ("model", "data"))
    if data.partition(":")[0] in DRAWN:
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
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return name, value  # the value is a string without quotes
