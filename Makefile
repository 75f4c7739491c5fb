# make demo | check | test | test-full | bench | docs | dist | sanitize | lint | types | clean. `make demo` first creates
# .venv, installs the few pinned packages that it runs with, and builds the CPU's kernels. All others first do
# `make setup`, which does the same, builds the CUDA code too where there is nvcc, and installs the rest of the pinned
# development environment. What is up to date is not done again.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py $(shell find csrc -type f)
PY_CODE := setup.py .ci torchfast tests benchmarks examples docs
CPP_CODE := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: setup demo check test test-full lint types bench docs dist sanitize clean

setup: .venv/dev .venv/built

.venv/demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	TORCHFAST_BUILD=0 $(BIN)/python -m pip install --quiet --no-compile --editable ".[demo]"
	touch $@

.venv/built: .venv/demo $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch .venv/cpu-built $@

# Half of the time to build is nvcc's, and what the demo runs on a GPU are the losses, which Triton serves.
.venv/cpu-built: .venv/demo $(SOURCES)
	TORCHFAST_CUDA=0 $(BIN)/python setup.py --quiet build_ext --inplace
	rm -f .venv/built
	touch $@

.venv/dev: .venv/demo
	TORCHFAST_BUILD=0 $(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: .venv/cpu-built
	$(BIN)/python examples/train_digits.py
	$(BIN)/python examples/retrieve_digits.py

LOSSES := $(addprefix tests/losses/test_,ops.py with_gradient.py cross_entropy.py sigmoid_focal_loss.py linear_cross_entropy.py)
METRICS := $(addprefix tests/metrics/test_,metric_ops.py ranking.py retrieval_ops.py retrieval.py retrieval_forms.py \
	classification.py regression.py)
TRITON := tests/losses/test_triton_cross_entropy.py tests/losses/test_triton_sigmoid_focal_loss.py
# Triton's interpreter takes long for lists of hundreds among thousands of items.
INTERPRETED := not whole_matrix and not thousands and not threads
PYTEST = $(BIN)/python -m pytest -q -n auto --dist worksteal $(FULL)
# A process takes whole files, which build what their tests share.
LONGEST_FIRST := tests/release tests/kernels tests/losses tests torchfast
# The instruction sets below this machine's, which the native run has tested.
NARROWER := $(BIN)/python -c 'from torchfast.info import report; isas = ["baseline", "avx2", "avx512"]; \
	build = report()["build"]; print(*isas[:isas.index(build["simd"])] if isinstance(build, dict) else [])'

# What one runs while working.
check: setup lint types
	$(PYTEST) tests/losses/test_ops.py tests/metrics/test_metric_ops.py -k "not opcheck and not compile"

# Everything, and then what the kernels of each mode change: tests/conftest.py has the rule.
test: setup lint types
	$(PYTEST) --dist loadfile --no-loadscope-reorder $(addprefix --ignore=,$(TRITON)) $(LONGEST_FIRST)
	isas=$$($(NARROWER)) && for isa in $$isas; do TORCHFAST_ISA=$$isa $(PYTEST) $(LOSSES) $(METRICS) || exit 1; done
	$(PYTEST) --kernel reference $(LOSSES) $(METRICS) tests/test_selftest.py
	$(BIN)/python tests/kernels/cuda_emulator -q -n auto --dist worksteal $(FULL) -k ranking \
		tests/metrics/test_ranking.py tests/metrics/test_metric_ops.py
	$(PYTEST) --kernel triton $(LOSSES) $(TRITON) tests/test_selftest.py
	$(PYTEST) --kernel triton tests/metrics/test_retrieval_ops.py -k "$(INTERPRETED)"

# All combinations of parameters instead of all pairs, and ten times as many random examples: some hours.
test-full:
	$(MAKE) test FULL=--full

lint: setup
	$(BIN)/ruff check $(PY_CODE)
	$(BIN)/ruff format --check $(PY_CODE)
	$(BIN)/clang-format --dry-run --Werror $(CPP_CODE)

types: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/run.py --kept-memory
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/plot.py
	$(BIN)/python benchmarks/readme.py

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The wheel is built from the source distribution, and tagged with the oldest Linux that it runs on.
dist: setup
	rm -rf dist
	TORCHFAST_BUILD=require $(BIN)/python -m build --no-isolation
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude libc10.so --exclude libtorch_cpu.so \
		--wheel-dir dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl
	$(BIN)/python .ci/audit_wheel.py dist/*.whl
	$(BIN)/twine check --strict dist/*

# What reads and writes memory, at odd sizes and strides; not what is about Python alone.
SANITIZED := (test_ops or test_metric_ops or two_ops or strides or layout or sizes or any_size or any_spread or cut_off_is_0) \
	and not opcheck and not compile and not samples_reach and not memory
SANITIZE := $(BIN)/python tests/kernels/sanitizers.py address,undefined -m pytest -q -n auto --kernel native --capture=sys

sanitize: setup
	$(SANITIZE) $(LOSSES) $(METRICS) -k "$(SANITIZED)"
	isas=$$($(NARROWER)) && for isa in $$isas; do TORCHFAST_ISA=$$isa $(SANITIZE) \
		tests/losses/test_ops.py tests/metrics/test_metric_ops.py -k "strides or layout or dtype" || exit 1; done
	$(BIN)/python tests/kernels/sanitizers.py thread -m torchfast.selftest --device cpu

clean:
	rm -rf .venv build dist site *.egg-info torchfast/_C*.so
