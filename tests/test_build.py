"""Tests of the build and of its error messages. They do not compile anything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import relops
from relops import _library

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(relops.__file__).parent


def python(*arguments: str, cwd: Path, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    paths = [str(path)] if path else []
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def join_lines(text: str) -> str:
    """Replace line breaks with spaces, because a message may be wrapped anywhere."""
    return " ".join(text.split())


# ---- Register spills ----

# Kernels that may spill registers: a part of the kernel's mangled name, and the reason.
ALLOWED_SPILLS: dict[str, str] = {}


def spills(report: str) -> dict[str, int]:
    """Return the bytes of spill stores and loads of each "kernel for arch" in the output of nvcc -Xptxas -v."""
    found, arch = {}, "unknown"
    kernel = None
    for line in report.splitlines():
        if entry := re.search(r"Compiling entry function '\S+' for '(\w+)'", line):
            arch = entry[1]
        elif properties := re.search(r"Function properties for (\S+)", line):
            kernel = properties[1]
        elif sizes := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found[f"{kernel} for {arch}"] = int(sizes[1]) + int(sizes[2])
    return found


def test_report_of_spills_is_parsed() -> None:
    report = """\
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
    assert spills(report) == {"_Z4goodv for sm_80": 0, "_Z3badv for sm_90": 32}


def test_no_kernel_spills() -> None:
    reports = sorted(ROOT.glob("build/**/*.cu.o.ptxas"))
    if not reports:
        pytest.skip("no ptxas reports: relops._cuda was not built in this source tree")
    kernels: dict[str, int] = {}
    for report in reports:
        file_spills = spills(report.read_text())
        assert file_spills, f"{report} names no kernel. Did nvcc run with -Xptxas -v?"
        kernels |= file_spills
    spilling = {
        kernel: size for kernel, size in kernels.items() if size and not any(part in kernel for part in ALLOWED_SPILLS)
    }
    assert not spilling


# ---- Registered kernels ----


def schemas() -> set[str]:
    library = ROOT / "csrc/library.cpp"
    return set(re.findall(r'm\.def\(\s*"(\w+)\(', library.read_text()))


@pytest.mark.quick
def test_every_schema_has_a_cpu_kernel() -> None:
    kernels = _library.op_kernels()
    assert schemas() == set(kernels)
    assert all("CPU" in devices for devices in kernels.values()), kernels


def test_every_schema_has_a_cuda_kernel(tmp_path: Path) -> None:
    """Load relops._cuda with unresolved CUDA symbols, so that the test also runs with a torch without CUDA."""
    if _library.cuda_library() is None:
        message = "relops._cuda is not built"
        if os.environ.get("RELOPS_REQUIRE_CUDA_BUILD") == "1":
            pytest.fail(f"{message}, and RELOPS_REQUIRE_CUDA_BUILD=1")
        pytest.skip(message)
    program = """
import ctypes, os, relops
from relops import _library
ctypes.CDLL(str(_library.cuda_library()), mode=os.RTLD_LAZY)
print(*[name for name, devices in _library.op_kernels().items() if "CUDA" in devices])
"""
    done = python("-c", program, cwd=tmp_path, path=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == schemas()


# ---- Errors of the build ----


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"RELOPS_CUDA": "1", "CUDA_HOME": "{empty}"},
            "relops: RELOPS_CUDA=1, but no nvcc was found under CUDA_HOME={empty}. Install the CUDA toolkit and set "
            "CUDA_HOME to it, or build only the CPU kernels with RELOPS_CUDA=0.",
        ),
        ({"RELOPS_CUDA": "7"}, "relops: RELOPS_CUDA must be 0, 1 or unset, got '7'"),
        ({"RELOPS_CUDA": "0", "CXX": "no-such-compiler"}, "relops: building needs a C++ compiler"),
    ],
    ids=["no nvcc", "RELOPS_CUDA", "no compiler"],
)
def test_build_errors_name_the_remedy(environment: dict[str, str], message: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {name: value.format(empty=empty) for name, value in environment.items()}
    # CXX=false makes the build fail at once, instead of compiling for minutes, if the expected error does not occur.
    done = python("setup.py", "build_ext", "--build-lib", str(tmp_path), cwd=ROOT, **{"CXX": "false"} | environment)
    assert done.returncode != 0
    assert message.format(empty=empty) in join_lines(done.stderr)


def test_build_without_torch_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    done = python("setup.py", "build_ext", cwd=ROOT, path=tmp_path)
    assert done.returncode != 0
    assert "building needs PyTorch >= 2.10" in done.stderr and "no torch here" in done.stderr
    assert "pip install --no-build-isolation ." in done.stderr
    assert "Traceback" not in done.stderr


# ---- Errors of the import ----


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """Return a folder that contains a copy of relops without its compiled libraries."""
    shutil.copytree(PACKAGE, tmp_path / "relops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_import_without_the_cpu_library(copied: Path) -> None:
    # The import hook of an editable install would find the compiled library of the source tree.
    code = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]; import relops"
    done = python("-c", code, cwd=copied, path=copied)
    assert "ImportError: relops._C is not built." in done.stderr
    assert "`make build`, or `pip install --no-build-isolation .`" in done.stderr


def test_import_with_a_broken_cpu_library(copied: Path) -> None:
    (compiled,) = PACKAGE.glob("_C.*so")
    (copied / "relops" / compiled.name).write_text("not a library")
    done = python("-c", "import relops", cwd=copied, path=copied)
    assert f"ImportError: relops._C does not load on torch {torch.__version__}: " in done.stderr
    assert "Build it again: pip install --force-reinstall" in done.stderr


def test_import_on_an_old_torch(tmp_path: Path) -> None:
    program = "import torch; torch.__version__ = '2.9.1+cpu'; import relops"
    done = python("-c", program, cwd=tmp_path, path=PACKAGE.parent)
    assert "ImportError: relops needs PyTorch >= 2.10, found 2.9.1+cpu: pip install -U torch" in done.stderr


def test_import_without_the_cuda_library(copied: Path) -> None:
    (compiled,) = PACKAGE.glob("_C.*so")
    shutil.copy(compiled, copied / "relops")
    program = """
import relops, torch
from relops import _library
print(_library.cuda_missing)
try:
    _library.check_device_has_kernels("some_op", torch.device("cuda"))
except RuntimeError as error:
    print(error)
"""
    done = python("-c", program, cwd=copied, path=copied)
    missing, error = done.stdout.splitlines()
    assert missing.startswith("not built (build with nvcc on PATH or CUDA_HOME set")
    assert error == f"relops.some_op: got CUDA tensors, but relops._cuda is {missing}"


def test_info_command(tmp_path: Path) -> None:
    done = python("-m", "relops", "info", cwd=tmp_path, path=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    build = _library.build_info()
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line and " kernels" not in line)
    assert rows["relops"] == relops.__version__ == build["version"]
    assert rows["torch"] == f"{torch.__version__} (built with {build['torch']})"
    assert re.search(rf"^CPU kernels +{build['cpu_isa']}, \d+ threads$", done.stdout, re.MULTILINE)
    assert re.search(rf"^CUDA kernels +{re.escape(_library.cuda_missing or 'loaded')}$", done.stdout, re.MULTILINE)
    for name, devices in _library.op_kernels().items():
        assert rows[name] == ", ".join(devices)
