"""Code that all benchmarks share: the description of a row, verification, timing, memory, machine limits, records.

A row is one measurement of an op, with one input shape, dtype, device and direction. Its contenders are relops, the
pure-PyTorch twin of the op (in `relops.reference`), and peers, which are other implementations.

Each `bench_<op>.py` defines a function ``benches(device) -> list[Bench | Skipped]`` that describes its rows and runs
nothing. `run.py` finds these functions, and `conftest.py` turns their rows into pytest-benchmark tests.

A row is measured in three steps:

1. Verification: relops runs in the dtype of the row, and its outputs are compared with those of the twin in float64 on
   the same inputs. Indices must be equal to those of the twin in the dtype of the row. If the error exceeds the bound,
   the row is not timed.
2. Peak memory: one call of each contender is measured.
3. Rounds: each round draws new random inputs and runs every contender once on them, in rotating order. Times are
   medians over the rounds. A ratio is the median of the ratios within the rounds, so other load on the machine affects
   all contenders alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import relops
from relops import _library

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FORWARD, BACKWARD, FORWARD_BACKWARD = "forward", "backward", "forward+backward"

# The largest allowed relative RMS error of relops against the float64 twin: several times the rounding error.
ERROR_BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# The fraction of indices in which a peer may differ from the twin, because some peers round the coordinates.
PEER_SELECTION_BOUND = 0.01
MIN_ROUNDS, QUICK_MIN_ROUNDS, MAX_ROUNDS = 5, 3, 100


@dataclass(frozen=True)
class Model:
    """The compulsory work of a row, which no implementation can avoid.

    Attributes:
        bytes: The bytes that must be moved if each input is read once and each output (and gradient) is written once.
        flops: The floating point operations of the definition. A multiply-add counts as two.
        gathered_bytes: The bytes that a kernel without a cache would read, or None if that figure is not informative.
    """

    bytes: int
    flops: int
    gathered_bytes: int | None = None


@dataclass(frozen=True)
class Contender:
    """A callable to time, and a context manager that is active during its forward and backward passes."""

    call: Callable[..., Any]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


@dataclass(frozen=True, eq=False)
class Bench:
    """The description of one row.

    Attributes:
        op: The name of the op. The op, shape, dtype, device, direction and number of threads identify the row.
        shape: A readable label of the input.
        dtype: The dtype of the row.
        device: "cpu" or "cuda".
        direction: "forward", "backward" or "forward+backward". In a "backward" row, the forward pass runs before the
            clock starts.
        make_inputs: A function that takes a generator on the device and returns new random arguments (tensors and other
            values) for all contenders.
        relops: The op. It returns a tensor or a tuple of tensors.
        pytorch: The pure-PyTorch twin of the op, which returns the same values.
        model: The compulsory work, or None if it has no meaning, as for a whole network.
        peers: Other implementations to time, by name. A peer that fails or returns wrong results is left out with a
            note.
        compiled: Whether to time the twin under torch.compile too (not in the quick setting).
        target: The ratio to PyTorch that the project wants to reach.
        peer_targets: The ratios to peers that the project wants to reach, by name.
        quick: Whether the row is part of the quick setting.
        cold: Whether to flush the last-level cache before each call. If it is None, the cache is flushed on CUDA only,
            because on the CPU the preceding layer of a network has usually just written the input.
        graph: Whether to time replays of a CUDA graph (forward only), for calls that take less time than their launch.
        tolerance: The bound on the error. If it is None, the bound is that of the dtype, or 0 if `selection` is true.
        min_rounds: The minimum number of rounds. It is lower for rows in which the twin takes minutes.
        selection: Whether the outputs are indices (-1 is padding), possibly followed by numbers such as scores.
            Rounding may decide which indices are selected, so the twin runs in the dtype of the row instead of float64.
            relops must select the same indices as the twin, and its numbers may differ by `tolerance`. The indices of
            peers may differ by a fraction of PEER_SELECTION_BOUND.
        comparable: A function that maps the outputs to the tensors that verification compares.
        differentiated: The positions of the inputs for which gradients are computed. None means all floating point
            inputs.
    """

    op: str
    shape: str
    dtype: torch.dtype
    device: str
    direction: str
    make_inputs: Callable[[torch.Generator], tuple]
    relops: Callable[..., Any]
    pytorch: Callable[..., Any]
    model: Model | None = None
    peers: Mapping[str, Callable[..., Any] | Contender] = field(default_factory=dict)
    compiled: bool = False
    target: float | None = None
    peer_targets: Mapping[str, float] = field(default_factory=dict)
    quick: bool = False
    cold: bool | None = None
    graph: bool = False
    tolerance: float | None = None
    min_rounds: int = MIN_ROUNDS
    selection: bool = False
    comparable: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = tuple
    differentiated: tuple[int, ...] | None = None

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        return f"{self.op} | {self.shape} | {self.dtype_name} | {self.device} | {self.direction}"

    @property
    def flushed(self) -> bool:
        return self.device == "cuda" if self.cold is None else self.cold

    @property
    def error_bound(self) -> float:
        if self.tolerance is not None:
            return self.tolerance
        return 0.0 if self.selection else ERROR_BOUNDS[self.dtype]


@dataclass(frozen=True)
class Skipped:
    """A row that cannot run in this environment, and the reason."""

    op: str
    shape: str
    reason: str
    quick: bool = False


class VerificationError(Exception):
    """Raised if a contender and the twin return different results. The time of the contender would be meaningless."""


# ---- Running one contender ----


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Run contenders with deterministic algorithms. Use this function as the context of a Contender."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def to_float64(inputs: Iterable[Any]) -> tuple:
    return tuple(x.double() if is_float(x) else x for x in inputs)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def bind(bench: Bench, contender: Contender, inputs: tuple, grads: tuple[Tensor, ...]) -> Callable[[], tuple]:
    """Return a function that calls the contender once on these inputs and does only the work to be timed.

    The function returns the outputs, followed by the gradients of the inputs unless the direction is "forward". If the
    direction is "backward", the function can be called only once.
    """
    if bench.direction == FORWARD:

        def forward() -> tuple:
            with torch.no_grad(), contender.context():
                return as_tuple(contender.call(*inputs))

        return forward

    if bench.differentiated is None:
        leaves = [x for x in inputs if is_float(x)]
    else:
        leaves = [inputs[i] for i in bench.differentiated]
    for leaf in leaves:
        leaf.requires_grad_()

    def forward_backward() -> tuple:
        with contender.context():
            outputs = as_tuple(contender.call(*inputs))
            return (*outputs, *torch.autograd.grad(outputs, leaves, grads))

    if bench.direction == FORWARD_BACKWARD:
        return forward_backward

    with contender.context():
        outputs = as_tuple(contender.call(*inputs))
    # In a network, the gradient of an output usually has the memory layout of the output.
    grads = tuple(torch.empty_like(output).copy_(grad) for output, grad in zip(outputs, grads))

    def backward() -> tuple:
        with contender.context():
            return (*outputs, *torch.autograd.grad(outputs, leaves, grads))

    return backward


class Inputs:
    """A source of random inputs for a bench and, if it has a backward pass, of random gradients of its outputs."""

    def __init__(self, bench: Bench, seed: int = 0) -> None:
        self.bench = bench
        self.generator = torch.Generator(bench.device).manual_seed(seed)
        self.outputs: list[Tensor] = []  # meta tensors with the shapes and dtypes of the outputs

    def draw(self) -> tuple[tuple, tuple[Tensor, ...]]:
        inputs = tuple(x.detach() if isinstance(x, Tensor) else x for x in self.bench.make_inputs(self.generator))
        if self.bench.direction == FORWARD:
            return inputs, ()
        if not self.outputs:
            with torch.no_grad():
                self.outputs = [x.to("meta") for x in as_tuple(self.bench.relops(*inputs))]
        grads = tuple(
            torch.randn(x.shape, generator=self.generator, dtype=torch.float32, device=self.bench.device).to(x.dtype)
            for x in self.outputs
        )
        return inputs, grads


class Graph:
    """A CUDA graph of a contender's forward pass. New inputs are copied into its static inputs before each replay."""

    def __init__(self, contender: Contender, inputs: tuple) -> None:
        self.inputs = tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad(), contender.context():
            for _ in range(3):  # lazy initialization must not be captured
                contender.call(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), contender.context(), torch.cuda.graph(self.graph):
            self.outputs = as_tuple(contender.call(*self.inputs))

    def bind(self, inputs: tuple) -> Callable[[], tuple]:
        for static, new in zip(self.inputs, inputs):
            if isinstance(static, Tensor):
                static.copy_(new)

        def replay() -> tuple:
            self.graph.replay()
            return self.outputs

        return replay


