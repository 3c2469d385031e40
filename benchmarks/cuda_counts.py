"""Counts of compiled CUDA kernels: registers, shared memory, blocks per multiprocessor, and instructions of loops.

Usage: python -m benchmarks.cuda_counts PATTERN [FILE ...] [--arch 90] [--shared BYTES] [--threads N]

PATTERN is a regular expression, for example 'forward_kernel<.*float'. A FILE is a .cubin, .o or .so file, or a .cu
file, which is compiled for the architecture first. The default is all object files of the last build. The counts come
from SASS, the machine code, which cuobjdump prints. This program is part of the CUDA toolkit and of triton's wheel.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The limits of a multiprocessor, from the table of compute capabilities in the CUDA programming guide.

    Attributes:
        threads: The maximum number of resident threads.
        blocks: The maximum number of resident blocks.
        shared: The bytes of shared memory.
        reserved: The bytes of shared memory that each block uses in addition to its own. The shared memory of a block
            is limited to `shared - reserved`.
    """

    threads: int
    blocks: int
    shared: int
    reserved: int = 1024
    registers: int = 65536


ARCHITECTURES = {
    "75": Architecture(1024, 16, 64 * 1024, reserved=0),
    "80": Architecture(2048, 32, 164 * 1024),
    "86": Architecture(1536, 16, 100 * 1024),
    "89": Architecture(1536, 24, 100 * 1024),
    "90": Architecture(2048, 32, 228 * 1024),
    "100": Architecture(2048, 32, 228 * 1024),
    "120": Architecture(1536, 24, 100 * 1024),
}

