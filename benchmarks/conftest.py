"""A plugin that runs each bench_*.py with pytest-benchmark: `pytest benchmarks/ --benchmark-enable [-k quick]`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.run import devices


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path.name.startswith("bench_") and file_path.suffix == ".py":
        return BenchFile.from_parent(parent, path=file_path)
    return None


class BenchFile(pytest.Module):
    """A benchmark file. It defines rows instead of tests, so the plugin adds `test_bench` as its only test."""

    def _getobj(self):
        module = super()._getobj()
        module.test_bench = test_bench
        return module


def test_bench(benchmark, bench, contender) -> None:
    harness.run_in_pytest(benchmark, bench, contender)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "bench" not in metafunc.fixturenames:
        return
    parameters = []
    for device in devices():
        for bench in metafunc.module.benches(device):
            if isinstance(bench, harness.Skipped):
                mark = pytest.mark.skip(reason=bench.reason)
                parameters.append(pytest.param(None, None, id=f"{bench.op}-{bench.shape}", marks=mark))
                continue
            prefix = "quick-" if bench.quick else ""
            for name, contender in harness.contenders_of(bench, quick=True).items():
                parameters.append(pytest.param(bench, contender, id=f"{prefix}{bench.label}-{name}"))
    metafunc.parametrize(("bench", "contender"), parameters)
