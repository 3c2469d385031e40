"""python -m benchmarks.run [--quick] [--op NAME] [--device cpu|cuda] [--threads N] [--out DIR]"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from relops import _library


def devices() -> list[str]:
    """The devices that this build of relops has kernels for and this machine has."""
    cuda = torch.cuda.is_available() and _library.cuda_missing is None
    return ["cpu", "cuda"] if cuda else ["cpu"]


def discover(device: str, quick: bool, op: str | None) -> Iterator[harness.Bench | harness.Skipped]:
    """The rows of every bench_<stem>.py; `op` picks a stem or the name of an op."""
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        module = importlib.import_module(f"benchmarks.{path.stem}")
        for bench in module.benches(device):
            if op not in (None, bench.op, path.stem.removeprefix("bench_")):
                continue
            if bench.quick or not quick:
                yield bench


def run_device(options: argparse.Namespace, device: str, rows: list[dict[str, Any]], failures: list[str]) -> None:
    """Appends to `rows` as they finish, so that an interrupt loses only the one under way."""
    harness.progress(f"{device}: measuring the machine's limits")
    run = harness.describe_run(device)
    copy, flops = run["limits"]["copy_bytes_per_s"], run["limits"]["float32_flops_per_s"]
    harness.progress(f"{device}: copies at {copy / 1e9:.4g} GB/s, float32 matmul at {flops / 1e9:.4g} GFLOP/s")
    benches = list(discover(device, options.quick, options.op))
    if not benches:
        harness.progress(f"{device}: no rows for --op {options.op}")
    for number, bench in enumerate(benches, 1):
        counter = f"[{number:>{len(str(len(benches)))}}/{len(benches)}]"
        if isinstance(bench, harness.Skipped):
            harness.progress(f"{counter} {bench.op} | {bench.shape}: skipped, {bench.why}")
            continue
        harness.progress(f"{counter} {bench.label}: ", end="")
        try:
            row = harness.measure(bench, options.quick)
        except Exception as error:  # one row's failure must not cost the others; the exit status tells
            failures.append(f"{bench.label}: {type(error).__name__}: {error}")
            harness.progress(f"FAILED: {type(error).__name__}: {error}")
            continue
        finally:
            harness.release_memory(device)
        relops_ms, pytorch_ms = (harness.format_ms(row["ms"][name]["median"]) for name in ("relops", "pytorch"))
        ratio = harness.format_ratio(row["ratio"])
        harness.progress(f"{relops_ms} ms, PyTorch {pytorch_ms} ms, {ratio} ({row['rounds']} rounds)")
        rows.append(row)
        if not options.quick:
            harness.Record(options.out, device, bench.op, run).add(row)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Verifies relops against float64, times it against PyTorch, prints a table and records JSON.",
    )
    parser.add_argument("--quick", action="store_true", help="the main rows, few rounds; prints, records nothing")
    parser.add_argument("--op", help="only this op, e.g. ms_deform_attn_fused, or this file, e.g. ms_deform_attn")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: every device that relops can use here")
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: torch's)")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="default: benchmarks/results")
    options = parser.parse_args(argv)
    if options.device == "cuda" and "cuda" not in devices():
        why = _library.cuda_missing or "loaded, but torch sees no GPU"
        parser.error(f"--device cuda: relops._cuda is {why}")
    if options.threads:
        torch.set_num_threads(options.threads)

    begin = time.perf_counter()
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    interrupted = False
    try:
        for device in [options.device] if options.device else devices():
            run_device(options, device, rows, failures)
    except KeyboardInterrupt:
        interrupted = True

    print(harness.table(rows) if rows else "No rows measured.")
    print(
        "\nMedians of rounds. Peak: memory of one call beyond its inputs. Error: relative RMS against float64; of ops"
    )
    print("that select, the share of indices that are not those of the twin in the same dtype.")
    print(
        f"Of limit: the time that memory bandwidth or arithmetic allow, over the time taken. {len(rows)} rows in "
        f"{time.perf_counter() - begin:.0f} s."
    )
    if options.quick:
        print("This was the quick setting, nothing was recorded. The full run: python -m benchmarks.run")
    elif rows:
        print(f"Recorded under {options.out}; table and plots: python -m benchmarks.report")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 130 if interrupted else 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
