"""The graph layers on a GPU: are they right, and how fast are they beside PyTorch Geometric on the same one?

    python perf/cuda_graph.py [--seconds 75] [--output perf/cuda_graph.json]

needs torch with CUDA, numba-cuda and torch_geometric. Each cell, a layer of one size, is a process of its own, so that
cells compile side by side and one that fails takes no other with it; but only one at a time has the GPU, by a lock.
First a small graph with hubs is compared with double precision on the CPU, outputs and all gradients, twice for the
bits. Then ours and theirs are timed in turn in blocks, theirs with edges as they were drawn and grouped by target,
float32 without TF32, a float16 or bfloat16 run of ours beside; and what a call takes of memory and of Python.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

# Instead of this folder, where a file called cuda.py hides NVIDIA's package of that name.
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:] = [ROOT, *(path for path in sys.path if os.path.abspath(path or ".") != os.path.join(ROOT, "perf"))]

Row = dict[str, Any]
TOLERANCE, ROUNDED = 2e-5, 1e-2  # relative, of norms; of bfloat16
CELLS: list[Row] = [
    dict(layer=layer, channels_in=width, heads=heads)
    for width, heads in ((64, 4), (128, 8))
    for layer in ("GAT", "GATv2", "GraphTransformer")
]
NODES, EDGES, CHANNELS = 100_000, 1_000_000, 16


# --- one cell, in its own process --------------------------------------------------------------------------------
class Cell:
    """A layer of one size, ours and theirs, on one graph."""

    def __init__(self, layer: str, channels_in: int, heads: int, nodes: int, edges: int, power_law: bool = False):
        import torch

        import ruvector_numba as rv
        from ruvector_numba.bench.peers_graph import GraphWork

        self.work = GraphWork(layer, nodes, edges, channels_in, heads, CHANNELS, backward=True, power_law=power_law)
        x, grad, self.parameters = self.work.inputs()
        self.x, self.grad = (torch.from_numpy(a).cuda() for a in (x, grad))
        self.ends = self.work.edge_index()
        self.layer = getattr(rv, layer)(channels_in, CHANNELS, heads)
        self.layer.set_parameters(self.parameters)
        self.graph = rv.CSRGraph.from_edge_index(self.ends, num_nodes=nodes)

    def forward(self) -> Any:
        return self.layer(self.x, self.graph)

    def both(self) -> tuple[Any, Any]:
        output, cache = self.layer.forward_cached(self.x, self.graph)
        return output, self.layer.backward(self.grad, cache)

    def results(self, found: tuple[Any, Any]) -> list[Any]:
        """In double precision on the CPU: the output, and gradients in the order that the reference has."""
        from ruvector_numba.bench.peers_graph import _results

        output, made = found
        named = {name: g.double().cpu().numpy() for name, g in made.parameters.items()}
        return _results(output.double().cpu().numpy(), made.node_features.double().cpu().numpy(), named)

    def theirs(self, grouped: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """PyTorch Geometric's layer, forward and with gradients."""
        import importlib

        import numpy as np
        import torch

        from ruvector_numba.bench.peers_graph import _LAYERS

        nn: Any = importlib.import_module("torch_geometric.nn")
        layer = getattr(nn, _LAYERS[self.work.layer].peer)(self.work.channels_in, CHANNELS, self.work.heads)
        layer.load_state_dict({name: torch.from_numpy(a) for name, a in self.parameters.items()})
        layer = layer.cuda()
        ends = self.ends[:, np.argsort(self.ends[1], kind="stable")] if grouped else self.ends
        edge_index, leaf = torch.from_numpy(np.ascontiguousarray(ends)).cuda(), self.x.clone().requires_grad_()
        wanted = [leaf, *layer.parameters()]

        def forward() -> Any:
            with torch.inference_mode():
                return layer(self.x, edge_index)

        def both() -> Any:
            output = layer(leaf, edge_index)
            return output, torch.autograd.grad(output, wanted, self.grad)

        return forward, both