# The classes of instructions, and regular expressions for the beginning of their opcodes. The first match counts.
CLASSES = {
    "MMA": r"[HDIQB]MMA|[HDIQB]GMMA|LDSM|MOVM",
    "FP64": r"D(FMA|ADD|MUL|SETP|MNMX)|\S*F64|MUFU\.RCP64H|MUFU\.RSQ64H",
    "FFMA": r"FFMA",
    "FP32": r"F(ADD|MUL|SETP|SET|MNMX|SEL|CHK|SWZADD)",
    "FP16": r"H(FMA|ADD|MUL|SETP|SET|MNMX)",
    "MUFU": r"MUFU",
    "CVT": r"F2F|F2I|I2F|F2FP|FRND|I2FP|I2I",
    "WIDE": r"IMAD\.(WIDE|HI)",
    "LDG": r"LDG|LD\b",
    "STG": r"STG|ST\b",
    "LDS": r"LDS",
    "STS": r"STS",
    "LOCAL": r"LDL|STL",
    "ATOM": r"RED|ATOM",
    "SHFL": r"SHFL|VOTE|MATCH",
    "BAR": r"BAR|WARPSYNC|DEPBAR|MEMBAR|ERRBAR",
    "CALL": r"CALL",
    "BRANCH": r"BRA|BRX|BSSY|BSYNC|BREAK|EXIT|RET|JMP|NOP|YIELD",
    "INT": r"I(MAD|ADD|SETP|MNMX|ABS|MUL|DP)|LOP|PLOP|SHF|LEA|VIADD|VIMNMX|PRMT|SEL|POPC|FLO|BMSK|SGXT|BREV",
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction. `guarded` tells whether it has a predicate, and `target` is the address after its operands."""

    address: int
    opcode: str
    guarded: bool
    target: int | None

    @functools.cached_property
    def category(self) -> str:
        return next((name for name, pattern in CLASSES.items() if re.match(pattern, self.opcode)), "OTHER")


def count_classes(code: list[Instruction]) -> dict[str, int]:
    return {"total": len(code), **Counter(instruction.category for instruction in code)}


@dataclasses.dataclass(frozen=True)
class Loop:
    """A natural loop. Its instructions include inner loops, but `own` does not. Both include paths that are rare."""

    instructions: list[Instruction]
    own: list[Instruction]
    depth: int


@dataclasses.dataclass
class Kernel:
    """A kernel for one architecture. `shared` is its static shared memory, `threads` the launch bound of a block."""

    name: str
    arch: str
    registers: int
    stack: int
    shared: int
    threads: int | None
    instructions: list[Instruction]

    def count(self, pattern: str) -> int:
        """Count the instructions of which the whole opcode matches the regular expression."""
        return sum(re.fullmatch(pattern, i.opcode) is not None for i in self.instructions)

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """Return the loops in the order of their addresses."""
        return find_loops(self.instructions)

    def hot_loop(self, category: str) -> Loop:
        """Return the loop that has the most instructions of a class outside of its inner loops, or the longest such."""
        return max(self.loops, key=lambda loop: (count_classes(loop.own).get(category, 0), len(loop.own)))


def blocks_per_multiprocessor(arch: str, registers: int, threads: int, shared: int) -> int:
    """Return the number of blocks of a kernel that are resident on a multiprocessor at the same time.

    Registers are allocated to a warp in units of 256, and each of the four partitions of a multiprocessor has its own.
    `shared` is the static and dynamic shared memory of a block, which is allocated in units of 128 bytes.
    """
    limits = ARCHITECTURES[arch]
    warps = -(-threads // 32)
    partition_warps = limits.registers // 4 // (-(-registers * 32 // 256) * 256)
    bounds = [limits.blocks, limits.threads // (32 * warps), 4 * partition_warps // warps]
    if shared + limits.reserved:
        bounds.append(limits.shared // (-(-(shared + limits.reserved) // 128) * 128))
    return min(bounds)


# ---- Loops ----


def find_loops(code: list[Instruction]) -> list[Loop]:
    """Find the natural loops: an edge to a block that dominates the edge's source closes a loop.

    A backward branch alone is no loop, because compilers move rare paths behind the end of a kernel, from where they
    jump back. Paths for diverged warps (BRA.DIV) are ignored, as are subroutines.
    """
    index = {instruction.address: i for i, instruction in enumerate(code)}
    jumps = {i: index[c.target] for i, c in enumerate(code) if c.opcode.split(".")[0] == "BRA" and c.target in index}
    starts = sorted({0, *jumps.values(), *(i + 1 for i, c in enumerate(code) if is_end(c) or i in jumps)} - {len(code)})
    ends = [*starts[1:], len(code)]
    block_at = {start: number for number, start in enumerate(starts)}
    successors: list[list[int]] = []
    for end in ends:
        last = code[end - 1]
        following = [block_at[jumps[end - 1]]] if end - 1 in jumps and "DIV" not in last.opcode else []
        if end in block_at and not (is_end(last) and not last.guarded):
            following.append(block_at[end])
        successors.append(following)

    order = reverse_postorder(successors)
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for successor in successors[block]:
            predecessors[successor].append(block)
    dominators = {block: -1 for block in order} | {0: 1}  # sets of blocks as bits; -1 is the set of all blocks
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            common = functools.reduce(lambda a, b: a & b, (dominators[p] for p in predecessors[block])) | 1 << block
            changed |= common != dominators[block]
            dominators[block] = common

    bodies: dict[int, set[int]] = {}
    for block in order:
        for header in successors[block]:
            if dominators[block] >> header & 1:
                body, stack = bodies.setdefault(header, {header}), [block]
                while stack:
                    if (member := stack.pop()) not in body:
                        body.add(member)
                        stack += predecessors[member]

    def instructions(blocks: set[int]) -> list[Instruction]:
        return [instruction for block in sorted(blocks) for instruction in code[starts[block] : ends[block]]]

    return [
        Loop(
            instructions(body),
            own=instructions(body.difference(*(bodies[other] for other in bodies if other in body - {header}))),
            depth=sum(header in other for other in bodies.values()),
        )
        for header, body in sorted(bodies.items())
    ]


def is_end(instruction: Instruction) -> bool:
    """Tell whether control continues elsewhere after the instruction, at least for some threads."""
    return instruction.opcode.split(".")[0] in ("BRA", "EXIT", "RET", "BRX", "JMP")


def reverse_postorder(successors: list[list[int]]) -> list[int]:
    """Return the blocks that block 0 reaches, each before its successors except at the edges that close loops."""
    order, seen, stack = [], {0}, [(0, iter(successors[0]))]
    while stack:
        block, following = stack[-1]
        successor = next((s for s in following if s not in seen), None)
        if successor is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(successor)
            stack.append((successor, iter(successors[successor])))
    return order[::-1]


# ---- Reading of compiled files ----


def cuobjdump() -> str | None:
    """Return the path of cuobjdump: the one on PATH, else the one in triton's wheel. Return None if neither exists."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    path = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return str(path) if path and path.exists() else None


def dump(*arguments: str, cwd: Path | None = None) -> str:
    program = cuobjdump()
    if program is None:
        raise FileNotFoundError("cuobjdump was not found: neither PATH nor triton's wheel has it (pip install triton)")
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True, cwd=cwd).stdout


