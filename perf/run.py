"""Measure the cells of `cells.py` against the peers that are installed, and write them down.

    python perf/run.py                          all cells, on one and on two threads: some 40 minutes
    python perf/run.py --groups causal decode   some of them; the others keep what an earlier run found
    python perf/run.py --smoke --output build   everything once at tiny sizes: shows that it works, nothing of speed

How it measures is told in `ruvector_numba/bench/comparison.py`. Results go to perf/results-<cpu>.json, after every
cell; `report.py` makes the README's tables of them.
"""

import argparse
import datetime
import json
import math
import os
import pathlib
import platform
import re
import sys
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # not there in the contestants' processes, which begin with this file too

import cells  # noqa: E402
import peak  # noqa: E402
from peers import everyone, versions  # noqa: E402

import ruvector_numba as rv  # noqa: E402
from ruvector_numba.bench.comparison import Plan, Score, compare  # noqa: E402
from ruvector_numba.bench.peers import PEERS, adapters, installed  # noqa: E402
from ruvector_numba.bench.works import OURS, Build, Task  # noqa: E402

sys.path[:] = [p for p in sys.path if pathlib.Path(p).resolve() != HERE]  # torch imports NVIDIA's cuda, not cuda.py
CAVEATS = (
    "Every answer was checked against float64 before it was timed. Contestants are timed in blocks taken in turn, each "
    "in a process of its own; a ratio is the median over pairs of blocks timed next to each other.",
    "onnxruntime is the faster of its two operators in each cell, MultiHeadAttention and Attention, with inputs laid "
    "out as they like them and bound beforehand, and one preallocated output; openvino reuses its output too. torch, "
    "numpy and ruvector-numba allocate theirs in each call.",
    "numpy is the plain formula, on the same number of BLAS threads; it is left out where it would form more than "
    "256 MiB of scores.",
    "A layer is self-attention with its four projections and their biases, and its gradients are those of the input "
    "and of all parameters: rv.MultiHeadAttention beside torch.nn.MultiheadAttention with need_weights=False, which "
    "is the fastest of its modes in each cell: eval, train, and train with the length first. A step is one position "
    "more, where keys and values of 511 before it are kept: layer.step beside the same written in torch.",
    "bfloat16 and float16: arrays of that type for ruvector-numba and torch; openvino is given float32 arrays and the "
    "hint to compute in bfloat16. The peak of bfloat16 is twice that of float32 where it is multiplied by pairs.",
    "A share of the peak counts attended pairs and projections only, and is of the float32 multiply-adds that this "
    "machine did in registers in the same rounds; that of a decode is of the memory that the same number of threads "
    "read.",
    "A layer on a graph has the edges drawn at random and, for GAT and GATv2, a self-loop at each node; its gradients "
    "are those of the nodes and of all parameters. rv.GAT and the others are given a CSRGraph built beforehand (where "
    "it says so, the same edge_index in each call, whose graph is kept); torch_geometric is given the edge_index, in "
    "the order drawn or grouped by target, whichever is faster in each cell. It runs in torch.inference_mode where no "
    "gradients are asked for.",
    "A share of the bandwidth counts what a layer on a graph reads at least: for each edge a projected row of its "
    "source in float32, two for GraphTransformer (key and value), and three times that with gradients, once forward "
    "and once towards either end of the edges. No nodes, no self-loops, no indices, nothing that is written. Rows that "
    "are still in a cache come faster than memory gives them, so it can pass 100%.",
    "Compiling is not counted: it happens once on a machine.",
)


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    found = rv.info()
    return {
        "cpu": found["cpu"],
        "target": found["target"],
        "lanes": found["lanes"],
        "processors": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "threading_layer": found["threading_layer"],
        "versions": {**found["versions"], **versions([n for n in everyone() if n not in (OURS, "numpy")])},
    }