def difference(got: Any, wanted: Any) -> float:
    """Relative, of norms."""
    import numpy as np

    return float(np.linalg.norm(got - wanted) / max(1e-30, float(np.linalg.norm(wanted))))


def check(options: Row) -> Row:
    """A small graph with hubs, beside double precision; and the bits of a second time."""
    import numpy as np

    cell = Cell(**options, nodes=1500, edges=20000, power_law=True)
    found, again = cell.results(cell.both()), cell.results(cell.both())
    names = ["output", "node_features", *sorted(cell.parameters)]
    names = [name for name in names if name != "lin_key.bias"]
    wanted = cell.work.reference()
    errors = {name: difference(a, b) for name, a, b in zip(names, found, wanted, strict=True)}
    same = all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    largest = int(np.bincount(cell.ends[1]).max())
    right = same and all(e < TOLERANCE for e in errors.values())
    row: Row = dict(errors=errors, same_bits=same, right=right, hub=largest)
    if options["heads"] == 4:
        cell.x, cell.grad = cell.x.bfloat16(), cell.grad.bfloat16()
        halves = cell.results(cell.both())
        rounded = {name: difference(a, b) for name, a, b in zip(names, halves, wanted, strict=True)}
        row["right"] &= rounded["output"] < ROUNDED and rounded["node_features"] < 5 * ROUNDED
        row["bfloat16_errors"] = rounded
    return row


def block(call: Callable[[], Any], calls: int) -> float:
    """Milliseconds a call, of several in a row."""
    import torch

    begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / calls


