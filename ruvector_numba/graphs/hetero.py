"""Nodes and edges of several types: what a call has by type, checked, and its edges as one graph."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .. import gpu
from ..arrays import Array
from ..errors import DimensionMismatchError, GraphStructureError, InvalidConfigError, InvalidInputError
from ..values import shown
from .derived import Derived
from .edge_values import edge_attributes, edge_values
from .graph import CSRGraph
from .inputs import features, graph_in_call, size
from .neighbors import packed

__all__ = [
    "EdgeType",
    "Joined",
    "attributes_by_type",
    "by_type",
    "checked_metadata",
    "joined_edges",
    "known_types",
    "nodes_by_type",
    "parameter_key",
    "weights_of_edges",
]

EdgeType = tuple[str, str, str]


class Joined(NamedTuple):
    """All types of edges that a call has, as one graph."""

    graph: CSRGraph
    sources: dict[EdgeType, slice]
    targets: dict[str, slice]
    edges: dict[EdgeType, slice]


class _Kept(NamedTuple):
    """A joined graph, and what it was made of, without keeping that alive."""

    made_of: list[weakref.ref[CSRGraph]]
    joined: Joined


JOINED: Derived[dict[Any, _Kept]] = Derived("graphs that it was joined to, as the first of them")


def joined_edges(edge_types: list[EdgeType], edge_index_dict: Any, nodes: dict[str, Array]) -> Joined:
    """All edges of a call as one graph, which is kept with that of its first type as long as the others live."""
    edges_of = known_types("edge_index_dict", edge_index_dict, edge_types)
    for kind in edges_of:
        for node in kind[::2]:
            if node not in nodes:
                hint = "give the features of both ends of the edges"
                raise InvalidInputError(f"there are edges {kind!r}, x_dict lacks {node!r}", hint=hint)
    reached = {kind[2] for kind in edge_types}
    sources = _places({kind: len(nodes[kind[0]]) for kind in edges_of})
    targets = _places({node: len(x) for node, x in nodes.items() if node in reached})
    graph_of = {kind: _graph(kind, one, nodes) for kind, one in edges_of.items()}
    if not graph_of:
        return _joined(graph_of, sources, targets)
    graphs = list(graph_of.values())
    kept = graphs[0].derived(JOINED, dict)
    sizes = [(kind, at.stop) for places in (sources, targets) for kind, at in places.items()]
    key = (*map(id, graphs), *sizes)
    found = kept.get(key)
    # An id may have been another graph's, which is gone.
    if found is None or any(ref() is not graph for ref, graph in zip(found.made_of, graphs, strict=True)):
        for old, one in list(kept.items()):
            if any(ref() is None for ref in one.made_of):
                kept.pop(old, None)
        found = _Kept([*map(weakref.ref, graphs)], _joined(graph_of, sources, targets))
        kept[key] = found
    return found.joined


def _joined(graph_of: dict[EdgeType, CSRGraph], sources: dict[EdgeType, slice], targets: dict[str, slice]) -> Joined:
    ends = {kind: graph.to_edge_index() for kind, graph in graph_of.items()}
    moved = [x + [[sources[kind].start], [targets[kind[2]].start]] for kind, x in ends.items()]
    numbers = tuple(sum(at.stop - at.start for at in places.values()) for places in (sources, targets))
    whole = CSRGraph.from_edge_index(np.concatenate([np.empty((2, 0), np.int64), *moved], axis=1), numbers)
    return Joined(whole, sources, targets, _places({kind: x.shape[1] for kind, x in ends.items()}))


def _graph(kind: EdgeType, edge_index: Any, nodes: dict[str, Array]) -> CSRGraph:
    """The edges of one type, checked."""
    name, (source, target) = f"edge_index_dict[{kind!r}]", ((f"x_dict[{n!r}]", nodes[n]) for n in kind[::2])
    if not isinstance(edge_index, CSRGraph):
        try:
            return graph_in_call(edge_index, name, source, target)
        except GraphStructureError as error:
            if name in error.reason:
                raise
            raise GraphStructureError(f"{name}: {error.reason}", shapes=error.shapes, hint=error.hint) from None
    numbers = len(source[1]), len(target[1])
    given = edge_index.num_sources, edge_index.num_targets
    if given != numbers:
        shapes = {f"nodes {kind[0]!r}, {kind[2]!r}": numbers, f"edge_index_dict[{kind!r}]": edge_index}
        hint = "the graph has a source for each row of the one, a target for each of the other"
        raise DimensionMismatchError(given, numbers, shapes=shapes, hint=hint)
    return edge_index


# --- what a call has by type -----------------------------------------------------------------------------------------
def nodes_by_type(x_dict: Any, widths: dict[str, int]) -> dict[str, Array]:
    """The features of the nodes, of these widths and one dtype."""
    nodes = {}
    for kind, x in known_types("x_dict", x_dict, list(widths)).items():
        name, width = f"x_dict[{kind!r}]", widths[kind]
        if gpu.is_on_gpu(x):
            raise InvalidInputError(f"{name} lies on a GPU, where HGT does not run", hint="take it to the CPU")
        nodes[kind] = array = features(name, x)
        if array.shape[1] != width:
            hint = f"the layer was built for {width} channels of {kind!r}"
            raise DimensionMismatchError(width, array.shape[1], shapes={f"{name}.shape": array.shape}, hint=hint)
    if not nodes:
        raise InvalidInputError("x_dict is empty", hint="give the features of each type of nodes")
    if len({x.dtype for x in nodes.values()}) > 1:
        dtypes = {f"x_dict[{kind!r}].dtype": x.dtype for kind, x in nodes.items()}
        raise InvalidInputError("the types of nodes differ in dtype", shapes=dtypes, hint="cast them to one")
    return nodes


def attributes_by_type(
    edge_attr_dict: Any, widths: dict[EdgeType, int], joined: Joined, dtype: np.dtype[Any]
) -> tuple[dict[EdgeType, Array], dict[EdgeType, tuple[int, ...]]]:
    """The attributes (E, edge_dim) of the edges that have some, and the shapes in which they were given."""
    by_kind = {} if edge_attr_dict is None else known_types("edge_attr_dict", edge_attr_dict, list(joined.edges))
    attr: dict[EdgeType, Array] = {}
    shapes: dict[EdgeType, tuple[int, ...]] = {}
    for kind, at in joined.edges.items():
        name, width, E = f"edge_attr_dict[{kind!r}]", widths.get(kind), at.stop - at.start
        if width is None and kind in by_kind:
            raise InvalidInputError(f"{name} was given, these edges have no edge_dim", hint="build it with edge_dim")
        if width is None:
            continue
        if kind in by_kind:
            attr[kind] = packed(edge_attributes(name, by_kind[kind], E, width, dtype))
            shapes[kind] = np.shape(by_kind[kind])
        elif E:
            raise InvalidInputError(f"{name} is missing", hint=f"give an array (E, {width}), one row for each edge")
    return attr, shapes


def weights_of_edges(edge_weight: Any, joined: Joined, dtype: np.dtype[Any]) -> tuple[Array | None, list[EdgeType]]:
    """The weights of all edges (E,), 1 where none were given, and the types that were given some."""
    if edge_weight is None:
        return None, []
    by_kind = known_types("edge_weight", edge_weight, list(joined.edges))
    weight = np.ones(joined.graph.num_edges, dtype)
    for kind, x in by_kind.items():
        at = joined.edges[kind]
        weight[at] = edge_values(f"edge_weight[{kind!r}]", x, (at.stop - at.start,), dtype)
    return weight, list(by_kind)


# --- types -----------------------------------------------------------------------------------------------------------
def checked_metadata(metadata: Any) -> tuple[list[str], list[EdgeType]]:
    hint = 'give (["a", "b"], [("a", "to", "b")]): node types, and edge types of source, relation and target'
    try:
        nodes, kinds = metadata
        node_types, edge_types = list(nodes), [tuple(kind) for kind in kinds]
        known = {*node_types}
    except (TypeError, ValueError):
        raise InvalidConfigError(f"metadata is {shown(metadata)}", hint=hint) from None
    for kind in edge_types:
        if len(kind) != 3 or not all(isinstance(part, str) for part in kind) or not {kind[0], kind[2]} <= known:
            raise InvalidConfigError(f"metadata has the edge type {kind!r}", hint=hint)
    keys = [parameter_key(*kind) for kind in edge_types]
    is_clear = all(isinstance(node, str) for node in node_types) and len(known) == len(node_types)
    if not is_clear or isinstance(nodes, str) or not keys or len({*keys}) < len(keys):
        raise InvalidConfigError("metadata has no edge types, a type twice, or a node type that is no text", hint=hint)
    return node_types, edge_types


def by_type(name: str, numbers: Any, kinds: list[Any]) -> dict[Any, int]:
    """One number for all types, or for each its own, in the order of the types."""
    if not isinstance(numbers, Mapping):
        return dict.fromkeys(kinds, size(name, numbers))
    known = known_types(name, numbers, kinds, InvalidConfigError)
    return {kind: size(f"{name}[{kind!r}]", n) for kind, n in known.items()}


def known_types(
    name: str, by_kind: Any, kinds: list[Any], error: type[InvalidInputError | InvalidConfigError] = InvalidInputError
) -> dict[Any, Any]:
    """The entries of a dictionary by type, in the order of the types."""
    if not isinstance(by_kind, Mapping):
        raise InvalidInputError(f"{name} is a {type(by_kind).__name__}", hint="give a dictionary by type")
    for kind in by_kind:
        if kind not in kinds:
            raise error(f"{name} has {kind!r}", hint=f"the types are {', '.join(map(repr, kinds))}")
    return {kind: by_kind[kind] for kind in kinds if kind in by_kind}


def _places(sizes: dict[Any, int]) -> dict[Any, slice]:
    stops = np.cumsum([0, *sizes.values()]).tolist()
    return {kind: slice(*ends) for kind, *ends in zip(sizes, stops, stops[1:], strict=False)}


def parameter_key(*kind: str) -> str:
    """A type's name in those of parameters."""
    return "__".join(kind).replace(".", "#")
