# `make demo` and `make test` need Python 3.11 or newer with its headers, make, git and a C++
# compiler; everything else goes into .venv. Run again, they set up only what has changed.

PYTHON ?= python3
TORCH ?= torch==2.13.0
SHARD ?= 1/1
FIRST ?= 0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
RUN ?= $(BIN)/python
TRITON_TESTS := $(addprefix tests/kernels/test_,rank_one.py low_rank.py localized_attention.py triton_attention.py isolation.py torch.py)
TEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal
GPU_TEST := KEYLOCK_TEST_DEVICE=cuda CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTHONPATH=.:python $(RUN) -m pytest
# The test of a whole pipeline on a GPU, where diffusers is installed.
PIPELINES := "import diffusers, peft; print('tests/diffusers/test_step.py::test_a_captured_cuda_graph_serves_every_user')"
# Ends with a message where there are no CUDA kernels.
NO_CUDA_KERNELS := "import sys; from keylock_kernels import native_cuda; sys.exit(native_cuda.missing())"
# What an editable install depends on; Python files are read from the checkout as they are.
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt keylock_kernels/_version.py $(shell find csrc -type f)

.PHONY: help demo test test-gpu gpu-record first-gpu lint bench report clean
.NOTPARALLEL:
.DELETE_ON_ERROR:
SHELL := /bin/bash

help:
	@echo "make demo      three users' concepts, taught and drawn in one batch (outputs/demo)"
	@echo "make test      the tests that need no GPU"
	@echo "make test-long the rest of them, which takes longer: kernels in Triton's interpreter, what they compile to,"
	@echo "               the C++ kernels with sanitizers, which make test-csrc runs alone"
	@echo "make test-ptx  the Triton kernels' own tests on their PTX for two GPUs, executed on the CPU; takes hours"
	@echo "make test-gpu  the tests that need one; SHARD=2/4 runs the second quarter"
	@echo "make first-gpu is everything there, right and how fast, on a GPU's first day; STEP=right|safe|fast a part"
	@echo "               of at most ten minutes, STEP=smoke a step, STUB=1 what can be rehearsed without a GPU"
	@echo "make gpu-record  puts on record that the CUDA C++ kernels passed every shard of make test-gpu"
	@echo "make mutants   changes one line of the library at a time and runs the tests that should notice;"
	@echo "               ONLY=training,routing takes some of tests/mutants, SHARD=2/4 the second quarter"
	@echo "make lint      ruff, mypy, clang-format"
	@echo "make bench     the benchmarks; SHARD=2/4 runs every fourth, BENCH=--write-data keeps the numbers"
	@echo "make localization  what regions, image prompts and maps do on the embedded model, into docs/localization.md"
	@echo "make quality   do concepts show their subjects? methods learned, drawn and judged on the embedded model, into"
	@echo "               outputs/quality, where it goes on; QUICK=1 is five users, QUALITY=... options; needs the emoji font"
	@echo "make fuzz      hostile pictures, requests, files, folders and calls by the thousand, into docs/security.md;"
	@echo "               FUZZ=pictures,requests takes some kinds, COUNT=500 so many cases from FIRST=0 and writes nothing"
	@echo "make report    what the Triton kernels compile to for four GPUs"
	@echo "make clean     removes .venv and everything built"
	@echo "PYTHON=$(PYTHON) and TORCH=$(TORCH) choose the interpreter and the torch that .venv gets"

demo: $(VENV)/installed
	$(BIN)/keylock demo

# Tests of one thread each on two cores; those of more threads set their number themselves. Of the Triton kernels they
# execute what is compiled for GPUs.
test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(TEST) tests -m "not gpu and not long"

# What takes longer: the Triton kernels in its interpreter, a process of its own since the mode is fixed on import, what
# they compile to for four GPUs, their PTX in every dtype, whole benchmarks and models, the C++ kernels under sanitizers.
.PHONY: test-long
test-long: $(VENV)/installed-test test-csrc
	@export OMP_NUM_THREADS=1; \
	TRITON_INTERPRET=1 $(TEST) $(TRITON_TESTS) -k triton -m "not gpu"; interpreted=$$?; \
	$(TEST) tests -m "long and not gpu" && exit $$interpreted

