"""Nodes and edges of several types: what a call has by type, checked, and its edges as one graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..checks import Array
from ..errors import DimensionMismatchError, GraphStructureError, InvalidConfigError, InvalidInputError
from . import edges
from .graph import CSRGraph
from .inputs import size

__all__ = ["EdgeType", "Joined", "by_type", "checked_metadata", "joined_edges", "known_types", "parameter_key"]

EdgeType = tuple[str, str, str]


class Joined(NamedTuple):
    """All types of edges that a call has, as one graph."""

    graph: CSRGraph
    sources: dict[EdgeType, slice]
    targets: dict[str, slice]
    edges: dict[EdgeType, slice]


def joined_edges(edge_types: list[EdgeType], edge_index_dict: Any, nodes: dict[str, Array]) -> Joined:
    """All edges that were given as one graph; kept in the first of them if all are graphs."""
    given = known_types("edge_index_dict", edge_index_dict, edge_types)
    for kind in given:
        for node in kind[::2]:
            if node not in nodes:
                hint = "give the features of both ends of the edges"
                raise InvalidInputError(f"there are edges {kind!r}, x_dict lacks {node!r}", hint=hint)
    reached = {kind[2] for kind in edge_types}
    sources = _places({kind: len(nodes[kind[0]]) for kind in given})
    targets = _places({node: len(x) for node, x in nodes.items() if node in reached})
    graphs = list(given.values())
    is_kept = bool(graphs) and all(isinstance(graph, CSRGraph) for graph in graphs)
    kept: Any = graphs[0]._made.get("joined", [()]) if is_kept else [()]
    layout = [*map(id, graphs)], sources, targets
    if kept[0] == layout:
        return kept[1]
    ends = {kind: _ends(kind, graph, nodes) for kind, graph in given.items()}
    moved = [x + [[sources[kind].start], [targets[kind[2]].start]] for kind, x in ends.items()]
    numbers = tuple(sum(at.stop - at.start for at in places.values()) for places in (sources, targets))
    whole = CSRGraph.from_edge_index(np.concatenate([np.empty((2, 0), np.int64), *moved], axis=1), numbers)
    made = Joined(whole, sources, targets, _places({kind: x.shape[1] for kind, x in ends.items()}))
    if is_kept:
        graphs[0]._made["joined"] = layout, made, graphs  # which stay, and so do their ids
    return made


# --- types -----------------------------------------------------------------------------------------------------------
def checked_metadata(metadata: Any) -> tuple[list[str], list[EdgeType]]:
    hint = 'give (["a", "b"], [("a", "to", "b")]): node types, and edge types of source, relation and target'
    try:
        nodes, kinds = metadata
        node_types, edge_types = list(nodes), [tuple(kind) for kind in kinds]
        known = {*node_types}
    except (TypeError, ValueError):
        raise InvalidConfigError(f"metadata is {metadata!r}", hint=hint) from None
    for kind in edge_types:
        if len(kind) != 3 or not all(isinstance(part, str) for part in kind) or not {kind[0], kind[2]} <= known:
            raise InvalidConfigError(f"metadata has the edge type {kind!r}", hint=hint)
    keys = [parameter_key(*kind) for kind in edge_types]
    is_clear = all(isinstance(node, str) for node in node_types) and len(known) == len(node_types)
    if not is_clear or isinstance(nodes, str) or not keys or len({*keys}) < len(keys):
        raise InvalidConfigError("metadata has no edge types, a type twice, or a node type that is no text", hint=hint)
    return node_types, edge_types


def by_type(name: str, given: Any, kinds: list[Any]) -> dict[Any, int]:
    """One number for all types, or for each its own, in the order of the types."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(kinds, size(name, given))
    known = known_types(name, given, kinds, InvalidConfigError)
    return {kind: size(f"{name}[{kind!r}]", n) for kind, n in known.items()}


def known_types(
    name: str, given: Any, kinds: list[Any], error: type[InvalidInputError | InvalidConfigError] = InvalidInputError
) -> dict[Any, Any]:
    """What is given by type, in the order of the types."""
    if not isinstance(given, Mapping):
        raise InvalidInputError(f"{name} is a {type(given).__name__}", hint="give a dictionary by type")
    for kind in given:
        if kind not in kinds:
            raise error(f"{name} has {kind!r}", hint=f"the types are {', '.join(map(repr, kinds))}")
    return {kind: given[kind] for kind in kinds if kind in given}


def _ends(kind: EdgeType, given: Any, nodes: dict[str, Array]) -> Array:
    """The sources and targets (2, E) of edges of one type, checked."""
    numbers = len(nodes[kind[0]]), len(nodes[kind[2]])
    if isinstance(given, CSRGraph):
        if (given.num_sources, given.num_targets) != numbers:
            shapes = {f"nodes {kind[0]!r}, {kind[2]!r}": numbers, f"edge_index_dict[{kind!r}]": given}
            hint = "the graph has a source for each row of the one, a target for each of the other"
            raise DimensionMismatchError((given.num_sources, given.num_targets), numbers, shapes=shapes, hint=hint)
        return given.to_edge_index()
    try:
        found = edges.ends(given, numbers)[0]
        bad = np.flatnonzero(((found < 0) | (found >= np.array(numbers)[:, None])).any(axis=0))
        if len(bad):
            raise edges.no_node(int(bad[0]), found[0, bad[0]], found[1, bad[0]], *numbers)
    except GraphStructureError as error:
        reason = f"edge_index_dict[{kind!r}]: {error.reason}"
        raise GraphStructureError(reason, shapes=error.shapes, hint=error.hint) from None
    return found.astype(np.int64)


def _places(sizes: dict[Any, int]) -> dict[Any, slice]:
    stops = np.cumsum([0, *sizes.values()]).tolist()
    return {kind: slice(*ends) for kind, *ends in zip(sizes, stops, stops[1:], strict=False)}


def parameter_key(*kind: str) -> str:
    """A type's name in those of parameters."""
    return "__".join(kind).replace(".", "#")
