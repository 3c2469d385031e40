"""The command that runs the benchmarks of the ops and records their results.

Usage: python -m benchmarks.run [--quick] [--op NAME] [--device cpu|cuda] [--threads N] [--out DIR]
"""

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
    """Return the devices of this machine for which this build of relops has kernels."""
    cuda = torch.cuda.is_available() and _library.cuda_missing is None
    return ["cpu", "cuda"] if cuda else ["cpu"]


def discover(device: str, quick: bool, op: str | None) -> Iterator[harness.Bench | harness.Skipped]:
    """Yield the rows of every `bench_<stem>.py`. If `op` is given, yield only the rows of that op or that stem."""
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        module = importlib.import_module(f"benchmarks.{path.stem}")
        for bench in module.benches(device):
            if op not in (None, bench.op, path.stem.removeprefix("bench_")):
                continue
            if bench.quick or not quick:
                yield bench


def run_device(options: argparse.Namespace, device: str, rows: list[dict[str, Any]], failures: list[str]) -> None:
    """Measure all rows of a device. Append each finished row to `rows`, so that an interrupted run keeps it."""
    harness.progress(f"{device}: measuring the limits of the machine")
    run = harness.describe_run(device)
    copy, flops = run["limits"]["copy_bytes_per_s"], run["limits"]["float32_flops_per_s"]
    harness.progress(f"{device}: a copy runs at {copy / 1e9:.4g} GB/s, a float32 matmul at {flops / 1e9:.4g} GFLOP/s")
    benches = list(discover(device, options.quick, options.op))
    if not benches:
        harness.progress(f"{device}: --op {options.op} has no rows")
    for number, bench in enumerate(benches, 1):
        counter = f"[{number:>{len(str(len(benches)))}}/{len(benches)}]"
        if isinstance(bench, harness.Skipped):
            harness.progress(f"{counter} {bench.op} | {bench.shape}: skipped because {bench.reason}")
            continue
        harness.progress(f"{counter} {bench.label}: ", end="")
        try:
            row = harness.measure(bench, options.quick)
        except Exception as error:  # a failed row must not stop the run, but changes the exit status
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
        description="Verify relops against pure PyTorch in float64, time both, and print and record the results.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="run only the main rows for a few rounds, and record nothing"
    )
    parser.add_argument(
        "--op", help="run only this op (for example ms_deform_attn_fused) or bench_OP.py (for example ms_deform_attn)"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="the device to run on (default: all devices that relops can use here)"
    )
    parser.add_argument("--threads", type=int, help="the number of CPU threads (default: torch's default)")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="the folder to record results in")
    options = parser.parse_args(argv)
    if options.device == "cuda" and "cuda" not in devices():
        reason = _library.cuda_missing or "loaded, but torch finds no GPU"
        parser.error(f"--device cuda: relops._cuda is {reason}")
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

    # The targets are goals for the developers of relops, so the quick setting does not show them.
    print(harness.table(rows, targets=not options.quick) if rows else "No rows were measured.")
    print(
        "\nTimes are medians over rounds, and a ratio says how many times faster relops is. The peak is the peak memory"
        "\nof one call, not counting its inputs. The error is the relative RMS error with respect to the float64 twin"
        "\nor, for ops that return indices, the fraction of indices that differ from those of the twin. The column"
        '\n"of limit" is the shortest time that memory bandwidth and arithmetic allow, divided by the measured time.'
        f"\n{len(rows)} rows took {time.perf_counter() - begin:.0f} s."
    )
    if options.quick:
        print("This was the quick setting, which records nothing. For the full run: python -m benchmarks.run")
    elif rows:
        print(f"The rows were recorded in {options.out}. For a table and plots, run: python -m benchmarks.report")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 130 if interrupted else 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
