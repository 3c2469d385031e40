"""Tests of benchmarks/performance.py and benchmarks/report.py, which write the page and summary of recorded results."""

from __future__ import annotations

import copy
import itertools
import json
import re
from pathlib import Path

import pytest

from benchmarks import harness, performance, report


def test_page_is_up_to_date() -> None:
    assert performance.PAGE.read_text() == performance.page(), "run: python -m benchmarks.report --no-plots"


def test_page_shows_every_recorded_row() -> None:
    text = performance.page()
    for records in performance.ops_records(harness.RESULTS).values():
        for record in records.values():
            for row in record["rows"]:
                milliseconds = performance.format_ms(row["ms"]["relops"]["median"])
                assert f"| {row['shape']} | {row['dtype']} | {row['direction']} | {milliseconds} |" in text, row[
                    "shape"
                ]


def test_page_is_valid_markdown() -> None:
    text = performance.page()
    assert text.startswith("# Performance\n")
    headings = re.findall(r"^(#+) (.*)$", text, re.MULTILINE)
    levels = [len(marks) for marks, _ in headings]
    assert levels.count(1) == 1 and all(deeper <= level + 1 for level, deeper in itertools.pairwise(levels))
    assert len({title for _, title in headings}) == len(headings)
    for block in text.split("\n\n"):
        if block.startswith("|"):
            columns = [line.count("|") for line in block.strip().splitlines()]
            assert len(set(columns)) == 1, block.splitlines()[0]
    for image in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text):
        assert (performance.PAGE.parent / image).is_file(), image


def test_page_shows_no_targets() -> None:
    assert not re.search(r"\btargets?\b|MISSED", performance.page())


def test_summary_has_eleven_rows() -> None:
    lines = performance.summary().splitlines()
    assert len([line for line in lines if line.startswith("| `")]) == 11
    for line, machine in zip(lines[-3:], ("AMD EPYC", "Intel Xeon", "AMD EPYC"), strict=True):
        assert machine in line and "2026" in line


def test_page_of_an_unknown_machine(tmp_path: Path) -> None:
    """Results of a new machine get their own section, and GPU results remove the note that GPU results are missing."""
    for folder in ("cells", "shapes", "dcn"):
        (tmp_path / folder).symlink_to(harness.RESULTS / folder)
    record = json.loads((harness.RESULTS / "amd-epyc-avx2-2-cores" / "rank_embedding.json").read_text())
    gpu = copy.deepcopy(record)
    for run in gpu["runs"].values():
        run["machine"]["gpu"], run["versions"]["cuda"] = "NVIDIA H200", "13.0"
    for row in gpu["rows"]:
        row["device"] = "cuda"
    for folder, content in (("some-cpu", record), ("nvidia-h200", gpu)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rank_embedding.json").write_text(json.dumps(content))
    text = performance.page(tmp_path)
    assert "## Ops on an NVIDIA H200 with CUDA 13.0" in text and "## Ops on 2 cores of AMD EPYC (avx2)" in text
    assert "No GPU figures exist" not in text and "No GPU figures exist" in performance.page()


def test_report_writes_the_page(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    assert report.main(["--page", str(path)]) == 0
    assert path.read_text() == performance.page()


@pytest.mark.parametrize("targets", [False, True])
def test_table_shows_targets_on_request(targets: bool) -> None:
    rows = json.loads((harness.RESULTS / "amd-epyc-avx2-2-cores" / "relation_attention.json").read_text())["rows"]
    text = harness.table(rows, targets=targets)
    assert ("MISSED" in text) == ("target" in text) == targets
    header, rule = next(pair for pair in itertools.pairwise(text.splitlines()) if pair[0].startswith("shape"))
    lines = [line for line in text.splitlines() if line.startswith(("shape", "self"))]
    assert len(rule) == len(header) and {len(line) for line in lines} == {len(header)}
