"""What attention on graphs costs beside time per edge: memory, uneven degrees, building the graph. Linux, glibc.

    python perf/graph_memory.py                         some three minutes; perf/graph-<cpu>.json, for report.py
    python perf/graph_memory.py --smoke --output build  tiny sizes: shows that it works

Memory is the most that a process held during the first call, less what it held before and what the call returned: each
in a process of its own, after a call on a tiny graph that loads and compiles what is needed.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import multiprocessing
import pathlib
import re
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))  # processes of their own begin without it

from run import HERE, machine, slug

import ruvector_numba as rv
from ruvector_numba.bench.peers import adapters, installed
from ruvector_numba.bench.peers_graph import GraphWork, torch_layer
from ruvector_numba.bench.works import OURS, Runner

HEAVY = GraphWork("GAT", 50_000, 1_000_000, 64, 4, 32)
EVEN = GraphWork("GAT", 100_000, 1_000_000, 64, 4, 16)
CAVEATS = (
    "Memory is the most that a process held during the first call, less what it held before the call and less the "
    "output and gradients. Ours includes the graph with self-loops and, with gradients, the edges grouped by source: "
    "both stay with the CSRGraph and serve the calls that follow. torch_geometric is given its edges in the order "
    "drawn.",
    "Power-law degrees: both ends of an edge are drawn so that the k-th most popular node has k^-0.8 as many as the "
    "first.",
)


# --- memory -----------------------------------------------------------------------------------------------------------
def _status(field: str) -> float:
    """MB, of this process"""
    found = re.search(rf"{field}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    if found is None:
        raise SystemExit("memory is read from /proc/self/status, as Linux has it")
    return int(found[1]) * 1024 / 1e6


def _memory(name: str, work: GraphWork, threads: int) -> float:
    """MB beyond inputs, outputs and parameters."""
    build = adapters(work)[name] if name == OURS else torch_layer  # whose usual adapter makes calls beforehand
    build(work.tiny(), threads).call()
    runner = build(work, threads)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what setting up freed would be used again unseen; glibc's
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = _status("VmRSS")
    found = runner.call()
    peak = _status("VmHWM")
    returned = sum(array.nbytes for array in runner.results(found)) / 1e6
    return peak - before - returned


# --- time -------------------------------------------------------------------------------------------------------------
def _paired(ours: Runner, base: Runner, blocks: int) -> float:
    """The median ratio of blocks that are timed in turn: of one library, so in one process."""
    return statistics.median(ours.time(3) / base.time(3) for _ in range(blocks))


def _unevenness(name: str, work: GraphWork, threads: int, blocks: int) -> float:
    """How many times as long a call takes on power-law degrees as on even ones."""
    build = adapters(work)[name]
    return _paired(build(dataclasses.replace(work, power_law=True), threads), build(work, threads), blocks)


def _building(work: GraphWork, threads: int, blocks: int) -> float:
    """Milliseconds of CSRGraph.from_edge_index."""
    rv.set_num_threads(threads)
    ends = work.edge_index()
    runner = Runner(lambda: rv.CSRGraph.from_edge_index(ends, num_nodes=work.nodes))
    return 1e3 * statistics.median(runner.time(5) for _ in range(blocks))


# --- the table --------------------------------------------------------------------------------------------------------
def _apart(function: Callable[..., float], *arguments: Any) -> float:
    """In a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _rows(threads: int, blocks: int, heavy: GraphWork, even: GraphWork) -> list[dict[str, Any]]:
    names = installed(adapters(heavy))
    rows = []

    def add(what: str, unit: str, digits: int, most: float, values: dict[str, float]) -> None:
        rows.append({"what": what, "unit": unit, "digits": digits, "most": most, **values})
        print(f"{what}: {', '.join(f'{n} {v:.{digits}f} {unit}' for n, v in values.items())}", flush=True)

    for backward, most in ((False, 100.0), (True, 200.0)):
        work = dataclasses.replace(heavy, backward=backward)
        add(f"{work.name}: memory", "MB", 0, most, {n: _apart(_memory, n, work, threads) for n in names})
    for backward in (False, True):
        work = dataclasses.replace(even, backward=backward)
        values = {n: _apart(_unevenness, n, work, threads, blocks) for n in names}
        add(f"{work.name}: time on power-law degrees over time on even ones", "", 2, 1.5, values)
    graph = f"{even.nodes:,} nodes, {even.edges:,} edges"
    add(f"CSRGraph.from_edge_index, {graph}", "ms", 1, 60.0, {OURS: _apart(_building, even, threads, blocks)})
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one block")
    parser.add_argument("--output", type=pathlib.Path, default=HERE, metavar="FOLDER")
    options = parser.parse_args()
    if options.smoke and options.output.resolve() == HERE:
        parser.error("--smoke measures nothing: send it elsewhere with --output FOLDER")
    sizes = (HEAVY.tiny(), EVEN.tiny()) if options.smoke else (HEAVY, EVEN)
    rows = _rows(options.threads, 1 if options.smoke else 5, *sizes)
    found = machine()
    path = options.output / f"graph-{slug(found['cpu'], found['target'])}.json"
    document = {"machine": found, "threads": options.threads, "caveats": CAVEATS, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