def paired(calls: dict[str, Callable[[], Any]], rounds: int = 5) -> dict[str, float]:
    """The median time of each, in blocks of about 15 ms, in turn."""
    counts = {}
    for name, call in calls.items():
        call()
        counts[name] = max(2, min(50, round(15 / block(call, 2))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(block(call, counts[name]))
    return {name: sorted(x)[rounds // 2] for name, x in times.items()}


def timings(cell: Cell) -> Row:
    """Milliseconds, and how many times ours theirs take, the faster of their two orders of edges."""
    drawn, grouped = cell.theirs(False), cell.theirs(True)
    output, theirs = cell.both()[0], grouped[1]()[0]
    row: Row = dict(to_theirs=difference(output.double().cpu().numpy(), theirs.detach().double().cpu().numpy()))
    pairs = (("forward", cell.forward, 0), ("training", cell.both, 1))
    for name, ours, n in pairs:
        times = paired(dict(ours=ours, drawn=drawn[n], grouped=grouped[n]))
        row[f"{name}_ms"] = times
        row[f"{name}_ratio"] = min(times["drawn"], times["grouped"]) / times["ours"]
    return row


def halves(cell: Cell) -> Row:
    """The same of ours in 16 bits, milliseconds: no peer beside it."""
    import torch

    x, grad = cell.x, cell.grad
    cell.x, cell.grad = x.bfloat16(), grad.bfloat16()
    try:
        times = paired(dict(forward=cell.forward, training=cell.both), rounds=3)
    finally:
        cell.x, cell.grad = x, grad
    torch.cuda.synchronize()
    return times


def memory(cell: Cell) -> Row:
    """Bytes at the peak of a pass with gradients beyond what was there; and of one array (E, H, C)."""
    import torch

    found: Row = dict(edges_heads_channels=4 * cell.work.edges * cell.work.heads * CHANNELS)
    for name, call in (("ours", cell.both), ("theirs", cell.theirs(True)[1])):
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        found[name] = torch.cuda.max_memory_allocated() - before
    return found


def host(cell: Cell) -> Row:
    """Microseconds of Python for one call, of which the GPU's work is not waited for."""
    import torch

    found = {}
    for name, call in (("forward", cell.forward), ("training", cell.both)):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(30):
            call()
        found[name] = (time.perf_counter() - start) / 30 * 1e6
        torch.cuda.synchronize()
    return found


def short(name: str) -> str:
    """Of a kernel of ours its function, of others how it begins."""
    found = re.search(r"(attention_|backward_by|prepare_|project_|join_|add_|copy_|fill_|fold_)[a-z]+", name)
    return found[0] if found and "ruvector" in name else name[:90]


def kernel_times(cell: Cell) -> Row:
    """Microseconds of each kernel in one pass with gradients, ours and theirs, the longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    found: Row = {}
    for name, call in (("ours", cell.both), ("theirs", cell.theirs(True)[1])):
        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        events = [(short(e.key), round(float(e.self_device_time_total), 1), e.count) for e in seen.key_averages()]
        found[name] = sorted(events, key=lambda e: -e[1])[:14]
    return found


@contextlib.contextmanager
def alone(lock: str) -> Iterator[None]:
    """While this holds, no other cell uses the GPU."""
    with open(lock, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_cell(options: Row, lock: str) -> None:
    """Prints a line of JSON for each step that is done."""

    def tell(step: str, make: Callable[[], Any]) -> None:
        start = time.time()
        try:
            result = make()
        except Exception:
            result = dict(error=traceback.format_exc()[-1800:])
        print(json.dumps(dict(step=step, result=result, seconds=round(time.time() - start, 1))), flush=True)

    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    tell("check", lambda: check(options))  # compiles; other cells may be timed meanwhile, and are timed on CUDA's clock
    with alone(lock):
        small = Cell(**options, nodes=1000, edges=10000)
        tell("host_us", lambda: host(small))
        cell = Cell(**options, nodes=NODES, edges=EDGES)
        tell("timings", lambda: timings(cell))
        tell("memory", lambda: memory(cell))
        if options["layer"] != "GATv2" or options["heads"] == 4:
            tell("kernels", lambda: kernel_times(cell))
        if options["heads"] == 4:
            tell("bfloat16_ms", lambda: halves(cell))


# --- all of them -------------------------------------------------------------------------------------------------
def measure(seconds: float = 75.0, cells: list[Row] | None = None, lock: str | None = None) -> Row:
    """All cells; what is not done when the time is up is left out. Whoever holds `lock` has the GPU first."""
    chosen = CELLS if cells is None else cells
    stop, found = time.time() + seconds, dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for n, options in enumerate(chosen):
            out = open(os.path.join(folder, f"{n}.out"), "w+", encoding="utf-8")
            command = [sys.executable, os.path.abspath(__file__), "--cell", json.dumps(options)]
            command += ["--lock", lock or os.path.join(folder, "lock")]
            running.append((options, out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True)))
        for options, out, process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, stop - time.time()))
            late = process.poll() is None
            if late:
                process.kill()
                process.wait()
            out.seek(0)
            name = f"{options['layer']} {options['channels_in']}→{options['heads']}x{CHANNELS}"
            found[name] = read(out.read(), late)
            out.close()
            print(name, json.dumps(found[name], ensure_ascii=False)[:6000], flush=True)
    return found


def read(text: str, late: bool) -> Row:
    """What a cell has printed, by step; the rest of its output if it did not come to its end."""
    row: Row = {}
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError, TypeError, KeyError):
            said = json.loads(line)
            row[said["step"]] = said["result"]
            row.setdefault("seconds", {})[said["step"]] = said["seconds"]
    if late or "timings" not in row:
        row["unfinished"] = text[-1500:]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", default="perf/cuda_graph.json", help="where the numbers go")
    parser.add_argument("--seconds", type=float, default=75.0, help="for all of it")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--lock", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        return run_cell(json.loads(options.cell), options.lock)
    found = measure(options.seconds)
    with open(options.output, "w", encoding="utf-8") as file:
        json.dump(found, file, indent=1, ensure_ascii=False)
    return None


if __name__ == "__main__":
    main()
