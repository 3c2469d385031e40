"""Loading of the compiled libraries of relops, and information about them."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

# The oldest version of torch whose stable ABI has all functions that the sources call. A build runs on this version and
# on every later one. setup.py reads this number.
MINIMUM_TORCH = (2, 10)

# The reason why relops._cuda is not loaded, or None if it is loaded.
cuda_missing: str | None = "not loaded yet"


def load() -> None:
    """Load the schemas and CPU kernels of the ops, and their CUDA kernels if this torch has CUDA.

    It is not an error if relops was built without relops._cuda. The ops then work on the CPU. If they get a CUDA
    tensor, they raise an error that names the missing library.

    Raises:
        ImportError: If torch is too old, if relops._C is missing or does not load, or if torch has CUDA and
            relops._cuda exists but does not load. The message says how to fix this.
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
                "It was built for another version of Python or is incomplete. Build it again: "
                "pip install --force-reinstall --no-deps --no-build-isolation <the relops source>"
            ) from error
        raise ImportError(
            "relops._C is not built. In the source tree, run `make build`, or `pip install --no-build-isolation .`. "
            "If relops is already installed, run Python outside of the source folder."
        ) from error

    library = cuda_library()
    if library is None:
        cuda_missing = "not built (build with nvcc on PATH or CUDA_HOME set; RELOPS_CUDA=1 makes nvcc a requirement)"
    elif torch.version.cuda is None:
        cuda_missing = f"built but not loaded, because torch {torch.__version__} has no CUDA"
    else:
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            raise ImportError(
                f"relops._cuda does not load on torch {torch.__version__} (CUDA {torch.version.cuda}): {error}\n"
                "Build it again with this torch installed (pip install --force-reinstall --no-deps "
                "--no-build-isolation <the relops source>), or build it without its CUDA kernels (RELOPS_CUDA=0)."
            ) from error
        cuda_missing = None


def cuda_library() -> Path | None:
    """Return the path of the relops._cuda library, or None if the library was not built."""
    return next(iter(sorted(Path(__file__).parent.glob("_cuda.*so"))), None)


def build_info() -> dict[str, str]:
    """Return what relops was built with, and the instruction set that its CPU kernels use on this machine."""
    from relops import _C

    return _C.build_info()


def op_kernels() -> dict[str, list[str]]:
    """Map the name of every op, including the backward ops, to the devices for which the dispatcher has a kernel."""
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("relops::"))
    return {
        name.removeprefix("relops::"): [
            key for key in ("CPU", "CUDA") if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
        ]
        for name in names
    }


def check_device_has_kernels(op: str, device: torch.device) -> None:
    """If the device is CUDA and the CUDA kernels are not loaded, raise a clearer error than the dispatcher would."""
    if device.type == "cuda" and cuda_missing is not None:
        raise RuntimeError(f"relops.{op}: got CUDA tensors, but relops._cuda is {cuda_missing}")
