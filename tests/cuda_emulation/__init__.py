"""Builds csrc/cuda for the CPU, on the emulation in cuda_runtime.h, as ops of the namespace relops_emulated."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

from relops._library import MINIMUM_TORCH

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
NAMESPACE = "relops_emulated"


def translate(source: str) -> str:
    """The few constructs of CUDA that macros cannot express: launches, dynamic shared memory, registration."""
    source = re.sub(
        r"(\w+_kernel(?:<[^;]*?>)?)\s*<<<([^;]*?)>>>\(([^;]*?)\);",
        r"emulation::launch(\2, [&] { \1(\3); });",
        source,
    )
    assert "<<<" not in source, "a launch in a form that translate() does not know"
    source = source.replace(
        "extern __shared__ __align__(16) char memory[];", "char* memory = emulation::dynamic_shared();"
    )
    source = source.replace("LIBRARY_IMPL(relops, CUDA,", f"LIBRARY_IMPL({NAMESPACE}, CPU,")
    return source.replace("STABLE_TORCH_LIBRARY(relops,", f"STABLE_TORCH_LIBRARY({NAMESPACE},")


def build(folder: Path) -> Path:
    """Compiles into `folder` and gives the library to load with torch.ops.load_library."""
    (folder / "cuda").mkdir()
    commands = []
    for path in [CSRC / "library.cpp", *sorted((CSRC / "cuda").iterdir())]:
        target = folder / "cuda" / path.name
        target.write_text(translate(path.read_text()))
        if path.suffix in (".cpp", ".cu"):
            commands.append(
                [
                    "g++",
                    "-std=c++20",
                    "-O1",
                    "-fPIC",
                    "-fvisibility=hidden",
                    "-DTORCH_TARGET_VERSION=" + str((MINIMUM_TORCH[0] << 56) + (MINIMUM_TORCH[1] << 48)) + "ULL",
                ]
                + ["-Wno-attributes", "-Wno-unknown-pragmas", "-Wno-psabi"]
                + [f"-I{p}" for p in (HERE, folder, CSRC)]
                + [f"-isystem{p}" for p in cpp_extension.include_paths()]
                + ["-x", "c++", "-c", str(target), "-o", f"{target}.o"]
            )
    for running in [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]:
        _, errors = running.communicate()
        assert running.returncode == 0, errors
    library = folder / f"lib{NAMESPACE}.so"
    objects = [str(p) for p in (folder / "cuda").glob("*.o")]
    paths = [f"-L{p}" for p in cpp_extension.library_paths()]
    subprocess.run(
        ["g++", "-shared", *objects, *paths, "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(library)], check=True
    )
    return library


def ops(folder: Path):
    """The emulated ops, with the schemas of torch.ops.relops."""
    torch.ops.load_library(str(build(folder)))
    return getattr(torch.ops, NAMESPACE)
