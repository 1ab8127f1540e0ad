"""Mini-batches of a graph that is too large for one pass: a few nodes, and neighbours drawn for them, hop by hop.

The first hop draws neighbours of the target nodes, the second neighbours of the nodes that the first has added, and so
on; a node is expanded once, when it is new. What is drawn for a node is decided by the seed, the hop and the node's
number alone: no other node, no order and no number of threads has a say in it.

Training looks like this. Three kinds of nodes, which mostly have neighbours of their own kind, and features that say
little by themselves; a softmax regression on the mean over neighbours, taken twice:

>>> import numpy as np, ruvector_numba as rv
>>> rng = np.random.default_rng(0)
>>> kind = rng.integers(0, 3, 600)
>>> ends = rng.integers(0, 600, (2, 30000))
>>> is_edge = (kind[ends[0]] == kind[ends[1]]) | (rng.random(30000) < 0.1)
>>> graph = rv.CSRGraph.from_edge_index(ends[:, is_edge], num_nodes=600)
>>> x = np.eye(3)[kind] + 2 * rng.standard_normal((600, 3))  # or np.load("features.npy", mmap_mode="r")

>>> def logits(sample, W):
...     to_mean = sample.graph.to_scipy() / np.maximum(sample.graph.in_degrees, 1)[:, None]
...     h = (to_mean @ (to_mean @ sample.features(x)))[: sample.num_targets]
...     return h, h @ W

>>> W = np.zeros((3, 3))
>>> for epoch in range(5):
...     for sample in rv.neighbor_batches(graph, np.arange(300), (5, 5), batch_size=50, seed=epoch, shuffle=True):
...         h, z = logits(sample, W)
...         p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
...         W -= 0.02 * h.T @ (p - np.eye(3)[kind[sample.nodes[: sample.num_targets]]])

>>> rest = rv.sample_neighbors(graph, np.arange(300, 600), (-1, -1))  # all neighbours
>>> bool((logits(rest, W)[1].argmax(axis=1) == kind[300:]).mean() > 0.95)
True
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..arrays import Array
from ..errors import DimensionMismatchError, GraphStructureError, InvalidConfigError, InvalidInputError
from ..values import as_array, is_list, random_seed, shown, switch, whole_number
from .edges import as_given, refuse_masked
from .graph import CSRGraph
from .neighbors import checked_graph

__all__ = ["NeighborBatches", "NeighborSample", "neighbor_batches", "sample_neighbors"]

Nodes = NDArray[np.int64]
Words = NDArray[np.uint64]


@dataclass(frozen=True, eq=False, repr=False)
class NeighborSample:
    """A subgraph around some target nodes.

    Attributes
    ----------
    nodes : array of int64 (n)
        Its nodes, by their numbers in the whole graph: the targets as they were given, then the others in the order in
        which they first appeared.
    graph : CSRGraph
        Its edges, between places in `nodes`; edges of one target keep the order that they have in the whole graph.
    edges : array of int64 (E)
        The numbers in the whole graph of the edges of `graph`, as in ``edge_attr[sample.edges]``; both in the caller's
        order.
    num_targets : int
        The targets are ``nodes[:num_targets]``.
    num_all_nodes : int
        Nodes of the whole graph.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> graph = rv.CSRGraph.from_edge_index([[1, 2, 3, 4, 5], [0, 0, 0, 3, 4]])
    >>> sample = rv.sample_neighbors(graph, [3], -1)
    >>> sample.nodes.tolist(), sample.edges.tolist(), sample.graph
    ([3, 4], [3], CSRGraph(num_nodes=2, num_edges=1))
    """

    nodes: NDArray[np.int64]
    graph: CSRGraph
    edges: NDArray[np.int64]
    num_targets: int
    num_all_nodes: int

    def __repr__(self) -> str:
        counts = f"num_targets={self.num_targets}, num_nodes={len(self.nodes)}, num_edges={len(self.edges)}"
        return f"NeighborSample({counts})"

    def features(self, x: ArrayLike) -> Array:
        """``x[nodes]``, of what belongs to all nodes of the whole graph.

        Parameters
        ----------
        x : array_like (num_all_nodes, ...)
            Features, labels or whatever else; of a `numpy.memmap` only the rows that are needed are read.

        Returns
        -------
        array (n, ...)
            An ordinary one, in memory.

        Raises
        ------
        DimensionMismatchError
            If `x` does not have one row for each node of the whole graph.
        InvalidInputError
            If it is no array and cannot become one, or is one of `numpy.ma`, whose mask would be lost.

        Examples
        --------
        >>> import ruvector_numba as rv
        >>> sample = rv.sample_neighbors(rv.CSRGraph.from_edge_index([[2], [0]], num_nodes=4), [0], -1)
        >>> sample.features([10.0, 11.0, 12.0, 13.0]).tolist()
        [10.0, 12.0]
        """
        rows = as_given("x", x)
        if rows.ndim == 0 or len(rows) != self.num_all_nodes:
            shapes = {"x.shape": rows.shape, "expected": f"({self.num_all_nodes}, ...)"}
            hint = "give the rows of all nodes of the whole graph; those of the sample are picked here"
            got = len(rows) if rows.ndim else ()
            raise DimensionMismatchError(self.num_all_nodes, got, shapes=shapes, hint=hint)
        return rows[self.nodes]


class NeighborBatches(Iterator[NeighborSample]):
    """The samples of one epoch, each drawn when it is asked for, once; made by `neighbor_batches`.

    Its `len` is the number of samples of the whole epoch, however many were taken: what a progress bar asks for.
    """

    def __init__(self, graph: CSRGraph, seeds: Nodes, fan_outs: list[int], batch_size: int, seed: int) -> None:
        starts = range(0, len(seeds), batch_size)
        self._len = len(starts)
        self._samples = (_sample(graph, seeds[start : start + batch_size], fan_outs, seed) for start in starts)

    def __repr__(self) -> str:
        return f"NeighborBatches({len(self)} samples)"

    def __len__(self) -> int:
        return self._len

    def __next__(self) -> NeighborSample:
        return next(self._samples)


# --- drawing -------------------------------------------------------------------------------------------------------
def sample_neighbors(
    graph: CSRGraph, nodes: ArrayLike, fan_out: int | Sequence[int], *, seed: int | None = 0
) -> NeighborSample:
    """Draw a subgraph around some nodes, enough of it to compute them in as many layers as there are fan-outs.

    Each new node gets up to `fan_out` of the edges into it, each set of so many being as likely as any other. After the
    last hop the nodes that were new in it have no edges: their features count, what a layer makes of them does not
    reach the targets.

    Parameters
    ----------
    graph : CSRGraph
        Its sources and targets are the same nodes.
    nodes : array_like of integers (n)
        The target nodes, none of them twice.
    fan_out : int or sequence of int
        Edges to draw for each node, one number for each layer, that of the targets first; -1 for all edges.
    seed : int, optional
        The same seed draws the same neighbours for a node that is new in the same hop, whatever the other nodes are.
        Fresh for each call if None.

    Returns
    -------
    NeighborSample

    Raises
    ------
    GraphStructureError
        If `graph` is no CSRGraph or has other sources than targets, or a number in `nodes` is no node.
    InvalidInputError
        If `nodes` holds a node twice, or no integers, or has another shape, or `seed` is no whole number from 0 to
        2**63 - 1.
    InvalidConfigError
        If `fan_out` holds anything but positive whole numbers and -1.

    References
    ----------
    Hamilton, Ying, Leskovec, "Inductive Representation Learning on Large Graphs", 2017; which nodes are expanded, and
    how they are numbered, is as in `NeighborLoader` of PyTorch Geometric.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> graph = rv.CSRGraph.from_edge_index([[1, 2, 3, 4, 5], [0, 0, 0, 3, 4]])
    >>> sample = rv.sample_neighbors(graph, [0], (2, -1), seed=1)
    >>> sample
    NeighborSample(num_targets=1, num_nodes=4, num_edges=3)
    >>> sample.nodes.tolist(), sample.edges.tolist()
    ([0, 2, 3, 4], [1, 2, 3])
    >>> sample.graph.to_edge_index().tolist()
    [[1, 2, 3], [0, 0, 2]]
    """
    seeds = _nodes(graph, nodes)
    return _sample(graph, seeds, _fan_outs(fan_out), random_seed(seed))


def neighbor_batches(
    graph: CSRGraph,
    nodes: ArrayLike,
    fan_out: int | Sequence[int],
    batch_size: int,
    *,
    seed: int | None = 0,
    shuffle: bool = False,
) -> NeighborBatches:
    """One epoch: `sample_neighbors` around `batch_size` of the nodes at a time, the last time around those left.

    To train, give each epoch a seed of its own and shuffle, ``seed=epoch, shuffle=True``: with the defaults, every
    epoch draws the same neighbours, in the same order.

    Parameters
    ----------
    graph, nodes, fan_out
        See `sample_neighbors`.
    batch_size : int
        Target nodes of a sample.
    seed : int, optional
        Decides the order and the draws. All batches of an epoch draw with the same, so that a node has the same
        neighbours in each of them where it is new in the same hop. A fresh one if None.
    shuffle : bool, default False
        Take the nodes in random order, which does not depend on the order they are given in; else in that.

    Returns
    -------
    NeighborBatches
        An iterator over the samples; its `len` is the number of them.

    Raises
    ------
    GraphStructureError, InvalidInputError
        As `sample_neighbors`, InvalidInputError also for a `shuffle` that is neither True nor False; at the call,
        before the first sample is drawn.
    InvalidConfigError
        As `sample_neighbors`; also if `batch_size` is no positive whole number.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> graph = rv.CSRGraph.from_edge_index([[1, 2, 3, 4], [0, 0, 3, 3]])
    >>> batches = rv.neighbor_batches(graph, [0, 1, 2, 3], 1, batch_size=2)
    >>> len(batches), [sample.nodes[:2].tolist() for sample in batches]
    (2, [[0, 1], [2, 3]])
    """
    seeds, fan_outs, seed = _nodes(graph, nodes), _fan_outs(fan_out), random_seed(seed)
    batch_size = whole_number("batch_size", batch_size, 1, error=InvalidConfigError)
    if switch("shuffle", shuffle):
        seeds = seeds[np.argsort(_dice(seed, _ORDER, seeds))]
    return NeighborBatches(graph, seeds, fan_outs, batch_size, seed)


def _sample(graph: CSRGraph, seeds: Nodes, fan_outs: list[int], seed: int) -> NeighborSample:
    """Targets stand in the sample in the order in which they are expanded, so its edges are grouped as they come."""
    places = np.zeros(
        graph.num_targets, graph.indices.dtype
    )  # of a node in the sample, from 1 on; 0 if it is not there
    places[seeds] = np.arange(1, len(seeds) + 1)
    new, known, hops = seeds, len(seeds), []
    for hop, fan_out in enumerate(fan_outs, 1):
        begins = graph.indptr[new].astype(np.int64)
        degrees = graph.indptr[new + 1] - begins
        count, chosen = _chosen(degrees, fan_out, _dice(seed, hop, new))
        position = chosen + np.repeat(begins - _before(degrees), count)
        source = graph.indices[position]
        unseen = source[places[source] == 0]
        turn = np.arange(1, len(unseen) + 1, dtype=places.dtype)
        places[unseen[::-1]] = turn[::-1]  # of several numbers for a node the last one written stays: its first turn
        new = unseen[places[unseen] == turn].astype(np.int64)
        places[new] = np.arange(known + 1, known + len(new) + 1)
        known += len(new)
        hops.append((new, count, position, source))
    added, counts, positions, sources = zip(*hops, strict=True)
    indptr = np.cumsum(np.concatenate([[0], *counts, np.zeros_like(new)]))  # what is new at last is not expanded
    made = CSRGraph.from_neighbors(indptr, places[np.concatenate(sources)] - 1)
    edges = np.concatenate(positions)
    if graph.edge_ids is not None:
        edges = graph.edge_ids[edges].astype(np.int64)
    return NeighborSample(np.concatenate([seeds, *added]), made, edges, len(seeds), graph.num_targets)


def _chosen(degrees: NDArray[np.int64], most: int, dice: Words) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many edges each node gets, and which, ascending, counted through all edges of these nodes.

    Floyd's choice of `most` out of n, of all nodes at once: step by step one of the first n - most + 1, n - most + 2,
    ..., n edges is drawn, and if it was drawn before, the last of them is taken, which cannot have been.

    References
    ----------
    Bentley, Floyd, "Programming pearls: a sample of brilliance", 1987.
    """
    is_large = degrees > most
    if most == -1 or not is_large.any():
        return degrees, np.arange(degrees.sum())
    taken = np.repeat(~is_large, degrees)
    begins, last, dice = _before(degrees)[is_large], degrees[is_large] - most, dice[is_large]
    for step in range(1, most + 1):
        fractions = (_mixed(dice + _words(step * _STEP)) >> _words(11)) * 2.0**-53  # of 53 bits, in [0, 1)
        drawn = begins + (fractions * (last + 1)).astype(np.int64)
        drawn = np.where(taken[drawn], begins + last, drawn)
        taken[drawn] = True
        last += 1
    return np.minimum(degrees, most), np.flatnonzero(taken)


