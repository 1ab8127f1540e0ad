"""Graphs for attention over neighbours: edges grouped by their target, checked once, never changed.

Callers give edges as in PyTorch Geometric, edge_index (2, E): the sources, then the targets; edge e goes from source j
to target i, which attends to j.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..arrays import Array
from ..checks import floats
from ..errors import DimensionMismatchError, GraphStructureError, InvalidInputError
from ..values import check_memory
from . import edges, others, self_loops
from .derived import Derived
from .edges import LoopPolicy

__all__ = ["CSRGraph", "Transposed"]

_T = TypeVar("_T")


class Transposed(NamedTuple):
    """The same edges grouped by source, for gradients: those of source j are `indptr[j]` to `indptr[j + 1] - 1`."""

    indptr: Array  # (num_sources + 1)
    targets: Array  # (E), ascending in each group
    positions: Array  # (E): where the edge stands among those grouped by target


TRANSPOSED = Derived[Transposed]("the edges grouped by source")
WITH_LOOPS: Derived[CSRGraph] = Derived("the graph with self-loops by a policy")


class _NoNumNodes(GraphStructureError, AttributeError):
    """A graph whose sources and targets differ has no number of nodes, and hasattr says so."""


class CSRGraph:
    """An immutable graph, grouped by target; made by one of the `from_` methods, which check what they are given.

    The edges of one target keep the caller's order, duplicates are edges of their own, and whatever belongs to edges is
    handed in and out in the caller's order. The arrays are read-only, and int32 where that can count nodes and edges,
    else int64. A graph can be pickled, and shared by threads.

    Attributes
    ----------
    indptr : array (num_targets + 1)
        The edges of target i stand at the positions ``indptr[i]`` to ``indptr[i + 1] - 1``.
    indices : array (num_edges)
        The source of the edge at each position.
    edge_ids : array (num_edges), or None
        The caller's number of the edge at each position; None if these are the positions themselves.
    num_sources, num_targets, num_nodes, num_edges : int
        Sources and targets are the same nodes, unless their numbers differ: then there is no num_nodes.

    The layout is that of SciPy's CSR matrices, with the row a target and the column a source, so that
    ``graph.to_scipy(weights) @ x`` sums what each target receives.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> graph = rv.CSRGraph.from_edge_index([[0, 2, 1, 0], [1, 0, 1, 2]], num_nodes=3)
    >>> graph
    CSRGraph(num_nodes=3, num_edges=4)
    >>> graph.indptr.tolist(), graph.indices.tolist(), graph.edge_ids.tolist()
    ([0, 1, 3, 4], [2, 0, 1, 0], [1, 0, 2, 3])
    """

    __slots__ = ("__weakref__", "_derived", "edge_ids", "indices", "indptr", "num_sources")

    indptr: Array
    indices: Array
    edge_ids: Array | None
    num_sources: int
    _derived: dict[tuple[Derived[Any], tuple[Hashable, ...]], Any]  # written to by `derived` alone

    def __init__(self, *edges: object, **more: object) -> None:
        hint = "use CSRGraph.from_edge_index, from_neighbors, from_scipy or from_networkx"
        raise GraphStructureError("a CSRGraph is made from edges", hint=hint)

    def __setattr__(self, name: str, value: object = None) -> None:
        raise AttributeError(f"a CSRGraph cannot be changed: {name}")

    __delattr__ = __setattr__

    def __reduce__(self) -> tuple[Callable[..., CSRGraph], tuple[Any, ...]]:
        return _assembled, (self.indptr, self.indices, self.edge_ids, self.num_sources)

    # --- making one ------------------------------------------------------------------------------------------------
    @classmethod
    def from_edge_index(cls, edge_index: ArrayLike, num_nodes: int | tuple[int, int] | None = None) -> CSRGraph:
        """From the two ends of each edge, in any order.

        Parameters
        ----------
        edge_index : array_like of integers (2, E)
            The source of each edge, and its target.
        num_nodes : int or (int, int), optional
            How many nodes, or sources and targets, there are. None for as many as the largest index says.

        Returns
        -------
        CSRGraph
            Edge e is the e-th column of `edge_index`.

        Raises
        ------
        GraphStructureError, OutOfMemoryError
            If `edge_index` has another shape, or holds other than nodes; if there is no memory for so many nodes.

        Examples
        --------
        >>> import ruvector_numba as rv
        >>> rv.CSRGraph.from_edge_index([[0, 4], [1, 1]], num_nodes=(5, 2))
        CSRGraph(num_sources=5, num_targets=2, num_edges=2)
        """
        ends, num_sources, num_targets = edges.ends(edge_index, num_nodes)
        return _grouped(ends[0], ends[1], num_sources, num_targets)

    @classmethod
    def from_neighbors(cls, indptr: ArrayLike, indices: ArrayLike, num_sources: int | None = None) -> CSRGraph:
        """From the sources of each target, as they stand in memory here too.

        Parameters
        ----------
        indptr : array_like of integers (num_targets + 1)
            The sources of target i are ``indices[indptr[i]:indptr[i + 1]]``.
        indices : array_like of integers (E)
            Copied. Edge e is that of ``indices[e]``.
        num_sources : int, optional
            None for the same nodes as the targets.

        Returns
        -------
        CSRGraph

        Raises
        ------
        GraphStructureError, OutOfMemoryError
            If `indptr` does not rise from 0 to E, or an index is no node; if there is no memory for so many sources.

        Examples
        --------
        >>> import ruvector_numba as rv
        >>> rv.CSRGraph.from_neighbors([0, 2, 2, 3], [1, 2, 0])
        CSRGraph(num_nodes=3, num_edges=3)
        """
        starts, sources, num_sources = edges.neighbors(indptr, indices, num_sources)
        dtype = edges.index_dtype(num_sources, len(starts), len(sources))
        return _assembled(starts.astype(dtype), sources.astype(dtype), None, num_sources)

    @classmethod
    def from_scipy(cls, matrix: Any) -> CSRGraph:
        """From a sparse matrix whose rows are targets and whose columns are sources, as in ``matrix @ x``.

        Parameters
        ----------
        matrix : scipy.sparse array or matrix, CSR, CSC or COO, (num_targets, num_sources)
            Every stored entry is an edge, a zero or a duplicate too; edge e is that of ``matrix.data[e]``. The values
            are ignored: give a layer ``edge_attr=matrix.data`` where they shall count. Transpose it if it says who
            points to whom, as NetworkX's does.

        Returns
        -------
        CSRGraph

        Raises
        ------
        GraphStructureError
            If it is no such matrix, or holds an index that is no node.

        Examples
        --------
        >>> import scipy.sparse, ruvector_numba as rv
        >>> rv.CSRGraph.from_scipy(scipy.sparse.csc_array([[0, 2, 0], [3, 0, 0]]))
        CSRGraph(num_sources=3, num_targets=2, num_edges=2)
        """
        form, (num_targets, num_sources) = others.sparse_format(matrix), matrix.shape
        if form == "csr":
            return cls.from_neighbors(matrix.indptr, matrix.indices[: matrix.nnz], num_sources)
        return _grouped(*others.ends_of_sparse(matrix), num_sources, num_targets)

    @classmethod
    def from_networkx(cls, graph: Any) -> CSRGraph:
        """From a NetworkX graph; node n is the n-th of ``list(graph)``.

        Edges are numbered node by node as ``graph.adjacency()`` gives them, which is the order of PyTorch Geometric's
        `from_networkx`. Those of an undirected graph go both ways, a self-loop once; those of a multigraph are kept.

        Parameters
        ----------
        graph : networkx.Graph, DiGraph, MultiGraph or MultiDiGraph

        Returns
        -------
        CSRGraph

        Raises
        ------
        GraphStructureError
            If it is no NetworkX graph.
        """
        sources, targets, num_nodes = others.ends_of_networkx(graph)
        return _grouped(sources, targets, num_nodes, num_nodes)

    # --- what it is ------------------------------------------------------------------------------------------------
    @property
    def num_targets(self) -> int:
        """How many nodes attend: one less than `indptr` has numbers."""
        return len(self.indptr) - 1

    @property
    def num_nodes(self) -> int:
        """How many nodes there are; GraphStructureError where sources and targets are not the same ones."""
        if self.is_bipartite:
            raise _NoNumNodes("sources and targets differ", hint="ask for num_sources or num_targets")
        return self.num_targets

    @property
    def num_edges(self) -> int:
        """How many edges there are, duplicates and self-loops among them."""
        return len(self.indices)

    @property
    def is_bipartite(self) -> bool:
        """Do sources and targets differ in number, so that they cannot be the same nodes?"""
        return self.num_sources != self.num_targets

    @property
    def in_degrees(self) -> Array:
        """(num_targets): edges that each target receives."""
        return np.diff(self.indptr)

    @property
    def out_degrees(self) -> Array:
        """(num_sources): edges that each source sends."""
        return np.bincount(self.indices, minlength=self.num_sources).astype(self.indices.dtype)

    @property
    def transposed(self) -> Transposed:
        """The edges grouped by source; built when first asked for."""
        return self.derived(TRANSPOSED, self._transpose)

    def __repr__(self) -> str:
        nodes = f"num_sources={self.num_sources}, num_targets" if self.is_bipartite else "num_nodes"
        return f"CSRGraph({nodes}={self.num_targets}, num_edges={self.num_edges})"

    def by_position(self, values: ArrayLike) -> Array:
        """Values in the caller's order of edges, now as the edges stand in `indices`. See `by_edge` for an example.

        Parameters
        ----------
        values : array_like (E, ...)

        Returns
        -------
        array (E, ...)

        Raises
        ------
        DimensionMismatchError, InvalidInputError
            If there is not one for each edge; if they become no array, or are one of `numpy.ma`.
        """
        one_each = self._one_each("values", edges.as_given("values", values))
        return one_each if self.edge_ids is None else one_each[self.edge_ids]

    def by_edge(self, values: ArrayLike) -> Array:
        """Values as the edges stand in `indices`, now in the caller's order: the inverse of `by_position`.

        Parameters
        ----------
        values : array_like (E, ...)

        Returns
        -------
        array (E, ...)

        Raises
        ------
        DimensionMismatchError, InvalidInputError
            If there is not one for each edge; if they become no array, or are one of `numpy.ma`.

        Examples
        --------
        >>> import ruvector_numba as rv
        >>> graph = rv.CSRGraph.from_edge_index([[0, 2, 1, 0], [1, 0, 1, 2]])
        >>> graph.by_position([10, 11, 12, 13]).tolist()
        [11, 10, 12, 13]
        >>> graph.by_edge([11, 10, 12, 13]).tolist()
        [10, 11, 12, 13]
        """
        one_each = self._one_each("values", edges.as_given("values", values))
        if self.edge_ids is None:
            return one_each
        out = np.empty_like(one_each)
        out[self.edge_ids] = one_each
        return out

    def to_edge_index(self) -> NDArray[np.int64]:
        """The two ends of each edge.

        Returns
        -------
        array of int64 (2, E)
            Sources above targets, in the caller's order.
        """
        out = np.empty((2, self.num_edges), np.int64)
        for row, ends in zip(out, (self.indices, self._targets()), strict=True):
            row[slice(None) if self.edge_ids is None else self.edge_ids] = ends
        return out

    def to_scipy(self, values: ArrayLike | None = None) -> Any:
        """The graph as a sparse matrix with one stored entry for each edge.

        Parameters
        ----------
        values : array_like (E), optional
            The entries, in the caller's order of edges; None for ones, float32.

        Returns
        -------
        scipy.sparse.csr_array (num_targets, num_sources)
            Its entries stand grouped by target: ``graph.by_edge(result.data)`` is in the caller's order again.

        Raises
        ------
        DimensionMismatchError, InvalidInputError
            If there is not one for each edge; if these are no numbers, or an array of `numpy.ma`.

        Examples
        --------
        >>> import ruvector_numba as rv
        >>> rv.CSRGraph.from_edge_index([[0, 2], [1, 0]]).to_scipy([5.0, 6.0]).toarray().tolist()
        [[0.0, 0.0, 6.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
        """
        import scipy.sparse

        data = np.ones(self.num_edges, np.float32) if values is None else np.array(self.by_position(values))
        if data.ndim != 1:
            shapes = {"values.shape": data.shape}
            raise DimensionMismatchError((self.num_edges,), data.shape, shapes=shapes, hint="one number for each edge")
        if data.dtype.kind not in "biufc":
            raise InvalidInputError(f"values has dtype {data.dtype}, which is no number", hint="give numbers")
        shape = self.num_targets, self.num_sources
        return scipy.sparse.csr_array((data, self.indices.copy(), self.indptr.copy()), shape=shape)

    # --- self-loops ------------------------------------------------------------------------------------------------
    def with_self_loops(self, policy: LoopPolicy = "replace") -> CSRGraph:
        """The graph with an edge from each node to itself; made when first asked for.

        Parameters
        ----------
        policy : {"replace", "add", "keep"}
            "replace" takes out the self-loops that are there and gives each node one, as `GATConv` of PyTorch Geometric
            does; "add" gives each node one more, as its `add_self_loops`; "keep" is the graph as it is.

        Returns
        -------
        CSRGraph
            Nodes are the first min(num_sources, num_targets), and the new edges are the caller's last, in the order of
            nodes, behind those that stay. `edge_attr_with_self_loops` gives what belongs to them.

        Raises
        ------
        InvalidConfigError
            If the policy is none of these.

        Examples
        --------
        >>> import ruvector_numba as rv
        >>> graph = rv.CSRGraph.from_edge_index([[0, 1, 1], [1, 1, 0]])
        >>> graph.with_self_loops().to_edge_index().tolist()
        [[0, 1, 0, 1], [1, 0, 0, 1]]
        """
        if edges.loop_policy("policy", policy) == "keep":
            return self
        return self.derived(WITH_LOOPS, lambda: self._put_loops(policy), policy)

    def edge_attr_with_self_loops(
        self, edge_attr: ArrayLike, policy: LoopPolicy = "replace", fill_value: str | ArrayLike = "mean"
    ) -> Array:
        """An array of edges, extended to the edges of ``with_self_loops(policy)``, in their order.

        Parameters
        ----------
        edge_attr : array_like of floats (E, ...)
            For the edges of this graph, in the caller's order.
        policy : {"replace", "add", "keep"}
            As in `with_self_loops`.
        fill_value : "mean", "add", number or array_like
            Entries of new self-loops: the mean or the sum of those of the other edges to the node (0 where there are
            none; with "add" its older self-loops count), or this number, or this array, which broadcasts to one entry
            for each node.

        Returns
        -------
        array (E of the new graph, ...)

        Raises
        ------
        DimensionMismatchError, InvalidInputError
            If there is not one entry for each edge, or `fill_value` does not broadcast; if they hold no floats.
        InvalidConfigError
            If the policy or the word in `fill_value` is unknown.

        Examples
        --------
        >>> import ruvector_numba as rv
        >>> graph = rv.CSRGraph.from_edge_index([[0, 1, 1], [1, 1, 0]])
        >>> graph.edge_attr_with_self_loops([3.0, 5.0, 7.0]).tolist()
        [3.0, 7.0, 7.0, 3.0]
        """
        values = self._one_each("edge_attr", floats("edge_attr", edge_attr))
        if edges.loop_policy("policy", policy) == "keep":
            return values.copy()
        return self_loops.put_in(self, values, policy, fill_value)

    # --- what is derived from it -----------------------------------------------------------------------------------
    def derived(self, kind: Derived[_T], make: Callable[[], _T], *of: Hashable) -> _T:
        """Something that follows from the graph, made when first asked for and kept as long as the graph lives.

        Parameters
        ----------
        kind : Derived
            The kind of thing, and so the type of what is returned.
        make : callable
            Makes it, in two threads maybe, which both get the one that is kept. Other graphs that it holds on to live
            as long as this one.
        *of : hashable
            All that it depends on besides the graph, such as a policy or a device: there is one for each.
        """
        key = kind, of
        found = self._derived.get(key)
        return self._derived.setdefault(key, make()) if found is None else found

    # --- inside ----------------------------------------------------------------------------------------------------
    def _targets(self) -> Array:
        """(E): the target at each position."""
        return np.repeat(np.arange(self.num_targets, dtype=self.indices.dtype), self.in_degrees)

    def _transpose(self) -> Transposed:
        from ..plan import grouping as plan

        survey = plan.survey(self.indices, self._targets(), self.num_sources, self.num_targets, self.indices.dtype)
        indptr, targets, positions = plan.group(survey)
        if positions is None:
            positions = np.arange(self.num_edges, dtype=self.indices.dtype)
        return Transposed(*map(_frozen, (indptr, targets, positions)))

    def _put_loops(self, policy: LoopPolicy) -> CSRGraph:
        from ..plan import loops as plan

        loops = min(self.num_sources, self.num_targets)
        dtype = edges.index_dtype(self.num_sources, self.num_targets, self.num_edges + loops)
        parts = self_loops.parts(self)
        made = plan.put_loops(parts, plan.find_loops(parts) if policy == "replace" else None, loops, dtype)
        return _assembled(*made, self.num_sources)

    def _one_each(self, name: str, x: Array) -> Array:
        if x.ndim == 0 or len(x) != self.num_edges:
            shapes, hint = {f"{name}.shape": x.shape}, "one entry for each edge, in the first axis"
            raise DimensionMismatchError(self.num_edges, len(x) if x.ndim else (), shapes=shapes, hint=hint)
        return x


# --- assembly ------------------------------------------------------------------------------------------------------
def _frozen(x: Array) -> Array:
    x.flags.writeable = False
    return x


def _assembled(indptr: Array, indices: Array, edge_ids: Array | None, num_sources: int) -> CSRGraph:
    """A graph of these parts, which are right and are its own."""
    graph, ids = object.__new__(CSRGraph), None if edge_ids is None else _frozen(edge_ids)
    parts: tuple[Any, ...] = _frozen(indptr), _frozen(indices), ids, num_sources, {}
    for name, part in zip(("indptr", "indices", "edge_ids", "num_sources", "_derived"), parts, strict=True):
        object.__setattr__(graph, name, part)
    return graph


def _grouped(sources: Array, targets: Array, num_sources: int, num_targets: int) -> CSRGraph:
    """From the ends of the edges, integers of any kind, which are checked here."""
    from ..plan import grouping as plan  # at the first call, as it loads the kernels

    dtype = edges.index_dtype(num_sources, num_targets, len(sources))
    check_memory((num_targets + 1,), dtype, "indptr", hint="it has one number for each target: is num_nodes right?")
    edges.check_num_sources(num_sources, "num_nodes")
    integer = dtype if dtype == sources.dtype == targets.dtype == np.int32 else np.dtype(np.int64)
    keys, others = (np.require(ends, integer, ["C", "A"]) for ends in (targets, sources))
    survey = plan.survey(keys, others, num_targets, num_sources, dtype)
    if survey.bad >= 0:
        raise edges.no_node(survey.bad, sources[survey.bad], targets[survey.bad], num_sources, num_targets)
    return _assembled(*plan.group(survey), num_sources)
