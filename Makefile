# What developers run by hand. CI runs .ci/run, which needs nothing from here.
PYTHON ?= python

.PHONY: dev check format test test-avx2

dev:  ## install in place
	$(PYTHON) -m pip install -e ".[test]" ruff

check:  ## lint
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format:  ## put sources into the one format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

test:  ## the README's test command, on what is installed
	pytest

test-avx2:  ## the same, compiled for 8 lanes
	NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES= pytest
