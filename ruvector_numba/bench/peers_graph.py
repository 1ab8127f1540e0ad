"""Layers of attention on graphs as work to be measured: what is right, and the adapters of both libraries.

Inputs and parameters lie on coarse grids: float32 adds such numbers without rounding, and so finds each argument of a
LeakyReLU on the side of zero where float64 finds it. One edge on the other side is a gradient off by more than any
rounding.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .works import OURS, Build, Runner

__all__ = ["GRAPHS", "GraphWork", "torch_layer"]

_SLOPE = 0.2


@dataclasses.dataclass(frozen=True)
class GraphWork:
    """One cell of the tables: a layer on a random graph, forward or with the gradients of nodes and parameters.

    Both ends of an edge are drawn from all nodes alike, or with `power_law` the k-th most popular node k^-0.8 times as
    often as the first. With `from_edge_index` ours is given the same edge_index in each call, and not a graph built
    beforehand. With `edge_dim` edges have so many features, and loops the mean of those of the other edges to their
    node. With `aggregation` "max", forward alone: of two edges equal but for rounding, either has the gradient.
    """

    layer: str
    nodes: int
    edges: int
    channels_in: int
    heads: int
    channels: int
    backward: bool = False
    power_law: bool = False
    from_edge_index: bool = False
    edge_dim: int = 0
    aggregation: str = "sum"

    kind = "graph"
    unit = "M edges/s"
    limit = "bandwidth"

    def __post_init__(self) -> None:
        if self.aggregation not in ("sum", "max") or (self.backward and self.aggregation == "max"):
            raise ValueError(f"aggregation is {self.aggregation!r}: give 'sum', or 'max' without gradients")

    @property
    def name(self) -> str:
        """The layer, its channels, the graph, and what is done."""
        features = f" with {self.edge_dim} features" if self.edge_dim else ""
        terms = [
            f"{self.layer} {self.channels_in}→{self.heads}x{self.channels}",
            f"{self.nodes:,} nodes",
            f"{self.edges:,} edges" + " of power-law degrees" * self.power_law + features,
            "forward + backward" if self.backward else "forward",
        ]
        return ", ".join(terms) + " from edge_index" * self.from_edge_index + ", max" * (self.aggregation == "max")

    @property
    def length(self) -> int:
        return self.edges

    def rate(self, seconds: float) -> float:
        """Million edges in a second."""
        return self.edges / seconds / 1e6

    def used(self, rate: float) -> float:
        """GB/s of what must be read at least: for each edge its features and the projected rows of its source.

        With gradients three times as much: forward, towards targets, and rows of the targets towards sources.
        """
        rows = 2 if self.layer == "GraphTransformer" else 1
        numbers = rows * self.heads * self.channels + self.edge_dim
        return rate * numbers * (3 if self.backward else 1) * 4 / 1e3

    def tiny(self) -> GraphWork:
        return dataclasses.replace(self, nodes=60, edges=400)

    def reference(self) -> list[np.ndarray]:
        return _reference(self)

    def edge_index(self) -> np.ndarray:
        """(2, E) int64: the same edges in every process."""
        rng = np.random.default_rng(1)
        if not self.power_law:
            return rng.integers(0, self.nodes, (2, self.edges))
        popularity = np.arange(1, self.nodes + 1) ** -0.8
        return rng.permutation(self.nodes)[rng.choice(self.nodes, (2, self.edges), p=popularity / popularity.sum())]

    def edge_attr(self) -> np.ndarray | None:
        """(E, edge_dim), if edges have features."""
        numbers = np.random.default_rng(2).integers(-32, 33, (self.edges, self.edge_dim))
        return numbers.astype(np.float32) / np.float32(16) if self.edge_dim else None

    def inputs(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Nodes, the output's gradient, and parameters by the names that both libraries have for them."""
        rng = np.random.default_rng(0)

        def draw(shape: tuple[int, ...], deviation: float, steps: int) -> np.ndarray:
            return np.rint(rng.standard_normal(shape) * (deviation * steps)).astype(np.float32) / np.float32(steps)

        width, with_edges = self.heads * self.channels, self.edge_dim > 0
        layer = _LAYERS[self.layer]
        linears = layer.linears + layer.skips
        shapes = {f"{name}.weight": (width, self.channels_in) for name in linears}
        biases = [f"{name}.bias" for name in linears if name != "lin"] + ["bias"] * (not layer.skips)
        parameters = {name: draw(shape, self.channels_in**-0.5, 64) for name, shape in shapes.items()}
        if self.edge_dim:
            parameters["lin_edge.weight"] = draw((width, self.edge_dim), self.edge_dim**-0.5, 64)
        vectors = layer.vectors + layer.of_edges * with_edges
        parameters |= {name: draw((1, self.heads, self.channels), self.channels**-0.5, 16) for name in vectors}
        parameters |= {name: draw((width,), 0.5, 64) for name in biases}
        return draw((self.nodes, self.channels_in), 1.0, 4), draw((self.nodes, width), 1.0, 64), parameters


