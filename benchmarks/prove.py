"""The command for a machine with a GPU: build for it, run the tests, the sanitizers and all benchmarks.

Usage: python -m benchmarks.prove [--minutes M] [--fresh] [--only PART ...]

Every part has a folder in build/prove with its output and result. A part that passed is not run again until its
sources, torch or the GPU change. Parts that failed, ran out of time or could not run are repeated. Every part has a
time limit, and so has the whole run.

The status is 0 if every part passed, 1 if a part failed or ran out of time, and 3 if no part failed but some could not
run, for example because there is no GPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import cuda_counts

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / "build" / "prove"
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"


@dataclass(frozen=True)
class Part:
    """A command with a time limit.

    Attributes:
        name: The name of the part and of its folder.
        command: The command, which runs in the root of the repository.
        minutes: The time limit.
        sources: Files and folders whose contents decide whether the part must run again.
        environment: Environment variables, in addition to those of this process.
        missing: Why the command cannot run on this machine, or None if it can.
        parallel: Whether the part may run next to the parallel parts that follow it.
    """

    name: str
    command: Sequence[str]
    minutes: float
    sources: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None
    parallel: bool = False


running: list[subprocess.Popen] = []


@dataclass(frozen=True)
class Result:
    part: str
    status: str
    detail: str = ""


def make_parts(capability: str | None) -> list[Part]:
    """Return all parts for a GPU of this compute capability, or for a machine without a GPU if it is None."""
    no_gpu = "torch finds no GPU" if capability is None else None
    no_nvcc = None if cuda_counts.nvcc() else "nvcc was not found"
    no_sanitizer = None if shutil.which("compute-sanitizer") else "compute-sanitizer is not on PATH"
    code = ("csrc", "relops", "setup.py")
    build = {"RELOPS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability or "9.0"}
    pytest = [sys.executable, "-m", "pytest", "-q"]
    suite = ["tests", "relops", "docs", "README.md", "CONTRIBUTING.md", "--doctest-modules", "--markdown-docs"]
    suite += ["-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
    on_gpu, passive = {"RELOPS_REQUIRE_GPU": "1"}, {"OMP_WAIT_POLICY": "passive"}
    parts = [
        Part("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 10, code, build, no_nvcc),
        Part("tests", [*pytest, *suite], 10, (*code, "tests", "benchmarks", "docs"), passive | on_gpu, no_gpu),
    ]
    # The forward and backward passes of every op on all sample inputs, in float32 and, with the deterministic kernels,
    # in bfloat16. torch's memory cache is off, so every tensor has its own allocation and an access beyond its end is
    # detected.
    selection = (
        "cuda and (test_equals_twin or test_matches_twin and torch.float32-torch.float32 "
        "or test_deterministic and torch.bfloat16)"
    )
    sanitizer = ["compute-sanitizer", "--kernel-name", "kernel_substring=relops", "--report-api-errors", "no"]
    contract = ["tests/test_contract.py", "tests/test_contract_selection.py", "-k", selection]
    for tool in SANITIZERS:
        command = [*sanitizer, "--error-exitcode", "1", "--tool", tool, *pytest, *contract]
        environment = on_gpu | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        parts.append(Part(tool, command, 10, (*code, "tests"), environment, no_gpu or no_sanitizer, parallel=True))
    for path in sorted((ROOT / "benchmarks").glob("bench_*.py")):
        command = [sys.executable, "-m", "benchmarks.run", "--device", "cuda", "--op", path.stem.removeprefix("bench_")]
        parts.append(Part(path.stem, command, 3, (*code, "benchmarks"), missing=no_gpu))
    return parts


def fingerprint(part: Part, machine: str) -> str:
    """Return a hash of what a result depends on: the machine, the command, and the sources without recorded results."""
    digest = hashlib.sha256(f"{machine} {part.command} {part.environment}".encode())
    for source in part.sources:
        path = ROOT / source
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and file.suffix in (".py", ".cu", ".cuh", ".h", ".cpp", ".md", ".json"):
                if "results" not in file.relative_to(ROOT).parts:
                    digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def run_part(part: Part, machine: str, state: Path, deadline: float) -> Result:
    """Run a part, unless it passed before, and record its result in its folder."""
    folder = state / part.name
    record, mark = folder / "result.json", fingerprint(part, machine)
    if record.exists():
        stored = json.loads(record.read_text())
        if stored["fingerprint"] == mark and stored["status"] == PASSED:
            return Result(part.name, PASSED, f"earlier, in {stored['seconds']} s")
    if part.missing is not None:
        return Result(part.name, NOT_RUN, part.missing)
    limit = min(60 * part.minutes, deadline - time.monotonic())
    if limit <= 0:
        return Result(part.name, NOT_RUN, "the time of the whole run is over")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{part.name}: {shlex.join(part.command)}", flush=True)
    begin = time.monotonic()
    status = run_command(part, folder / "output.txt", limit)
    seconds = round(time.monotonic() - begin)
    temporary = record.with_suffix(".tmp")
    temporary.write_text(json.dumps({"status": status, "seconds": seconds, "fingerprint": mark, "machine": machine}))
    temporary.replace(record)
    output = "" if status == PASSED else f", see {os.path.relpath(folder, ROOT)}/output.txt"
    return Result(part.name, status, f"{seconds} s{output}")


def run_command(part: Part, log: Path, limit: float) -> str:
    with log.open("w") as output:
        # A session of its own, so that the processes that the command starts can be killed together with it.
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env={**os.environ, **part.environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        running.append(process)
        try:
            return PASSED if process.wait(limit) == 0 else FAILED
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        finally:
            kill_session(process)


def kill_session(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of its processes have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_parts(parts: Sequence[Part], machine: str, state: Path, minutes: float) -> list[Result]:
    """Run the parts one after the other, but neighboring parallel parts side by side, and return their results.

    After a build that failed, nothing else runs, because the results would not be those of these sources.
    """
    deadline = time.monotonic() + 60 * minutes
    results: list[Result] = []

    def run(part: Part) -> Result:
        if any(result.part == "build" and result.status in (FAILED, TIMED_OUT) for result in results):
            return Result(part.name, NOT_RUN, "the build did not pass")
        return run_part(part, machine, state, deadline)

    with concurrent.futures.ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 2)) as pool:
        try:
            for parallel, group in itertools.groupby(parts, lambda part: part.parallel):
                for result in (pool.map if parallel else map)(run, group):
                    results.append(result)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                kill_session(process)
            raise
    return results


def summarize(results: Sequence[Result]) -> int:
    """Print one line per part and the numbers of results, and return the exit status."""
    width = max(len(result.part) for result in results)
    print()
    for result in results:
        print(f"{result.part:{width}}  {result.status:9}  {result.detail}")
    count = {status: sum(r.status == status for r in results) for status in (PASSED, FAILED, TIMED_OUT, NOT_RUN)}
    print("\n" + ", ".join(f"{number} {status}" for status, number in count.items()))
    return 1 if count[FAILED] or count[TIMED_OUT] else 3 if count[NOT_RUN] else 0


def find_machine() -> tuple[str, str | None]:
    """Return a description of torch and the GPU, and the compute capability of the GPU (None if there is no GPU)."""
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__}, no GPU", None
    capability = ".".join(map(str, torch.cuda.get_device_capability(0)))
    return f"torch {torch.__version__}, {torch.cuda.get_device_name(0)}, compute capability {capability}", capability


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prove",
        description="Build for the GPU of this machine, and run the tests, sanitizers and benchmarks on it.",
    )
    parser.add_argument("--minutes", type=float, default=30, help="the time limit of the whole run (default: 30)")
    parser.add_argument("--fresh", action="store_true", help="run the parts again that passed before")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run only these parts, for example build tests")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    machine, capability = find_machine()
    parts = make_parts(capability)
    if options.only:
        names = [part.name for part in parts]
        if unknown := [name for name in options.only if name not in names]:
            parser.error(f"--only: {unknown[0]} is not a part; the parts are {', '.join(names)}")
        parts = [part for part in parts if part.name in options.only]
    if options.fresh:
        for part in parts:
            shutil.rmtree(STATE / part.name, ignore_errors=True)
    print(f"{machine}. The outputs of the parts are in {os.path.relpath(STATE, ROOT)}.", flush=True)
    return summarize(run_parts(parts, machine, STATE, options.minutes))


if __name__ == "__main__":
    sys.exit(main())
