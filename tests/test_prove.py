"""Tests of the command that runs everything on a machine with a GPU, `make prove`, with other commands as parts."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import prove
from benchmarks.prove import FAILED, NOT_RUN, PASSED, TIMED_OUT, Part, Result


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(prove, "ROOT", tmp_path)
    (tmp_path / "code").mkdir()
    (tmp_path / "code/a.py").write_text("1")
    return tmp_path


def part(name: str, program: str, minutes: float = 1, parallel: bool = False, missing: str | None = None) -> Part:
    return Part(name, [sys.executable, "-c", program], minutes, ["code"], missing=missing, parallel=parallel)


def run(root: Path, *parts: Part, minutes: float = 1, machine: str = "GPU") -> list[Result]:
    return prove.run_parts(parts, machine, root / "state", minutes)


def statuses(results: list[Result]) -> list[str]:
    return [result.status for result in results]


def test_a_part_that_passed_runs_again_only_after_a_change(root: Path) -> None:
    log = root / "log"
    counted = part("counted", f"open({str(log)!r}, 'a').write('x'); print('output')")
    for count in (1, 1):
        assert statuses(run(root, counted)) == [PASSED]
        assert log.read_text() == "x" * count
    assert (root / "state/counted/output.txt").read_text() == "output\n"
    assert run(root, counted)[0].detail.startswith("earlier")
    (root / "code/a.py").write_text("2")
    run(root, counted)
    assert log.read_text() == "xx"
    run(root, counted, machine="another GPU")
    assert log.read_text() == "xxx"
    (root / "state/counted/result.json").unlink()
    run(root, counted, machine="another GPU")
    assert log.read_text() == "xxxx"


def test_parts_that_failed_or_ran_out_of_time_run_again(root: Path) -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {'import time; time.sleep(60)'!r}])"
    parts = [part("fails", "print('reason'); exit(3)"), part("hangs", child, minutes=1 / 60), part("passes", "")]
    begin = time.monotonic()
    for _ in range(2):
        results = run(root, *parts)
        assert statuses(results) == [FAILED, TIMED_OUT, PASSED]
        assert results[0].detail.endswith("fails/output.txt") and "earlier" not in results[0].detail
    assert time.monotonic() - begin < 50
    assert (root / "state/fails/output.txt").read_text() == "reason\n"


def test_processes_of_a_part_end_with_it(root: Path) -> None:
    pid = root / "pid"
    hangs = Part("hangs", ["sh", "-c", f"sleep 60 & echo $! > {pid}; wait"], minutes=1 / 20, sources=[])
    assert statuses(run(root, hangs)) == [TIMED_OUT]
    stat = Path(f"/proc/{pid.read_text().strip()}/stat")
    deadline = time.monotonic() + 10
    while stat.exists() and stat.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_the_whole_run_is_bounded(root: Path) -> None:
    results = run(root, part("hangs", "import time; time.sleep(60)"), part("late", ""), minutes=1 / 60)
    assert statuses(results) == [TIMED_OUT, NOT_RUN]
    assert results[1].detail == "the time of the whole run is over"


def test_nothing_runs_after_a_build_that_failed(root: Path) -> None:
    parts = [part("build", "exit(1)"), part("tests", ""), part("memcheck", "", parallel=True)]
    assert statuses(run(root, *parts)) == [FAILED, NOT_RUN, NOT_RUN]


def test_parallel_parts_run_side_by_side(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two parts waits for a file that the other writes."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    program = (
        "import pathlib, time\npathlib.Path({!r}).touch()\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)"
    )
    a, b = str(root / "a"), str(root / "b")
    parts = [part("one", program.format(a, b), parallel=True), part("two", program.format(b, a), parallel=True)]
    assert statuses(run(root, *parts)) == [PASSED, PASSED]


@pytest.mark.parametrize(
    ("found", "status"),
    [([PASSED], 0), ([PASSED, NOT_RUN], 3), ([PASSED, FAILED, NOT_RUN], 1), ([TIMED_OUT], 1)],
)
def test_summary(found: list[str], status: int, capsys: pytest.CaptureFixture) -> None:
    results = [Result(f"part {number}", status, "detail") for number, status in enumerate(found)]
    assert prove.summarize(results) == status
    lines = capsys.readouterr().out.split("\n")
    assert [line.split("  ")[0] for line in lines[1 : len(found) + 1]] == [result.part for result in results]
    assert f"{found.count(FAILED)} failed" in lines[-2] and f"{found.count(NOT_RUN)} not run" in lines[-2]


def test_without_a_gpu_every_part_but_the_build_says_why_it_did_not_run(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove, "find_machine", lambda: ("torch, no GPU", None))
    names = [part.name for part in prove.make_parts(None)]
    assert names[:6] == ["build", "tests", *prove.SANITIZERS]
    assert {f"bench_{op}" for op in ("nms", "roi_align", "ms_deform_attn", "box_iou")} <= {*names}
    assert prove.main(["--only", *names[1:]]) == 3
    assert capsys.readouterr().out.count("not run    torch finds no GPU\n") == len(names) - 1


def test_a_benchmark_run_that_is_killed_keeps_its_rows(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
from benchmarks import harness
record = harness.Record(Path(sys.argv[1]), "cpu", "nms", {"date": "today"})
key = {"op": "nms", "dtype": "float32", "device": "cpu", "direction": "forward", "threads": 1}
for shape in ("first", "second"):
    record.add({**key, "shape": shape})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=prove.ROOT)
    assert done.returncode == -signal.SIGKILL
    (path,) = tmp_path.glob("*/nms.json")
    assert [row["shape"] for row in json.loads(path.read_text())["rows"]] == ["first", "second"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_suite_can_require_a_gpu() -> None:
    environment = {**os.environ, "RELOPS_REQUIRE_GPU": "1"}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/test_nms.py"]
    done = subprocess.run(command, cwd=prove.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "RELOPS_REQUIRE_GPU=1, but no GPU visible to torch" in done.stderr


def test_an_unknown_part_is_an_error(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        prove.main(["--only", "memchek"])
    assert "--only: memchek is not a part; the parts are build, tests, memcheck" in capsys.readouterr().err


def test_the_suite_is_that_of_make_test() -> None:
    (recipe,) = re.findall(r"^test: .*\n((?:\t.*\n)+)", (prove.ROOT / "Makefile").read_text(), re.MULTILINE)
    arguments = shlex.split(recipe.replace("\\\n", " "))
    (tests,) = (part for part in prove.make_parts(None) if part.name == "tests")
    assert arguments[arguments.index("pytest") + 1 :] == list(tests.command)[tests.command.index("-q") + 1 :]
