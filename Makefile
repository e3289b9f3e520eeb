# burnish: the story, the tests, the checks. Every target brings what it needs into .venv; a second run installs nothing.
#
#   make demo     tune, merge, quantize, evaluate and chat on the bundled model and data, with a report
#   make test     the whole test suite
#   make check    ruff, pyright, import floors
#   make fmt      let ruff rewrite what it can
#   make asan     the CPU kernels' tests over a library that checks memory and undefined behaviour
#   make clean    remove .venv and caches; runs stay
#
# PYTHON      the interpreter that makes .venv            (default python3)
# PIP_FLAGS   more options for pip install                (--extra-index-url https://download.pytorch.org/whl/cpu, ...)
# PYTEST      more options for pytest in `make test`      (-k decoder, -m "not slow", ...)
# WORKERS     how many test processes run side by side    (default 2)

PYTHON ?= python3
PIP_FLAGS ?=
PYTEST ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check fmt asan clean

help:
	@sed -n '/^#   make/s/^#   //p' Makefile

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "burnish needs Python 3.10 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet $(PIP_FLAGS) -c constraints.txt -e .
	@touch $@

# One pip run brings the package and its dev extra; the demo stamp is made here too, so that `make demo` has nothing left to do.
$(VENV)/.dev-stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.demo-stamp $@

demo: $(VENV)/.demo-stamp
	$(BIN)/burnish demo

# Two processes with one thread each beat one process with two threads: the tests' models are tiny.
test: $(VENV)/.dev-stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 15 $(PYTEST)

check: $(VENV)/.dev-stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

fmt: $(VENV)/.dev-stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

asan: $(VENV)/.dev-stamp
	PYTHON=$(BIN)/python sh tests/kernels/asan.sh $(PYTEST)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