# --- what is right ----------------------------------------------------------------------------------------------------
class _Edges:
    """Edges from source to target, and what goes along them; arrays of edges are (E) or (E, C), of one head."""

    def __init__(self, source: np.ndarray, target: np.ndarray, nodes: int, aggregation: str = "sum") -> None:
        import scipy.sparse

        def incidence(end: np.ndarray) -> Any:
            return scipy.sparse.csr_array((np.ones(len(end)), (end, np.arange(len(end)))), shape=(nodes, len(end)))

        self.source, self.target, self.nodes, self.aggregation = source, target, nodes, aggregation
        self._into, self._from = incidence(target), incidence(source)

    def into(self, values: np.ndarray) -> np.ndarray:
        """The sum over the edges into each node."""
        return self._into @ values

    def out_of(self, values: np.ndarray) -> np.ndarray:
        return self._from @ values

    def attend(self, scores: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], Any]]:
        """Softmax over the edges into a node, times the values (E, C), joined; from a sum's gradient, those of both."""
        top = np.full(self.nodes, -np.inf)
        np.maximum.at(top, self.target, scores)
        p = np.exp(scores - top[self.target])
        p /= self.into(p)[self.target]

        def back(grad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            along = grad[self.target]
            dp = np.einsum("ec,ec->e", along, values)
            along *= p[:, None]
            return p * (dp - self.into(p * dp)[self.target]), along

        if self.aggregation == "sum":
            return self.into(p[:, None] * values), back
        largest = np.full((self.nodes, values.shape[1]), -np.inf)
        np.maximum.at(largest, self.target, p[:, None] * values)
        return np.where(np.isinf(largest), 0.0, largest), back


def _leaky(z: np.ndarray) -> np.ndarray:
    return np.where(z > 0, z, _SLOPE * z)


def _slope(z: np.ndarray) -> np.ndarray:
    return np.where(z > 0, 1.0, _SLOPE)


# One head: its projected edges (E, C), if they have features, its projected nodes and its vectors in; its output, and
# what gives the gradients of all these, out.
def _gat(
    edges: _Edges, a: np.ndarray | None, h: np.ndarray, att_src: np.ndarray, att_dst: np.ndarray, *att_edge: np.ndarray
) -> tuple[np.ndarray, Any]:
    z = (h @ att_src)[edges.source] + (h @ att_dst)[edges.target]
    if a is not None:
        z += a @ att_edge[0]
    output, attend_back = edges.attend(_leaky(z), h[edges.source])

    def back(grad: np.ndarray) -> tuple[Any, list[np.ndarray]]:
        ds, along = attend_back(grad)
        dz = ds * _slope(z)
        dsource, dtarget = edges.out_of(dz), edges.into(dz)
        dh = edges.out_of(along) + np.outer(dsource, att_src) + np.outer(dtarget, att_dst)
        if a is None:
            return None, [dh, dsource @ h, dtarget @ h]
        return np.outer(dz, att_edge[0]), [dh, dsource @ h, dtarget @ h, dz @ a]

    return output, back


def _gatv2(
    edges: _Edges, a: np.ndarray | None, left: np.ndarray, right: np.ndarray, att: np.ndarray
) -> tuple[np.ndarray, Any]:
    z = left[edges.source] + right[edges.target] + (0.0 if a is None else a)
    output, attend_back = edges.attend(_leaky(z) @ att, left[edges.source])

    def back(grad: np.ndarray) -> tuple[Any, list[np.ndarray]]:
        ds, along = attend_back(grad)
        dz = np.outer(ds, att) * _slope(z)
        return dz, [edges.out_of(along + dz), edges.into(dz), ds @ _leaky(z)]

    return output, back


def _transformer(
    edges: _Edges, a: np.ndarray | None, key: np.ndarray, query: np.ndarray, value: np.ndarray
) -> tuple[np.ndarray, Any]:
    scale, added = 1 / math.sqrt(key.shape[1]), 0.0 if a is None else a
    keys = key[edges.source] + added
    scores = np.einsum("ec,ec->e", keys, query[edges.target]) * scale
    output, attend_back = edges.attend(scores, value[edges.source] + added)

    def back(grad: np.ndarray) -> tuple[Any, list[np.ndarray]]:
        ds, along = attend_back(grad)
        ds = ds[:, None] * scale
        dkeys = ds * query[edges.target]
        return dkeys + along, [edges.out_of(dkeys), edges.into(ds * keys), edges.out_of(along)]

    return output, back


class _Layer(NamedTuple):
    peer: str  # PyTorch Geometric's name for it
    head: Callable[..., tuple[np.ndarray, Any]]
    linears: tuple[str, ...]  # the projections that attention sees
    vectors: tuple[str, ...]  # attention's own parameters
    of_edges: tuple[str, ...] = ()  # more of them where edges have features
    skips: tuple[str, ...] = ()  # projections that are added to the output; layers without one have loops and a bias


_LAYERS = {
    "GAT": _Layer("GATConv", _gat, ("lin",), ("att_src", "att_dst"), of_edges=("att_edge",)),
    "GATv2": _Layer("GATv2Conv", _gatv2, ("lin_l", "lin_r"), ("att",)),
    "GraphTransformer": _Layer(
        "TransformerConv", _transformer, ("lin_key", "lin_query", "lin_value"), (), skips=("lin_skip",)
    ),
}


def _reference(work: GraphWork) -> list[np.ndarray]:
    """Head by head, so that no array of edges is wider than one."""
    x, grad, parameters = work.inputs()
    p = {name: array.astype(np.float64) for name, array in parameters.items()}
    x, grad = x.astype(np.float64), grad.astype(np.float64)
    _, of_head, linears, vectors, of_edges, skips = _LAYERS[work.layer]
    vectors += of_edges * (work.edge_dim > 0)
    edges, attr = _graph(work, has_loops=not skips)

    projected = [x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0) for name in linears]
    output = np.zeros(grad.shape) + p.get("bias", 0.0)
    for name in skips:
        output += x @ p[f"{name}.weight"].T + p[f"{name}.bias"]
    above = [np.empty_like(y) for y in projected]
    found = {name: np.empty_like(p[name]) for name in vectors}
    of_attr = p.get("lin_edge.weight")
    if of_attr is not None:
        found["lin_edge.weight"] = np.empty_like(of_attr)
    for head in range(work.heads):
        own = slice(head * work.channels, (head + 1) * work.channels)
        a = None if attr is None or of_attr is None else attr @ of_attr[own].T
        attended, back = of_head(edges, a, *(y[:, own] for y in projected), *(p[name][0, head] for name in vectors))
        output[:, own] += attended
        if work.backward:
            da, made = back(grad[:, own])
            if attr is not None:
                found["lin_edge.weight"][own] = da.T @ attr
            for dy, of_nodes in zip(above, made, strict=False):
                dy[:, own] = of_nodes
            for name, of_vector in zip(vectors, made[len(above) :], strict=True):
                found[name][0, head] = of_vector
    if not work.backward:
        return [output]

    found["bias"] = grad.sum(axis=0)
    dx = np.zeros_like(x)
    for name, dy in zip(linears + skips, above + [grad] * len(skips), strict=True):
        dx += dy @ p[f"{name}.weight"]
        found |= {f"{name}.weight": dy.T @ x, f"{name}.bias": dy.sum(axis=0)}
    return _results(output, dx, {name: found[name] for name in p})


