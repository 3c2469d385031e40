"""Imports of packages that only training needs."""

from __future__ import annotations

import importlib
from types import ModuleType

from relops.training.errors import MissingPackageError

MODULES = {"pillow": "PIL.Image", "faster-coco-eval": "faster_coco_eval", "matplotlib": "matplotlib.figure"}


def require(module: str, package: str) -> ModuleType:
    """Import a module of an optional package, or raise MissingPackageError if that fails."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken or incompatible package can raise any exception
        raise MissingPackageError(
            f"the package {package} is required but cannot be imported ({error}): pip install 'relops[train]'"
        ) from error


def require_all(*packages: str) -> None:
    """Import the given packages, which are keys of MODULES, or raise one error that names all missing packages."""
    missing = []
    for package in packages:
        try:
            require(MODULES[package], package)
        except ImportError as error:
            missing.append(f"{package} ({error.__cause__})")
    if missing:
        raise MissingPackageError(
            f"required packages cannot be imported: {', '.join(missing)}: pip install 'relops[train]'"
        )
