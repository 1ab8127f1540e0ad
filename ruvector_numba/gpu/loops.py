"""What belongs to edges, for the edges with self-loops that a layer puts in, on a GPU; and back.

Each edge of the graph with self-loops is a target here, and the caller's edges are what it is made of: an edge that
stays is made of itself, a new loop of the other edges to its node, or of a constant. So this is attention over
neighbours with given weights.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import gpu
from ..arrays import Array
from ..graphs import edges
from ..graphs.derived import Derived
from ..graphs.graph import CSRGraph
from .arrays import GpuArray, Space
from .neighbors import NeighborTerms, Past

__all__ = ["loops_put_in", "loops_taken_out"]

OF_LOOPS = Derived[tuple[CSRGraph, Array, int]]("from the caller's edges to those with self-loops")


def loops_put_in(space: Space, graph: CSRGraph, values: GpuArray, policy: Any, fill_value: Any) -> GpuArray:
    """(E', ...): see `CSRGraph.edge_attr_with_self_loops`."""
    past = _past(space, graph, values, policy, fill_value)
    shape = (past.graph.num_targets, *values.shape[1:])
    return past.output._replace(shape=shape, strides=gpu.contiguous_strides(shape))


def loops_taken_out(space: Space, graph: CSRGraph, grad: GpuArray, policy: Any, fill_value: Any) -> GpuArray:
    """The gradient of the values that `loops_put_in` was given, from that of what it gave."""
    shape = (graph.num_edges, *grad.shape[1:])
    past = _past(space, graph, space.keep(space.empty(shape, grad.element)), policy, fill_value)
    found = past.backward(space, _rows(grad)).value
    return found._replace(shape=shape, strides=gpu.contiguous_strides(shape))


def _past(space: Space, graph: CSRGraph, values: GpuArray, policy: Any, fill_value: Any) -> Past:
    from ..plan import cuda_csr as plan

    fill = edges.checked_fill(fill_value)
    whole, weights, loops = _made_of(graph, policy, fill if isinstance(fill, str) else None)
    rows = _rows(values)
    offset = None
    if not isinstance(fill, str):
        filled = np.zeros((whole.num_targets, *values.shape[1:]), np.float32)
        filled[whole.num_targets - loops :] = edges.filled(fill, (loops, *values.shape[1:]), filled.dtype)
        offset = _rows(space.keep(gpu.uploaded(space, filled, values.element)))
    bias = space.keep(gpu.uploaded(space, weights[:, None], values.element))
    terms = NeighborTerms(plan.GIVEN, rows, None, rows, bias=bias, normalizes=False, offset=offset)
    return Past(whole, terms, space)


def _rows(x: GpuArray) -> GpuArray:
    """(E, ...) as (E, 1, channels)"""
    shape = (x.shape[0], 1, math.prod(x.shape[1:]))
    return x._replace(shape=shape, strides=gpu.contiguous_strides(shape))


def _made_of(graph: CSRGraph, policy: Any, word: str | None) -> tuple[CSRGraph, Array, int]:
    """The graph from the caller's edges to those with self-loops, the weights of its edges, and how many loops."""
    return graph.derived(OF_LOOPS, lambda: _built(graph, policy, word), policy, word)


def _built(graph: CSRGraph, policy: Any, word: str | None) -> tuple[CSRGraph, Array, int]:
    source, target = graph.to_edge_index()
    loops = min(graph.num_sources, graph.num_targets)
    stays = source != target if policy == "replace" else np.ones(len(source), np.bool_)
    kept = np.flatnonzero(stays)
    counts, chosen = np.zeros(loops, np.int64), np.zeros(0, np.int64)
    if word is not None:
        order = kept[np.argsort(target[kept], kind="stable")]
        chosen = order[target[order] < loops]
        counts = np.bincount(target[chosen], minlength=loops)
    ends = np.concatenate([np.arange(len(kept) + 1), len(kept) + np.cumsum(counts)])
    whole = CSRGraph.from_neighbors(ends, np.concatenate([kept, chosen]), num_sources=graph.num_edges)
    shares = np.repeat(1 / np.maximum(counts, 1) if word == "mean" else np.ones(loops), counts)
    return whole, np.concatenate([np.ones(len(kept)), shares]).astype(np.float32), loops