def _before(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sum of those before each."""
    return np.cumsum(counts) - counts


# --- dice ----------------------------------------------------------------------------------------------------------
_ORDER = 0  # what dice are for: the order of the nodes, or a hop, which count from 1
_STEP, _NODE = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03


def _dice(seed: int, purpose: int, nodes: Nodes) -> Words:
    """64 random bits for each node, all different."""
    key = _mixed(_mixed(_words(seed)) + _words(purpose * _STEP))
    return _mixed(key + nodes.astype(np.uint64) * _words(_NODE))


def _mixed(x: Words) -> Words:
    """A 64-bit finaliser (splitmix64): every bit of the result depends on every bit of x, and none is lost."""
    x = (x ^ (x >> _words(30))) * _words(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _words(27))) * _words(0x94D049BB133111EB)
    return x ^ (x >> _words(31))


def _words(n: int) -> Words:
    """One word, as an array since NumPy warns when a scalar overflows."""
    return np.array([n % (1 << 64)], np.uint64)


# --- checks --------------------------------------------------------------------------------------------------------
def _nodes(graph: CSRGraph, nodes: ArrayLike) -> Nodes:
    if checked_graph(graph).is_bipartite:
        shapes = {"num_sources": graph.num_sources, "num_targets": graph.num_targets}
        hint = (
            "a drawn source is a target of the next hop: number all nodes in one row, from_edge_index(..., num_nodes=N)"
        )
        raise GraphStructureError("sources and targets are different nodes", shapes=shapes, hint=hint)
    refuse_masked("nodes", nodes)
    found = as_array("nodes", nodes)
    if found.size == 0 and is_list(nodes):
        found = found.astype(np.int64)
    if found.dtype.kind not in "iu":
        hint = "of a mask take numpy.flatnonzero(nodes)" if found.dtype.kind == "b" else "give the nodes' whole numbers"
        raise InvalidInputError(f"nodes has dtype {found.dtype}, not an integer one", hint=hint)
    if found.ndim != 1:
        hint = "give a row of numbers; one node is [node]"
        raise InvalidInputError(f"nodes has {found.ndim} axes", shapes={"nodes.shape": found.shape}, hint=hint)
    n = graph.num_targets
    odd = np.flatnonzero((found < 0) | (found >= n))
    if len(odd):
        there = f"0 to {n - 1}" if n else "none"
        hint = "nodes count from 0, and the graph was made with as many as num_nodes says"
        raise GraphStructureError(f"nodes[{odd[0]}] is {found[odd[0]]}, and the nodes are {there}", hint=hint)
    ordered = np.sort(found)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(again):
        raise InvalidInputError(f"nodes holds {again[0]} more than once", hint="numpy.unique(nodes) holds each once")
    return found.astype(np.int64)


def _fan_outs(fan_out: int | Sequence[int]) -> list[int]:
    several = fan_out.tolist() if isinstance(fan_out, np.ndarray) else fan_out
    several = several if isinstance(several, list | tuple) else [several]  # type: ignore[list-item]
    hint = "give a positive whole number for each layer, or -1 for all neighbours, as in (10, 5)"
    found = [whole_number("one number of fan_out", n, -1, error=InvalidConfigError, hint=hint) for n in several]
    if not found or 0 in found:
        raise InvalidConfigError(f"fan_out is {shown(fan_out)}", hint=hint)
    return found
