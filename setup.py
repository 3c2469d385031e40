"""The build of relops._C (CPU kernels and schemas) and, if nvcc is found, of relops._cuda (CUDA kernels).

A single ninja file builds both libraries, so C++ and CUDA sources compile in parallel. A source is compiled again if a
header that it includes changes. torch.utils.cpp_extension does not do this for .cu files if torch is CPU-only. The
ptxas report of each .cu file is stored next to its object file, and tests/test_build.py reads it there.

Environment variables: RELOPS_CUDA=1 requires nvcc, and RELOPS_CUDA=0 skips the CUDA kernels. TORCH_CUDA_ARCH_LIST,
MAX_JOBS, CUDA_HOME and CXX have their usual meanings. CFLAGS and NVCC_APPEND_FLAGS are passed to the compilers.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# Code runs on later minor versions, so 8.6 includes 8.9. The PTX of 9.0 is for 10.x and 11.x, which have no code here.
DEFAULT_ARCHS = ("7.5", "8.0", "8.6", "9.0+PTX", "12.0")
MINIMUM_TORCH = tuple(
    map(int, re.search(r"^MINIMUM_TORCH = \((\d+), (\d+)\)", (ROOT / "relops/_library.py").read_text(), re.M).groups())
)

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        f"relops: building needs PyTorch >= {'.'.join(map(str, MINIMUM_TORCH))}; importing it failed: {error}\n"
        "  Either install it first (https://pytorch.org/get-started) and then run\n"
        "    pip install --no-build-isolation .     # build with the installed torch\n"
        "  or let pip install a separate torch for the build:\n"
        "    pip install ."
    ) from error


def find_cuda_home() -> Path | None:
    """Return CUDA_HOME or CUDA_PATH, else the CUDA home that the nvcc on PATH reports, else /usr/local/cuda."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return Path(os.environ[name])
    if nvcc := shutil.which("nvcc"):
        # The nvcc on PATH may be a wrapper script outside the CUDA home, so ask nvcc where the CUDA home is.
        dry_run = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        if top := re.search(r"^#\$ TOP=(.*)$", dry_run.stdout + dry_run.stderr, re.MULTILINE):
            return Path(top[1].strip()).resolve()
        return Path(nvcc).resolve().parent.parent
    default = Path("/usr/local/cuda")
    return default if (default / "bin/nvcc").exists() else None


def cuda_plan() -> tuple[Path | None, str]:
    """Return the CUDA home for the build (None skips the CUDA kernels), and a phrase that explains the decision."""
    requested = os.environ.get("RELOPS_CUDA", "")
    if requested not in ("", "0", "1"):
        raise SystemExit(f"relops: RELOPS_CUDA must be 0, 1 or unset, got {requested!r}")
    if requested == "0":
        return None, "skipped (RELOPS_CUDA=0)"
    home = find_cuda_home()
    if home is not None and (home / "bin/nvcc").exists():
        return home, f"built with {home}/bin/nvcc"
    if requested == "1":
        raise SystemExit(
            "relops: RELOPS_CUDA=1, but no nvcc was found"
            + (f" under CUDA_HOME={home}" if home else " (CUDA_HOME and CUDA_PATH are not set, and PATH has no nvcc)")
            + ".\n  Install the CUDA toolkit and set CUDA_HOME to it, or build only the CPU kernels with RELOPS_CUDA=0."
        )
    return None, "skipped: no nvcc found (set CUDA_HOME, or RELOPS_CUDA=1 to make this an error)"


def default_archs(cuda_home: Path) -> str:
    """Return the default architectures that this nvcc knows, with PTX of the last one, for GPUs that come later."""
    known = run(str(cuda_home / "bin/nvcc"), "--list-gpu-code").split()
    archs = [arch for arch in DEFAULT_ARCHS if f"sm_{arch.removesuffix('+PTX').replace('.', '')}" in known]
    if not archs:
        raise SystemExit(
            f"relops: {cuda_home}/bin/nvcc knows none of {', '.join(DEFAULT_ARCHS)}; set TORCH_CUDA_ARCH_LIST"
        )
    return ";".join([*archs[:-1], archs[-1].removesuffix("+PTX") + "+PTX"])