# The Triton kernels' tests on what they compile to for two GPUs, run instruction by instruction, and the cases of
# tests/kernels/test_ptx.py in every dtype; takes hours.
.PHONY: test-ptx
test-ptx: $(VENV)/installed-test
	@export OMP_NUM_THREADS=1; failed=0; \
	for gpu in sm_80 sm_90; do \
	  KEYLOCK_TEST_PTX=$$gpu $(TEST) $(TRITON_TESTS) -k triton -m "not gpu" || failed=1; \
	done; \
	$(TEST) tests/ptx tests/kernels/test_ptx.py -m "not gpu" || failed=1; exit $$failed

# The C++ kernels' own tests, under sanitizers. Its errors end the program.
.PHONY: test-csrc
test-csrc: $(VENV)/tools
	@mkdir -p build
	PATH=$(abspath $(BIN)):$$PATH; cmake -G Ninja -S . -B build/csrc-sanitized -DKEYLOCK_PYTHON=OFF \
	  -DKEYLOCK_TESTS=ON -DKEYLOCK_SANITIZE=address,undefined > build/csrc-sanitized.log && \
	  cmake --build build/csrc-sanitized && ctest --test-dir build/csrc-sanitized --output-on-failure

# What needs a GPU, and the numeric tests on it. RUN=python3 takes an interpreter that has what is needed (torch,
# triton, pytest, hypothesis, numpy; diffusers is used if it is there), and builds the native module in place. Every
# n-th test, so that slow files spread over the shards; results are in build/test-gpu-*.log as they come.
# Its build may skip nothing, or the CUDA kernels' tests would be missing without a word; KEYLOCK_BUILD_CUDA=0 leaves
# them out on purpose. CUDAARCHS=90-real in the environment builds for one GPU alone, which is quicker.
test-gpu: export KEYLOCK_BUILD_CUDA ?= 1
test-gpu: export KEYLOCK_BUILD_NATIVE ?= 1
test-gpu: $(if $(filter $(BIN)/python,$(RUN)),$(VENV)/installed-test,native-in-place)
	@mkdir -p build
	@test "$$KEYLOCK_BUILD_CUDA" = 0 || PYTHONPATH=. $(RUN) -c $(NO_CUDA_KERNELS)
	$(GPU_TEST) $(TRITON_TESTS) tests/kernels/test_gpu.py $$($(RUN) -c $(PIPELINES) 2> /dev/null) \
	  -q --collect-only > build/collected || test $$? -eq 5
	@awk -v shard=$(SHARD) 'BEGIN { split(shard, s, "/") } /::/ { if (n++ % s[2] == s[1] - 1) print }' \
	  build/collected > build/shard
	@if test -s build/shard; then set -o pipefail; \
	  $(GPU_TEST) -v @build/shard | tee build/test-gpu-$(subst /,-of-,$(SHARD)).log; \
	  else echo "shard $(SHARD) has no tests"; fi

# The first run on a GPU, in steps that each have a limit; what comes of them is in build/first-gpu, or in $OUT.
first-gpu: $(if $(filter $(BIN)/python,$(RUN)),$(VENV)/installed-test)
	PYTHONPATH=.:python $(RUN) -m benchmarks.first_gpu $(if $(filter-out 0,$(STUB)),--stub) $(STEP)

# Two runs at a time, of one thread each; results are in build/mutants.
.PHONY: mutants
mutants: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants/run.py --only "$(ONLY)" --shard $(SHARD)

gpu-record:
	PYTHONPATH=.:python $(RUN) -m tests.kernels.gpu_record

.PHONY: native-in-place
native-in-place:
	$(RUN) setup.py -q build_ext --inplace

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests/csrc tests/gpu_stub -name '*.h' -o -name '*.c' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

bench: $(if $(filter $(BIN)/python,$(RUN)),$(VENV)/installed-test,native-in-place)
	SHARD=$(SHARD) PYTHONPATH=.:python $(RUN) -m pytest benchmarks -q $(BENCH)

.PHONY: localization
localization: $(VENV)/installed-test
	PYTHONPATH=.:python $(RUN) -m benchmarks.localization

.PHONY: quality
quality: $(VENV)/installed-test
	PYTHONPATH=.:python $(RUN) -m benchmarks.quality outputs/quality $(if $(QUICK),--quick) $(QUALITY)

# Each kind in a process of its own, bounded in memory and time: about ten minutes on one core.
.PHONY: fuzz
fuzz: $(VENV)/installed-test
	PYTHONPATH=.:python $(RUN) -m tests.hostile.run --only "$(FUZZ)" --first $(FIRST) $(if $(COUNT),--count $(COUNT))

report: $(VENV)/installed-test
	$(BIN)/python -m keylock_kernels.report

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
