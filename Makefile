# `make demo` and `make test` need Python 3.11 or newer with its headers, make, git and a C++
# compiler; everything else goes into .venv. Run again, they set up only what has changed.

PYTHON ?= python3
TORCH ?= torch==2.13.0
SHARD ?= 1/1

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
# What an editable install depends on; Python files are read from the checkout as they are.
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt keylock_kernels/_version.py $(shell find csrc -type f)

.PHONY: help demo test test-gpu lint bench clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo "make demo      three users' concepts, taught and drawn in one batch (outputs/demo)"
	@echo "make test      every test that needs no GPU"
	@echo "make test-gpu  the tests that need one; SHARD=2/4 runs the second quarter"
	@echo "make lint      ruff, mypy, clang-format"
	@echo "make bench     the benchmarks"
	@echo "make clean     removes .venv and everything built"
	@echo "PYTHON=$(PYTHON) and TORCH=$(TORCH) choose the interpreter and the torch that .venv gets"

demo: $(VENV)/installed
	$(BIN)/keylock demo

test: $(VENV)/installed-test
	env -u OMP_NUM_THREADS $(BIN)/python -m pytest tests -q -m "not gpu"
# Triton's kernels, in its interpreter: a process of its own, since the mode is fixed on import.
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kernels/test_rank_one.py -q -m "not gpu" -k triton

# Every n-th test, so that slow files spread over the shards.
test-gpu: $(VENV)/installed-test
	@mkdir -p build
	$(BIN)/python -m pytest tests -q -m gpu --collect-only > build/collected || test $$? -eq 5
	@awk -v shard=$(SHARD) 'BEGIN { split(shard, s, "/") } /::/ { if (n++ % s[2] == s[1] - 1) print }' \
	  build/collected > build/shard
	@if test -s build/shard; then $(BIN)/python -m pytest -q -m gpu @build/shard; \
	  else echo "shard $(SHARD) has no tests"; fi

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

bench: $(VENV)/installed-test
	$(BIN)/python -m pytest benchmarks -q

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f keylock_kernels/_native*.so keylock_kernels/_build.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	touch $@

# First, and by name: whatever depends on torch then finds it instead of choosing another build.
$(VENV)/torch: $(VENV)/created
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) "$(TORCH)"
	touch $@

$(VENV)/tools: $(VENV)/torch
	$(PIP) setuptools wheel pybind11 cmake ninja
	touch $@

# No build isolation: pip's own build environment would fetch the tools again on every build.
$(VENV)/installed: $(VENV)/tools $(BUILD_INPUTS)
	$(PIP) --no-build-isolation -e .
	touch $@

$(VENV)/installed-%: $(VENV)/tools $(BUILD_INPUTS)
	$(PIP) --no-build-isolation -e ".[$*]"
	touch $@
