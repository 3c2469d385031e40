"""Build the CUDA sources for the CPU, with the emulation in cuda_runtime.h, as ops of namespace relops_emulated."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils import cpp_extension

from relops import _library

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
NAMESPACE = "relops_emulated"
STABLE_ABI = f"-DTORCH_TARGET_VERSION=0x{sum(n << shift for n, shift in zip(_library.MINIMUM_TORCH, (56, 48))):016x}ULL"

# The devices of devices.h that can have tensors. Each has the shared memory of its architecture.
DEVICES = {"sm_80": 1, "sm_75": 2, "sm_86": 3, "sm_90": 4}

in_use = False


def declare_shared(declaration: re.Match[str]) -> str:
    """Translate a declaration of static shared memory."""
    variables = re.sub(r"<.*?>|\[.*?\]", "", declaration[1]).split(",")
    names = ", ".join(variable.split()[-1] for variable in variables)
    return f"static {declaration[1]}; emulation::declare_shared({names});"


def translate(source: str) -> str:
    """Translate the CUDA constructs that macros cannot express: launches, shared memory and registration.

    Poison the tensors that torch does not initialize.
    """
    source = re.sub(
        r"(\w+_kernel(?:<[^;]*?>)?)\s*<<<([^;]*?)>>>\(([^;]*?)\);",
        r"emulation::launch(\2, \1, [&] { \1(\3); });",
        source,
    )
    assert "<<<" not in source, "translate() does not support the form of a kernel launch"
    source = source.replace(
        "extern __shared__ __align__(16) char memory[];", "char* memory = emulation::dynamic_shared();"
    )
    source = "#include <cuda_runtime.h>\n" + source
    source = re.sub(r"(?<!extern )__shared__ ([^;]*);", declare_shared, source)
    assert not re.search(r"stable::to\([^;]*device", source), "a CUDA graph cannot capture copies from the host"
    source = re.sub(r"torch::stable::(?:new_)?empty(?:_like)?\(", r"emulation::poisoned << \g<0>", source)
    source = source.replace("LIBRARY_IMPL(relops, CUDA,", f"LIBRARY_IMPL({NAMESPACE}, CPU,")
    return source.replace("STABLE_TORCH_LIBRARY(relops,", f"STABLE_TORCH_LIBRARY({NAMESPACE},")


def write_translated(folder: Path) -> list[Path]:
    """Write the translated files that have changed, in the layout of csrc, and return the sources to compile."""
    sources = []
    paths = [CSRC / "library.cpp", *sorted(CSRC.rglob("*.cu*")), *sorted(CSRC.rglob("*.h"))]
    for path, root in [*((path, CSRC) for path in paths), (HERE / "checks.cu", HERE)]:
        source, translated = translate(path.read_text()), folder / path.relative_to(root)
        translated.parent.mkdir(parents=True, exist_ok=True)
        if not translated.exists() or translated.read_text() != source:
            translated.write_text(source)
        if path.suffix in (".cpp", ".cu"):
            sources.append(translated)
    return sources


@functools.cache
def build() -> Path:
    """Compile what has changed and return the path of the library for torch.ops.load_library."""
    folder = ROOT / "build" / f"cuda_emulation-torch{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"lib{NAMESPACE}.so"
    flags = [
        *("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", STABLE_ABI),
        *("-Wno-attributes", "-Wno-unknown-pragmas", "-Wno-psabi"),
        *(f"-I{shlex.quote(str(path))}" for path in (HERE, folder, CSRC)),
        *(f"-isystem{shlex.quote(path)}" for path in cpp_extension.include_paths()),
        os.environ.get("CFLAGS", ""),
    ]
    paths = " ".join(f"-L{shlex.quote(path)}" for path in cpp_extension.library_paths())
    ninja = [
        "ninja_required_version = 1.3",
        f"rule cxx\n  command = g++ -MMD -MF $out.d {' '.join(flags)} -x c++ -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = g++ -shared $in -o $out {paths} -ltorch -ltorch_cpu -lc10",
    ]
    with FileLock(folder / "lock"):  # the first of several test processes builds; the rest wait
        objects = []
        for source in write_translated(folder):
            name = source.relative_to(folder)
            objects.append(f"{name}.o")
            ninja.append(f"build {name}.o: cxx {name}")
        ninja.append(f"build {library.name}: link {' '.join(objects)}")
        (folder / "build.ninja").write_text("\n".join(ninja) + "\n")
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        done = subprocess.run([shutil.which("ninja", path=path), "-C", folder], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    return library


def controls() -> ctypes.CDLL:
    """Return the functions that devices.h declares with EMULATION_CONTROL."""
    return ctypes.CDLL(str(build()))


@contextlib.contextmanager
def tensors_on(architecture: str) -> Iterator[None]:
    """Place all tensors on a device of an architecture, instead of sm_80."""
    controls().emulation_place_tensors(DEVICES[architecture])
    try:
        yield
    finally:
        controls().emulation_place_tensors(DEVICES["sm_80"])


@contextlib.contextmanager
def capture() -> Iterator[None]:
    """Capture a graph. Copies between host and device, and synchronizations, then raise an error."""
    controls().emulation_set_capturing(True)
    try:
        yield
    finally:
        controls().emulation_set_capturing(False)


def ignore_guard(index: int) -> int:
    """Ignore the guard with this index, counted from this call, or none if it is -1.

    Return the number of guards since the previous call.
    """
    return controls().emulation_ignore_guard(index)


@contextlib.contextmanager
def instead_of_cpu_kernels() -> Iterator[None]:
    """Run the emulated CUDA kernels instead of the CPU kernels, with the same argument checks and autograd."""
    global in_use
    torch.ops.load_library(str(build()))
    emulated = getattr(torch.ops, NAMESPACE)
    library = torch.library.Library("relops", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about the override, which is intended
        for name in _library.op_kernels():
            library.impl(name, getattr(emulated, name), "CPU", allow_override=True)
    in_use = True
    yield
    in_use = False
    library._destroy()
