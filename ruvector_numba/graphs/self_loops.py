"""What belongs to edges when a graph gets self-loops, and the way back of its gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ..arrays import Array
from . import edges

if TYPE_CHECKING:
    from ..plan import grouping as plan
    from .graph import CSRGraph

__all__ = ["parts", "put_in", "taken_out"]


def put_in(graph: CSRGraph, values: Array, policy: edges.LoopPolicy, fill_value: str | ArrayLike) -> Array:
    """(E', ...) of the edges with self-loops, where `values` (E, ...) belong to those without."""
    from ..plan import loops as plan
    from ..plan import memory

    loops, whole = min(graph.num_sources, graph.num_targets), graph.with_self_loops(policy)
    out = memory.empty((whole.num_edges, *values.shape[1:]), values.dtype)
    fill = edges.checked_fill(fill_value)
    if not isinstance(fill, str):
        out[len(out) - loops :] = edges.filled(fill, (loops, *values.shape[1:]), values.dtype)
    removes = policy == "replace"
    plan.put_rows(parts(graph), parts(whole), removes, loops, fill, _rows(values), _rows(out))
    return out


def taken_out(graph: CSRGraph, grad: Array, policy: edges.LoopPolicy, fill_value: str | ArrayLike) -> Array:
    """The adjoint of `put_in`: what loops were filled with came from the other edges."""
    from ..plan import loops as plan
    from ..plan import memory

    loops, whole = min(graph.num_sources, graph.num_targets), graph.with_self_loops(policy)
    out = memory.empty((graph.num_edges, *grad.shape[1:]), grad.dtype)
    removes = policy == "replace"
    plan.take_rows(parts(graph), parts(whole), removes, loops, fill_value, _rows(out), _rows(grad))
    return out


def parts(graph: CSRGraph) -> plan.Grouped:
    from ..plan import grouping as plan

    return plan.Grouped(graph.indptr, graph.indices, graph.edge_ids)


def _rows(x: Array) -> Array:
    """(E, ...) as (E, C)"""
    return np.ascontiguousarray(x).reshape(len(x), math.prod(x.shape[1:]))
