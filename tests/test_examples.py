"""Tests that the scripts in examples/ run without changes and are short."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

EXAMPLES = sorted(ROOT.joinpath("examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    tree = ast.parse(path.read_text())
    imports = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
    missing = {name for name in (x.partition(".")[0] for x in imports) if importlib.util.find_spec(name) is None}
    if missing:
        pytest.skip(f"{', '.join(sorted(missing))} is not installed")
    command = [sys.executable, str(path)]
    subprocess.run(command, cwd=tmp_path, env=environment(HF_HUB_OFFLINE="1"), check=True, timeout=600)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_has_at_most_60_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60
