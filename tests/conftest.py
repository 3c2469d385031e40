"""Devices, seeds, tolerances and layouts that all tests share."""

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
# The compiler's cache knows ops by name: what it compiled before a change of a schema would call the op as it was.
SCHEMAS = zlib.crc32((ROOT / "csrc/library.cpp").read_bytes())
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(ROOT / f"build/inductor-{SCHEMAS:08x}")

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TRACING_MODES = ("real", "fake", "symbolic")


def why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "no GPU visible to torch"
    return _library.cuda_missing and f"relops._cuda is {_library.cuda_missing}"


needs_cuda = pytest.mark.skipif(why_no_cuda() is not None, reason=f"CUDA: {why_no_cuda()}")


# Without a GPU the CUDA half of the tests is not collected: skipping as many tests as there are would take its time.
DEVICES = ["cpu"] if why_no_cuda() else ["cpu", "cuda"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if why_no_cuda():
        terminalreporter.write_line(f"Tests ran on the CPU only. CUDA: {why_no_cuda()}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulate-cuda", action="store_true", help="tests on the CPU run the CUDA kernels, on the emulation of CUDA"
    )


@pytest.fixture(scope="session", autouse=True)
def emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    wanted = request.config.getoption("--emulate-cuda")
    with cuda_emulation.instead_of_cpu_kernels() if wanted else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
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
    """For tests that set their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def asking_forward_mode(
    function: Callable[..., Any], inputs: Inputs, name: str
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Ways to ask for a tangent by one argument; a function that gives a tensor."""
    x = inputs[name].detach()

    def of(y: Tensor) -> Tensor:
        return function(**inputs | {name: y})

    def dual(f: Callable[[Tensor], Tensor], y: Tensor) -> Tensor | None:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(y, torch.ones_like(y)))).tangent

    def total(y: Tensor) -> Tensor:
        return of(y).sum()

    func = torch.func
    yield "forward_ad", lambda: dual(of, x)
    yield "forward_ad without gradients", lambda: torch.no_grad()(dual)(of, x)
    yield "forward_ad of a leaf", lambda: dual(of, x.clone().requires_grad_())
    yield "forward_ad of grad", lambda: dual(func.grad(total), x)
    yield "jvp", lambda: func.jvp(of, (x,), (x,))
    yield "jvp of jvp", lambda: func.jvp(lambda y: func.jvp(of, (y,), (x,))[1], (x,), (x,))
    yield "jvp of grad", lambda: func.jvp(func.grad(total), (x,), (x,))
    yield "grad of jvp", lambda: func.grad(lambda y: func.jvp(total, (y,), (x,))[1])(x)
    yield "vmap of jvp", lambda: torch.vmap(lambda t: func.jvp(of, (x,), (t,))[1])(x[None])
    yield "linearize", lambda: func.linearize(of, x)
    yield "jacfwd", lambda: func.jacfwd(lambda t: of(x * t))(torch.ones((), dtype=x.dtype, device=x.device))
    yield "hessian", lambda: func.hessian(lambda t: total(x * t))(torch.ones((), dtype=x.dtype, device=x.device))


class AsModule(torch.nn.Module):
    """What torch.export takes: a function of inputs by name."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Inputs) -> Any:
        return self.function(**inputs)


def check_recompiles(op: Op | Selection, device: str, assert_same: Callable[[Any, Any], None]) -> None:
    """Sizes that grow compile once, and the results of both runs are the same."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op.function, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for k in range(5):
        inputs = op.draw(op.growing(k), device)
        assert_same(op.run(inputs, compiled), op.run(inputs))
        frames.append(counter.frame_count)
    assert frames[-1] == frames[0]  # which is 2 where floats are traced, found to be constants, and traced again


def environment(**more: str) -> dict[str, str]:
    """Of a process that imports the relops of this one, installed or not."""
    paths = [str(Path(relops.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | more


def run_python(program: str, **more: str) -> subprocess.CompletedProcess:
    """In a process of its own, with more of an environment."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=Path(__file__).parent, env=environment(**more), capture_output=True, text=True)


def resident_growth(begin: str, small: str, large: str) -> int:
    """By how many KB the peak of the resident set grows when statements that took some memory take more."""
    if sys.platform != "linux":
        pytest.skip("reads the peak of the resident set in the unit of Linux")
    done = run_python(
        f"""
import resource, torch, relops
{begin}
{small}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{large}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def tensors_of(inputs: Inputs) -> dict[str, Tensor]:
    return {name: x for name, x in inputs.items() if isinstance(x, Tensor)}


def faked(mode: FakeTensorMode, inputs: Inputs) -> Inputs:
    return {name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def traced(run: Callable[[Inputs], Any], inputs: Inputs, tracing_mode: str) -> Callable[[Inputs], Any]:
    """`run` of inputs of which the tensors are those of the graph, traced by make_fx."""
    graph = make_fx(lambda tensors: run(inputs | tensors), tracing_mode=tracing_mode)(tensors_of(inputs))
    return lambda inputs: graph(tensors_of(inputs))


def check_two_streams(op: Op | Selection, sample: Sample, assert_same: Callable[[Any, Any], None]) -> None:
    """On two at once, with numbers that arrive after a long wait: a kernel on any other stream would be too early."""
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
    """A CUDA graph of the step, and what its replays write their results to."""
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
    """Every second element of a buffer whose other elements would show."""
    filler = torch.full_like(x, float("nan")) if x.is_floating_point() else torch.ones_like(x)
    return torch.stack([filler, x], -1)[..., 1]


def shifted(x: Tensor) -> Tensor:
    """Dense, but not aligned to more than an element."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


LAYOUTS = [reversed_strides, sliced, shifted]


# ---- Comparisons ----


def tolerances(dtype: torch.dtype) -> tuple[float, float]:
    """(relative, as a fraction of the largest value) by which a result of this dtype may miss the float64 twin.

    16-bit results are sums in float32 rounded once: twice the rounding error, and nothing besides it but float32's.
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
    """`expected` is float64, from the inputs as rounded to the tested dtype; `dtype` where actual was cast since;
    `noise` is that of the op (cases.Op)."""
    relative, of_largest = tolerances(dtype or actual.dtype)
    largest = noise * expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.detach().double().cpu(),
        expected.detach().cpu(),
        rtol=relative,
        atol=of_largest * largest,
        msg=lambda text: f"{what}: {text}",
    )


def assert_matches_twin(op: Op, inputs: Inputs, dtype: torch.dtype | None = None) -> None:
    """The output and every gradient."""
    actual = op.run(inputs)
    for name, expected in op.run_twin(inputs).items():
        assert_matches(actual[name], expected, name, dtype, op.noise)


def assert_same_selection(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """The same kernels on the same numbers."""
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def assert_matches_selection(op: Selection, inputs: Inputs) -> None:
    """The twin's indices exactly; its numbers, which soft_nms has, but for rounding."""
    actual, expected = op.run(inputs), op.run_twin(inputs)
    for x, y in zip(op.comparable(actual), op.comparable(expected), strict=True):
        assert x.dtype == y.dtype
        relative = tolerances(x.dtype)[0] if x.is_floating_point() else 0
        torch.testing.assert_close(x, y, rtol=relative, atol=0)