def read_kernels(path: Path, arch: str | None = None) -> list[Kernel]:
    """Read the kernels of a .cubin, .o or .so file. With `arch`, read only the kernels for this architecture."""
    if path.suffix == ".cubin":
        return [kernel for kernel in read_cubin(path) if arch in (None, kernel.arch)]
    with tempfile.TemporaryDirectory() as folder:
        dump("-xelf", "all", str(path.resolve()), cwd=Path(folder))
        cubins = sorted(Path(folder).glob(f"*.sm_{arch}.cubin" if arch else "*.cubin"))
        return [kernel for cubin in cubins for kernel in read_cubin(cubin)]


def read_cubin(path: Path) -> list[Kernel]:
    resources: dict[str, dict[str, int]] = {}
    threads: dict[str, int] = {}
    code: dict[str, list[Instruction]] = {}
    name = arch = attribute = ""
    for line in dump("-res-usage", "-elf", "-sass", str(path)).splitlines():
        if found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@\S+ )?\s*(\S+?)(?: (.*?))?\s*;", line):
            address, predicate, opcode, operands = found.groups()
            target = re.search(r"(?:^|\s)0x([0-9a-f]+)$", operands or "")
            # "BRA P1, 0x80" has a second predicate, which is combined with the first.
            guarded = predicate is not None or (opcode.startswith("BRA") and "," in operands)
            code[name].append(Instruction(int(address, 16), opcode, guarded, int(target[1], 16) if target else None))
        elif found := re.match(r"\s*Function : (\S+)", line):
            name = found[1]
            code[name] = []
        elif found := re.match(r"\s*code for sm_(\d+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):$", line):
            name = found[1]
        elif found := re.match(r"\s*REG:", line):
            resources[name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        elif found := re.match(r"\.nv\.info\.(\S+)", line):
            name = found[1]
        elif found := re.match(r"\s*Attribute:\s*(\S+)", line):
            attribute = found[1]
        elif attribute == "EIATTR_MAX_THREADS" and (found := re.match(r"\s*Value:\s*(.*)", line)):
            x, y, z = (int(value, 16) for value in found[1].split())
            threads[name] = x * y * z
    # From sm_90 on, cuobjdump adds the reserved bytes to the static shared memory of kernels that have some.
    reserved = ARCHITECTURES[arch].reserved if int(arch) >= 90 else 0
    return [
        Kernel(
            name=short,
            arch=arch,
            registers=resources[mangled]["REG"],
            stack=resources[mangled]["STACK"],
            shared=max(0, resources[mangled]["SHARED"] - reserved),
            threads=threads.get(mangled),
            instructions=code[mangled],
        )
        for mangled, short in zip(code, demangle(list(code)))
    ]


def demangle(names: list[str]) -> list[str]:
    """Demangle names of kernels, and remove namespaces, the result and the parameters."""
    done = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True)
    return [shorten(name) for name in done.stdout.splitlines()]


