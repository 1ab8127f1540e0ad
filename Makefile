# What developers run by hand. CI runs .ci/run, which needs nothing from here.
PYTHON ?= python
CACHES := $(CURDIR)/build/numba-cache

.PHONY: dev check format test test-avx2 test-bounds test-cuda test-peers bench demo clean

dev:  ## install in place, with everything a developer needs
	$(PYTHON) -m pip install -e ".[dev,demo,perf]"

check:  ## lint and types, and tables as measured
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) perf/report.py --check

format:  ## put sources into the one format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

test:  ## the README's test command, on what is installed
	pytest

test-avx2:  ## the core of the tests, compiled for 8 lanes
	NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES= NUMBA_CACHE_DIR=$(CACHES)/avx2 pytest -m core

test-bounds:  ## the core of the tests on one thread, every access checked
	NUMBA_BOUNDSCHECK=1 RUVECTOR_NUMBA_THREADS=1 NUMBA_CACHE_DIR=$(CACHES)/bounds pytest -m core

test-cuda:  ## the GPU's kernels on Numba's simulator, and through NVIDIA's assembler; needs ".[cuda-test]", no GPU
	NUMBA_ENABLE_CUDASIM=1 pytest tests/test_cuda_*.py
	pytest tests/test_gpu_*.py

test-peers:  ## beside torch, PyTorch Geometric and ONNX Runtime, as far as they are installed: CI has none of them
	pytest tests/test_*torch*.py tests/test_pyg_parity.py tests/test_interop_*.py tests/test_optim.py tests/test_graph.py tests/test_bench*.py

bench:  ## measure against the peers that are installed, and write perf/RESULTS.md and the README's summary: some 45 minutes
	$(PYTHON) perf/run.py
	$(PYTHON) perf/graph_memory.py
	$(PYTHON) perf/onnx_encoder.py
	$(PYTHON) perf/report.py

demo:
	ruvector-numba demo

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-output