# ---- Verification ----


def relative_rms_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the maximum over the tensors of RMS(found - expected) / RMS(expected).

    The result is inf if the shapes differ or if the error is NaN.
    """
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if b.numel() == 0:
            continue
        b = b.detach().double()
        difference = (a.detach().double() - b).square_().mean().sqrt().item()
        scale = b.square().mean().sqrt().item()
        error = difference / scale if scale > 0 else difference
        worst = max(worst, error if error == error else float("inf"))
    return worst


def selection_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the fraction of indices that only one of the two contenders selects, counted image by image.

    If both select the same indices in a different order, the result is the same as for one differing index. If all
    indices are equal and in the same order, the result is the relative RMS error of the numbers that follow them.
    """
    if all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if not b.is_floating_point()):
        return relative_rms_error(*([x for x in outputs if is_float(x)] for outputs in (found, expected)))
    rows = zip(*(torch.atleast_2d(outputs[0]).tolist() for outputs in (found, expected)), strict=True)
    sets = [({*a} - {-1}, {*b} - {-1}) for a, b in rows]
    selected = max(1, sum(max(len(a), len(b)) for a, b in sets))
    return max(1, sum(max(len(a - b), len(b - a)) for a, b in sets)) / selected


def expected_of_twin(bench: Bench, inputs: tuple, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the expected results, computed by the twin in float64, or in the dtype of the row if it is a selection."""
    if bench.selection:
        return bench.comparable(bind(bench, Contender(bench.pytorch), inputs, grads)())
    run = bind(
        bench,
        Contender(bench.pytorch),
        to_float64(x.detach() if is_float(x) else x for x in inputs),
        tuple(g.double() for g in grads),
    )
    return bench.comparable(run())


def verify(
    bench: Bench, name: str, contender: Contender, inputs: tuple, grads: tuple, expected: Sequence[Tensor]
) -> float:
    """Return the error of the contender `name` with respect to the twin.

    Raises:
        VerificationError: If the error exceeds the bound of the row.
    """
    outputs, bound = bench.comparable(bind(bench, contender, inputs, grads)()), bench.error_bound
    if bench.selection:
        error, metric = selection_error(outputs, expected), "the fraction of indices that differ from the twin"
        if name not in ("relops", "pytorch"):
            bound = PEER_SELECTION_BOUND
    else:
        error, metric = relative_rms_error(outputs, expected), "the relative RMS error with respect to the float64 twin"
    if not error <= bound:
        raise VerificationError(
            f"{name}: {metric} is {error:.3g}, which exceeds the bound {bound:.3g}; not timed: {bench.label}"
        )
    return error


# ---- Time and memory ----


@functools.cache
def _flush_buffer(device: str) -> Tensor:
    if device == "cuda":
        cache = torch.cuda.get_device_properties(0).L2_cache_size
    else:
        cache = last_level_cache_bytes() or 64 << 20
    return torch.empty(max(4 * cache, 256 << 20), dtype=torch.uint8, device=device)


def flush_cache(device: str) -> None:
    """Flush the last-level cache by writing to a buffer that is larger than the cache."""
    _flush_buffer(device).zero_()


def last_level_cache_bytes() -> int | None:
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
    except OSError:
        return None
    return int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]]


def time_once(run: Callable[[], Any], device: str, cold: bool) -> float:
    """Return the duration of one call in seconds, measured with CUDA events or, on the CPU, with the wall clock."""
    if cold:
        flush_cache(device)
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        outputs = run()
        end.record()
        torch.cuda.synchronize()
        seconds = start.elapsed_time(end) / 1e3
    else:
        begin = time.perf_counter()
        outputs = run()
        seconds = time.perf_counter() - begin
    del outputs  # freeing the outputs is not part of the call
    return seconds


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Return the peak memory of one call, including its outputs but not the memory that was in use before the call.

    On CUDA, the figure comes from torch's caching allocator. On the CPU under Linux, it is the growth of the peak
    resident set, which includes the scratch memory of kernels. Free heap pages are first returned to the system, so
    that the call increases the resident set when it uses them again. On other systems, the figure comes from torch's
    profiler, which records torch's allocations but not the scratch memory of kernels.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = run()
        torch.cuda.synchronize()
        del outputs
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    except (OSError, AttributeError):
        return _peak_bytes_by_profiler(run)
    before = _proc_status_bytes("VmRSS")
    outputs = run()
    peak = _proc_status_bytes("VmHWM")
    del outputs
    return max(peak - before, 0)


def _proc_status_bytes(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match, name
    return int(match[1]) << 10


def _peak_bytes_by_profiler(run: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        outputs = run()
        del outputs
    running = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            running += event.nbytes()
            peak = max(peak, running)
    return peak


def _best_seconds(run: Callable[[], Any], device: str, repeats: int = 7) -> float:
    run()
    return min(time_once(run, device, cold=False) for _ in range(repeats))


@functools.cache
def machine_limits(device: str, threads: int) -> dict[str, float]:
    """Return the speed limits of this machine.

    The limits are the bandwidth of a large copy (bytes read plus bytes written), and the rates of large matrix products
    in float32 and float64 (with TF32 off). These rates serve as upper bounds for arithmetic. Each limit is the best of
    several measurements.
    """
    del threads  # only part of the cache key
    count, n = (1 << 30, 8192) if device == "cuda" else (1 << 28, 1536)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    limits = {"copy_bytes_per_s": 2 * count / _best_seconds(lambda: target.copy_(source), device)}
    for dtype in (torch.float32, torch.float64):
        a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
        limits[f"{str(dtype).removeprefix('torch.')}_flops_per_s"] = 2 * n**3 / _best_seconds(lambda: a @ b, device)  # noqa: B023
    return limits


def limit_ms(model: Model, dtype: torch.dtype, limits: Mapping[str, float]) -> tuple[float, str]:
    """Return the time that the machine needs for the compulsory work, and whether memory or arithmetic limits it.

    Arithmetic on 16-bit inputs counts as float32.
    """
    arithmetic = limits["float64_flops_per_s" if dtype == torch.float64 else "float32_flops_per_s"]
    times = {"memory": model.bytes / limits["copy_bytes_per_s"] * 1e3, "arithmetic": model.flops / arithmetic * 1e3}
    by = max(times, key=times.__getitem__)
    return times[by], by


# ---- One row ----


def contenders_of(bench: Bench, quick: bool) -> dict[str, Contender]:
    found: dict[str, Contender] = {"relops": Contender(bench.relops), "pytorch": Contender(bench.pytorch)}
    for name, peer in bench.peers.items():
        found[name] = peer if isinstance(peer, Contender) else Contender(peer)
    if bench.compiled and not quick:
        torch.compiler.reset()  # each row compiles anew
        found["torch.compile"] = Contender(torch.compile(bench.pytorch, dynamic=False))
    return found


def measure(bench: Bench, quick: bool = False) -> dict[str, Any]:
    """Verify and time one bench, and return its row as a dictionary that can be stored as JSON.

    Raises:
        VerificationError: If the results of relops differ from those of its twin.
    """
    budget_s, min_rounds = (2.0, min(bench.min_rounds, QUICK_MIN_ROUNDS)) if quick else (10.0, bench.min_rounds)
    source = Inputs(bench)
    contenders, notes = contenders_of(bench, quick), []
    inputs, grads = source.draw()
    expected = expected_of_twin(bench, inputs, grads)
    errors: dict[str, float] = {}
    for name, contender in list(contenders.items()):
        try:
            errors[name] = verify(bench, name, contender, inputs, grads, expected)
        except Exception as error:
            if name in ("relops", "pytorch"):
                raise
            notes.append(f"{name} was left out: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
            del contenders[name]
    del expected

    # Verification has already run every contender once, so memory that only a first call allocates is not measured.
    peaks = {name: peak_bytes(bind(bench, c, inputs, grads), bench.device) for name, c in contenders.items()}

    graphs = {name: Graph(c, inputs) for name, c in contenders.items()} if bench.graph else {}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    begin = time.perf_counter()
    for round_ in range(MAX_ROUNDS):
        inputs, grads = source.draw()
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            run = graphs[name].bind(inputs) if graphs else bind(bench, contenders[name], inputs, grads)
            synchronize(bench.device)
            times[name].append(time_once(run, bench.device, bench.flushed))
        if round_ + 1 >= min_rounds and time.perf_counter() - begin > budget_s:
            break

    ratio = _ratio(times["pytorch"], times["relops"])
    row: dict[str, Any] = {
        "op": bench.op,
        "shape": bench.shape,
        "dtype": bench.dtype_name,
        "device": bench.device,
        "direction": bench.direction,
        "threads": torch.get_num_threads() if bench.device == "cpu" else None,
        "rounds": len(times["relops"]),
        "cache": "cold" if bench.flushed else "warm",
        "cuda_graph": bench.graph,
        "ms": {name: _summary(values) for name, values in times.items()},
        "ratio": ratio,
        "peer_ratio": {n: _ratio(times[n], times["relops"]) for n in names if n not in ("relops", "pytorch")},
        "target": bench.target,
        "target_reached": None if bench.target is None else ratio >= bench.target,
        "peer_targets": dict(bench.peer_targets),
        "peak_bytes": peaks,
        "error": errors,
        "error_bound": bench.error_bound,
        "notes": notes,
    }
    if bench.model is not None:
        milliseconds, by = limit_ms(bench.model, bench.dtype, machine_limits(bench.device, torch.get_num_threads()))
        seconds = row["ms"]["relops"]["median"] / 1e3
        row["model"] = asdict(bench.model)
        row["limit_ms"], row["limited_by"] = milliseconds, by
        row["fraction_of_limit"] = milliseconds / 1e3 / seconds
        if bench.model.gathered_bytes:
            row["gathered_bytes_per_s"] = bench.model.gathered_bytes / seconds
    return row


def _ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast))


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": median * 1e3, "quartile_1": low * 1e3, "quartile_3": high * 1e3, "min": min(seconds) * 1e3}


def release_memory(device: str) -> None:
    """Free the memory in torch's cache, so that the next row can use it."""
    if device == "cuda":
        torch.cuda.empty_cache()


# ---- Records ----


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_name(device: str) -> str:
    """Return the name of the results folder of this machine, for example 'amd-epyc-avx512-2-cores' or 'nvidia-h200'.

    The name of a CPU includes the instruction set, because under a hypervisor several generations of processors report
    the same model name.
    """
    cpu = f"{cpu_model()} {_library.build_info()['cpu_isa']} {cores()} cores"
    name = torch.cuda.get_device_name() if device == "cuda" else cpu
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def describe_run(device: str) -> dict[str, Any]:
    """Return a description of this benchmark run. Each measured row names its run by the date of the run."""
    status = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    run: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_model(), "cores": cores(), "platform": platform.platform()},
        "cpu_isa": _library.build_info()["cpu_isa"],
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "relops": relops.__version__},
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "limits": machine_limits(device, torch.get_num_threads()),
    }
    with contextlib.suppress(ImportError):
        import numpy

        run["versions"]["numpy"] = numpy.__version__
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        run["machine"] |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
        run["versions"]["cuda"] = torch.version.cuda
    return run


