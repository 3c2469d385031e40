"""Build the CUDA sources for the CPU, with the emulation in cuda_runtime.h, as ops of namespace relops_emulated."""

from __future__ import annotations

import contextlib
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

in_use = False


def translate(source: str) -> str:
    """Translate the CUDA constructs that macros cannot express: launches, dynamic shared memory and registration."""
    source = re.sub(
        r"(\w+_kernel(?:<[^;]*?>)?)\s*<<<([^;]*?)>>>\(([^;]*?)\);",
        r"emulation::launch(\2, \1, [&] { \1(\3); });",
        source,
    )
    assert "<<<" not in source, "translate() does not support the form of a kernel launch"
    source = source.replace(
        "extern __shared__ __align__(16) char memory[];", "char* memory = emulation::dynamic_shared();"
    )
    source = source.replace("LIBRARY_IMPL(relops, CUDA,", f"LIBRARY_IMPL({NAMESPACE}, CPU,")
    return source.replace("STABLE_TORCH_LIBRARY(relops,", f"STABLE_TORCH_LIBRARY({NAMESPACE},")


def write_translated(folder: Path) -> list[Path]:
    """Write the translated files that have changed, in the layout of csrc, and return the sources to compile."""
    sources = []
    for path in [CSRC / "library.cpp", *sorted(CSRC.rglob("*.cu")), *sorted(CSRC.rglob("*.cuh"))]:
        source, translated = translate(path.read_text()), folder / path.relative_to(CSRC)
        translated.parent.mkdir(parents=True, exist_ok=True)
        if not translated.exists() or translated.read_text() != source:
            translated.write_text(source)
        if path.suffix in (".cpp", ".cu"):
            sources.append(translated)
    return sources


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
