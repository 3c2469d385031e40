"""Loading of the compiled libraries of relops, and information about them."""

from __future__ import annotations

import functools
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
    """If the CUDA kernels cannot run on the device, raise a clearer error than the dispatcher or CUDA would."""
    if device.type == "cuda" and (problem := cuda_problem(device)) is not None:
        raise RuntimeError(f"relops.{op}: got CUDA tensors, but {problem}")


@torch.compiler.assume_constant_result  # the compiler would trace a cached function without its cache
def cuda_problem(device: torch.device) -> str | None:
    """Return why the CUDA kernels cannot run on the device, or None if they can or if this machine has no such GPU."""
    return _find_cuda_problem(device)


@functools.cache
def _find_cuda_problem(device: torch.device) -> str | None:
    if cuda_missing is not None:
        return f"relops._cuda is {cuda_missing}"
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        return None  # a fake tensor may be on a GPU that does not exist
    codes = build_info()["cuda_archs"]
    capability = torch.cuda.get_device_capability(device)
    if any(runs_on(code, capability) for code in codes.split()):
        return None
    name, version = torch.cuda.get_device_name(device), ".".join(map(str, capability))
    return (
        f"{name} has compute capability {version}, and relops._cuda was built for {codes}. "
        f"Build it again with TORCH_CUDA_ARCH_LIST={version}, or with a list that contains {version}"
    )


def runs_on(code: str, capability: tuple[int, int]) -> bool:
    """Return whether a GPU runs code that nvcc generated: sm_90 is machine code and compute_90 is PTX, for example.

    A GPU runs machine code for the same major version and at most its minor version. Its driver compiles PTX for at
    most its version. A letter after the number restricts the code: sm_90a and compute_90a run only on 9.0.
    """
    kind, number = code.split("_")
    letter = number.lstrip("0123456789")
    version = divmod(int(number.removesuffix(letter)), 10)
    if letter == "a":
        return capability == version
    if kind == "sm" or letter == "f":
        return capability[0] == version[0] and capability >= version
    return capability >= version
