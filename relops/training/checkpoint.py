"""Files that hold the state of a run, or a trained detector."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: dict[str, Any]) -> None:
    """Of tensors and plain types. At every moment `path` is the old file or the new one, whole."""
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load(path: Path, *keys: str) -> dict[str, Any]:
    """What `save` wrote, on the CPU; a file that cannot be read, or lacks one of the keys, is a ValueError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load has no error of its own: what it raises depends on which bytes are wrong
        raise ValueError(f"{path}: is no checkpoint or a damaged one ({type(error).__name__}: {error})") from error
    missing = [key for key in keys if not isinstance(state, dict) or key not in state]
    if missing:
        raise ValueError(f"{path}: must hold {', '.join(keys)}, got a file without {', '.join(missing)}")
    return state


def check_same(path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """A run goes on with the settings it began with."""
    for name in wanted | stored:
        if stored.get(name) != wanted.get(name):
            raise ValueError(
                f"{path}: its run has {name} = {stored.get(name)!r}, got {wanted.get(name)!r}. Go on with the same "
                "settings, choose another output, or begin anew with --restart"
            )
