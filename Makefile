PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One a core of two: what tests start runs beside them, and each worker more reads all tests anew.
WORKERS ?= 2

# What is compiled is kept: each worker would compile every test, each process of a deployment fedveil.
unexport PYTHONDONTWRITEBYTECODE

# One thread a process: workers run side by side, and the thread count changes float32 results.
export OMP_NUM_THREADS := 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo test lint tests test-slow test-examples docs package sbom audit

demo: $(STAMP)
	$(BIN)/fedveil demo --out demo

test: $(STAMP)
	$(MAKE) --jobs 2 lint tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tests: $(STAMP)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-examples: $(STAMP)
	$(BIN)/python -m pytest -m slow tests/test_examples.py

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict

package:
	PYTHON="$(PYTHON)" .ci/package

sbom: $(STAMP)
	PYTHON="$(PYTHON)" .ci/sbom $(BIN)/python

audit: $(STAMP)
	PYTHON="$(PYTHON)" .ci/audit $(BIN)/python

# torch comes first and alone: the plain index offers a CUDA build to whoever asks for a range.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,tensorboard]'
	touch $(STAMP)
