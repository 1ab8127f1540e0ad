"""Every GPU kernel goes through NVIDIA's assembler for three generations of GPUs, within the registers and the stack
that are written beside it. Needs the toolkit, no GPU; a process for each generation, as Numba compiles for one in each.
"""

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

SCRIPT = Path(__file__).with_name("gpu_assembly.py")
GENERATIONS = {"Ampere": (8, 0), "Hopper": (9, 0), "Blackwell": (10, 0)}


@pytest.fixture(scope="module")
def assembled():
    """The rows of each generation; two processes at once."""
    environment = {name: x for name, x in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}

    def run(capability):
        command = [sys.executable, str(SCRIPT), *map(str, capability)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(GENERATIONS, pool.map(run, GENERATIONS.values())))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_registers_and_stack_are_within_budget(assembled, generation):
    done = assembled[generation]
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({row["kernel"] for row in rows}) >= 9
    wrong = [row for row in rows if "error" in row]
    assert not wrong, wrong[0]["error"]
    if "registers" not in rows[0]:
        pytest.skip("ptxas is not installed: only compiled to PTX")
    over = [row for row in rows if row["registers"] > row["budget"]]
    if generation == "Hopper":  # the others unroll loops by rules of their own: nothing is promised for them
        over += [row for row in rows if row["stack"] > row["stack_budget"]]
    assert not over, "\n".join(map(str, over))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_no_kernel_computes_in_double_precision(assembled, generation):
    rows = [json.loads(line) for line in assembled[generation].stdout.splitlines()]
    assert not [row for row in rows if row["doubles"]]


def test_products_are_made_by_tensor_cores(assembled):
    rows = [json.loads(line) for line in assembled["Hopper"].stdout.splitlines()]
    for row in rows:
        if row["kernel"] == "projection_halves.project_halves":
            assert row["mma"] > 0, row
        if row["kernel"] in ("dense.forward", "dense_backward.to_query", "dense_backward.to_key"):
            assert (row["mma"] > 0) == (row["element"] != "float32"), row


def test_a_name_that_numpy_has_dropped_is_lent_while_a_kernel_compiles(monkeypatch):
    import numpy as np
    from ruvector_numba.kernels.cuda import jit

    name = "row_stack"  # not np.row_stack: a linter once put its successor there, and no kernel compiled
    monkeypatch.delattr(np, name, raising=False)
    with jit._row_stack():
        assert getattr(np, name) is np.vstack
    assert not hasattr(np, name) and hasattr(np, "vstack")