def row_key(row: Mapping[str, Any]) -> tuple:
    return tuple(row[name] for name in ("op", "shape", "dtype", "device", "direction", "threads"))


class Record:
    """The file `results/<machine>/<op>.json`, which contains rows and the runs that measured them.

    A new row replaces the row with the same key.
    """

    def __init__(self, out: Path, device: str, op: str, run: dict[str, Any]) -> None:
        self.path = out / machine_name(device) / f"{op}.json"
        self.run = run

    def add(self, row: dict[str, Any]) -> None:
        """Add a row and write the file immediately, so that an interrupted run keeps its finished rows."""
        runs: dict[str, Any] = {}
        rows: list[dict[str, Any]] = []
        if self.path.exists():
            stored = json.loads(self.path.read_text())
            runs, rows = stored["runs"], stored["rows"]
        row = {**row, "run": self.run["date"]}
        same_key = [i for i, old in enumerate(rows) if row_key(old) == row_key(row)]
        if same_key:
            rows[same_key[0]] = row
        else:
            rows.append(row)
        runs[row["run"]] = self.run
        used = {r["run"] for r in rows}
        runs = {date: run for date, run in runs.items() if date in used}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"runs": runs, "rows": rows}, indent=1) + "\n")
        temporary.replace(self.path)


# ---- The table ----


