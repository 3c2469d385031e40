# make run    set up, build, run the microbenchmarks against pure PyTorch in a quick setting. Without a GPU the CUDA half
#             is left out, unless RELOPS_CUDA=1 asks for it
# make test   set up, build, run the tests
# make quick  set up, build, run in a minute the tests that show most mistakes: what to run after every edit
# make docs   set up, build, write the documentation to build/docs
# make bench  set up, build, run all microbenchmarks, write results and plots
# make sanitize  set up, build, run tests of every CUDA kernel under compute-sanitizer; needs a GPU
#
# PYTHON   the Python to make the virtual environment of (python3)
# VENV     where to make it (.venv)
# TORCH    what to install where that Python has no torch (torch==2.14.1 torchvision==0.29.1); a torch that is there stays
#          as it is

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.14.1 torchvision==0.29.1

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check
# Extras must not replace torch, and some (timm) would.
PIN := $(VENV)/torch-pin.txt

.PHONY: run test quick docs bench sanitize memcheck racecheck synccheck build info lint oldest clean

run: export RELOPS_CUDA ?= $(shell nvidia-smi -L > /dev/null 2>&1 || echo 0)
# Of the packages that the full benchmarks need, these rows compare with SciPy alone.
run: build
	$(PIP) -c $(PIN) scipy
	@test "$(RELOPS_CUDA)" != 0 || echo "The CUDA half was left out, as no GPU was found; make run RELOPS_CUDA=1 builds it."
	$(PY) -m benchmarks.run --quick

# The examples in docstrings and in Markdown files are tests as well. Several processes share the cores, so idle threads
# must not spin.
test: build $(VENV)/installed
	OMP_WAIT_POLICY=passive $(PY) -m pytest tests relops docs README.md CONTRIBUTING.md --doctest-modules --markdown-docs \
	  -n auto --maxprocesses 8 --dist worksteal

quick: build $(VENV)/installed
	OMP_WAIT_POLICY=passive $(PY) -m pytest -q -m quick -n auto --maxprocesses 8 --dist worksteal

docs: build $(VENV)/installed
	$(PY) docs/draw_figures.py
	$(PY) -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "The first page is build/docs/index.html"

bench: build
	$(PIP) -c $(PIN) -e '.[bench]' --no-build-isolation
	$(PY) -m benchmarks.run
	$(PY) -m benchmarks.report

# Every sample of every op, forward and backward: float32, and bfloat16 by the deterministic kernels. Tensors have memory
# of their own, without torch's cache, so that reading past one is seen.
SANITIZERS := memcheck racecheck synccheck
sanitize: $(SANITIZERS)
$(SANITIZERS): build $(VENV)/installed
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $@ --kernel-name kernel_substring=relops \
	  --report-api-errors no --error-exitcode 1 \
	  $(PY) -m pytest -q tests/test_contract.py tests/test_contract_selection.py -k "cuda and (test_equals_twin \
	  or test_matches_twin and torch.float32-torch.float32 or test_deterministic and torch.bfloat16)"

# The build is incremental: only what changed is compiled.
build: $(VENV)/can-build
	$(PY) setup.py -q build_ext --inplace

info: build
	$(PY) -m relops info

lint: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'tests/cuda_emulation/*.h' 'tests/cuda_emulation/*.cuh')

# An environment with the oldest torch that relops runs on. tests/test_sources.py uses it where RELOPS_OLDEST_TORCH is its
# Python.
OLDEST := .venv-oldest
oldest: $(OLDEST)/installed
$(OLDEST)/installed:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check torch==2.10.0 numpy
	touch $@

# Where $(PYTHON) has a torch, the environment sees that one.
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

# The build comes first, because pip hides its plan and its progress; pip then finds everything compiled.
$(VENV)/installed: pyproject.toml $(VENV)/can-build
	$(PY) setup.py -q build_ext --inplace
	$(PIP) -c $(PIN) -e '.[test]' --no-build-isolation
	touch $@

clean:
	rm -rf build relops/*.so $(VENV) $(OLDEST) *.egg-info
