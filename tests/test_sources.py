"""Tests of the C++ and CUDA sources: which files name an op, and whether they compile with the oldest torch."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import cuda_emulation
import pybind11
import pytest
from conftest import environment
from cuda_emulation import CSRC
from torch.utils import cpp_extension

from relops import _library

SOURCES = sorted(path for path in CSRC.rglob("*") if path.is_file())
PUBLIC_OPS = sorted(name for name in _library.op_kernels() if not name.startswith("_"))
# setup.py defines these macros for module.cpp.
BUILD_FACTS = [f'-DRELOPS_{name}=""' for name in ("VERSION", "TORCH", "COMPILER", "NVCC", "CUDA_ARCHS")]
# The path of the Python interpreter in an environment with the oldest torch. .ci/run creates this environment.
OLDEST = os.environ.get("RELOPS_OLDEST_TORCH")


def names_op(path: Path, op: str) -> bool:
    return re.search(rf"\b_?{op}(_backward)?\b", path.read_text()) is not None


@pytest.mark.parametrize("op", PUBLIC_OPS)
def test_only_the_files_of_one_family_name_an_op(op: str) -> None:
    folders = {path.relative_to(CSRC).parts[0] for path in SOURCES if names_op(path, op)} - {"library.cpp"}
    assert len(folders) == 1 and folders != {"common"}


def test_the_first_line_of_a_file_names_its_ops() -> None:
    for path in SOURCES:
        opening = path.read_text().split("\n#")[0]
        assert opening.startswith("// "), f"{path} does not begin with a comment that describes it"
        ops = [op for op in PUBLIC_OPS if re.search(rf"\b{op}\b", opening.split("\n")[0])]
        if path.parent != CSRC and not path.is_relative_to(CSRC / "common"):
            assert ops, f"the first line of {path} names no op"


def test_files_have_at_most_500_lines() -> None:
    assert not [path for path in SOURCES if len(path.read_text().splitlines()) > 500]


# ---- Compilation ----


def check_parses(path: Path, folders: Iterable[Path], include_paths: Iterable[str]) -> None:
    """Parse a source and instantiate its templates, without generating code."""
    command = ["g++", "-std=c++20", "-fsyntax-only", "-w", cuda_emulation.STABLE_ABI, "-x", "c++", *BUILD_FACTS]
    command += [*(f"-I{folder}" for folder in folders), *(f"-isystem{path}" for path in include_paths), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]


KERNEL_HEADERS = [path for path in SOURCES if path.name.startswith("cpu_") and path.suffix == ".h"]


@pytest.mark.parametrize("path", KERNEL_HEADERS, ids=lambda path: str(path.relative_to(CSRC)))
def test_kernel_header_parses_alone(path: Path) -> None:
    """Editors parse a header without the file that includes it."""
    check_parses(path, [CSRC], cpp_extension.include_paths())


@pytest.fixture(scope="module")
def oldest_include_paths() -> list[str]:
    if OLDEST is None:
        pytest.skip("RELOPS_OLDEST_TORCH is not set to a Python interpreter with the oldest torch")
    program = "from torch.utils import cpp_extension; print(*cpp_extension.include_paths(), sep='\\n')"
    done = subprocess.run([OLDEST, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [pybind11.get_include(), *done.stdout.split("\n")[:-1], sysconfig.get_path("include")]


@pytest.mark.parametrize("suffix", [".cpp", ".cu"])
def test_sources_compile_with_the_oldest_torch(suffix: str, oldest_include_paths: list[str], tmp_path: Path) -> None:
    """The normal build does not show whether the headers of the oldest torch accept the sources.

    CUDA sources are parsed after their translation for the emulation.
    """
    folders, sources = [CSRC], [path for path in SOURCES if path.suffix == suffix]
    if suffix == ".cu":
        sources = [path for path in cuda_emulation.write_translated(tmp_path) if path.suffix == suffix]
        folders = [cuda_emulation.HERE, tmp_path, CSRC]
    for path in sources:
        check_parses(path, folders, oldest_include_paths)


def test_build_runs_on_the_oldest_torch(tmp_path: Path) -> None:
    """A build also runs on older versions of torch, because it uses only the stable ABI of the oldest one."""
    if OLDEST is None:
        pytest.skip("RELOPS_OLDEST_TORCH is not set to a Python interpreter with the oldest torch")
    program = """
import relops, torch
assert torch.__version__.startswith("{}.{}.".format(*relops._library.MINIMUM_TORCH)), torch.__version__
input = torch.rand(1, 2, 8, 8, requires_grad=True)
boxes = torch.tensor([[0.0, 1.0, 1.0, 6.0, 5.0]])
relops.roi_align(input, boxes, 2).sum().backward()
assert torch.allclose(input.grad.sum(), torch.tensor(8.0))
assert relops.nms(boxes[:, 1:], torch.ones(1), 0.5).tolist() == [0]
if torch.version.cuda is not None and relops._library.cuda_library() is not None:
    assert all("CUDA" in devices for devices in relops._library.op_kernels().values())
"""
    done = subprocess.run([OLDEST, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
