"""Packages that only training needs."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, package: str) -> ModuleType:
    """Import a module of a package that only training needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{package} is needed for this and not installed: pip install 'relops[train]'") from error
