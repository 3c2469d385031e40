"""Loads the compiled halves of relops and says what is in them."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

# The oldest torch whose stable ABI the sources use; setup.py reads it here. A build runs on it and on every later one.
MINIMUM_TORCH = (2, 10)

# Why relops._cuda is not loaded: None where it is.
cuda_missing: str | None = "not tried yet"


def load() -> None:
    """Registers the schemas and CPU kernels, and the CUDA kernels where this torch has CUDA.

    Raises:
        ImportError: naming the remedy, where the CPU half is missing or torch is too old, or where torch has CUDA and
            relops._cuda is there but does not load. A build without relops._cuda is no error: its ops work on the
            CPU, and on a CUDA tensor say what is missing.
    """
    global cuda_missing
    found = tuple(int("".join(filter(str.isdigit, part))) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < MINIMUM_TORCH:
        minimum = ".".join(map(str, MINIMUM_TORCH))
        raise ImportError(f"relops needs PyTorch >= {minimum}, found {torch.__version__}: pip install -U torch")
    try:
        importlib.import_module("relops._C")
    except ImportError as error:
        if any(Path(__file__).parent.glob("_C.*so")):
            raise ImportError(
                f"relops._C does not load on torch {torch.__version__}: {error}\n"
                "It was built for another Python or is incomplete. Build it again: "
                "pip install --force-reinstall --no-deps --no-build-isolation <the relops source>"
            ) from error
        raise ImportError(
            "relops._C is not built. In the source tree: `make build`, or `pip install --no-build-isolation .`; "
            "do not run Python in the source folder of an installed relops."
        ) from error

    library = cuda_library()
    if library is None:
        cuda_missing = "not built (build with nvcc on PATH or CUDA_HOME set; RELOPS_CUDA=1 makes its absence an error)"
    elif torch.version.cuda is None:
        cuda_missing = f"built, not loaded: torch {torch.__version__} has no CUDA"
    else:
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            raise ImportError(
                f"relops._cuda does not load on torch {torch.__version__} (CUDA {torch.version.cuda}): {error}\n"
                "Build it again with this torch installed (pip install --force-reinstall --no-deps "
                "--no-build-isolation <the relops source>), or without its CUDA half (RELOPS_CUDA=0)."
            ) from error
        cuda_missing = None


def cuda_library() -> Path | None:
    """The file of relops._cuda, where it was built."""
    return next(iter(sorted(Path(__file__).parent.glob("_cuda.*so"))), None)


def build_info() -> dict[str, str]:
    """What relops was built with, and the instruction set its CPU kernels chose here."""
    from relops import _C

    return _C.build_info()


def op_kernels() -> dict[str, list[str]]:
    """For every op of the library, public and backward: the devices it has a kernel for, as the dispatcher sees it."""
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("relops::"))
    return {
        name.removeprefix("relops::"): [
            key for key in ("CPU", "CUDA") if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
        ]
        for name in names
    }


def check_device_has_kernels(op: str, device: torch.device) -> None:
    """A clear error instead of the dispatcher's, where a CUDA tensor meets a build without CUDA kernels."""
    if device.type == "cuda" and cuda_missing is not None:
        raise RuntimeError(f"relops.{op}: CUDA tensors, but relops._cuda is {cuda_missing}")
