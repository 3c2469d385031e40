"""Tests of the build and of its error messages. They do not compile anything."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import relops
from benchmarks import cuda_counts
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


@pytest.mark.parametrize(
    ("known", "archs"),
    [
        ("75 80 86 87 89 90 100 120 121", "7.5;8.0;8.6;9.0+PTX;12.0+PTX"),
        ("50 60 70 75 80 86 89 90 90a", "7.5;8.0;8.6;9.0+PTX"),
        ("80 86", "8.0;8.6+PTX"),
    ],
    ids=["CUDA 13", "CUDA 12.0", "few"],
)
def test_default_architectures_are_those_that_nvcc_knows(known: str, archs: str, tmp_path: Path) -> None:
    fake_nvcc(tmp_path, known)
    assert cuda_counts.build().default_archs(tmp_path) == archs


def test_the_build_plan_shows_the_architectures(tmp_path: Path) -> None:
    """The build fails after the plan, because the C++ compiler is `false`."""
    fake_nvcc(tmp_path, "80 90")
    environment = {"CXX": "false", "CUDA_HOME": str(tmp_path), "TORCH_CUDA_ARCH_LIST": ""}
    done = python("setup.py", "build_ext", "--build-lib", str(tmp_path / "library"), cwd=ROOT, **environment)
    assert done.returncode != 0
    assert re.search(r"^  CUDA archs +8\.0;9\.0\+PTX$", done.stderr, re.MULTILINE), done.stderr


def fake_nvcc(home: Path, known: str) -> None:
    (home / "bin").mkdir()
    (home / "bin/nvcc").write_text(f"#!/bin/sh\nprintf 'sm_%s\\n' {known}\n")
    (home / "bin/nvcc").chmod(0o755)


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


@pytest.mark.parametrize(
    ("code", "runs"),
    [
        ("sm_86", ["8.6", "8.9"]),
        ("sm_90", ["9.0"]),
        ("compute_90", ["9.0", "10.0", "10.3", "11.0", "12.0", "12.1"]),
        ("sm_90a", ["9.0"]),
        ("compute_90a", ["9.0"]),
        ("sm_100f", ["10.0", "10.3"]),
        ("sm_120", ["12.0", "12.1"]),
    ],
)
def test_gpus_that_run_the_code(code: str, runs: list[str]) -> None:
    gpus = ["7.0", "7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1"]
    assert [gpu for gpu in gpus if _library.runs_on(code, tuple(map(int, gpu.split("."))))] == runs


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretend that relops._cuda is loaded, and that cuda:0 is a GPU with compute capability 7.0."""
    build = {**_library.build_info(), "cuda_archs": "sm_75 sm_80 compute_80"}
    monkeypatch.setattr(_library, "cuda_missing", None)
    monkeypatch.setattr(_library, "build_info", lambda: build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    _library._find_cuda_problem.cache_clear()
    yield
    _library._find_cuda_problem.cache_clear()


UNUSABLE = (
    "relops.some_op: got CUDA tensors, but Tesla V100 has compute capability 7.0, and relops._cuda was built for sm_75 "
    "sm_80 compute_80. Build it again with TORCH_CUDA_ARCH_LIST=7.0, or with a list that contains 7.0"
)


def test_error_for_a_gpu_that_the_build_does_not_support(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("cuda", "cuda:0"):
        with pytest.raises(RuntimeError, match=f"^{re.escape(UNUSABLE)}$"):
            _library.check_device_has_kernels("some_op", torch.device(device))
    _library.check_device_has_kernels("some_op", torch.device("cuda:1"))  # of fake tensors: no such GPU exists
    _library._find_cuda_problem.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    _library.check_device_has_kernels("some_op", torch.device("cuda"))


def test_a_graph_is_traced_past_the_check_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_find_cuda_problem", functools.cache(lambda device: None))

    @torch.compile(backend="eager", fullgraph=True)
    def function(x: torch.Tensor) -> torch.Tensor:
        _library.check_device_has_kernels("some_op", torch.device("cuda"))
        return x + 1

    assert function(torch.zeros(1)) == 1


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
