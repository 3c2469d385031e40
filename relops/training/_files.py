"""Helpers for output files: check paths early, write files atomically, and lock the folder of a run."""

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
    """Create a folder and its parents, or raise a UsageError that gives the reason for the failure."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: the path contains a null character
        raise UsageError(f"{folder}: output must be a folder that exists or can be created ({why(error)})") from error


def check_kinds(folder: Path, files: Sequence[str], folders: Sequence[str]) -> None:
    """Raise UsageError if one of `files` exists but is not a file, or one of `folders` exists but is not a folder."""
    for name in (*files, *folders):
        path = folder / name
        if os.path.lexists(path) and not (path.is_dir() if name in folders else path.is_file()):
            kind = "folder" if name in folders else "file"
            raise UsageError(f"{path}: must be a {kind}, but something else with this name exists")


def check_file(path: Path) -> None:
    """Create the folder of an output file, and raise a UsageError if the file cannot be written."""
    if os.path.isdir(path):
        raise UsageError(f"{path}: output must be a file, got a folder")
    if _is_device(path):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_path(path)
        open(temporary, "wb").close()
        os.unlink(temporary)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: output must be a file that can be written ({why(error)})") from error


@contextlib.contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` if the `with` block ends without an error.

    At any time, `path` is either the complete old file or the complete new file. An OSError in the `with` block is
    raised again as an OutputError that names the path.
    """
    in_place = _is_device(path)
    temporary = path if in_place else _temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if not in_place:
                os.fsync(file.fileno())
        if not in_place:
            os.replace(temporary, os.path.realpath(path))
    except BaseException as error:
        if not in_place:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        # If the disk is full, torch.save raises a RuntimeError with the OSError as its __context__.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise OutputError(f"{path}: the file cannot be written ({why(cause)})") from error
        raise


def write_json(path: Path, content: Any) -> None:
    with written(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def _is_device(path: Path) -> bool:
    """Return whether `path` is a device or a pipe, which cannot be replaced by a file."""
    return os.path.exists(path) and not os.path.isfile(path)


def _temporary_path(path: Path) -> str:
    """Return the path of the temporary file that replaces `path` or, if `path` is a link, the target of the link."""
    return f"{os.path.realpath(path)}.{os.getpid()}.tmp"


def why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder. Other processes that try to lock it get a UsageError that names this process.

    The operating system releases the lock when this process ends, even if it is killed. The lock file then stays in the
    folder, but it only names the process that last held the lock. `lockf` is used instead of `flock`, because processes
    that load data would inherit a lock made by `flock` and keep it after the training process was killed.
    """
    try:
        file = open(folder / LOCK, "a+", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UsageError(f"{folder}: output must be a writable folder ({why(error)})") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise UsageError(f"{folder}: another run is writing to this folder: {file.read() or '?'}") from error
            warnings.warn(
                f"{folder}: the folder cannot be locked, so a second run in it would not be detected ({why(error)})",
                stacklevel=3,
            )
        else:
            command = textwrap.shorten(shlex.join(sys.orig_argv), 200)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}, since {time.ctime()}: {command}")
            file.flush()
        yield
