"""From perf/results-*.json, perf/graph-*.json and perf/cuda-*.json to perf/RESULTS.md, and its summary in the README.

python perf/report.py            write RESULTS.md, and the README between <!-- perf:begin --> and <!-- perf:end -->
python perf/report.py --check    only say whether both are up to date; 1 when they are not
"""

import argparse
import json
import pathlib
import sys
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
BEGIN, END = "<!-- perf:begin -->", "<!-- perf:end -->"
OURS, LIMITS = "ruvector-numba", ("peak", "bandwidth")
GRAPHS = "M edges/s"  # the unit of layers on graphs, which have tables of their own
KINDS = {  # groups of cells.py, as the summary calls them
    "forward": "forward",
    "causal": "forward, causal",
    "training": "forward + backward",
    "causal-training": "forward + backward, causal",
    "odd": "forward, sizes that no block divides",
    "spiky": "forward, scores that jump",
    "window": "forward, a window of 256 keys",
    "layer": "`MultiHeadAttention`, forward",
    "layer-training": "`MultiHeadAttention`, forward + backward",
    "step": "one step of `MultiHeadAttention`, 512 positions",
    "decode": "one query over 65,536 keys",
    "decode-grouped": "one query of 32 heads over 8192 keys of 8 heads",
    "bfloat16": "forward, bfloat16",
    "bfloat16-training": "forward + backward, bfloat16",
    "bfloat16-decode": "one query over 65,536 keys, bfloat16",
    "float16": "forward, float16",
    "graph": "`GAT`, `GATv2`, `GraphTransformer`, forward",
    "graph-training": "`GAT`, `GATv2`, `GraphTransformer`, forward + backward",
}


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _against(value: float | None, must: float | None, text: str) -> str:
    """A measured value, in bold where it meets its limit, with the limit in brackets where it does not."""
    if value is None:
        return "-"
    if must is None:
        return text.format(value)
    return f"**{text.format(value)}**" if value >= must else f"{text.format(value)} ({text.format(must)})"


