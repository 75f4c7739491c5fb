# make demo | test | bench | docs | lint | types | clean. Each first does `make setup`, which creates .venv,
# installs the pinned development environment and builds the extension; it does nothing when up to date.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py $(shell find csrc -type f)
PY_CODE := setup.py torchfast tests benchmarks examples docs
CPP_CODE := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: setup demo test lint types bench docs clean

setup: .venv/built

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	TORCHFAST_BUILD=0 $(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

.venv/built: .venv/installed $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

demo: setup
	$(BIN)/python examples/train_digits.py
	$(BIN)/python examples/retrieve_digits.py

LOSSES := $(addprefix tests/test_,ops.py cross_entropy.py sigmoid_focal_loss.py linear_cross_entropy.py)
METRICS := $(addprefix tests/test_,metric_ops.py ranking.py classification.py regression.py)
TRITON := tests/test_triton_cross_entropy.py tests/test_triton_sigmoid_focal_loss.py
PYTEST := $(BIN)/python -m pytest -q -n auto --dist worksteal

# Everything, and then what the kernels of each mode change: tests/conftest.py has the rule.
test: setup lint types
	$(PYTEST) --dist loadfile $(addprefix --ignore=,$(TRITON))
	TORCHFAST_ISA=avx2 $(PYTEST) $(LOSSES) $(METRICS)
	TORCHFAST_ISA=baseline $(PYTEST) $(LOSSES) $(METRICS)
	$(PYTEST) --kernel reference $(LOSSES) $(METRICS) tests/test_selftest.py
	$(BIN)/python tests/cuda_emulator -q -n auto --dist worksteal -k ranking tests/test_ranking.py tests/test_metric_ops.py
	$(PYTEST) --kernel triton $(LOSSES) $(TRITON) tests/test_selftest.py

lint: setup
	$(BIN)/ruff check $(PY_CODE)
	$(BIN)/ruff format --check $(PY_CODE)
	$(BIN)/clang-format --dry-run --Werror $(CPP_CODE)

types: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/plot.py
	$(BIN)/python benchmarks/readme.py

docs: setup
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build dist site *.egg-info torchfast/_C*.so
