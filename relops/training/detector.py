"""Detectors: a model by name, and all that it takes to use one that is trained, in a file."""

from __future__ import annotations

import dataclasses
import inspect
import os
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from relops import models
from relops.models.detectors.base import BaseDetector
from relops.training import checkpoint
from relops.training.data.images import PixelRange
from relops.training.errors import RunNotFoundError, UsageError


def build_model(name: str, num_classes: int, options: dict[str, Any]) -> BaseDetector:
    """Build a detector by `relops.models.build`, from options that a command line or a file has.

    Raises:
        UsageError: naming the model, where there is none of this name, or it cannot be built with these options.
    """
    try:
        if name in models.DETECTORS:
            _check_options(models.DETECTORS[name], num_classes, options)
        return models.build(name, num_classes, **options)
    except Exception as error:  # a module raises anything, given a number or a string that is not one of its own
        message = str(error).partition("\n")[0]
        if name in models.DETECTORS:
            message = f"options of model {name}: {message}"
        raise UsageError(message.removeprefix("relops.models: ")) from error


def _check_options(factory: Callable[..., object], num_classes: int, options: dict[str, Any]) -> None:
    """Raise an error where the factory has no such option, or takes only values of another type for it."""
    inspect.signature(factory).bind(num_classes, **options)
    hints = typing.get_type_hints(factory)
    for option, value in options.items():
        hint = hints.get(option, object)
        if typing.get_origin(hint) not in (None, types.UnionType) or isinstance(value, hint):
            continue
        if not (isinstance(value, int) and isinstance(float(value), hint)):
            raise ValueError(f"{option} must be {getattr(hint, '__name__', hint)}, got {value!r}")


@dataclass
class Detector:
    """A model, and all that it takes to use it.

    Attributes:
        model: in evaluation mode where it is loaded.
        name, options: of the model, see `build_model`.
        classes: names; label i is classes[i].
        min_size, max_size: of images, see `relops.training.data.prepare`.
        data: the data that the model was trained on, see `relops.training.data.open_data`.
        train_annotations, test_annotations: the annotation files that the run was given, if any.
        pixel_range: the values that become 0 and 255 in images whose pixels are not bytes, where the data had some.
    """

    model: BaseDetector
    name: str
    options: dict[str, Any]
    classes: list[str]
    min_size: int
    max_size: int
    data: str
    train_annotations: str | None = None
    test_annotations: str | None = None
    pixel_range: PixelRange | None = None

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    def save(self, path: Path) -> None:
        """Write what `load_detector` reads."""
        others = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain_range = self.pixel_range and tuple(self.pixel_range)
        checkpoint.save(path, others | {"model": self.model.state_dict(), "pixel_range": plain_range})


def load_detector(path: Path, device: torch.device) -> Detector:
    """Load a detector from the folder of a run or from a file.

    Args:
        path: the folder of a run, from which model.pt is taken, or last.pt where the run has not ended; or such a file.
        device: where the model goes.

    Raises:
        RunNotFoundError: where there is no such file.
        UsageError: naming the file, where it is damaged, or its weights are not those of its model.
    """
    candidates = [path / "model.pt", path / "last.pt"] if os.path.isdir(path) else [path]
    found = next(filter(os.path.exists, candidates), None)
    if found is None:
        raise RunNotFoundError(f"{path}: must be a run's folder, or a file model.pt or last.pt of one, got none")
    stored = checkpoint.load(found, "model", "classes")
    weights = stored["model"]
    if "config" in stored:  # of last.pt
        checkpoint.check_keys(found, stored["config"], "model")
        weights = stored.get("average") or weights
        stored |= stored["config"] | {"name": stored["config"]["model"]}
    fields = [field for field in dataclasses.fields(Detector) if field.name != "model"]
    checkpoint.check_keys(found, stored, *(field.name for field in fields if field.default is dataclasses.MISSING))
    model = build_model(stored["name"], len(stored["classes"]), stored["options"])
    for phase in range(stored.get("phase", -1) + 1):
        model.start_phase(phase)
    checkpoint.load_weights(found, model, weights)
    if stored.get("pixel_range") is not None:
        stored["pixel_range"] = PixelRange(*stored["pixel_range"])
    return Detector(
        model.to(device).eval(), **{field.name: stored[field.name] for field in fields if field.name in stored}
    )
