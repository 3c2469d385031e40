"""Files that hold the state of a run, or a trained detector."""

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

# After what torch.save writes comes a line with its checksum, which torch.load ignores. The checksums within a zip file
# do not cover the attributes and places of its parts.
MARK = b"\nsha256 "
LENGTH = len(MARK) + 2 * hashlib.sha256().digest_size
CHECKED = "checksum"  # in the state: files of earlier versions end without a checksum, others must not


def save(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain types. At every moment `path` is the old file or the new one, whole."""
    with written(path) as file:
        torch.save(state | {CHECKED: True}, file)
        file.flush()
        file.write(MARK + _checksum(file.name, file.tell()))


def load(path: Path, *keys: str) -> dict[str, Any]:
    """Return the dict that `save` or torch.save wrote, on the CPU. A file that cannot be read, is damaged or
    lacks one of the keys is a UsageError."""
    has_checksum = _verify(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own: what it raises depends on which bytes are wrong
        # The rest of the message is advice to trust the file.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]
        raise UsageError(f"{path}: is no checkpoint or a damaged one ({type(error).__name__}: {reason})") from error
    check_keys(path, state, *keys)
    if state.pop(CHECKED, False) and not has_checksum:
        raise UsageError(f"{path}: is damaged: its checksum was cut off")
    return state


def _verify(path: Path) -> bool:
    """Whether a file ends with a checksum. One that does not match, or a file that cannot be read, is a UsageError."""
    try:
        length = os.path.getsize(path) - LENGTH
        with open(path, "rb") as file:
            file.seek(max(0, length))
            end = file.read(LENGTH)
        if not end.startswith(MARK):
            return False
        checksum = _checksum(path, length)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: must be a file that can be read ({why(error)})") from error
    if end != MARK + checksum:
        raise UsageError(f"{path}: is damaged: its checksum does not match its content")
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
    """Raise UsageError if the content of a file is not a dict that has all of these keys."""
    if not isinstance(state, dict):
        raise UsageError(f"{path}: must hold a dict, got {type(state).__name__}")
    missing = [key for key in keys if key not in state]
    if missing:
        raise UsageError(f"{path}: must hold {', '.join(keys)}, got a file without {', '.join(missing)}")


def load_weights(path: Path, model: nn.Module, weights: dict[str, Any]) -> None:
    """Load the weights that a file holds into the model."""
    try:
        model.load_state_dict(weights)
    except Exception as error:  # RuntimeError where names or shapes differ; anything where the weights are none
        reason = textwrap.shorten(str(error), 400)
        raise UsageError(f"{path}: its weights must be those of the model that it names: {reason}") from error


def load_backbone_weights(path: Path, model: BaseDetector) -> None:
    """Load the weights of a classifier, which a file holds by name, into the backbone of the model."""
    weights = load(path)
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            raise UsageError(f"{path}: must hold tensors by name, got {type(value).__name__} as {name!r}")
    try:
        load_backbone(model, weights)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error


def check_same(path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UsageError where a run would continue with other settings than it began with."""
    for name in wanted | stored:
        if stored.get(name) != wanted.get(name):
            raise UsageError(
                f"{path}: its run has {name} = {stored.get(name)!r}, got {wanted.get(name)!r}. Go on with the same "
                "settings, choose another output, or begin anew with --restart"
            )