def _graph(work: GraphWork, has_loops: bool) -> tuple[_Edges, np.ndarray | None]:
    """The edges, and their features in float64."""
    source, target = work.edge_index()
    attr = work.edge_attr()
    attr = None if attr is None else attr.astype(np.float64)
    if has_loops:  # those layers put one at every node
        kept, nodes = source != target, np.arange(work.nodes)
        source, target = source[kept], target[kept]
        if attr is not None:
            degrees = np.bincount(target, minlength=work.nodes)
            means = _Edges(source, target, work.nodes).into(attr[kept]) / np.maximum(degrees, 1)[:, None]
            attr = np.concatenate([attr[kept], means])
        source, target = np.concatenate([source, nodes]), np.concatenate([target, nodes])
    return _Edges(source, target, work.nodes, work.aggregation), attr


def _results(output: np.ndarray, dx: np.ndarray, gradients: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What is compared of a backward pass: the output, and gradients in the order of the parameters' names.

    That of lin_key.bias is 0, softmax being what it is: its rounding errors are judged beside that of lin_query.bias.
    """
    found = dict(gradients)
    if "lin_key.bias" in found:
        found["lin_query.bias"] = np.stack([found.pop("lin_key.bias"), found["lin_query.bias"]])
    return [output, dx, *(found[name] for name in sorted(found))]


# --- adapters ---------------------------------------------------------------------------------------------------------
def _ruvector(work: GraphWork, threads: int) -> Runner:
    import ruvector_numba as rv

    rv.set_num_threads(threads)
    x, grad, parameters = work.inputs()
    kind, options = getattr(rv, work.layer), {"edge_dim": work.edge_dim or None, "aggregation": work.aggregation}
    layer = kind(work.channels_in, work.channels, work.heads, **options)
    layer.set_parameters(parameters)
    graph: Any = work.edge_index()
    attr = work.edge_attr()
    if not work.from_edge_index:
        graph = rv.CSRGraph.from_edge_index(graph, num_nodes=work.nodes)
    if not work.backward:
        return Runner(lambda: [layer(x, graph, attr)])

    def both() -> tuple[np.ndarray, Any]:
        output, cache = layer.forward_cached(x, graph, attr)
        return output, layer.backward(grad, cache)

    return Runner(both, lambda found: _results(found[0], found[1].node_features, found[1].parameters))


def torch_layer(work: GraphWork, threads: int, grouped: bool = False) -> Runner:
    """PyTorch Geometric's layer, its edges in the order that they were drawn in, or grouped by target."""
    import torch

    torch.set_num_threads(threads)
    nn: Any = importlib.import_module("torch_geometric.nn")
    x, grad, parameters = work.inputs()
    kind = getattr(nn, _LAYERS[work.layer].peer)
    options = {"edge_dim": work.edge_dim or None, "aggr": work.aggregation}
    layer = kind(work.channels_in, work.channels, work.heads, **options)
    layer.load_state_dict({name: torch.from_numpy(array) for name, array in parameters.items()})
    ends, attr = work.edge_index(), work.edge_attr()
    if grouped:
        order = np.argsort(ends[1], kind="stable")
        ends, attr = np.ascontiguousarray(ends[:, order]), None if attr is None else attr[order]
    edge_attr = None if attr is None else torch.from_numpy(attr)
    edge_index, leaf, above = (torch.from_numpy(array) for array in (ends, x, grad))

    def forward() -> Any:
        with torch.inference_mode():
            return layer(leaf, edge_index, edge_attr)

    if not work.backward:
        return Runner(forward, lambda output: [output.numpy()])
    leaf.requires_grad_()
    named = dict(layer.named_parameters())

    def both() -> list[Any]:
        output = layer(leaf, edge_index, edge_attr)
        return [output, *torch.autograd.grad(output, [leaf, *named.values()], above)]

    def results(found: list[Any]) -> list[np.ndarray]:
        output, dx, *gradients = (tensor.detach().numpy() for tensor in found)
        return _results(output, dx, dict(zip(named, gradients, strict=True)))

    return Runner(both, results)


def _torch_geometric(work: GraphWork, threads: int) -> Runner:
    """The faster of its two orders of edges on this work."""
    return min((torch_layer(work, threads, grouped) for grouped in (False, True)), key=lambda runner: runner.time(2))


GRAPHS: dict[str, Build] = {OURS: _ruvector, "torch_geometric": _torch_geometric}
