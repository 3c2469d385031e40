# make run       set up, build, and run the main microbenchmarks against pure PyTorch for a few rounds. Without a GPU,
#                the CUDA kernels are not built unless RELOPS_CUDA=1 requests them
# make test      set up, build, and run the tests
# make quick     set up, build, and run tests that show most mistakes in one minute; use it after every edit
# make lint      set up, build, and run ruff, mypy and clang-format
# make docs      set up, build, and write the documentation to build/docs
# make bench     set up, build, run all benchmarks, and write results, plots and docs/performance.md
# make sanitize  set up, build, and run tests of every CUDA kernel under compute-sanitizer; needs a GPU
# make prove     set up, build for the GPU of this machine, and run the tests, the sanitizers and all benchmarks on it
#
# PYTHON   the Python that creates the virtual environment (python3)
# VENV     the folder of the virtual environment (.venv)
# TORCH    what to install if that Python has no torch (torch==2.14.1 torchvision==0.29.1); an installed torch is kept

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.14.1 torchvision==0.29.1

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check
# This file makes pip keep the installed version of torch, because some packages (timm) would replace it.
PIN := $(VENV)/torch-pin.txt

.PHONY: run test quick docs bench sanitize prove build info lint oldest clean

run: export RELOPS_CUDA ?= $(shell nvidia-smi -L > /dev/null 2>&1 || echo 0)
# Some of the quick benchmarks compare with SciPy. The full benchmarks (make bench) need more packages.
run: build
	$(PIP) -c $(PIN) scipy
	@test "$(RELOPS_CUDA)" != 0 || echo "The CUDA kernels were not built, because no GPU was found. make run RELOPS_CUDA=1 builds them."
	$(PY) -m benchmarks.run --quick

# The examples in docstrings and in Markdown files are tests as well. Several test processes share the cores, so idle
# threads must not spin.
test: build $(VENV)/installed
	OMP_WAIT_POLICY=passive $(PY) -m pytest tests relops docs README.md CONTRIBUTING.md --doctest-modules --markdown-docs \
	  -n auto --maxprocesses 8 --dist worksteal

quick: build $(VENV)/installed
	OMP_WAIT_POLICY=passive $(PY) -m pytest -q -m quick -n auto --maxprocesses 8 --dist worksteal

docs: build $(VENV)/installed
	$(PY) -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "The first page is build/docs/index.html"

bench: build
	$(PIP) -c $(PIN) -e '.[bench]' --no-build-isolation
	$(PY) -m benchmarks.run
	$(PY) -m benchmarks.report

# Only for the GPU of this machine, or for 9.0 without a GPU. Parts that passed are not repeated unless FRESH=1.
prove: export TORCH_CUDA_ARCH_LIST := $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1),9.0)
prove: $(VENV)/installed
	$(PIP) -c $(PIN) -e '.[bench]' --no-build-isolation
	$(PY) -m benchmarks.prove $(if $(FRESH),--fresh)

sanitize: build $(VENV)/installed
	$(PY) -m benchmarks.prove --only memcheck racecheck synccheck initcheck

# The build is incremental: it compiles only what changed.
build: $(VENV)/can-build
	$(PY) setup.py -q build_ext --inplace

info: build
	$(PY) -m relops info

lint: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'tests/cuda_emulation/*.h' 'tests/cuda_emulation/*.cu*')

# This environment has the oldest torch that relops supports. tests/test_sources.py uses it if RELOPS_OLDEST_TORCH is
# the path of the environment's Python.
OLDEST := .venv-oldest
oldest: $(OLDEST)/installed
$(OLDEST)/installed:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check torch==2.10.0 numpy
	touch $@

# If $(PYTHON) has torch, the virtual environment uses that torch.
$(PY):
	$(PYTHON) -m venv $$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages) $(VENV)

$(PIN): | $(PY)
	$(PY) -c 'import torch' 2>/dev/null || $(PIP) $(TORCH)
	$(PY) -c 'from importlib.metadata import distributions; \
	  print(*{f"{d.name}=={d.version}" for d in distributions() if d.name in ("torch", "torchvision")}, sep="\n")' > $@.tmp
	mv $@.tmp $@

$(VENV)/can-build: $(PIN)
	$(PIP) -c $(PIN) 'setuptools>=77' wheel ninja pybind11 numpy
	touch $@

# The build runs before pip, because pip hides the build plan and the progress. pip then finds everything compiled.
$(VENV)/installed: pyproject.toml $(VENV)/can-build
	$(PY) setup.py -q build_ext --inplace
	$(PIP) -c $(PIN) -e '.[test]' --no-build-isolation
	touch $@

clean:
	rm -rf build relops/*.so $(VENV) $(OLDEST) *.egg-info