def _rows(results: list[dict[str, Any]], names: list[str]) -> list[str]:
    rows = []
    for result in results:
        scores = {s["name"]: s for s in result["scores"]}
        ours = scores[OURS]
        cells = [
            result["work"] + (" (GB/s)" if result["unit"] == "GB/s" else ""),
            _number(ours.get("rate")),
            _against(result["share"], result["must_share"], "{:.0%}"),
            *(_number(scores.get(n, {}).get("rate")) for n in names),
            _against(result["ratio"], result["must_ratio"], "{:.2f}"),
            f"{ours['error']:.0e}" if ours.get("error") is not None else "-",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _table(results: list[dict[str, Any]], threads: int) -> str:
    """One number of threads: a row for each cell, a column for each peer that was measured at least once."""
    every = dict.fromkeys(s["name"] for r in results for s in r["scores"] if s.get("rate") is not None)
    names = [n for n in every if n != OURS and n not in LIMITS]
    is_graphs = results[0]["unit"] == GRAPHS
    heading = [
        "layer, channels, graph" if is_graphs else "(batch, heads, length, dim)",
        OURS,
        "of the machine",
        *names,
        "times the best",
        "error",
    ]
    rule = ["---", *["---:"] * (len(heading) - 1)]
    lines = ["| " + " | ".join(heading) + " |", "| " + " | ".join(rule) + " |", *_rows(results, names)]
    title = f"Attention on graphs, {GRAPHS}, " * is_graphs + f"{threads} thread{'s' if threads > 1 else ''}:\n\n"
    return title + "\n".join(lines) + "\n"


def _graph_table(document: dict[str, Any]) -> str:
    """What `graph_memory.py` measured: values that should be small, with what each may be at most."""
    lines = ["| | ruvector-numba | torch_geometric | at most |", "| --- | ---: | ---: | ---: |"]
    for row in document["rows"]:
        ours, theirs, most = (
            "-" if row.get(n) is None else f"{row[n]:.{row['digits']}f} {row['unit']}".rstrip()
            for n in (OURS, "torch_geometric", "most")
        )
        if row["most"] is not None and row[OURS] <= row["most"]:
            ours = f"**{ours}**"
        lines.append(f"| {row['what']} | {ours} | {theirs} | {most} |")
    threads = document["threads"]
    return f"Attention on graphs, memory and shape, {threads} threads:\n\n" + "\n".join(lines) + "\n"


def markdown(document: dict[str, Any], of_graphs: dict[str, Any] | None = None) -> str:
    """All tables of one machine, with what they depend on."""
    machine, results = document["machine"], document["results"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    days = sorted({r["measured"][:10] for r in results})
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    parts = [
        f"**{machine['cpu']}** ({machine['target']}, {machine['lanes']} lanes), {machine['processors']} processors, "
        f"{machine['system']}, threads by {machine['threading_layer']}; {versions}; {when}.\n",
        "GFLOP/s in float32 unless a row names another type, GB/s where it says so. *Of the machine*: the share of "
        "the peak measured in the same rounds. *Times the best*: how many times as fast as the fastest peer. Both "
        "are bold where they reach what this project asks of itself, else that stands in brackets. *Error*: the "
        "largest, against float64, relative to the largest value.\n",
    ]
    for is_graphs, threads in sorted({(r["unit"] == GRAPHS, r["threads"]) for r in results}):
        rows = [r for r in results if (r["unit"] == GRAPHS, r["threads"]) == (is_graphs, threads)]
        parts.append(_table(rows, threads))
    caveats = list(document["caveats"])
    if of_graphs is not None:
        parts.append(_graph_table(of_graphs))
        caveats += of_graphs["caveats"]
    parts += [f"- {caveat}" for caveat in caveats]
    return "\n".join(parts) + "\n"


def of_gpu(document: dict[str, Any]) -> str:
    """The tables of one GPU, from what `cuda.py` measured."""
    machine, checks = document["machine"], document.get("checks", ())
    versions = ", ".join(f"{name} {version}" for name, version in machine.items() if name != "gpu")
    right = sum(bool(row["right"]) for row in checks)
    said = f" {right} of {len(checks)} checks against double precision are right, with the same bits twice."
    lines = [
        f"**{machine['gpu']}**; {versions}.{said if checks else ''}\n",
        "Dense attention in bfloat16, 16384 tokens of 2048 channels, TFLOP/s; *of flash's time*: ours, in one of "
        "torch's FlashAttention, in bold up to 2:\n",
        "| length, dim, mask | ruvector-numba | flash | cudnn | of flash's time | with gradients | flash | cudnn | of "
        "flash's time |",
        "| --- |" + " ---: |" * 8,
    ]
    for row in document["dense"]:
        cells = [f"{row['L']}, {row['D']}, {'causal' if row['causal'] else 'none'}"]
        for kind in ("forward", "training"):
            cells += [_number(row[f"{kind}_tflops"].get(name)) for name in ("ours", "flash", "cudnn")]
            times = row[f"{kind}_to_flash"]
            cells.append(f"**{times:.2f}**" if times <= 2 else f"{times:.2f} (2)")
        lines.append("| " + " | ".join(cells) + " |")
    if "graph" in document:
        lines += _gpu_layers(document["graph"])
    lines.append("")
    for row in document.get("decode", ()):
        rates = row["gigabytes_per_s"]
        lines.append(
            f"- One query over {row['S']} keys of {row['Hk']} heads, a batch of {row['B']}: {rates['ours']:.0f} GB/s "
            f"of keys and values read, torch {rates['torch']:.0f}."
        )
    if "memory" in document:
        lines.append(
            f"- Beyond inputs and results, forward and backward over {document['memory']['L']} tokens of 16 heads take "
            f"{document['memory']['bytes'] / 1e6:.1f} MB; a call takes {document['host_us']:.0f} us of Python."
        )
    return "\n".join(lines) + "\n"


def _gpu_layers(cells: dict[str, Any]) -> list[str]:
    lines = [
        "\nLayers on graphs of 100,000 nodes and 1,000,000 edges, float32, milliseconds; *times*: as fast as the "
        "faster of PyTorch Geometric's two ways, edges as drawn or grouped by target, in bold from 3 on:\n",
        "| layer | ruvector-numba | torch_geometric | times | with gradients | torch_geometric | times |",
        "| --- |" + " ---: |" * 6,
    ]
    for name, cell in cells.items():
        row, times = [name], cell["timings"]
        for kind in ("forward", "training"):
            theirs = min(times[f"{kind}_ms"][way] for way in ("drawn", "grouped"))
            row += [f"{times[f'{kind}_ms']['ours']:.2f}", f"{theirs:.2f}"]
            row.append(_against(times[f"{kind}_ratio"], 3, "{:.1f}"))
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _span(values: list[float], digits: int = 2) -> str:
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _told(results: list[dict[str, Any]]) -> str:
    """How many times as fast as the best peer the cells of one kind are, in bold where all are what they must be."""
    ratios = [r["ratio"] for r in results if r["ratio"] is not None]
    if not ratios:
        return ""
    span = _span(ratios, 1 if min(ratios) >= 3 else 2)
    return f"**{span}**" if all(r["ratio"] >= r["must_ratio"] for r in results) else span


def summary(documents: list[dict[str, Any]], gpus: list[dict[str, Any]]) -> str:
    """One row for each kind of cell, and one column for each machine and number of threads."""
    columns = [(d, threads) for d in documents for threads in sorted({r["threads"] for r in d["results"]})]
    heads = [f"{d['machine']['target']}, {n} thread{'s' if n > 1 else ''}" for d, n in columns]
    lines = [
        "How many times as fast as the fastest of its peers, from the worst cell of a kind to the best; in bold where "
        "every cell reaches what this project asks of itself:\n",
        "| | beside | asked | " + " | ".join(heads) + " |",
        "| --- | --- | ---: |" + " ---: |" * len(heads),
    ]
    for group, kind in KINDS.items():
        rows = [[r for r in d["results"] if (r["group"], r["threads"]) == (group, n)] for d, n in columns]
        every = [r for row in rows for r in row]
        if every:
            peers = dict.fromkeys(s["name"] for r in every for s in r["scores"] if s.get("rate") is not None)
            beside = ", ".join(name for name in peers if name != OURS and name not in LIMITS)
            cells = [kind, beside, f"{every[0]['must_ratio']:g}", *(_told(row) for row in rows)]
            lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for gpu in gpus:
        forward, training = (
            _span([row[f"{kind}_to_flash"] for row in gpu["dense"]]) for kind in ("forward", "training")
        )
        said = [f"{gpu['machine']['gpu']}, bfloat16: takes {forward} times as long as torch's FlashAttention"]
        said.append(f"with gradients {training}")
        for name, kind in (("layers on graphs", "forward"), ("with gradients", "training")):
            if "graph" in gpu:
                times = _span([cell["timings"][f"{kind}_ratio"] for cell in gpu["graph"].values()], 1)
                said.append(f"{name} {times} times as fast as torch_geometric")
        lines.append("- " + ", ".join(said) + ".")
    return "\n".join(lines) + "\n"


def results(documents: list[dict[str, Any]], graphs: list[dict[str, Any] | None], gpus: list[dict[str, Any]]) -> str:
    """All of RESULTS.md."""
    parts = ["# What was measured\n", "`perf/run.py` and its neighbours measure, `perf/report.py` writes this file.\n"]
    for document, of_graphs in zip(documents, graphs, strict=True):
        parts += [f"## {document['machine']['cpu']} ({document['machine']['target']})\n", markdown(document, of_graphs)]
    for gpu in gpus:
        parts += [f"## {gpu['machine']['gpu']}\n", of_gpu(gpu)]
    return "\n".join(parts)


def insert(readme: str, text: str) -> str:
    """The README with `text` between its markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md needs a line {BEGIN} and, below it, a line {END}")
    return f"{before}{BEGIN}\n{text.rstrip()}\n{END}{after}"


def main() -> int:
    """Write both files, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 when a file is out of date")
    parser.add_argument("--readme", type=pathlib.Path, default=HERE.parent / "README.md")
    parser.add_argument("--results", type=pathlib.Path, default=HERE, metavar="FOLDER")
    options = parser.parse_args()
    paths = sorted(options.results.glob("results-*.json"))
    if not paths:
        raise SystemExit(f"no results-*.json in {options.results}: run perf/run.py first")
    documents = [json.loads(path.read_text()) for path in paths]
    graph_paths = [path.with_name(path.name.replace("results-", "graph-", 1)) for path in paths]
    graphs = [json.loads(path.read_text()) if path.exists() else None for path in graph_paths]
    gpus = [json.loads(path.read_text()) for path in sorted(options.results.glob("cuda-*.json"))]
    wanted = {
        options.readme: insert(options.readme.read_text(), summary(documents, gpus)),
        options.results / "RESULTS.md": results(documents, graphs, gpus),
    }
    old = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if options.check:
        print(f"out of date: {', '.join(map(str, old))}; run perf/report.py" if old else "up to date")
        return int(bool(old))
    for path in old:
        path.write_text(wanted[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