def gpu_codes() -> list[str]:
    """Return what nvcc generates for the architectures, for example sm_90 and compute_90 (PTX) for 9.0+PTX."""
    names = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
    flags = " ".join([*cpp_extension._get_cuda_arch_flags(), *(os.environ.get(name, "") for name in names)])
    return sorted(set(re.findall(r"\bcode=(\w+)", flags)), key=lambda code: (int(re.sub(r"\D", "", code)), code))


def version() -> str:
    return re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]


class NinjaBuild(build_ext):
    """A build_ext command that writes one build.ninja for all extensions and runs it.

    Ninja does not compile unchanged sources again.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        # pip would build in a temporary folder. A fixed folder per version of Python and torch makes the next build
        # incremental.
        self.build_temp = str(ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__}")
        self.into_source = bool(self.inplace)  # setuptools resets inplace during the build

    def build_extensions(self) -> None:
        # Look next to this Python first, because a virtual environment that is not activated is not on PATH.
        ninja = shutil.which("ninja", path=str(Path(sys.executable).parent)) or shutil.which("ninja")
        if ninja is None:
            raise SystemExit("relops: building needs ninja; install it with: pip install ninja")
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        cxx = os.environ.get("CXX", "g++")
        if shutil.which(shlex.split(cxx)[0]) is None:
            raise SystemExit(f"relops: building needs a C++ compiler, but {cxx} was not found; install g++ or set CXX")
        cuda_home, cuda_words = cuda_plan()
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or (default_archs(cuda_home) if cuda_home else "")
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs  # torch reads it when it makes the flags of nvcc
        if cuda_home is None:
            # Remove a library from an earlier in-place build, because relops would load it.
            for stale in (ROOT / "relops").glob("_cuda.*") if self.into_source else ():
                stale.unlink()
            self.extensions = [e for e in self.extensions if e.name != "relops._cuda"]
        facts = {
            "VERSION": version(),
            "TORCH": torch.__version__,
            "COMPILER": run(*shlex.split(cxx), "--version").splitlines()[0],
            "CUDA_ARCHS": " ".join(gpu_codes()) if cuda_home else "",
            "NVCC": nvcc_release(cuda_home) if cuda_home else "",
        }
        temp = Path(self.build_temp)
        rows = {
            "version": facts["VERSION"],
            "torch": f"{torch.__version__} (stable ABI of {'.'.join(map(str, MINIMUM_TORCH))})",
            "C++": facts["COMPILER"],
            "relops._cuda": cuda_words,
            **({"CUDA archs": archs, "nvcc": facts["NVCC"]} if cuda_home else {}),
            "jobs": jobs,
            "objects": os.path.relpath(temp, ROOT),
        }
        print("relops build plan", *(f"  {key:13}{value}" for key, value in rows.items()), sep="\n", file=sys.stderr)
        sys.stderr.flush()

        temp.mkdir(parents=True, exist_ok=True)
        (temp / "build.ninja").write_text(
            "\n".join([*ninja_rules(cxx, cuda_home), *self.ninja_edges(temp, facts)]) + "\n"
        )
        if subprocess.run([ninja, "-C", str(temp), "-j", jobs]).returncode:
            raise SystemExit(
                "relops: the build failed; see the messages above and the section Troubleshooting in docs/install.md."
            )

    def ninja_edges(self, temp: Path, facts: dict[str, str]) -> list[str]:
        """Return the ninja build statements: one per object file and one per library."""
        defines = " ".join(shlex.quote(f'-DRELOPS_{key}="{value}"') for key, value in facts.items())
        edges = []
        for extension in self.extensions:
            objects = []
            for source in extension.sources:
                obj = temp / f"{source}.o"
                obj.parent.mkdir(parents=True, exist_ok=True)
                objects.append(escape(obj))
                rule = "cxx" if source.endswith(".cpp") else "nvcc"
                edges.append(f"build {objects[-1]}: {rule} {escape(ROOT / source)}\n  name = {source}")
                if source == "csrc/module.cpp":  # only here: new values must not recompile the kernels
                    edges.append(f"  defines = {defines.replace('$', '$$')}")
            library = Path(self.get_ext_fullpath(extension.name)).resolve()
            library.parent.mkdir(parents=True, exist_ok=True)
            rule = "link" if extension.name == "relops._C" else "link_cuda"
            edges.append(f"build {escape(library)}: {rule} {' '.join(objects)}\n  name = {extension.name}")
        return edges


def common_flags() -> str:
    """Return the flags of the C++ compiler and of nvcc."""
    import pybind11

    # pybind11 comes first, because the copy in some versions of torch does not compile for the stable ABI.
    system = [pybind11.get_include(), *cpp_extension.include_paths(), sysconfig.get_path("include")]
    includes = " ".join([f"-I{shlex.quote(str(CSRC))}", *(f"-isystem {shlex.quote(path)}" for path in system)])
    target = sum(part << shift for part, shift in zip(MINIMUM_TORCH, (56, 48)))
    return f"-std=c++20 -O3 -DTORCH_TARGET_VERSION=0x{target:016x}ULL {includes}"


def nvcc_flags() -> str:
    """Return the flags of nvcc, except for the architectures."""
    return f"{common_flags()} -DUSE_CUDA -Xcompiler -fPIC,-fvisibility=hidden --expt-relaxed-constexpr -Xptxas -v"


def ninja_rules(cxx: str, cuda_home: Path | None) -> list[str]:
    cflags = f"{common_flags()} -fPIC -fvisibility=hidden -Wall -Wno-psabi {os.environ.get('CFLAGS', '')}"
    paths = " ".join(f"-L{shlex.quote(p)} -Wl,-rpath-link,{shlex.quote(p)}" for p in cpp_extension.library_paths())
    # Without --no-as-needed, the linker would drop libtorch, which loads libtorch_cuda if torch has CUDA.
    link = f"{cxx} -shared $in -o $out -Wl,--no-as-needed {paths} -ltorch -ltorch_cpu -lc10"
    rules = [
        "ninja_required_version = 1.3",
        f"rule cxx\n  command = {cxx} -MMD -MF $out.d {cflags} $defines -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = C++  $name",
        f"rule link\n  command = {link}\n  description = link $name",
    ]
    if cuda_home is None:
        return rules
    nvcc = os.environ.get("PYTORCH_NVCC", str(cuda_home / "bin/nvcc"))
    archs = " ".join(cpp_extension._get_cuda_arch_flags())
    flags = f"{nvcc_flags()} {archs}"
    lib = next((d for d in ("lib64", "lib") if (cuda_home / d / "libcudart_static.a").exists()), "lib64")
    # The CUDA runtime is linked statically, so that the build does not depend on the CUDA version of the user's torch.
    cudart = f"-L{shlex.quote(str(cuda_home / lib))} -lcudart_static -lrt -ldl -lpthread"
    return [
        *rules,
        f"rule nvcc\n  command = {nvcc} -MD -MF $out.d {flags} -c $in -o $out > $out.ptxas 2>&1"
        " || { cat $out.ptxas; rm -f $out; exit 1; }",
        "  depfile = $out.d\n  deps = gcc\n  description = CUDA $name",
        f"rule link_cuda\n  command = {link} {cudart}\n  description = link $name",
    ]


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def nvcc_release(cuda_home: Path) -> str:
    release = re.search(r"release [\d.]+, V([\d.]+)", run(str(cuda_home / "bin/nvcc"), "--version"))
    return release[1] if release else "unknown"


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in CSRC.glob(pattern))


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension("relops._C", sources("**/*.cpp")),
            Extension("relops._cuda", sources("**/*.cu")),
        ],
        cmdclass={"build_ext": NinjaBuild},
    )
