"""Caches and gradients of the layers on graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..arrays import Array
from ..parameters import ParameterSet
from .hetero import EdgeType, Joined
from .inputs import Inputs
from .neighbors import Past

if TYPE_CHECKING:
    from .hgt import HGT
    from .layer import GraphLayer

__all__ = ["GraphCache", "GraphGradients", "HeteroCache", "HeteroGradients"]


class Gated(NamedTuple):
    """What the gate of a `GraphTransformer` weighed, heads joined or averaged (N, width), and its weights (N,)."""

    attended: Array
    root: Array
    gate: Array


class Record(NamedTuple):
    """The forward pass of a layer, for its backward pass."""

    layer: GraphLayer
    inputs: Inputs
    parameters: ParameterSet
    past: Past
    projected: Array | None  # (Nt, H, C): what GAT makes of targets that are not its sources
    gated: Gated | None  # of a GraphTransformer with `beta`


class Back(NamedTuple):
    """The gradients that come back through a layer's attention."""

    source: Array
    target: Array | None  # that of the sources where the nodes are the same
    edge_attr: Array | None  # of the edges with self-loops
    parameters: dict[str, Array]


class GraphCache:
    """A graph layer's forward pass, kept for its backward pass.

    It refers to the arrays of the call, on a GPU to the output too: they must not change before the backward pass.

    Attributes
    ----------
    graph : CSRGraph
        With the self-loops that the layer put in; the edges of `coefficients`.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> layer = rv.GAT(3, 4, heads=2, seed=0)
    >>> output, cache = layer.forward_cached(np.ones((3, 3), np.float32), [[0, 1], [2, 2]])
    >>> cache
    GraphCache(GAT, CSRGraph(num_nodes=3, num_edges=5))
    >>> cache.coefficients().shape
    (5, 2)
    """

    __slots__ = ("_record", "graph")

    def __init__(self, record: Record) -> None:
        self._record, self.graph = record, record.inputs.graph

    def __repr__(self) -> str:
        return f"GraphCache({self._record.layer.name()}, {self.graph!r})"

    def coefficients(self) -> Array:
        """How much each edge counts, before dropout and edge weights; computed now.

        Returns
        -------
        array (E, H)
            In the order of `graph`'s edges.
        """
        return self._record.past.coefficients()


@dataclass(frozen=True, slots=True, eq=False)
class GraphGradients:
    """The gradients that a graph layer's backward pass gives.

    Attributes
    ----------
    parameters : dict of str to array
    node_features : array, or pair of arrays
        In the form of the call's nodes; in a pair None for a target that was None.
    edge_attr, edge_weight : array or None
        For the caller's edges, without self-loops that the layer put in; None if none was given.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> layer = rv.GAT(3, 4, heads=2, seed=0)
    >>> output, cache = layer.forward_cached(np.ones((3, 3), np.float32), [[0, 1], [2, 2]])
    >>> gradients = layer.backward(output, cache)
    >>> gradients.node_features.shape, list(gradients.parameters), gradients.edge_attr
    ((3, 3), ['att_src', 'att_dst', 'lin.weight', 'bias'], None)
    """

    parameters: dict[str, Array]
    node_features: Any
    edge_attr: Array | None = None
    edge_weight: Array | None = None


class HeteroRecord(NamedTuple):
    """The forward pass of an `HGT`, for its backward pass."""

    layer: HGT
    nodes: dict[str, Array]
    joined: Joined
    attr: dict[EdgeType, Array]  # (E, edge_dim)
    attr_shapes: dict[EdgeType, tuple[int, ...]]  # as they were given
    weighted: list[EdgeType]  # the types of edges that were given weights
    parameters: ParameterSet
    past: Past
    active: dict[str, Array]  # gelu of what each type of nodes attended to


class HeteroCache:
    """The forward pass of an `HGT`, kept for its backward pass.

    It refers to the arrays of the call and copies none: they must not change before the backward pass.

    Attributes
    ----------
    graph : CSRGraph
        The edges of all types as one graph.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> layer = rv.HGT(3, 4, (["n"], [("n", "to", "n")]), heads=2, seed=0)
    >>> output, cache = layer.forward_cached({"n": np.ones((3, 3))}, {("n", "to", "n"): [[0, 1], [2, 2]]})
    >>> cache.coefficients()["n", "to", "n"].tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """

    __slots__ = ("_record", "graph")

    def __init__(self, record: HeteroRecord) -> None:
        self._record, self.graph = record, record.joined.graph

    def __repr__(self) -> str:
        return f"HeteroCache({self._record.layer!r}, {self.graph!r})"

    def coefficients(self) -> dict[EdgeType, Array]:
        """How much each edge counts, before edge weights; computed now.

        Returns
        -------
        dict of (str, str, str) to array (E, H)
            By edge type, in the caller's order. Over all edges into a node they sum to 1.
        """
        coefficients = self._record.past.coefficients()
        return {kind: coefficients[at] for kind, at in self._record.joined.edges.items()}


@dataclass(frozen=True, slots=True, eq=False)
class HeteroGradients:
    """The gradients that `HGT`'s backward pass gives.

    Attributes
    ----------
    parameters : dict of str to array
    node_features : dict of str to array, for all node types that were given
    edge_attr : dict of (str, str, str) to array, for all edge types whose attributes were given
    edge_weight : dict of (str, str, str) to array (E,), for all edge types whose weights were given

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> layer = rv.HGT(3, 4, (["n"], [("n", "to", "n")]), heads=2, seed=0)
    >>> edges = {("n", "to", "n"): [[0, 1], [2, 2]]}
    >>> output, cache = layer.forward_cached({"n": np.ones((3, 3))}, edges, edge_weight={("n", "to", "n"): [0.5, 1.0]})
    >>> gradients = layer.backward(output, cache)
    >>> gradients.node_features["n"].shape, gradients.edge_weight["n", "to", "n"].shape, gradients.edge_attr
    ((3, 3), (2,), {})
    """

    parameters: dict[str, Array]
    node_features: dict[str, Array]
    edge_attr: dict[EdgeType, Array]
    edge_weight: dict[EdgeType, Array]