def slug(*names: str) -> str:
    """A name fit for a file."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(names).lower()).strip("-")


def best_peer(scores: list[Score]) -> Score | None:
    """The fastest of those that answered rightly, not counting ourselves."""
    rivals = [s for s in scores[1:] if not math.isnan(s.ratio)]  # that of a limit is
    return min(rivals, key=lambda s: s.ratio, default=None)


def measure(group: cells.Group, work: Task, threads: int, plan: Plan, extra: list[str]) -> dict[str, Any]:
    """One cell: our score, the peers', the machine's limit in the same rounds, and what follows from them."""
    known = adapters(work)
    here = installed(known)
    names = [OURS, *(n for n in (*group.peers, *extra) if n in here)]
    builds: dict[str, Build] = {n: known[n] for n in names}
    builds[work.limit] = peak.LIMITS[work.limit]
    scores = compare(work, builds, threads, plan, measuring=[work.limit])
    ours, machine_limit, best = scores[0], scores[-1], best_peer(scores)
    return {
        "group": group.name,
        "work": work.name,
        "threads": threads,
        "unit": work.unit,
        "limit": machine_limit.rate,
        "share": work.used(ours.rate) / machine_limit.rate,
        "best_peer": best.name if best else None,
        "ratio": best.ratio if best else None,
        "must_ratio": group.must_ratio,
        "must_share": group.required_share(work),
        "measured": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "scores": [s.to_dict() for s in scores],
    }


def verdict(result: dict[str, Any]) -> str:
    """One line on a cell, for whoever watches; SHORT marks what misses its limit."""
    ours = result["scores"][0]
    if "rate" not in ours:
        return f"{result['work']}: {ours.get('skipped', 'not measured')}"
    text = f"{result['work']:<64} {ours['rate']:7.1f} {result['unit']:<9} {result['share']:4.0%} of the machine"
    if result["must_share"] is not None and result["share"] < result["must_share"]:
        text += f" (SHORT of {result['must_share']:.0%})"
    if result["ratio"] is not None:
        text += f", {result['ratio']:.2f} times {result['best_peer']}"
        text += f" (SHORT of {result['must_ratio']:.2f})" * (result["ratio"] < result["must_ratio"])
    return text


def save(path: pathlib.Path, results: list[dict[str, Any]], plan: Plan) -> None:
    """Results of an earlier run stay, except of the cells measured now. Not a number becomes null."""
    earlier = json.loads(path.read_text())["results"] if path.exists() else []
    key = ("group", "work", "threads")
    new = {tuple(r[k] for k in key) for r in results}
    kept = [r for r in earlier if tuple(r[k] for k in key) not in new]
    order = [g.name for g in cells.GROUPS]
    every = sorted((r for r in kept + results if r["group"] in order), key=lambda r: order.index(r["group"]))
    timing = {"blocks": plan.blocks, "seconds": plan.seconds, "pause": plan.pause}
    document = {"machine": machine(), "caveats": CAVEATS, "timing": timing, "results": every}
    plain = json.loads(json.dumps(document), parse_constant=lambda _: None)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """What the user asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--groups", nargs="+", choices=[g.name for g in cells.GROUPS])
    parser.add_argument("--add-peers", nargs="+", default=[], choices=list(PEERS), help="beyond those of each group")
    parser.add_argument("--blocks", type=int, default=Plan.blocks)
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="of each block")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, two short blocks")
    parser.add_argument("--output", type=pathlib.Path, default=HERE, metavar="FOLDER")
    options = parser.parse_args()
    if options.smoke and options.output.resolve() == HERE:
        parser.error("--smoke measures nothing: send it elsewhere with --output FOLDER")
    return options


def main() -> int:
    """Measure, and save after each cell; 1 when one of our own answers was missing or wrong."""
    options = arguments()
    plan = Plan(2, 0.01, 0.01) if options.smoke else Plan(options.blocks, options.seconds)
    groups = [g for g in (cells.SMOKE if options.smoke else cells.GROUPS) if g.name in (options.groups or [g.name])]
    found = rv.info()
    path = options.output / f"results-{slug(found['cpu'], found['target'])}.json"
    results: list[dict[str, Any]] = []
    for group in groups:
        print(f"\n{group.name}", flush=True)
        for work in group.works:
            for threads in options.threads:
                results.append(measure(group, work, threads, plan, options.add_peers))
                print(f"{threads} thread{'s' if threads > 1 else ' '} {verdict(results[-1])}", flush=True)
                save(path, results, plan)
    print(f"\nwritten: {path}")
    return int(any("rate" not in r["scores"][0] for r in results))


if __name__ == "__main__":
    sys.exit(main())
