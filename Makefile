# Everything a developer does, on a machine with Python >= 3.10, a C++ compiler and make. `make help` lists it.
#
# Stamps in .venv/ remember what is done: a second call is quick and needs no network, and a change to csrc/, setup.py
# or pyproject.toml builds again.

PYTHON ?= python3
TORCH ?= torch>=2.11,<2.14
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
WRITTEN_IN_PYTHON := $(wildcard setup.py curveball_fused tests tools examples benchmarks)
WRITTEN_IN_CPP := $(shell find csrc -name '*.cpp' -o -name '*.h')

.DEFAULT_GOAL := help
.PHONY: help install demo test bench lint format wheel clean
.DELETE_ON_ERROR:

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.made-install  ## make .venv with torch, the tools and this package (editable, with native kernels)

# torch first: the native build uses its headers. Pinned to a range, so that no surprise comes along.
.venv/.made-torch:
	$(PYTHON) -m venv .venv
	$(PIP) install '$(TORCH)' 'setuptools>=64' wheel
	touch $@

.venv/.made-install: .venv/.made-torch $(SOURCES)
	$(PIP) install --no-build-isolation --editable '.[dev]'
	touch $@

demo: install  ## train a small model beside SGD and Adam; options in ARGS
	$(BIN)/python examples/demo.py $(ARGS)

test: install  ## all tests; options in ARGS, such as ARGS="-k solve"
	CURVEBALL_REQUIRE_NATIVE=1 $(BIN)/python -m pytest tests $(ARGS)

bench: install  ## measure the speed of the kernels and of whole steps
	$(BIN)/python -m pytest benchmarks $(ARGS)

lint: install  ## check style and types, change nothing
	$(BIN)/ruff check $(WRITTEN_IN_PYTHON)
	$(BIN)/ruff format --check $(WRITTEN_IN_PYTHON)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(WRITTEN_IN_CPP)

format: install  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix $(WRITTEN_IN_PYTHON)
	$(BIN)/ruff format $(WRITTEN_IN_PYTHON)
	$(BIN)/clang-format -i $(WRITTEN_IN_CPP)

# build/ goes first: setuptools would pack files that were deleted from the sources since the last build.
wheel: install  ## build the wheel into dist/ and check what is in it
	rm -rf build dist
	$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(BIN)/python tools/check_wheel.py --native dist/*.whl

clean:  ## remove everything that make made
	rm -rf .venv build dist *.egg-info curveball_fused/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
