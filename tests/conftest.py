"""The fixtures, comparisons, layouts and process helpers that all tests share."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cuda_emulation
import pytest
import torch
from cases import Inputs, Op, Sample, Selection
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import relops
from relops import _library

ROOT = Path(__file__).resolve().parents[1]
# The compiler's cache identifies ops by name. Each version of the schemas gets its own cache, because code that was
# compiled before a schema changed would call the op with the old arguments.
SCHEMAS = zlib.crc32((ROOT / "csrc/library.cpp").read_bytes())
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(ROOT / f"build/inductor-{SCHEMAS:08x}")

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TRACING_MODES = ("real", "fake", "symbolic")


def why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "no GPU visible to torch"
    return _library.cuda_missing and f"relops._cuda is {_library.cuda_missing}"


needs_cuda = pytest.mark.skipif(why_no_cuda() is not None, reason=f"CUDA: {why_no_cuda()}")


# Without a GPU, tests on the device "cuda" are not collected, because skipping them one by one would be slow.
DEVICES = ["cpu"] if why_no_cuda() else ["cpu", "cuda"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def pytest_configure() -> None:
    if os.environ.get("RELOPS_REQUIRE_GPU") == "1" and (reason := why_no_cuda()):
        raise pytest.UsageError(f"RELOPS_REQUIRE_GPU=1, but {reason}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if why_no_cuda():
        terminalreporter.write_line(f"Tests ran on the CPU only. CUDA: {why_no_cuda()}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulate-cuda",
        action="store_true",
        help="replace the CPU kernels with the CUDA kernels, which the CUDA emulation runs on the CPU",
    )


@pytest.fixture(scope="session", autouse=True)
def emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    requested = request.config.getoption("--emulate-cuda")
    with cuda_emulation.instead_of_cpu_kernels() if requested else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@contextlib.contextmanager
def determinism(enabled: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.fixture
def deterministic() -> Iterator[None]:
    with determinism(True):
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def forward_mode_calls(
    function: Callable[..., Any], inputs: Inputs, name: str
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield a description and a call for every way to differentiate `function` in forward mode.

    The calls differentiate with respect to the argument `name`. `function` must return one tensor.
    """
    x = inputs[name].detach()

    def output(y: Tensor) -> Tensor:
        return function(**inputs | {name: y})

    def dual(f: Callable[[Tensor], Tensor], y: Tensor) -> Tensor | None:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(y, torch.ones_like(y)))).tangent

    def total(y: Tensor) -> Tensor:
        return output(y).sum()

    func = torch.func
    yield "forward_ad", lambda: dual(output, x)
    yield "forward_ad without gradients", lambda: torch.no_grad()(dual)(output, x)
    yield "forward_ad of a leaf", lambda: dual(output, x.clone().requires_grad_())
    yield "forward_ad of grad", lambda: dual(func.grad(total), x)
    yield "jvp", lambda: func.jvp(output, (x,), (x,))
    yield "jvp of jvp", lambda: func.jvp(lambda y: func.jvp(output, (y,), (x,))[1], (x,), (x,))
    yield "jvp of grad", lambda: func.jvp(func.grad(total), (x,), (x,))
    yield "grad of jvp", lambda: func.grad(lambda y: func.jvp(total, (y,), (x,))[1])(x)
    yield "vmap of jvp", lambda: torch.vmap(lambda t: func.jvp(output, (x,), (t,))[1])(x[None])
    yield "linearize", lambda: func.linearize(output, x)
    yield "jacfwd", lambda: func.jacfwd(lambda t: output(x * t))(torch.ones((), dtype=x.dtype, device=x.device))
    yield "hessian", lambda: func.hessian(lambda t: total(x * t))(torch.ones((), dtype=x.dtype, device=x.device))


class AsModule(torch.nn.Module):
    """A module that calls a function with a dict of inputs. torch.export accepts only modules."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Inputs) -> Any:
        return self.function(**inputs)


def check_recompiles(op: Op | Selection, device: str, assert_same: Callable[[Any, Any], None]) -> None:
    """Check that larger sizes do not cause a recompilation, and that compiled and eager results are equal."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op.function, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for k in range(5):
        inputs = op.draw(op.growing(k), device)
        assert_same(op.run(inputs, compiled), op.run(inputs))
        frames.append(counter.frame_count)
    # frames[0] is 2 if the first call traces floats as symbols, finds that they are constants and traces again.
    assert frames[-1] == frames[0]


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment variables, updated with `more`, for a new process that uses the same relops.

    The new process finds relops even if it is not installed.
    """
    paths = [str(Path(relops.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | more


def run_python(program: str, **more: str) -> subprocess.CompletedProcess:
    """Run a Python program in a new process, whose environment variables are updated with `more`."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=Path(__file__).parent, env=environment(**more), capture_output=True, text=True)


