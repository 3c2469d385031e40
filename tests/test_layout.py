"""Tests of the package's layout: no function hides a module, layers import downwards, and no import is circular."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import pkgutil
from pathlib import Path

import pytest

import relops

ROOT = Path(relops.__file__).parent

# Layers from the bottom to the top. A module may import only from its own layer and from lower layers.
LAYERS = (
    (
        "relops._annotations",
        "relops._autocast",
        "relops._checks",
        "relops._dtypes",
        "relops._library",
        "relops._tracing",
    ),
    ("relops.ops", "relops.reference"),
    ("relops.nn",),
    ("relops.models.initialization", "relops.models.structures"),
    ("relops.models.backbones", "relops.models.parts"),
    ("relops.models.detectors",),
    ("relops.models.checkpoints", "relops.models.inference"),
    ("relops.models",),
    ("relops.training",),
    ("relops", "relops.__main__"),
)


def module_names(package: str = "relops") -> list[str]:
    """Return the names of a package and of all its subpackages and Python modules."""
    folder = ROOT.joinpath(*package.split(".")[1:])
    files = (file.relative_to(ROOT.parent).with_suffix("") for file in sorted(folder.rglob("*.py")))
    return [".".join(file.parts).removesuffix(".__init__") for file in files]


MODULES = module_names()


def source(name: str) -> ast.Module:
    path = ROOT.parent.joinpath(*name.split("."))
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def imported(tree: ast.AST, lazily: bool) -> set[str]:
    """Return the modules of relops that a file imports. If `lazily` is True, include imports inside functions."""
    nodes = ast.walk(tree) if lazily else ast.iter_child_nodes(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name in MODULES} - {"relops"}


def layer(name: str) -> int:
    """Return the index of the layer that contains the longest prefix of the name."""
    indices = {prefix: i for i, prefixes in enumerate(LAYERS) for prefix in prefixes}
    parts = name.split(".")
    return next(indices[prefix] for n in range(len(parts), 0, -1) if (prefix := ".".join(parts[:n])) in indices)


@pytest.mark.parametrize("package", ["relops.models", "relops.nn", "relops.training"])
def test_no_module_is_hidden(package: str) -> None:
    """A function must not hide the module of the same name, because `import relops.models.x as x` would then return the
    function. In relops.ops and relops.reference, functions hide their modules on purpose, as test_contract.py checks.
    """
    names = [name for name in module_names(package) if not name.endswith("__main__")]
    walked = {info.name for info in pkgutil.walk_packages(importlib.import_module(package).__path__, package + ".")}
    assert {package, *walked} == set(names)
    for name in names:
        module = importlib.import_module(name)
        assert functools.reduce(getattr, name.split(".")[1:], relops) is module, name


def test_layers_import_downwards() -> None:
    violations = {
        (name, other) for name in MODULES for other in imported(source(name), lazily=True) if layer(other) > layer(name)
    }
    assert not violations


def test_no_import_is_circular() -> None:
    graphlib.TopologicalSorter({name: imported(source(name), lazily=False) for name in MODULES}).prepare()


def test_twins_do_not_import_ops() -> None:
    for name in module_names("relops.reference"):
        others = imported(source(name), lazily=True)
        assert all(other.startswith("relops.reference") for other in others), (name, others)