def shorten(name: str) -> str:
    if kernel := re.match(r"(?:void )?cub::[^<]*?(\w+)<", name):  # its namespaces and arguments depend on the version
        return f"cub::{kernel[1]}"
    name = re.sub(r"\(anonymous namespace\)::|\b(relops|c10)::|^void |\((int|bool|long|unsigned int)\)", "", name)
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:i]
    return name


# ---- Compilation ----


@functools.cache
def build() -> types.ModuleType:
    """Return setup.py as a module."""
    specification = importlib.util.spec_from_file_location("relops_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def nvcc() -> str | None:
    """Return the path of nvcc, or None if it was not found."""
    home = build().find_cuda_home()
    return str(home / "bin/nvcc") if home and (home / "bin/nvcc").exists() else None


def compile_cubin(source: Path, arch: str, cubin: Path) -> str:
    """Compile a .cu file of csrc for one architecture, with the flags of setup.py, and return the report of ptxas."""
    command = [nvcc(), *shlex.split(build().nvcc_flags()), "-cubin", f"-arch=sm_{arch}", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed on {source}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


# ---- Command line ----


def built_objects() -> list[Path]:
    """Return the object files of the last build with this version of torch."""
    import torch

    return sorted(ROOT.glob(f"build/{sys.implementation.cache_tag}-torch{torch.__version__}/csrc/**/*.cu.o"))


def kernels_of(path: Path, arch: str) -> list[Kernel]:
    if path.suffix != ".cu":
        return read_kernels(path, arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{path.stem}.cubin"
        compile_cubin(path, arch, cubin)
        return read_cubin(cubin)


def describe(kernel: Kernel, dynamic: int, threads: int | None) -> Iterator[str]:
    """Yield the lines that the command prints about a kernel."""
    yield f"{kernel.name}  sm_{kernel.arch}"
    threads = threads or kernel.threads
    words = f"  {kernel.registers} registers, {kernel.shared + dynamic} bytes of shared memory, {kernel.stack} of stack"
    if threads:
        blocks = blocks_per_multiprocessor(kernel.arch, kernel.registers, threads, kernel.shared + dynamic)
        words += f", {threads} threads: {blocks} blocks a multiprocessor"
    yield words
    yield f"  whole kernel: {format_counts(count_classes(kernel.instructions))}"
    for loop in kernel.loops:
        counts = format_counts(count_classes(loop.instructions))
        own = "" if len(loop.own) == len(loop.instructions) else f" ({len(loop.own)} of them outside of inner loops)"
        yield f"{'  ' * loop.depth}  loop at {loop.instructions[0].address:#x}: {counts}{own}"


def format_counts(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (item[0] != "total", item[0] == "OTHER", -item[1]))
    return ", ".join(f"{name} {count}" for name, count in ordered)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda_counts",
        description="Print the registers, occupancy and instruction counts of compiled CUDA kernels.",
    )
    parser.add_argument("pattern", help="a regular expression that part of the kernel's name matches")
    parser.add_argument("files", nargs="*", type=Path, help=".cubin, .o, .so or .cu files (default: the last build)")
    parser.add_argument("--arch", default="90", choices=ARCHITECTURES, help="the architecture (default: 90)")
    parser.add_argument("--shared", type=int, default=0, help="the bytes of dynamic shared memory of a block")
    parser.add_argument("--threads", type=int, help="the threads of a block (default: the launch bound)")
    options = parser.parse_args(argv)
    files = options.files or built_objects()
    if not files:
        parser.error("there is no build: name a .cu or .cubin file, or run `make build` first")
    found = False
    for path in files:
        for kernel in kernels_of(path, options.arch):
            if re.search(options.pattern, kernel.name):
                found = True
                print(*describe(kernel, options.shared, options.threads), "", sep="\n")
    if not found:
        print(f"No kernel for sm_{options.arch} matches {options.pattern!r}.", file=sys.stderr)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