def format_ms(milliseconds: float) -> str:
    return f"{milliseconds:.4g}" if milliseconds < 1000 else f"{milliseconds:.0f}"


def format_bytes(count: int) -> str:
    return f"{count / 2**20:.3g}M" if count < 1000 * 2**20 else f"{count / 2**30:.3g}G"


def format_ratio(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"


def format_fraction(fraction: float) -> str:
    return f"{fraction * 100:.0f}%" if fraction >= 0.1 else f"{fraction * 100:.1f}%"


SHORT_DTYPES = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
SHORT_DIRECTIONS = {FORWARD: "fwd", BACKWARD: "bwd", FORWARD_BACKWARD: "fwd+bwd"}
TARGET_WIDTH = 13  # width of the column of targets, including the two spaces before it


def table_header(targets: bool) -> str:
    return (
        f"{'shape':47} {'dtype':5} {'pass':7} {'relops ms':>9} {'PyTorch ms':>10} {'ratio':>7}"
        f"{'  target' if targets else '':{TARGET_WIDTH if targets else 0}}"
        f" {'peak, relops':>12} {'PyTorch':>7} {'error':>8} {'of limit':>8}"
    )


def format_target(ratio: float, target: float | None, targets: bool) -> str:
    """Return the text of a target with its verdict, or an empty string if `targets` is false."""
    if not targets:
        return ""
    verdict = "" if target is None else f"  {target:g}x {'reached' if ratio >= target else 'MISSED'}"
    return f"{verdict:{TARGET_WIDTH}}"


def table_line(row: Mapping[str, Any], targets: bool) -> str:
    fraction = format_fraction(row["fraction_of_limit"]) if "fraction_of_limit" in row else ""
    return (
        f"{row['shape']:47} {SHORT_DTYPES.get(row['dtype'], row['dtype']):5} {SHORT_DIRECTIONS[row['direction']]:7}"
        f" {format_ms(row['ms']['relops']['median']):>9} {format_ms(row['ms']['pytorch']['median']):>10}"
        f" {format_ratio(row['ratio']):>7}{format_target(row['ratio'], row['target'], targets)}"
        f" {format_bytes(row['peak_bytes']['relops']):>12}"
        f" {format_bytes(row['peak_bytes']['pytorch']):>7} {row['error']['relops']:>8.1e} {fraction:>8}"
    )


def table(rows: Sequence[Mapping[str, Any]], targets: bool) -> str:
    """Return the rows as text, with a section per op and device. The peers of a row are listed below it.

    If `targets` is true, a column shows the ratios that the project wants to reach.
    """
    lines: list[str] = []
    section = None
    for row in rows:
        if section != (row["op"], row["device"]):
            section = (row["op"], row["device"])
            cuda = row["device"] == "cuda"
            machine = torch.cuda.get_device_name() if cuda else f"{cpu_model()}, {row['threads']} threads"
            header = table_header(targets)
            lines += ["", f"{row['op']} on {row['device']} ({machine})", header, "-" * len(header)]
        lines.append(table_line(row, targets))
        for name, ratio in row["peer_ratio"].items():
            lines.append(
                f"{'    against ' + name:60} {'':9} {format_ms(row['ms'][name]['median']):>10}"
                f" {format_ratio(ratio):>7}{format_target(ratio, row['peer_targets'].get(name), targets)}"
                f" {'':12} {format_bytes(row['peak_bytes'][name]):>7} {row['error'][name]:>8.1e}"
            )
        lines += [f"    note: {note}" for note in row["notes"]]
    return "\n".join(lines)


def progress(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


# ---- pytest-benchmark ----


@functools.cache
def _verified_inputs(bench: Bench) -> Inputs:
    source = Inputs(bench)
    inputs, grads = source.draw()
    verify(bench, "relops", Contender(bench.relops), inputs, grads, expected_of_twin(bench, inputs, grads))
    return source


def run_in_pytest(benchmark: Any, bench: Bench, contender: Contender) -> None:
    """Run one contender of one bench as a pytest-benchmark test. All contenders of a bench form one group.

    The times are wall-clock times that include kernel launches, so `python -m benchmarks.run` is more precise.
    """
    source = _verified_inputs(bench)
    inputs, _ = source.draw()
    graph = Graph(contender, inputs) if bench.graph else None
    benchmark.group = bench.label

    def setup() -> tuple[tuple, dict]:
        inputs, grads = source.draw()
        run = bind(bench, contender, inputs, grads) if graph is None else graph.bind(inputs)
        if bench.flushed:
            flush_cache(bench.device)
        synchronize(bench.device)
        return (run,), {}

    def call(run: Callable[[], Any]) -> None:
        run()
        synchronize(bench.device)

    benchmark.pedantic(call, setup=setup, rounds=bench.min_rounds, warmup_rounds=1)
