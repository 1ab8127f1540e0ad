"""The edge arrays' entries of the self-loops that a graph gets, and the way back of their gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..checks import Array
from ..errors import InvalidConfigError
from . import edges

if TYPE_CHECKING:
    from .graph import CSRGraph

__all__ = ["filled", "taken_out"]


def filled(graph: CSRGraph, values: Array, stays: NDArray[np.bool_], fill_value: str | ArrayLike) -> Array:
    """The entries (n, ...) of n new loops, where `values` (E, ...) belong to the edges, of which some stay."""
    n = min(graph.num_sources, graph.num_targets)
    shape = (n, *values.shape[1:])
    if not isinstance(fill_value, str):
        return edges.filled(fill_value, shape, values.dtype)
    if fill_value not in ("mean", "add"):
        hint = 'give "mean", "add", a number or an array'
        raise InvalidConfigError(f"fill_value is {fill_value!r}", hint=hint)
    import scipy.sparse

    ids = np.arange(graph.num_edges, dtype=graph.indices.dtype) if graph.edge_ids is None else graph.edge_ids
    here = stays[ids]
    ends = np.append(0, np.cumsum(here))[graph.indptr[: n + 1]].astype(ids.dtype)
    chosen = ids[here][: ends[-1]]
    one_each = scipy.sparse.csr_array((np.ones(len(chosen), values.dtype), chosen, ends), (n, graph.num_edges))
    sums = one_each @ values.reshape(graph.num_edges, math.prod(shape[1:]))
    if fill_value == "mean":
        sums /= np.maximum(np.diff(ends), 1)[:, None].astype(values.dtype)
    return sums.reshape(shape)


def taken_out(graph: CSRGraph, grad: Array, policy: edges.LoopPolicy, fill_value: str | ArrayLike) -> Array:
    """The adjoint of `CSRGraph.edge_attr_with_self_loops`: what loops were filled with came from the other edges."""
    loops = min(graph.num_sources, graph.num_targets)
    kept = len(grad) - loops
    source, target = graph.to_edge_index()
    stays = source != target if policy == "replace" else np.ones(len(source), np.bool_)
    out = np.zeros((graph.num_edges, *grad.shape[1:]), grad.dtype)
    out[stays] = grad[:kept]
    if isinstance(fill_value, str):
        of_loops = np.zeros((graph.num_targets, *grad.shape[1:]), grad.dtype)
        of_loops[:loops] = grad[kept:]
        if fill_value == "mean":
            degrees = np.bincount(target[stays], minlength=graph.num_targets)
            of_loops /= np.maximum(degrees, 1).reshape(-1, *[1] * (grad.ndim - 1)).astype(grad.dtype)
        out[stays] += of_loops[target[stays]]
    return out
