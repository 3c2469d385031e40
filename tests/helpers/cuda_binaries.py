"""Compiled CUDA kernels: the report of ptxas, and the table of pinned counts, tests/cuda_pins.json.

    python tests/helpers/cuda_binaries.py [PART OF A SOURCE'S PATH]

The command writes the counts of the current sources into the table. They come from the last build, or from nvcc for
the architectures that the last build does not have. The table has two parts for each source: `stacks` lists the kernels
that use local memory, with the bytes of their stack frames and spills, and `kernels` has counts of the kernels that
matter. To add a kernel, write {"loops": {"FFMA": {}}} for it and run the command. A hot loop is identified by a class
of instructions: it is the loop that has the most of them outside of its inner loops. An entry has these fields:

- dynamic: the bytes of dynamic shared memory of a block, for the numbers of resident blocks (0 if it is missing)
- requires: regular expressions of opcodes that the kernel must have
- loops: for each class that identifies a hot loop, the total number of instructions in the loop, and the numbers of the
  instructions of that class and of the slow classes
- threads: the launch bound of a block
- blocks: the number of resident blocks of a multiprocessor, for each architecture
- registers, FP64, CALL: the number of registers, FP64 instructions and calls of subroutines (64-bit divisions, for
  example) of the kernel

`dynamic`, `requires` and the classes of `loops` are written by hand, and the command writes the rest.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import cuda_counts  # noqa: E402

PINS = ROOT / "tests/cuda_pins.json"
PINNED_ARCH = "90"
# The sources whose kernels need the most registers and shared memory, which are tested on all architectures.
LARGEST = (
    "csrc/deform_attn/cuda_backward.cu",
    "csrc/deform_conv/cuda_backward.cu",
    "csrc/deform_conv/cuda_backward_weight.cu",
    "csrc/local_relation/cuda_backward.cu",
    "csrc/regions/cuda_backward.cu",
    "csrc/regions/cuda_forward_tiles.cu",
    "csrc/relation_attention/cuda_backward.cu",
    "csrc/relation_attention/cuda_forward.cu",
)
# sm_89 is missing because nvcc 13.0 allocates the same registers and memory for it as for sm_86 in these sources.
ARCHS = ("75", "80", "86", "90", "100", "120")
DEFAULT_ARCHS = ("75", "80", "86", "90", "120")  # those of the default build
SLOW = ("LDG", "STG", "LDS", "STS", "ATOM", "SHFL", "BAR", "MUFU", "CVT", "WIDE", "FP64", "CALL", "LOCAL")
REMEDY = "If this is intended, run `python tests/helpers/cuda_binaries.py` and commit tests/cuda_pins.json"


# ---- The report of ptxas ----


@dataclass(frozen=True)
class Report:
    """What ptxas says about a kernel: numbers of registers, and bytes of the stack frame, spills and shared memory."""

    mangled: str
    arch: str
    registers: int
    stack: int
    spills: int
    shared: int


def parse_report(text: str) -> list[Report]:
    """Parse the output of nvcc -Xptxas -v."""
    reports, arch, kernel, stack, spilled = [], None, None, 0, 0
    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", line):
            arch = entry[2]
        elif properties := re.search(r"Function properties for (\S+)", line):
            kernel = properties[1]
        elif sizes := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, spilled = int(sizes[1]), int(sizes[2]) + int(sizes[3])
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            reports.append(Report(kernel, arch, int(used[1]), stack, spilled, int(shared[1]) if shared else 0))
    return reports


# ---- Compiled sources ----


def built_report(source: str, arch: str) -> str | None:
    """Return the report of the last build about a source, or None if there is no build for the architecture."""
    for path in cuda_counts.built_objects():
        if path.as_posix().endswith(f"/{source}.o"):
            text = path.with_name(path.name + ".ptxas").read_text()
            return text if f"for 'sm_{arch}'" in text else None
    return None


def compiled(source: str, arch: str) -> tuple[list[Report], list[cuda_counts.Kernel]]:
    """Return what ptxas says about the kernels of a source and, for the pinned architecture, their instructions."""
    text = built_report(source, arch)
    if text is not None:
        (path,) = (path for path in cuda_counts.built_objects() if path.as_posix().endswith(f"/{source}.o"))
        kernels = cuda_counts.read_kernels(path, arch) if arch == PINNED_ARCH else []
    else:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernels.cubin"
            text = cuda_counts.compile_cubin(ROOT / source, arch, cubin)
            kernels = cuda_counts.read_kernels(cubin) if arch == PINNED_ARCH else []
    return [report for report in parse_report(text) if report.arch == arch], kernels


# ---- The table ----


def count(kernel: cuda_counts.Kernel, hot_classes: Iterable[str]) -> dict[str, Any]:
    """Return the counts of the table that are taken from the instructions of a kernel."""
    classes = cuda_counts.count_classes(kernel.instructions)
    loops = {}
    for hot in hot_classes:
        loop = cuda_counts.count_classes(kernel.hot_loop(hot).instructions)
        loops[hot] = {"total": loop["total"], **{name: loop[name] for name in (hot, *SLOW) if name in loop}}
    numbers = {"threads": kernel.threads, "registers": kernel.registers}
    return numbers | {name: classes.get(name, 0) for name in ("FP64", "CALL")} | {"loops": loops}


def resident_blocks(entry: dict[str, Any], report: Report) -> int:
    shared = report.shared + entry.get("dynamic", 0)
    return cuda_counts.blocks_per_multiprocessor(report.arch, report.registers, entry["threads"], shared)


def differences(entry: dict[str, Any], kernel: cuda_counts.Kernel) -> Iterator[str]:
    """Yield a description of each count that exceeds the table, and of each required instruction that is missing."""
    counts = count(kernel, entry["loops"])
    for name in ("threads", "registers", "FP64", "CALL"):
        if counts[name] > entry[name]:
            yield f"{kernel.name}: {name} {counts[name]}, and the table has {entry[name]}"
    for hot, pinned in entry["loops"].items():
        for name, number in counts["loops"][hot].items():
            if (name in SLOW or name == "total") and number > pinned.get(name, 0):
                yield f"{kernel.name}: {name} {number} in the {hot} loop, and the table has {pinned.get(name, 0)}"
    for pattern in entry.get("requires", ()):
        if not kernel.count(pattern):
            yield f"{kernel.name}: no instruction matches {pattern}"


def nvcc_release() -> str:
    """Return the version of nvcc without the patch. Other versions may generate other instructions."""
    return ".".join(cuda_counts.build().nvcc_release(Path(cuda_counts.nvcc()).parents[1]).split(".")[:2])


def read_table() -> dict[str, Any]:
    return json.loads(PINS.read_text())


def format_table(table: dict[str, Any]) -> str:
    """Return the table as JSON with one line per kernel."""

    def lines(rows: dict[str, Any], indent: str) -> str:
        return ",\n".join(f"{indent}{json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())

    sources = [
        f' {json.dumps(source)}: {{\n  "stacks": {json.dumps(rows["stacks"])},\n'
        f'  "kernels": {{\n{lines(rows["kernels"], "   ")}\n  }}\n }}'
        for source, rows in table["sources"].items()
    ]
    return f'{{"nvcc": {json.dumps(table["nvcc"])}, "sources": {{\n' + ",\n".join(sources) + "\n}}\n"


def stacks(reports: Iterable[Report]) -> dict[str, list[int]]:
    """Return the bytes of the stack frame and of the spills of each kernel that has some."""
    found: dict[str, list[int]] = {}
    for report in reports:
        if report.stack or report.spills:
            name = cuda_counts.demangle([report.mangled])[0]
            found[name] = [max(pair) for pair in zip(found.get(name, [0, 0]), [report.stack, report.spills])]
    return found


def write_table(part: str) -> None:
    """Write the counts of the sources whose path contains `part` into the table."""
    table = read_table()
    table["nvcc"] = nvcc_release()
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cu"))
    if missing := [source for source, rows in table["sources"].items() if rows["kernels"] and source not in sources]:
        raise SystemExit(f"{missing[0]} does not exist. Move its kernels in {PINS.name} to another source.")
    table["sources"] = {source: table["sources"].get(source, {"kernels": {}}) for source in sources}
    for source, rows in table["sources"].items():
        if part not in source and "stacks" in rows:
            continue
        entries = rows["kernels"]
        kernels = {kernel.name: kernel for kernel in compiled(source, PINNED_ARCH)[1]}
        for name, entry in entries.items():
            if name not in kernels:
                raise SystemExit(f"{source} has no kernel {name}. It has:\n  " + "\n  ".join(sorted(kernels)))
            written = {key: entry[key] for key in ("dynamic", "requires") if key in entry}
            entries[name] = written | count(kernels[name], entry["loops"]) | {"blocks": {}}
        rows["stacks"] = {}
        for arch in ARCHS if source in LARGEST else DEFAULT_ARCHS:
            reports = compiled(source, arch)[0]
            if found := stacks(reports):
                rows["stacks"][arch] = found
            for name, report in zip(cuda_counts.demangle([r.mangled for r in reports]), reports):
                if name in entries and arch in DEFAULT_ARCHS:
                    entries[name]["blocks"][arch] = resident_blocks(entries[name], report)
        print(source)
    PINS.write_text(format_table(table))


if __name__ == "__main__":
    write_table(sys.argv[1] if len(sys.argv) > 1 else "")
