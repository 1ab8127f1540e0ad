"""What is measured, as data: groups of cells with the limits that each has to meet.

A limit on the ratio is to the best peer of the group. One on the share is of the peak measured in the same rounds (of
the read bandwidth, for a decode), and holds for sequences of 1024 and more, `short_share` for those below 512. Work
counts attended pairs only. Layers on graphs count edges, and have no limit on the share.
"""

import dataclasses
from typing import Any

from ruvector_numba.bench.peers_graph import GraphWork
from ruvector_numba.bench.works import Task, Work

INFERENCE = ("torch", "onnxruntime", "openvino")
SIZES = ((8, 8, 128, 64), (4, 8, 512, 64), (2, 8, 1024, 64), (1, 8, 4096, 64), (1, 8, 1024, 128))
LAYER_SIZES = ((8, 8, 128, 64), (4, 8, 512, 64), (1, 12, 2048, 64))  # of 512, 512 and 768 channels
ODD_SIZES = ((4, 6, 1000, 80), (2, 8, 1025, 40), (3, 5, 333, 72))


@dataclasses.dataclass(frozen=True)
class Group:
    """Cells of one kind: what they are measured against, and what they must reach."""

    name: str
    works: tuple[Task, ...]
    peers: tuple[str, ...]
    must_ratio: float
    must_share: float | None = None
    short_share: float | None = None
    smoke: int = 1  # so many of the works, from the first, stand for all in a smoke test

    def required_share(self, work: Task) -> float | None:
        """The share of the peak that this work must reach, if any."""
        if work.length >= 1024:
            return self.must_share
        return self.short_share if work.length < 512 else None


def _square(sizes: tuple[tuple[int, int, int, int], ...], **terms: Any) -> tuple[Work, ...]:
    return tuple(Work(batch, heads, length, length, dim, **terms) for batch, heads, length, dim in sizes)


def _graphs(backward: bool) -> tuple[GraphWork, ...]:
    layers, size = ("GAT", "GATv2", "GraphTransformer"), (100_000, 1_000_000)
    narrow, wide = (
        [GraphWork(layer, *size, *shape, backward=backward) for layer in layers]
        for shape in ((64, 4, 16), (128, 8, 16))
    )
    first = narrow[0]
    others = dataclasses.replace(first, power_law=True), dataclasses.replace(first, from_edge_index=True)
    of_edges = [dataclasses.replace(work, edge_dim=8) for work in (first, narrow[-1])]
    largest = [] if backward else [dataclasses.replace(work, aggregation="max") for work in (first, narrow[-1])]
    return (*narrow, *others, *wide, *of_edges, *largest)


GROUPS = (
    Group("forward", _square(SIZES), (*INFERENCE, "numpy"), 1.0, 0.82, 0.70),
    Group("causal", _square(SIZES, causal=True), (*INFERENCE, "numpy"), 1.25, 0.72),
    Group("training", _square(SIZES, backward=True), ("torch",), 1.4, 0.80),
    Group("causal-training", _square(SIZES, causal=True, backward=True), ("torch",), 1.6, 0.70),
    Group("odd", _square(ODD_SIZES), INFERENCE, 1.0),
    Group("spiky", _square((SIZES[0], SIZES[2]), spiky=True), INFERENCE, 1.0),
    Group("window", (Work(1, 8, 8192, 8192, 64, window=256),), ("torch-flex",), 2.0),
    Group("layer", _square(LAYER_SIZES, layer=True), ("torch",), 1.0),  # these two aim at 1.4
    Group("layer-training", _square(LAYER_SIZES, layer=True, backward=True), ("torch",), 1.0),
    Group("step", tuple(Work(1, heads, 1, 512, 64, layer=True) for heads in (8, 12, 16)), ("torch",), 1.0),
    Group("decode", (Work(1, 8, 1, 65536, 64),), INFERENCE, 1.0, 0.90),
    Group("decode-grouped", (Work(1, 32, 1, 8192, 128, group=4),), INFERENCE[:2], 1.0),
    Group("bfloat16", _square(SIZES, dtype="bfloat16"), ("torch", "openvino"), 1.0, 0.70),
    Group("bfloat16-training", _square(SIZES, dtype="bfloat16", backward=True), ("torch",), 2.0),
    Group("bfloat16-decode", (Work(1, 8, 1, 65536, 64, dtype="bfloat16"),), ("torch", "openvino"), 1.0, 0.90),
    Group("float16", _square(SIZES[1:3], dtype="float16"), ("torch",), 5.0),
    Group("graph", _graphs(backward=False), ("torch_geometric",), 10.0, smoke=5),
    Group("graph-training", _graphs(backward=True), ("torch_geometric",), 8.0, smoke=5),
)


# The same kinds at sizes that take no time: they show that everything runs and agrees, and nothing about speed.
SMOKE = tuple(dataclasses.replace(g, works=tuple(w.tiny() for w in g.works[: g.smoke])) for g in GROUPS)
