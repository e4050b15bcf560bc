# Two commands do everything on a machine with python3 and make:  make demo   make test
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check format bench bench-full clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: .venv/.ready  ## make .venv with everything installed

.venv/.ready: pyproject.toml clients/digits/pyproject.toml clients/language/pyproject.toml constraints.txt
	@echo "setting up .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]" --editable clients/digits \
		--editable clients/language
	@touch $@

demo: setup  ## run a federation of eight clients and print what each way of merging gives
	@$(PY) simulations/demo.py

test: setup  ## run the default tests
	@$(PY) -m pytest

test-slow: setup  ## run the tests that take minutes
	@$(PY) -m pytest -m slow

check: setup  ## lint, formatting and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: setup  ## apply the formatter
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: setup  ## measure side by side with the peers (minutes)
	@$(PY) benchmarks/simulate.py
	@$(PY) -m benchmarks.engine --quick
	@$(PY) -m benchmarks.adapters

bench-full: setup  ## the same with models of 0.25 B parameters (hours; 30 GB of disk)
	@$(PY) -m benchmarks.engine --full --markdown runs/benchmarks.md

clean:  ## remove .venv, caches and runs
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
