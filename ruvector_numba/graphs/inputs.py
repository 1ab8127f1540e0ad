"""Checks of a graph layer's options and calls: nodes, a graph with self-loops, and the arrays of its edges."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .. import checks
from ..arrays import Array
from ..errors import DimensionMismatchError, GraphStructureError, InvalidConfigError, InvalidInputError
from ..values import check_memory, shown, whole_number
from . import edges
from .graph import CSRGraph
from .known import graph_of_edges

__all__ = [
    "Inputs",
    "check_not_swapped",
    "check_owner",
    "check_slope_range",
    "checked_filling",
    "checked_slope",
    "features",
    "graph_in_call",
    "graph_of",
    "is_pair",
    "size",
]


class Inputs(NamedTuple):
    """A checked call: nodes, the graph with its self-loops, and what belongs to its edges."""

    source: Array  # (Ns, in)
    target: Array | None  # (Nt, in): the same object where the nodes are; None where targets have no features
    is_pair: bool
    given: CSRGraph  # the caller's
    graph: CSRGraph
    edge_attr: Array | None  # (E, edge_dim), of `graph`
    edge_weight: Array | None  # (E)
    attr_shape: tuple[int, ...] | None  # the caller's
    dropout: float
    seed: int


def checked_slope(negative_slope: object) -> float:
    try:
        slope = checks.scale_of(negative_slope, 1)
    except InvalidInputError:
        slope = math.nan
    if negative_slope is None or not math.isfinite(slope):
        raise InvalidConfigError(f"negative_slope is {shown(negative_slope)}", hint="give a finite number")
    return slope


def checked_filling(fill_value: str | ArrayLike) -> str | ArrayLike:
    """What a layer fills its self-loops' attributes with. That an array fits nodes and edges shows in a call."""
    try:
        edges.checked_fill(fill_value)
    except InvalidInputError as error:
        raise InvalidConfigError(error.details, hint=edges.FILL_HINT) from None
    return fill_value


def check_slope_range(slope: float, dtype: np.dtype[Any]) -> None:
    """Refuse a slope that becomes infinity where the kernels compute with it."""
    largest = np.finfo(dtype).max
    if abs(slope) > float(largest):
        hint = f"{dtype} ends at {largest:.2g}: give a smaller one, or arrays of float64"
        raise InvalidInputError(f"negative_slope is {slope}", hint=hint)


def size(name: str, n: object) -> int:
    found = whole_number(name, n, 1, error=InvalidConfigError)
    check_memory((found,), np.dtype(np.float32), name, hint="there is a parameter for each, at least")
    return found


def check_owner(layer: Any, owner: Any) -> None:
    """Raise unless a cache that `owner` left is the layer's: of itself, or of what it is a copy of."""
    hint = "give what this layer's own forward_cached returned"
    if type(owner) is not type(layer):
        reason = f"cache is that of a {owner.name()}, another kind of layer"
        raise InvalidInputError(reason, hint=hint)
    if owner._identity != layer._identity:
        raise InvalidInputError(f"cache is that of another {layer.name()}", hint=hint)


def is_pair(x: Any) -> bool:
    """Is it (x_source, x_target)? A list of two rows is one array."""
    return isinstance(x, tuple) or (isinstance(x, list) and len(x) == 2 and np.ndim(x[0]) == 2)


def check_not_swapped(x: Any, graph: Any) -> None:
    """Refuse (graph, x), whose errors would be about numbers that are none."""
    is_index = isinstance(x, np.ndarray) and x.dtype.kind in "iu" and x.shape[:1] == (2,)
    if isinstance(x, CSRGraph) or (is_index and isinstance(graph, np.ndarray) and graph.dtype.kind == "f"):
        what = "a CSRGraph" if isinstance(x, CSRGraph) else "an edge_index, and graph holds floats"
        raise InvalidInputError(f"x is {what}", hint="x and graph are swapped: call layer(x, graph)")


def features(name: str, x: ArrayLike) -> Array:
    array = checks.floats(name, x)
    if array.ndim != 2:
        raise InvalidInputError(f"{name} has {array.ndim} axes", hint="give (nodes, channels)")
    return array if array.flags.aligned else array.copy()


def graph_in_call(edge_index: Any, name: str, sources: tuple[str, Array], targets: tuple[str, Array]) -> CSRGraph:
    """The graph of the argument `name`, whose ends are rows of these two arrays, which the errors name."""
    try:
        return graph_of_edges(edge_index, (len(sources[1]), len(targets[1])))
    except GraphStructureError as error:
        at: Any = error.shapes or {}
        if "edge" not in at:
            raise
        if edges.padding_hint(at["source"]) or edges.padding_hint(at["target"]):  # which is no row of any array
            raise
        is_source = at["source"] >= len(sources[1])
        n, (rows, x) = at["source" if is_source else "target"], sources if is_source else targets
        node, hint = "node", f"give {rows} a row for each node, or leave out the edges of nodes that have none"
        if sources[0] != targets[0]:
            node = "source" if is_source else "target"
            hint = f"{name}[0] counts rows of {sources[0]}, {name}[1] of {targets[0]}; {name}[::-1] swaps them"
        reason = f"{rows} has {len(x)} rows, and {name} names {node} {n}, at edge {at['edge']}"
        raise GraphStructureError(reason, shapes={f"{rows}.shape": x.shape}, hint=hint) from None


def graph_of(graph: Any, source: Array, target: Array | None, is_pair: bool) -> CSRGraph:
    if not isinstance(graph, CSRGraph):
        if hasattr(graph, "tocsr"):
            raise GraphStructureError("graph is a matrix", hint="CSRGraph.from_scipy(matrix), or sparse_forward")
        if target is None:
            hint = "give a CSRGraph: nothing else says how many targets there are when x_target is None"
            raise GraphStructureError("graph is an edge_index", hint=hint)
        names = ("x_source", "x_target") if is_pair else ("x", "x")
        return graph_in_call(graph, "edge_index", (names[0], source), (names[1], target))
    sources, targets = len(source), None if target is None else len(target)
    wanted = graph.num_sources, graph.num_targets
    if wanted != (sources, wanted[1] if targets is None else targets):
        shapes = {"nodes (sources, targets)": (sources, targets), "graph": graph}
        hint = (
            "x_source has one row for each source, x_target each target" if is_pair else "x has one row for each node"
        )
        raise DimensionMismatchError(wanted, (sources, targets), shapes=shapes, hint=hint)
    return graph
