"""bfloat16 and float16 on this CPU, in under a minute: which way they go, are they right, how fast beside torch.

    python perf/halves_check.py [--seconds 40] [--output halves.json]

Needs ml_dtypes, and torch for the comparison. For a machine that is at hand once and shortly; what the README says is
measured by run.py. Kernels are compiled in several processes at once. Timings are medians of blocks taken in turn, in
one process with a pause between blocks; past the time that is given cells are left out.
"""

import argparse
import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

# Instead of this folder, where a file called cuda.py hides NVIDIA's package of that name.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402

import ruvector_numba as rv  # noqa: E402

BFLOAT16, FLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
CELLS = ((8, 8, 128, 64), (2, 8, 1024, 64), (1, 8, 1024, 128), (4, 8, 512, 64), (1, 8, 4096, 64))
EPS = {BFLOAT16: 2.0**-7, FLOAT16: 2.0**-10}
Row = dict[str, Any]


def inputs(batch: int, heads: int, queries: int, keys: int, dim: int, kind: np.dtype) -> list[np.ndarray]:
    """query, key, value and the output's gradient"""
    rng = np.random.default_rng(0)
    lengths = (queries, keys, keys, queries)
    return [rng.standard_normal((batch, heads, n, dim), dtype=np.float32).astype(kind) for n in lengths]


# --- compiling --------------------------------------------------------------------------------------------------------
def compile_for(name: str, queries: int, backward: bool) -> None:
    """Do it once, so that the cache has it."""
    query, key, value, grad = inputs(1, 2, queries, 70, 16, np.dtype(name if name != "bfloat16" else BFLOAT16))
    if backward:
        rv.attention_backward(grad, rv.attention_forward(query, key, value))
    else:
        rv.scaled_dot_product_attention(query, key, value)


def compile_all() -> None:
    """Several at once; what two of them need is compiled twice, which costs nothing where there are cores."""
    wanted = [(name, queries, False) for name in ("bfloat16", "float16", "float32") for queries in (20, 1)]
    wanted += [(name, 20, True) for name in ("bfloat16", "float16")]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(len(wanted), os.cpu_count() or 1), context) as pool:
        list(pool.map(compile_for, *zip(*wanted, strict=True)))


# --- is it right ------------------------------------------------------------------------------------------------------
def by_the_book(query: Any, key: Any, value: Any, grad: Any, causal: bool) -> dict[str, np.ndarray]:
    """Output and gradients in float64."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (query, key, value, grad))
    s = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        s = np.where(np.tri(s.shape[-2], s.shape[-1]) > 0, s, -np.inf)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    dp = do @ v.swapaxes(-1, -2)
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True)) / math.sqrt(q.shape[-1])
    return {"output": p @ v, "dq": ds @ k, "dk": ds.swapaxes(-1, -2) @ q, "dv": p.swapaxes(-1, -2) @ do}


def check(kind: np.dtype, shape: tuple[int, int, int], causal: bool) -> Row:
    """Largest errors relative to the largest magnitude, in units of the type's last place: some 1 to 3 is right."""
    queries, keys, dim = shape
    given = inputs(2, 3, queries, keys, dim, kind)
    query, key, value, grad = given
    exact = by_the_book(query, key, value, grad, causal)
    cache = rv.attention_forward(query, key, value, is_causal=causal)
    g = rv.attention_backward(grad, cache)
    with rv.threads(1):
        again = rv.attention_backward(grad, rv.attention_forward(query, key, value, is_causal=causal))
    got = {"output": cache.output, "dq": g.query, "dk": g.key, "dv": g.value}
    eps = EPS[kind]
    errors = {
        name: round(float(np.abs(np.asarray(got[name], np.float64) - x).max() / np.abs(x).max() / eps), 2)
        for name, x in exact.items()
    }
    same = g.query.tobytes() == again.query.tobytes() and g.key.tobytes() == again.key.tobytes()
    right = same and max(errors.values()) < 4
    return {"check": f"{kind} {shape}{' causal' * causal}", "right": bool(right), "errors": errors}


