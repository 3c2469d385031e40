"""Packages that only training needs."""

from __future__ import annotations

import importlib
from types import ModuleType

from relops.training.errors import MissingPackageError

MODULES = {"pillow": "PIL.Image", "faster-coco-eval": "faster_coco_eval", "matplotlib": "matplotlib.figure"}


def require(module: str, package: str) -> ModuleType:
    """Import a module of a package that only training needs."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package that is broken, or does not fit another one, raises anything
        raise MissingPackageError(
            f"{package} is needed for this and cannot be imported ({error}): pip install 'relops[train]'"
        ) from error


def require_all(*packages: str) -> None:
    """Import what a command will need, of MODULES, before the command begins. The error names all that are missing."""
    missing = []
    for package in packages:
        try:
            require(MODULES[package], package)
        except ImportError as error:
            missing.append(f"{package} ({error.__cause__})")
    if missing:
        raise MissingPackageError(
            f"packages are needed for this and cannot be imported: {', '.join(missing)}: pip install 'relops[train]'"
        )