def resident_growth(begin: str, small: str, large: str) -> int:
    """Return by how many KB the statements `large` raise the peak resident set size.

    The statements `begin` and `small` run before `large`.
    """
    if sys.platform != "linux":
        pytest.skip("ru_maxrss is in KB only on Linux")
    process = run_python(
        f"""
import resource, torch, relops
{begin}
{small}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{large}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    )
    assert process.returncode == 0, process.stderr
    return int(process.stdout)


def tensors_of(inputs: Inputs) -> dict[str, Tensor]:
    return {name: x for name, x in inputs.items() if isinstance(x, Tensor)}


def faked(mode: FakeTensorMode, inputs: Inputs) -> Inputs:
    return {name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def traced(run: Callable[[Inputs], Any], inputs: Inputs, tracing_mode: str) -> Callable[[Inputs], Any]:
    """Trace `run` with make_fx into a graph whose arguments are the tensors in `inputs`."""
    graph = make_fx(lambda tensors: run(inputs | tensors), tracing_mode=tracing_mode)(tensors_of(inputs))
    return lambda inputs: graph(tensors_of(inputs))


def check_two_streams(op: Op | Selection, sample: Sample, assert_same: Callable[[Any, Any], None]) -> None:
    """Check that kernels run on the current stream while two streams are in use at the same time.

    The inputs get their values after a long wait, so a kernel on a wrong stream would read the inputs too early.
    """
    inputs = [op.draw(sample, "cuda", seed=seed) for seed in (0, 1)]
    expected = [op.run(given) for given in inputs]
    torch.cuda.synchronize()
    results = []
    for given in inputs:
        with torch.cuda.stream(torch.cuda.Stream()):
            late = given | {name: torch.zeros_like(x) for name, x in tensors_of(given).items()}
            torch.cuda._sleep(50_000_000)
            for name, x in tensors_of(given).items():
                late[name].copy_(x)
            results.append(op.run(late))
    torch.cuda.synchronize()
    for pair in zip(results, expected):
        assert_same(*pair)


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture `step` in a CUDA graph. Return the graph, and the tensors to which each replay writes its results."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


# ---- Layouts ----


def reversed_strides(x: Tensor) -> Tensor:
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def sliced(x: Tensor) -> Tensor:
    """Return a copy of `x` that occupies every second element of a buffer.

    The other elements are NaN (1 for integers), which reveals wrong reads.
    """
    filler = torch.full_like(x, float("nan")) if x.is_floating_point() else torch.ones_like(x)
    return torch.stack([filler, x], -1)[..., 1]


def shifted(x: Tensor) -> Tensor:
    """Return a dense copy of `x` that is aligned only to the size of one element."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


LAYOUTS = [reversed_strides, sliced, shifted]


# ---- Comparisons ----


def tolerances(dtype: torch.dtype) -> tuple[float, float]:
    """Return the tolerances for comparing a result of this dtype with the float64 twin.

    The first tolerance is relative to each value, and the second is a fraction of the largest value. 16-bit results are
    float32 sums that are rounded once, so their relative tolerance is twice the rounding error of the dtype, and their
    second tolerance is that of float32.
    """
    return {
        torch.float64: (1e-12, 1e-13),
        torch.float32: (1e-5, 1e-5),
        torch.float16: (1e-3, 1e-5),
        torch.bfloat16: (8e-3, 1e-5),
    }[dtype]


def assert_matches(
    actual: Tensor, expected: Tensor, what: str = "output", dtype: torch.dtype | None = None, noise: float = 1.0
) -> None:
    """Assert that `actual` is as close to the float64 tensor `expected` as the tested dtype allows.

    `expected` must be computed from inputs that were rounded to the tested dtype. The tested dtype is `dtype`, or that
    of `actual` if `dtype` is None. `noise` multiplies the absolute tolerance, as in cases.Op.
    """
    relative, fraction = tolerances(dtype or actual.dtype)
    largest = noise * expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.detach().double().cpu(),
        expected.detach().cpu(),
        rtol=relative,
        atol=fraction * largest,
        msg=lambda text: f"{what}: {text}",
    )


def assert_matches_twin(op: Op, inputs: Inputs, dtype: torch.dtype | None = None) -> None:
    """Assert that the output and every gradient of an op match those of its twin."""
    actual = op.run(inputs)
    for name, expected in op.run_twin(inputs).items():
        assert_matches(actual[name], expected, name, dtype, op.noise)


def assert_same_selection(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Assert that two results of the same kernels on the same numbers are equal."""
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def assert_matches_selection(op: Selection, inputs: Inputs) -> None:
    """Assert that an op returns the indices of its twin. The scores of soft_nms may differ by rounding errors."""
    actual, expected = op.run(inputs), op.run_twin(inputs)
    for x, y in zip(op.comparable(actual), op.comparable(expected), strict=True):
        assert x.dtype == y.dtype
        relative = tolerances(x.dtype)[0] if x.is_floating_point() else 0
        torch.testing.assert_close(x, y, rtol=relative, atol=0)
