"""What `HGT`'s passes leave and give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..checks import Array
from ..parameters import ParameterSet
from .hetero import EdgeType, Joined
from .neighbors import Past

if TYPE_CHECKING:
    from .hgt import HGT

__all__ = ["HeteroCache", "HeteroGradients", "HeteroRecord"]


class HeteroRecord(NamedTuple):
    """What `HGT`'s forward pass remembers."""

    layer: HGT
    nodes: dict[str, Array]
    joined: Joined
    attr: dict[EdgeType, Array]  # (E, edge_dim)
    attr_shapes: dict[EdgeType, tuple[int, ...]]  # as they were given
    weighted: list[EdgeType]  # the types of edges that were given weights
    parameters: ParameterSet
    past: Past


class HeteroCache:
    """What `HGT`'s forward pass leaves for its backward pass.

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
        """By edge type (E, H): how much each edge counts, in the caller's order; 1 in all over the edges of a node."""
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
    """

    parameters: dict[str, Array]
    node_features: dict[str, Array]
    edge_attr: dict[EdgeType, Array]
    edge_weight: dict[EdgeType, Array]
