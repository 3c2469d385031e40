"""Tests that the documentation lists every public name, that its links work, and that the site builds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

import relops

MODULES = {"ops": relops.ops, "nn": relops.nn, "models": relops.models}


@pytest.mark.parametrize("page", MODULES)
def test_api_page_has_every_public_name(page: str) -> None:
    text = ROOT.joinpath("docs", "api", f"{page}.md").read_text()
    documented = re.findall(r"^\.\. auto(?:function|class|data):: (\w+)$", text, re.MULTILINE)
    assert sorted(documented) == sorted(MODULES[page].__all__)


def test_table_of_ops_has_every_op() -> None:
    for page in ("README.md", "docs/ops/index.md"):
        text = ROOT.joinpath(page).read_text()
        assert not {name for name in relops.ops.__all__ if f"`{name}`" not in text}, page


def test_table_of_detectors_has_every_detector() -> None:
    for page in ("README.md", "docs/detectors.md"):
        text = ROOT.joinpath(page).read_text()
        assert not {name for name in relops.models.DETECTORS if f"`{name}" not in text}, page


def test_readme_has_at_most_10_kilobytes() -> None:
    assert ROOT.joinpath("README.md").stat().st_size <= 10_000


def test_links_between_pages_lead_to_files() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.joinpath("docs").rglob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert page.parent.joinpath(link).exists(), f"{page.relative_to(ROOT)} links to {link}"


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
