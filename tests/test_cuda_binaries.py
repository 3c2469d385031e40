"""Tests of the compiled CUDA kernels: spills, shared memory, resident blocks, and counts of instructions.

They need nvcc, but no GPU. Kernels that the last build does not have are compiled here, for one architecture at a time.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from helpers import cuda_binaries
from helpers.cuda_binaries import ARCHS, DEFAULT_ARCHS, LARGEST, PINNED_ARCH, REMEDY, ROOT, Report, parse_report

from benchmarks import cuda_counts

TABLE = cuda_binaries.read_table()
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cu"))
MAX_STATIC_SHARED = 48 * 1024  # the limit of every architecture


def why_no_counts() -> str | None:
    if cuda_counts.nvcc() is None:
        return "nvcc was not found"
    if cuda_counts.cuobjdump() is None:
        return "cuobjdump was not found: neither PATH nor triton's wheel has it"
    if (release := cuda_binaries.nvcc_release()) != TABLE["nvcc"]:
        return f"{cuda_binaries.PINS.name} has the counts of nvcc {TABLE['nvcc']}, and this is nvcc {release}. {REMEDY}"
    return None


@pytest.fixture(scope="module")
def tools() -> None:
    if reason := why_no_counts():
        if os.environ.get("RELOPS_REQUIRE_CUDA_BUILD") == "1":
            pytest.fail(f"{reason}, and RELOPS_REQUIRE_CUDA_BUILD=1")
        pytest.skip(reason)


# ---- The kernels ----


def cases() -> list[tuple[str, str]]:
    """Return the sources and architectures: those of the last build, all sources for sm_90, the largest for others."""
    return [
        (source, arch)
        for arch in ARCHS
        for source in SOURCES
        if source in LARGEST or arch == PINNED_ARCH or cuda_binaries.built_report(source, arch) is not None
    ]


def local_memory(reports: list[Report], allowed: dict[str, list[int]]) -> list[str]:
    """Return the kernels whose stack frames or spills are larger than those that the table allows."""
    return [
        f"{name} for sm_{reports[0].arch}: {found} bytes of stack and spills, and the table has {allowed.get(name)}"
        for name, found in cuda_binaries.stacks(reports).items()
        if any(size > limit for size, limit in zip(found, allowed.get(name, [0, 0])))
    ]


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize(("source", "arch"), cases())
def test_kernels_fit(source: str, arch: str) -> None:
    """Kernels do not spill, and as many blocks fit on a multiprocessor as the table says.

    The instructions of sm_90 do not exceed the table.
    """
    reports, kernels = cuda_binaries.compiled(source, arch)
    assert reports, "the report of ptxas names no kernel"
    allowed = TABLE["sources"][source]["stacks"].get(arch, {})
    entries = TABLE["sources"][source]["kernels"]
    found = local_memory(reports, allowed)
    names = cuda_counts.demangle([report.mangled for report in reports])
    assert entries.keys() <= {*names}, f"{cuda_binaries.PINS.name} has kernels that {source} does not have"
    for name, report in zip(names, reports):
        if report.shared > MAX_STATIC_SHARED:
            found.append(f"{name} for sm_{arch} has {report.shared} bytes of static shared memory")
        if name in entries and arch in DEFAULT_ARCHS:
            blocks, pinned = cuda_binaries.resident_blocks(entries[name], report), entries[name]["blocks"][arch]
            if blocks < max(pinned, 1):  # 0 blocks fit if the shared memory exceeds the limit of a block
                found.append(f"{name} for sm_{arch}: {blocks} blocks a multiprocessor, and the table has {pinned}")
    for kernel in kernels:
        if (accesses := kernel.count(r"LDL.*|STL.*")) and kernel.name not in allowed:
            found.append(f"{kernel.name} has {accesses} accesses to local memory")
        if kernel.name in entries:
            found += cuda_binaries.differences(entries[kernel.name], kernel)
    assert not found, "\n".join([*found, REMEDY])


def test_the_command_writes_the_table_in_its_format() -> None:
    assert list(TABLE["sources"]) == SOURCES, REMEDY
    assert cuda_binaries.PINS.read_text() == cuda_binaries.format_table(TABLE)


# ---- The tools ----


def test_report_is_parsed() -> None:
    text = """\
ptxas info    : 28 bytes gmem, 224 bytes cmem[4]
ptxas info    : Compiling entry function '_Z4goodv' for 'sm_80'
ptxas info    : Function properties for _Z4goodv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 87 registers, used 1 barriers, 16 bytes smem, 800 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3badv' for 'sm_90'
ptxas info    : Function properties for _Z3badv
    48 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 800 bytes cmem[0]
