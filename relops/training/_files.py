"""The files that commands write: checked before anything is computed, written whole, and by one run at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import shlex
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from relops.training.errors import OutputError, UsageError

LOCK = ".lock"


def make_folder(folder: Path) -> None:
    """Make the folder and those above it. A UsageError says why this is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise UsageError(
            f"{folder}: output must be a folder, or a path that one can be made at ({why(error)})"
        ) from error


def check_kinds(folder: Path, files: Sequence[str], folders: Sequence[str]) -> None:
    """Raise UsageError where the path of a file to be written is there and is not a file, or likewise of a folder."""
    for name in (*files, *folders):
        path = folder / name
        if os.path.lexists(path) and not (path.is_dir() if name in folders else path.is_file()):
            raise UsageError(f"{path}: must be a {'folder' if name in folders else 'file'}, for the run to write to")


def check_file(path: Path) -> None:
    """Make the folder of a file that is to be written. A UsageError says why the file cannot be written there."""
    if os.path.isdir(path):
        raise UsageError(f"{path}: output must be a file, got a folder")
    if _is_device(path):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = _beside(path)
        open(beside, "wb").close()
        os.unlink(beside)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: output must be a file that can be written ({why(error)})") from error


@contextlib.contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the context ends without an error: at every moment `path` is the
    old file or the new one, whole. An OSError in the context is raised as one that names the path."""
    in_place = _is_device(path)
    beside = path if in_place else _beside(path)
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            if not in_place:
                os.fsync(file.fileno())
        if not in_place:
            os.replace(beside, os.path.realpath(path))
    except BaseException as error:
        if not in_place:
            with contextlib.suppress(OSError):
                os.unlink(beside)
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # of torch.save, a consequence
        if isinstance(cause, OSError):
            raise OutputError(f"{path}: the file cannot be written ({why(cause)})") from error
        raise


def write_json(path: Path, content: Any) -> None:
    with written(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def _is_device(path: Path) -> bool:
    """Or a pipe: nothing can take its place."""
    return os.path.exists(path) and not os.path.isfile(path)


def _beside(path: Path) -> str:
    """Where a file is written that then takes the place of another, or of what that is a link to."""
    return f"{os.path.realpath(path)}.{os.getpid()}.tmp"


def why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from entering this context with the same folder; they get a UsageError that names this one.

    The kernel lets go of the lock when the process ends, however it ends; the file stays, and only says who has the
    lock. The lock is not flock's, which processes that load data would inherit and hold after a parent that was killed.
    """
    try:
        file = open(folder / LOCK, "a+", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UsageError(f"{folder}: output must be a folder that can be written to ({why(error)})") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise UsageError(f"{folder}: another run writes to this folder: {file.read() or '?'}") from error
            warnings.warn(f"{folder}: cannot be locked, a second run is not noticed ({why(error)})", stacklevel=3)
        else:
            command = textwrap.shorten(shlex.join(sys.orig_argv), 200)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}, since {time.ctime()}: {command}")
            file.flush()
        yield
