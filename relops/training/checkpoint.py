"""Files that hold the state of a run or a trained detector."""

from __future__ import annotations

import hashlib
import os
import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import nn

from relops.models import load_backbone
from relops.models.detectors.base import BaseDetector
from relops.training._files import why, written
from relops.training.errors import UsageError

# `save` adds a line with a checksum after the output of torch.save, and torch.load ignores this line. The checksums
# inside the zip file that torch.save writes are not sufficient: they do not cover the attributes and offsets of the zip
# file's members.
MARK = b"\nsha256 "
LENGTH = len(MARK) + 2 * hashlib.sha256().digest_size
# If the state has this key, the file must end with a checksum. Files from earlier versions do not have the key.
CHECKED = "checksum"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a dict of tensors and plain types to a file.

    At any time, `path` is either the complete old file or the complete new file.
    """
    with written(path) as file:
        torch.save(state | {CHECKED: True}, file)
        file.flush()
        file.write(MARK + _checksum(file.name, file.tell()))


def load(path: Path, *keys: str) -> dict[str, Any]:
    """Load a dict that `save` or `torch.save` wrote, with its tensors on the CPU.

    Args:
        path: the file.
        keys: keys that the dict must have.

    Raises:
        UsageError: If the file cannot be read, is damaged, or lacks one of the keys.
    """
    has_checksum = _verify(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the exception that torch.load raises depends on which bytes are wrong
        # The rest of torch's message is omitted, because it advises the user to load the file without weights_only.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]
        raise UsageError(
            f"{path}: the file is not a checkpoint or is damaged ({type(error).__name__}: {reason})"
        ) from error
    check_keys(path, state, *keys)
    if state.pop(CHECKED, False) and not has_checksum:
        raise UsageError(f"{path}: the file is damaged: its checksum is missing")
    return state


def _verify(path: Path) -> bool:
    """Return whether a file ends with a checksum, and raise UsageError if the checksum is wrong or cannot be read."""
    try:
        length = os.path.getsize(path) - LENGTH
        with open(path, "rb") as file:
            file.seek(max(0, length))
            end = file.read(LENGTH)
        if not end.startswith(MARK):
            return False
        checksum = _checksum(path, length)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: the file cannot be read ({why(error)})") from error
    if end != MARK + checksum:
        raise UsageError(f"{path}: the file is damaged: its checksum does not match its content")
    return True


def _checksum(path: str | Path, length: int) -> bytes:
    """Return the SHA-256 of the first `length` bytes of a file."""
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        while length > 0 and (part := file.read(min(length, 2**20))):
            checksum.update(part)
            length -= len(part)
    return checksum.hexdigest().encode()


def check_keys(path: Path, state: Any, *keys: str) -> None:
    """Raise UsageError unless the content of a file is a dict with all of these keys."""
    if not isinstance(state, dict):
        raise UsageError(f"{path}: the file must contain a dict, got {type(state).__name__}")
    missing = [key for key in keys if key not in state]
    if missing:
        raise UsageError(f"{path}: the file must contain {', '.join(keys)}, got a file without {', '.join(missing)}")


def load_weights(path: Path, model: nn.Module, weights: dict[str, Any]) -> None:
    """Load a state_dict into a model, or raise a UsageError that names the file `path` that contains the state_dict."""
    try:
        model.load_state_dict(weights)
    except Exception as error:  # RuntimeError if names or shapes differ, any exception if `weights` is not a state_dict
        reason = textwrap.shorten(str(error), 400)
        raise UsageError(f"{path}: the weights in the file must fit the model that the file names: {reason}") from error


def load_backbone_weights(path: Path, model: BaseDetector) -> None:
    """Load the weights of a classifier from a file into the backbone of a detector."""
    weights = load(path)
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            raise UsageError(f"{path}: all values must be tensors, got {type(value).__name__} for {name!r}")
    try:
        load_backbone(model, weights)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error


def check_same(path: Path, stored: dict[str, Any], requested: dict[str, Any]) -> None:
    """Raise UsageError if the requested settings of a run differ from those stored in its checkpoint."""
    for name in requested | stored:
        if stored.get(name) != requested.get(name):
            raise UsageError(
                f"{path}: the run was started with {name} = {stored.get(name)!r}, got {requested.get(name)!r}. Resume "
                "with the same settings, choose another folder with --output, or start again with --restart"
            )
