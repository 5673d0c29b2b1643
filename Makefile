# Everything a developer does, on a machine with Python >= 3.10, a C++ compiler and make. `make help` lists it.
#
# Stamps in .venv/ remember what is done: a second call is quick and needs no network, and a change to csrc/, setup.py,
# pyproject.toml or requirements/ builds again.

PYTHON ?= python3
TORCH ?= torch>=2.11,<2.14
LOCKED ?= 1
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
WRITTEN_IN_PYTHON := $(wildcard setup.py curveball_fused tests tools examples benchmarks)
WRITTEN_IN_CPP := $(shell find csrc tests/emulator tools -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-all bench gpu lint format wheel cuda clean
.DELETE_ON_ERROR:

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.made-install  ## make .venv with torch, the tools and this package (editable, with native kernels)

# Exact versions, with the hashes of all their files; LOCKED=0 takes the newest that the ranges allow, for an index that
# lacks some of these files. torch is in a range only: which of its builds it is, the index says.
locked = $(if $(filter 1,$(LOCKED)),--require-hashes -r requirements/$(1).txt,-r requirements/$(1).in)

# Before this package, as the native build uses torch's headers.
.venv/.made-torch: requirements/dev.txt
	$(PYTHON) -m venv .venv
	$(PIP) install $(call locked,dev)
	$(PIP) install '$(TORCH)' 'setuptools>=64' wheel
	touch $@

# What the extra names is there already, but for Triton, of which a CUDA build of torch brings the one that it needs.
.venv/.made-install: .venv/.made-torch $(SOURCES)
	$(PIP) install --no-build-isolation --editable '.[dev]'
	touch $@

# For all platforms and all Pythons from 3.10 on.
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --no-python-downloads --generate-hashes \
	--upgrade --excludes requirements/unlocked.txt --custom-compile-command 'make lock'
.PHONY: lock
lock: .venv/.made-torch  ## write requirements/*.txt anew: the newest versions, and their hashes
	$(PIP) install uv
	$(LOCK) --extra dev pyproject.toml requirements/dev.in --output-file requirements/dev.txt
	$(LOCK) --constraint requirements/dev.txt requirements/wheel.in --output-file requirements/wheel.txt

demo: install  ## train a small model by CurveBall, SGD and Adam; options in ARGS
	$(BIN)/python examples/demo.py $(ARGS)

# As many processes as cores, each with one thread.
PYTEST := CURVEBALL_REQUIRE_NATIVE=1 $(BIN)/python -m pytest tests -q -n auto --dist worksteal

test: install  ## the fast tests, in a few minutes; options in ARGS, such as ARGS="-k solve"
	$(PYTEST) -m 'not slow' $(ARGS)

test-slow: install  ## the others: mutants, compilers, experiments, subprocesses
	$(PYTEST) -m slow $(ARGS)

test-all: export HYPOTHESIS_PROFILE = ci
test-all: test test-slow  ## all tests, with many random cases

# The package is installed already, so pip adds what the extra names; torch is named so that it stays.
.venv/.made-trainers: .venv/.made-install
	$(PIP) install '$(TORCH)' 'curveball_fused[examples]'
	touch $@

.PHONY: trainers
trainers: .venv/.made-trainers  ## tests with Accelerate, Lightning, Hugging Face, Ignite, peft and TensorBoard
	CURVEBALL_REQUIRE_NATIVE=1 CURVEBALL_REQUIRE_TRAINERS=1 \
		$(BIN)/python -m pytest tests/integrations tests/habits/test_adapters.py tests/monitoring/test_tensorboard.py \
		-q -n auto --dist worksteal $(ARGS)

bench: install  ## measure the speed of the kernels and of whole steps; figures in build/benchmarks/
	$(BIN)/python -m pytest benchmarks $(ARGS)

# Those that the documentation cites.
KEPT := benchmarks/results
.PHONY: bench-kept
bench-kept: install  ## the same, and replace the figures in benchmarks/results/ and docs/scaling.png
	CURVEBALL_RESULTS=$(KEPT) $(BIN)/python -m pytest benchmarks $(ARGS)
	if test -e $(KEPT)/scaling.png; then mv $(KEPT)/scaling.png docs/scaling.png; fi

# Each part goes on where it was stopped; one alone: `python -m benchmarks.evidence.<part>`.
EVIDENCE := published robustness networks network_times accuracy contest outliers flat_losses fuzz soak
.PHONY: evidence
evidence: install  ## make the raw data of the claims that is missing in benchmarks/results/evidence/
	for part in $(EVIDENCE); do $(BIN)/python -m benchmarks.evidence.$$part || failed="$$failed $$part"; done; \
		if test -n "$$failed"; then echo "not complete:$$failed"; exit 1; fi

.PHONY: figures
figures: install  ## draw the pictures in docs/figures/ from what lies in benchmarks/results/
	$(BIN)/python -m benchmarks.figures

# Without .venv: by the torch that is installed, which must have CUDA, in the source tree, for this machine's GPU only.
OUT ?= build/gpu
gpu:  ## on a machine with a GPU: build, test and measure the kernels there; logs and figures in OUT=build/gpu
	$(PYTHON) tools/gpu.py $(OUT) $(ARGS)

# In build/sanitize/, beside the library that is installed, with GCC.
.PHONY: sanitize
sanitize: install  ## run all native operators under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	$(BIN)/python tools/sanitize.py address thread

lint: install  ## check style and types, change nothing
	$(BIN)/ruff check $(WRITTEN_IN_PYTHON)
	$(BIN)/ruff format --check $(WRITTEN_IN_PYTHON)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(WRITTEN_IN_CPP)

format: install  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix $(WRITTEN_IN_PYTHON)
	$(BIN)/ruff format $(WRITTEN_IN_PYTHON)
	$(BIN)/clang-format -i $(WRITTEN_IN_CPP)

# The package is installed already, so pip adds what the extra names.
.venv/.made-docs: .venv/.made-install
	$(PIP) install 'curveball_fused[docs]'
	touch $@

.PHONY: docs
docs: .venv/.made-docs  ## build the documentation into build/docs; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -d build/doctrees docs build/docs

# CUDA=13.0: a wheel with the CUDA kernels, for every torch of CUDA 13. Needs nvcc of that release, no GPU, and no CUDA
# build of torch. The kernels are for TORCH_CUDA_ARCH_LIST.
CUDA ?=
FOR_CUDA := $(if $(CUDA),FORCE_CUDA=1 CURVEBALL_LOCAL_VERSION=cu$(subst .,,$(CUDA)),FORCE_CUDA=0)
# Not packed into the wheel: what is part of torch, or comes with it.
FROM_TORCH := --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' --exclude 'libgomp*'

.venv/.made-wheel-tools: .venv/.made-torch requirements/wheel.txt
	$(PIP) install $(call locked,wheel)
	touch $@

# build/lib goes first: setuptools would pack files that were deleted from the sources since the last build. The egg-info
# goes last: its version, +cu130, would hide that of the editable install.
wheel: .venv/.made-wheel-tools  ## build the wheel into dist/ (CUDA=13.0: with CUDA kernels) and check it; Linux
	rm -rf build/lib* build/wheel build/unpacked dist
	$(FOR_CUDA) $(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	rm -rf *.egg-info
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair $(FROM_TORCH) --wheel-dir dist build/wheel/*.whl
	$(BIN)/python tools/check_wheel.py $(if $(CUDA),--cuda,--native) dist/*.whl
	$(BIN)/python -m zipfile -e dist/*.whl build/unpacked
	if test -e $(BIN)/torch-abi-audit; then \
		$(BIN)/torch-abi-audit --check both build/unpacked/curveball_fused/*.so; fi  # which Python 3.10 does not have
	$(if $(CUDA),$(BIN)/python tools/check_machine_code.py build/unpacked/curveball_fused/_C_cuda.abi3.so)

NVCC := $(shell PATH="$(CUDA_HOME)/bin:$$PATH:/usr/local/cuda/bin" command -v nvcc)

.venv/.made-nvrtc: .venv/.made-wheel-tools
	$(PIP) install 'nvidia-cuda-nvrtc-cu12==12.8.*'
	touch $@

cuda: $(if $(NVCC),.venv/.made-nvrtc)  ## check all of the CUDA kernels that needs no GPU: wheel, machine code, CUDA 12, loading
ifeq ($(NVCC),)
	@echo 'make cuda: skipped: no nvcc (CUDA_HOME, PATH, /usr/local/cuda)'
else
	$(MAKE) wheel CUDA=$$($(NVCC) --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
	$(BIN)/python tools/check_nvrtc.py build/unpacked/curveball_fused/_C_cuda.abi3.so
	$(BIN)/python tools/check_wheel.py --cuda dist/*.whl --install
	$(BIN)/python tools/check_cuda_load.py dist/*.whl $(if $(CACHE),--cache '$(CACHE)')
endif

clean:  ## remove everything that make made
	rm -rf .venv build dist *.egg-info curveball_fused/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