"""
    assert parse_report(text) == [
        Report("_Z4goodv", "80", registers=87, stack=0, spills=0, shared=16),
        Report("_Z3badv", "90", registers=255, stack=48, spills=32, shared=0),
    ]


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "blocks"),
    [
        ("90", 32, 256, 0, 8),  # bound by the threads
        ("86", 32, 256, 0, 6),
        ("75", 32, 256, 0, 4),
        ("90", 33, 256, 0, 6),  # 40 registers are allocated
        ("90", 128, 256, 0, 2),
        ("90", 129, 256, 0, 1),
        ("90", 255, 512, 0, 0),
        ("90", 32, 32, 0, 32),  # bound by the number of blocks
        ("86", 32, 32, 0, 16),
        ("89", 32, 32, 0, 24),
        ("90", 32, 64, 113 * 1024, 2),  # 1 KB of each block is reserved
        ("90", 32, 64, 113 * 1024 + 1, 1),
        ("75", 32, 64, 64 * 1024, 1),
        ("75", 32, 64, 64 * 1024 + 1, 0),
    ],
)
def test_resident_blocks(arch: str, registers: int, threads: int, shared: int, blocks: int) -> None:
    assert cuda_counts.blocks_per_multiprocessor(arch, registers, threads, shared) == blocks


# ---- Planted mistakes ----

KERNEL = """
extern "C" __global__ __launch_bounds__({threads}) void planted(const float* x, const int* at, float* y, int n) {{
  {body}
}}
"""
SUM = """
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < n; ++i) sum += x[i] * {factor};
  y[threadIdx.x] = sum;
"""
# 64 numbers are used after the barrier, but 1024 threads can have only 64 registers each, which also hold addresses.
SPILL = """
  float numbers[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) numbers[i] = x[threadIdx.x + i * n];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) y[threadIdx.x + i * n] = numbers[i] * numbers[(i + 1) % 96];
"""
LOCAL = """
  float numbers[32];
  for (int i = 0; i < 32; ++i) numbers[i] = x[threadIdx.x + i * n];
  for (int i = 0; i < n; ++i) y[i] = numbers[at[i]];
"""


def compile_planted(folder: Path, body: str, threads: int = 256) -> tuple[Report, cuda_counts.Kernel]:
    source, cubin = folder / "planted.cu", folder / "planted.cubin"
    source.write_text(KERNEL.format(body=body, threads=threads))
    (report,) = parse_report(cuda_counts.compile_cubin(source, PINNED_ARCH, cubin))
    (kernel,) = cuda_counts.read_kernels(cubin)
    return report, kernel


@pytest.mark.usefixtures("tools")
def test_a_spill_is_found(tmp_path: Path) -> None:
    report, kernel = compile_planted(tmp_path, SPILL, threads=1024)
    assert report.spills > 0 and kernel.count("STL.*") > 0
    (fault,) = local_memory([report], {"another": [8, 8]})
    assert re.fullmatch(r"planted for sm_90: \[\d+, \d+\] bytes of stack and spills, and the table has None", fault)
    assert local_memory([report], {"planted": [report.stack, report.spills]}) == []
    assert len(local_memory([report], {"planted": [report.stack, report.spills - 1]})) == 1


@pytest.mark.usefixtures("tools")
def test_local_memory_is_found(tmp_path: Path) -> None:
    report, kernel = compile_planted(tmp_path, LOCAL)
    assert report.spills == 0 and kernel.count("LDL.*") > 0
    (fault,) = local_memory([report], {})
    assert fault == "planted for sm_90: [128, 0] bytes of stack and spills, and the table has None"


@pytest.mark.usefixtures("tools")
def test_a_longer_loop_is_found(tmp_path: Path) -> None:
    _, kernel = compile_planted(tmp_path, SUM.format(factor="x[i]"))
    entry = json.loads(json.dumps({**cuda_binaries.count(kernel, ["FFMA"]), "requires": ["LDG.*"]}))
    assert entry["loops"]["FFMA"]["LDG"] == 1
    assert list(cuda_binaries.differences(entry, kernel)) == []
    assert list(cuda_binaries.differences({**entry, "requires": ["HMMA.*"]}, kernel)) == [
        "planted: no instruction matches HMMA.*"
    ]
    _, longer = compile_planted(tmp_path, SUM.format(factor="(double)x[at[i] % n]"))
    found = " ".join(cuda_binaries.differences(entry, longer))
    assert re.search(r"total \d+ in the FFMA loop, and the table has \d+", found)
    assert re.search(r"LDG \d in the FFMA loop, and the table has 1", found)
    assert re.search(r"planted: FP64 [1-9]", found)


@pytest.mark.usefixtures("tools")
def test_the_command_prints_the_counts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _, kernel = compile_planted(tmp_path, SUM.format(factor="2"), threads=128)
    assert cuda_counts.main(["plan.*", str(tmp_path / "planted.cubin"), "--shared", "40000"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("planted  sm_90\n")
    assert f"{kernel.registers} registers, 40000 bytes of shared memory, 0 of stack, 128 threads: 5 blocks" in printed
    assert re.search(r"^    loop at 0x\w+: total \d+, .*LDG 1", printed, re.MULTILINE)