# --- how fast ---------------------------------------------------------------------------------------------------------
def seconds_of(calls: dict[str, Callable[[], Any]], rounds: int = 4, block: float = 0.06) -> dict[str, float]:
    """Median seconds of a call of each, from blocks taken in turn."""
    counts = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        counts[name] = max(1, round(block / (time.perf_counter() - start)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(0.03)
            call()  # wakes its threads
            start = time.perf_counter()
            for _ in range(counts[name]):
                call()
            taken[name].append((time.perf_counter() - start) / counts[name])
    return {name: statistics.median(times) for name, times in taken.items()}


def ours(given: list[np.ndarray], backward: bool) -> Callable[[], Any]:
    query, key, value, grad = given
    if not backward:
        return lambda: rv.scaled_dot_product_attention(query, key, value)
    return lambda: rv.attention_backward(grad, rv.attention_forward(query, key, value))


def torchs(given: list[np.ndarray], backward: bool) -> Callable[[], Any]:
    import torch

    names = {BFLOAT16: torch.bfloat16, FLOAT16: torch.float16, FLOAT32: torch.float32}
    query, key, value, grad = (torch.from_numpy(x.astype(np.float32)).to(names[x.dtype]) for x in given)
    attention = torch.nn.functional.scaled_dot_product_attention
    if not backward:
        return lambda: attention(query, key, value)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    return lambda: torch.autograd.grad(attention(*leaves), leaves, grad)


def measure(cell: tuple[int, ...], threads: int, backward: bool) -> Row:
    """GFLOP/s, or GB/s of keys and values for a decode."""
    batch, heads, length, dim = cell[:4]
    keys = cell[4] if len(cell) > 4 else length
    calls, work = {}, (14 if backward else 4) * batch * heads * length * keys * dim / 1e9
    kinds = (BFLOAT16, FLOAT32) if backward else (BFLOAT16, FLOAT16, FLOAT32)
    for kind in kinds:
        given = inputs(batch, heads, length, keys, dim, kind)
        calls[f"ours {kind}"] = ours(given, backward)
        with contextlib.suppress(ImportError):
            import torch

            torch.set_num_threads(threads)
            if kind == BFLOAT16 or (kind == FLOAT16 and not backward):
                calls[f"torch {kind}"] = torchs(given, backward)
    with rv.threads(threads):
        seconds = seconds_of(calls)
    if length == 1:
        size = {"bfloat16": 2, "float16": 2, "float32": 4}
        rates = {n: 2 * batch * heads * keys * dim * size[n.split()[1]] / t / 1e9 for n, t in seconds.items()}
    else:
        rates = {name: work / t for name, t in seconds.items()}
    row: Row = {"cell": str(cell) + " with gradients" * backward, "threads": threads}
    row |= {name: round(rate, 1) for name, rate in rates.items()}
    for kind in ("bfloat16", "float16"):
        if f"torch {kind}" in seconds:
            row[f"times torch {kind}"] = round(seconds[f"torch {kind}"] / seconds[f"ours {kind}"], 2)
    return row


def main() -> int:
    """Print a line of JSON for each step, and all of it at the end; 1 when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    end = time.perf_counter() + options.seconds
    compile_all()
    from ruvector_numba.kernels.simd import halves

    info = rv.info(measure=True)
    known = halves()
    found: Row = {
        "cpu": info["cpu"], "target": info["target"], "lanes": info["lanes"], "peak_float32": info["peak_gflops"],
        "float16": known.float16, "bfloat16": known.bfloat16, "packed": known.packed, "compiled_in": None,
    }  # fmt: skip
    found["compiled_in"] = round(options.seconds - (end - time.perf_counter()), 1)
    print(json.dumps(found), flush=True)
    checks = [
        check(kind, shape, causal)
        for kind in (BFLOAT16, FLOAT16)
        for shape, causal in (
            ((97, 130, 64), False),
            ((130, 130, 64), True),
            ((41, 71, 40), False),
            ((5, 300, 64), False),
        )
    ]
    for row in checks:
        print(json.dumps(row), flush=True)
    cells: list[Any] = [(cell, n, False) for cell in CELLS[:3] for n in (1, 2)] + [(CELLS[1], n, True) for n in (1, 2)]
    cells += [((1, 8, 1, 64, 65536), n, False) for n in (1, 2)] + [(cell, 1, False) for cell in CELLS[3:]]
    timings = []
    for cell in cells:
        if time.perf_counter() < end - 2:
            timings.append(measure(*cell))
            print(json.dumps(timings[-1]), flush=True)
    found |= {"checks": checks, "timings": timings}
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    return int(not all(row["right"] for row in checks))


if __name__ == "__main__":
    sys.exit(main())
