"""The C++ and CUDA sources: where an op is found, and that headers compile alone and with the oldest torch."""

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
# What setup.py defines for module.cpp.
BUILD_FACTS = [f'-DRELOPS_{name}=""' for name in ("VERSION", "TORCH", "COMPILER", "NVCC", "CUDA_ARCHS")]
# A Python that has the oldest torch; .ci/run makes one.
OLDEST = os.environ.get("RELOPS_OLDEST_TORCH")


def named(path: Path, op: str) -> bool:
    return re.search(rf"\b_?{op}(_backward)?\b", path.read_text()) is not None


@pytest.mark.parametrize("op", PUBLIC_OPS)
def test_an_op_is_named_by_the_files_of_its_family_alone(op: str) -> None:
    folders = {path.relative_to(CSRC).parts[0] for path in SOURCES if named(path, op)} - {"library.cpp"}
    assert len(folders) == 1 and folders != {"common"}


def test_the_first_line_of_a_file_names_its_ops() -> None:
    for path in SOURCES:
        opening = path.read_text().split("\n#")[0]
        assert opening.startswith("// "), f"{path} does not begin with what it is"
        ops = [op for op in PUBLIC_OPS if re.search(rf"\b{op}\b", opening.split("\n")[0])]
        if path.parent != CSRC and not path.is_relative_to(CSRC / "common"):
            assert ops, f"the first line of {path} names no op"


def test_no_file_is_long() -> None:
    assert not [path for path in SOURCES if len(path.read_text().splitlines()) > 500]


# ---- What compiles ----


def check_parses(path: Path, folders: Iterable[Path], include_paths: Iterable[str]) -> None:
    """Parse a source and instantiate its templates, without generating code."""
    command = ["g++", "-std=c++20", "-fsyntax-only", "-w", cuda_emulation.STABLE_ABI, "-x", "c++", *BUILD_FACTS]
    command += [*(f"-I{folder}" for folder in folders), *(f"-isystem{path}" for path in include_paths), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]


KERNEL_HEADERS = [path for path in SOURCES if path.name.startswith("cpu_") and path.suffix == ".h"]


@pytest.mark.parametrize("path", KERNEL_HEADERS, ids=lambda path: str(path.relative_to(CSRC)))
def test_header_of_a_kernel_parses_alone(path: Path) -> None:
    """As an editor parses it, which knows nothing of the file that includes it."""
    check_parses(path, [CSRC], cpp_extension.include_paths())


@pytest.fixture(scope="module")
def oldest_include_paths() -> list[str]:
    if OLDEST is None:
        pytest.skip("RELOPS_OLDEST_TORCH names no Python with the oldest torch")
    program = "from torch.utils import cpp_extension; print(*cpp_extension.include_paths(), sep='\\n')"
    done = subprocess.run([OLDEST, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [pybind11.get_include(), *done.stdout.split("\n")[:-1], sysconfig.get_path("include")]


@pytest.mark.parametrize("suffix", [".cpp", ".cu"])
def test_sources_compile_with_the_oldest_torch(suffix: str, oldest_include_paths: list[str], tmp_path: Path) -> None:
    """Headers of an older torch have broken unseen. CUDA sources are parsed as the emulation has them."""
    folders, sources = [CSRC], [path for path in SOURCES if path.suffix == suffix]
    if suffix == ".cu":
        sources = [path for path in cuda_emulation.write_translated(tmp_path) if path.suffix == suffix]
        folders = [cuda_emulation.HERE, tmp_path, CSRC]
    for path in sources:
        check_parses(path, folders, oldest_include_paths)


def test_build_runs_on_the_oldest_torch(tmp_path: Path) -> None:
    """A build needs no headers of the torch that it runs on: it keeps the stable ABI of the oldest one."""
    if OLDEST is None:
        pytest.skip("RELOPS_OLDEST_TORCH names no Python with the oldest torch")
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
