"""Building models by name, and saving and loading trained detectors."""

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
    """Build a detector with `relops.models.build` from options given on the command line or stored in a file.

    Args:
        name: a key of `relops.models.DETECTORS`.
        num_classes: the number of classes without the background.
        options: the keyword arguments of the detector's factory function.

    Raises:
        UsageError: If there is no model with this name, or if the model cannot be built with these options. The message
            names the model.
    """
    try:
        if name in models.DETECTORS:
            _check_options(models.DETECTORS[name], num_classes, options)
        return models.build(name, num_classes, **options)
    except Exception as error:  # modules raise various exceptions for values that they do not support
        message = str(error).partition("\n")[0]
        if name in models.DETECTORS:
            message = f"options of model {name}: {message}"
        raise UsageError(message.removeprefix("relops.models: ")) from error


def _check_options(factory: Callable[..., object], num_classes: int, options: dict[str, Any]) -> None:
    """Raise an error if an option is not a parameter of the factory, or if its value has the wrong type."""
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
    """A model and everything that is needed to use it.

    Attributes:
        model: the model, which is in evaluation mode if it was loaded from a file.
        name, options: the model's name and options, see `build_model`.
        classes: class names. Label `i` stands for `classes[i]`.
        min_size, max_size: limits of the image size in pixels, see `relops.training.data.prepare`.
        data: the data set that the model was trained on, see `relops.training.data.open_data`.
        train_annotations, test_annotations: the annotation files that were given for the run, or None.
        pixel_range: the pixel values that are mapped to 0 and 255 in grayscale images with more than 8 bits per pixel,
            or None if there were no such training images.
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
        """Return the device of the model."""
        return next(self.model.parameters()).device

    def save(self, path: Path) -> None:
        """Write the detector to a file that `load_detector` reads."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain_range = self.pixel_range and tuple(self.pixel_range)
        checkpoint.save(path, fields | {"model": self.model.state_dict(), "pixel_range": plain_range})


def load_detector(path: Path, device: torch.device) -> Detector:
    """Load a detector from the folder of a run or from a file.

    Args:
        path: a file model.pt or last.pt, or the folder of a run. If it is a folder, model.pt is loaded, or last.pt if
            the run has not finished.
        device: the device that the model is moved to.

    Raises:
        RunNotFoundError: If there is no such file.
        UsageError: If the file is damaged, or if its weights do not fit its model. The message names the file.
    """
    candidates = [path / "model.pt", path / "last.pt"] if os.path.isdir(path) else [path]
    found = next(filter(os.path.exists, candidates), None)
    if found is None:
        raise RunNotFoundError(
            f"{path}: must be the folder of a run or a file model.pt or last.pt, but no such file exists"
        )
    stored = checkpoint.load(found, "model", "classes")
    weights = stored["model"]
    if "config" in stored:  # only last.pt has a config
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
