# Everything a newcomer needs: `make demo` to see it, `make test` to trust it, `make help` for the rest.
#
#   make demo PYTHON=python3.12            another interpreter (3.10 or newer)
#   make test PIP_FLAGS="--index-url ..."  another package index, for example one with the smaller CPU builds of torch

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
PYTEST_FLAGS ?=

BIN := $(VENV)/bin
# constraints in the one command that installs everything: no second step can replace torch by another build
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_FLAGS) --constraint constraints.txt --editable
# one thread per test process: two processes share two cores without standing in each other's way
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu check format docs readme clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.installed  ## install, then plan, prune, compare, save and reload the small model inside the package
	$(BIN)/layerwise demo --force --output demo-out

test: $(VENV)/.installed-dev  ## install with the development tools, then run the tests on two cores
	$(PYTEST) -n 2 -m "not slow and not gpu" $(PYTEST_FLAGS)

test-slow: $(VENV)/.installed-dev  ## the tests that take more than ten seconds each
	$(PYTEST) -n 2 -m "slow and not gpu" $(PYTEST_FLAGS)

test-gpu: $(VENV)/.installed-dev  ## the tests that need an accelerator
	$(BIN)/python -m pytest -v -m gpu $(PYTEST_FLAGS)

check: $(VENV)/.installed-dev  ## style, types, and the order of the rooms
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev  ## put the code in the one format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.installed-docs  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

readme: $(VENV)/.installed  ## run the demo and put its output and picture into README.md
	$(BIN)/python scripts/write_readme_demo.py

clean:  ## remove what was built; the virtual environment too
	rm -rf $(VENV) build dist site out demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: an install runs again only when what it depends on has changed.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "layerwise needs Python 3.10 or newer: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing into $(VENV): a few minutes the first time, never again until pyproject.toml changes.'
	$(INSTALL) '.[report]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing with the development tools into $(VENV): a few minutes the first time.'
	$(INSTALL) '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[docs]'
	@touch $@
