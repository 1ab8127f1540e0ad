"""From a graph and arrays of its nodes and edges to the jobs of attention over neighbours (kernels/csr.py).

As plan/grouping.py this one runs its jobs: how many there are, one or four, depends on the graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from ..kernels import csr as kernels
from ..kernels import csr_backward as backwards
from ..kernels import edge_softmax, walk
from ..kernels.edge_features import WIDE
from ..kernels.gather import EDGES, HALF, VECTORS, Heads, Rows
from ..kernels.scoring import Dropout
from ..kernels.simd import target
from . import memory, team
from .dropout import threshold_and_gain
from .layouts import NO_ROWS, NOTHING, rows
from .schedule import Schedule, schedule

__all__ = [
    "Kept",
    "Made",
    "NeighborTerms",
    "Schedule",
    "Walk",
    "backward",
    "coefficients",
    "fold",
    "forward",
    "softmax",
    "softmax_backward",
    "walk_of",
]

# Edges of a task, where a node counts as one more. Of a hub, parts are as large.
TASK = 2048
MOST = 4096  # not less than gather.EDGES: what passes it is a node alone, and a batch of several nodes never does
assert MOST >= EDGES
NODES = 512  # of a task that has no edges to do

SUM, JOINT, DOT, GIVEN = walk.SUM, walk.JOINT, walk.DOT, walk.GIVEN
AGGREGATIONS = {"sum": walk.ADD, "mean": walk.MEAN, "max": walk.MAX}


class Walk(NamedTuple):
    """The edges in the order of one of their ends: of targets, or with `positions` of sources."""

    indptr: Array
    others: Array
    edge_ids: Array | None
    positions: Array | None
    schedule: Schedule


def walk_of(indptr: Array, others: Array, edge_ids: Array | None, positions: Array | None = None) -> Walk:
    return Walk(indptr, others, edge_ids, positions, schedule(indptr, TASK, MOST))


class NeighborTerms(NamedTuple):
    """What attention over neighbours is of: nodes are (N, H, channels), edges (E, H, channels) as the caller has them.

    All are contiguous but for the steps from node to node, and of one dtype.
    """

    rule: int
    key: Array
    query: Array
    value: Array  # for JOINT the keys again
    edge: Array | None = None
    matrix: Array | None = None  # (K, H, C): `edge` is (E, K) then, and its product with this is what is meant
    bias: Array | None = None  # (E, H)
    att: Array | None = None  # (H, D)
    slope: float = 0.2
    scale: float = 1.0
    normalizes: bool = True
    dropout: float = 0.0
    seed: int = 0
    edge_weight: Array | None = None  # (E)
    aggregation: str = "sum"
    edge_value: Array | None = None  # where there is a matrix, None or the same as `edge`
    offset: Array | None = None  # (Nt or 1, H, C): what the output begins with
    fold: Array | None = None  # (1 or 2, H, C): key = <fold[0], value> and, if the nodes are the same, so the query


class Kept(NamedTuple):
    """What a forward pass leaves."""

    output: Array  # (Nt, H, C)
    # Columns beyond the heads are padding.
    bounds: Array  # (Nt, H): the largest score; meaningless without a softmax, as the totals are
    totals: Array  # (Nt, H): the sum of exp(score - the largest)
    scores: Array  # (E, H) by position
    chosen: Array  # (E, bytes) by position, for "max": bits of the channels that the edge was the largest in


class Made(NamedTuple):
    """Gradients; None for what there was not."""

    query: Array
    key: Array | None  # None where it went into the values
    value: Array
    edge: Array | None
    bias: Array | None
    edge_weight: Array | None
    edge_value: Array | None
    matrix: Array | None
    joined: Array  # (N, names, H, C): those that were to lie side by side
    offset: Array  # (H, C)
    att: Array | None  # (H, D), or (1 or 2, H, C) of a fold


def forward(by_target: Walk, terms: NeighborTerms, keeps: bool) -> Kept:
    """`keeps` the scores, for the backward pass or the coefficients."""
    dtype, nodes = terms.value.dtype, len(by_target.indptr) - 1
    H, C = terms.value.shape[1:]
    W, span = _numbers(H, target().lanes(dtype.itemsize))
    kept = Kept(
        output=memory.empty((nodes, H, C), dtype),
        bounds=memory.empty((nodes if keeps else 0, span), dtype),
        totals=memory.empty((nodes if keeps else 0, span), dtype),
        scores=memory.empty((len(by_target.others) if keeps else 0, W), dtype),
        chosen=memory.empty((len(by_target.others) if keeps else 0, _chosen_step(terms)), np.dtype(np.uint8)),
    )
    _run(kernels.forward, by_target, _job(by_target, terms, kept, keeps=int(keeps)), dtype)
    return kept


def coefficients(by_target: Walk, terms: NeighborTerms, kept: Kept) -> Array:
    """(E, H) in the caller's order: after the softmax, before dropout and the edges' weights."""
    out = np.empty((len(kept.scores), terms.value.shape[1]), kept.scores.dtype)
    job = _job(by_target, terms, kept, dbias=out)
    dtype, tasks = out.dtype, len(job.starts) - 1
    _launch(kernels.coefficients, job, tasks, dtype)
    return out


def backward(
    by_target: Walk,
    by_source: Walk,
    terms: NeighborTerms,
    kept: Kept,
    grad: Array,
    grad_weights: Array | None = None,
    joined: tuple[str, ...] = (),
) -> Made:
    """The gradients of all that was given; `grad_weights` (E, H) is that of the coefficients, in the caller's order.

    Those that `joined` names, of nodes that are the same, lie side by side.
    """
    dtype, pad = terms.value.dtype, _pad(terms)
    folds = 0 if terms.fold is None else len(terms.fold)
    makes_key = terms.rule == DOT or (terms.rule == SUM and not folds)

    def like(x: Array | None) -> Array | None:
        return None if x is None else memory.empty(x.shape, dtype)

    N, H, C = terms.value.shape
    together = memory.empty((N, len(joined), H, C), dtype)
    made: dict[str, Any] = {name: together[:, n] for n, name in enumerate(joined)}
    for name in ("query", "key", "value", "edge", "edge_weight", "edge_value"):
        if name not in made:
            made[name] = like(getattr(terms, name)) if name != "key" or makes_key else None
    if terms.matrix is not None:
        made["edge_value"] = None  # it is part of that of `edge`
    is_summed = terms.rule == SUM  # where the score of an edge is a number, so is its gradient
    scores = terms.bias if terms.bias is not None else terms.edge if is_summed else None
    made["bias"] = like(scores)
    fields = dict(
        grad=rows(grad), grad_weights=_or_nothing(grad_weights), has_grad_weights=int(grad_weights is not None),
        pairs=memory.empty((2 * kept.scores.size + target().lanes(dtype.itemsize),), dtype),
        dquery=rows(made["query"]), dkey=rows(made["key"]),
        dvalue=rows(made["value"]), dedge=rows(made["edge"]), dweight=_or_nothing(made["edge_weight"]),
        dedge_value=rows(made["edge_value"]), dbias=_or_nothing(made["bias"]), wants_dbias=int(scores is not None),
    )  # fmt: skip
    job = _job(by_target, terms, kept, **fields)
    of_matrix = np.zeros((_rows_of_sums(by_target), job.features.K, job.features.pitch), dtype)
    job = job._replace(features=job.features._replace(sums=of_matrix))
    in_parts = walk.PART, walk.SECOND_PART, walk.HUB
    sums = _run(backwards.backward_targets, by_target, job, dtype, pad, in_parts)
    job = _job(by_source, terms, kept, **fields, fold=_padded(terms.fold, pad), folds=folds)
    more = _run(backwards.backward_sources, by_source, job, dtype, pad)
    if terms.rule == SUM and terms.edge is not None:
        made["edge"], made["bias"] = made["bias"], None
    return Made(
        **made,
        matrix=None if terms.matrix is None else of_matrix.sum(axis=0)[:, : H * C].reshape(terms.matrix.shape),
        joined=together,
        offset=sums[0, :, :C],
        att=more[1 : 1 + folds, :, :C] if folds else sums[1, :, : terms.key.shape[2]] if terms.rule == JOINT else None,
    )


def softmax(by_target: Walk, scores: Array) -> Array:
    """(E, H): the softmax of such numbers over the edges of each target, both in the caller's order."""
    return _of_edges(edge_softmax.forward, by_target, scores)


def softmax_backward(by_target: Walk, weights: Array, grad: Array) -> Array:
    """(E, H): the gradient of the scores, given the weights and theirs."""
    given = np.ascontiguousarray(grad)
    return _of_edges(edge_softmax.backward, by_target, weights, grad_weights=given, has_grad_weights=1)


def _of_edges(kernel: Callable[..., None], by_target: Walk, numbers: Array, **more: Any) -> Array:
    H, dtype, out = numbers.shape[1], numbers.dtype, memory.empty(numbers.shape, numbers.dtype)
    none = np.zeros((0, H, 0), dtype)
    kept = Kept(none, none, none, none, np.zeros((0, 0), np.uint8))
    job = _job(by_target, NeighborTerms(GIVEN, none, none, none, bias=numbers), kept, dbias=out, **more)
    _run(kernel, by_target, job, dtype, in_parts=(walk.PART, walk.SECOND_PART))
    return out


def fold(value: Array, weights: Array) -> Array:
    """(F, N, H): the products of the rows of value (N, H, C) with each of weights (F, H, C)."""
    (N, H, C), F = value.shape, len(weights)
    out = memory.empty((F, N, H), value.dtype)
    if not C:
        out[...] = 0
        return out
    padded = _padded(weights, -(-C // target().lanes(value.itemsize)) * target().lanes(value.itemsize))
    job = kernels.FoldJob(rows(value), padded, out, F, N, H, C, padded.shape[-1], NODES)
    if N:
        kernels.fold.prepare(job, -(-N // NODES), value.dtype, 4 * N * H * C)()
    return out


# --- jobs ----------------------------------------------------------------------------------------------------------
def _pad(terms: NeighborTerms) -> int:
    lanes = target().lanes(terms.value.dtype.itemsize)
    return max(-(-n // lanes) * lanes for n in (terms.value.shape[2], terms.key.shape[2]))


def _numbers(H: int, lanes: int) -> tuple[int, int]:
    """Numbers of one edge, a head each: padded to a power of two that divides a vector, or to whole vectors; and to
    one vector at least."""
    W = 1 << (H - 1).bit_length() if H < lanes else -(-H // lanes) * lanes
    return W, max(W, lanes)


def _chosen_step(terms: NeighborTerms) -> int:
    """Bytes of an edge that say in which channels it was the largest."""
    lanes = target().lanes(terms.value.dtype.itemsize)
    vectors = terms.value.shape[1] * _pad(terms) // lanes if terms.aggregation == "max" else 0
    return vectors * max(1, lanes // 8)


def _even(H: int, C: int, lanes: int) -> int:
    """How many vectors a head is, where a tile of kernels/gather.py is some whole heads; else 0"""
    vectors = C // lanes if C % lanes == 0 else 0
    heads = {1: min(VECTORS, lanes), 2: min(VECTORS, lanes), 4: HALF}.get(vectors)
    return vectors if heads and H % heads == 0 else 0


@functools.lru_cache(256)
def _heads(H: int, C: int, pad: int, lanes: int) -> Heads:
    """The tables of kernels/gather.py."""
    W, span = _numbers(H, lanes)
    whole = [(h, c) for h in range(H) for c in range(0, C - lanes + 1, lanes)]
    rest = [(h, C // lanes * lanes) for h in range(H)] if C % lanes else []
    blocks = [one for some in (whole, rest) for one in some + some[-1:] * (-len(some) % VECTORS)]
    vectors = np.array([(h, h * C + c, h * pad + c) for h, c in blocks], np.int64).reshape(-1, 3).T.copy()
    numbers = np.minimum(np.arange(span) % W, H - 1)
    pieces = 1 if C == pad or not H else H
    return Heads(
        H,
        C,
        pad,
        W,
        min(W, lanes, VECTORS).bit_length() - 1,
        _even(H, C, lanes),
        len(whole),
        len(rest),
        C % lanes,
        *vectors,
        pieces,
        H * C // pieces,
        *(np.ascontiguousarray(numbers * step) for step in (C, pad)),
    )


def _padded(x: Array | None, pad: int) -> Array:
    """With zeros to whole vectors."""
    if x is None:
        return NOTHING
    out = np.zeros((*x.shape[:-1], pad), x.dtype)
    out[..., : x.shape[-1]] = x
    return out


def _features(terms: NeighborTerms, lanes: int) -> walk.Features:
    if terms.matrix is None:
        return walk.Features(0, 0, 0, 0, NOTHING, NOTHING, NOTHING)
    K, D = len(terms.matrix), math.prod(terms.matrix.shape[1:])
    pitch, narrow = (-(-n // step) * step for n, step in ((D, WIDE * lanes), (K, lanes)))
    matrix = terms.matrix.reshape(K, D)
    return walk.Features(K, D, pitch, narrow, _padded(matrix, pitch), _padded(matrix.T, narrow), NOTHING)


def _or_nothing(x: Array | None) -> Array:
    return NOTHING if x is None else x


def _job(by: Walk, terms: NeighborTerms, kept: Kept, **more: Any) -> walk.NeighborJob:
    H, C = terms.value.shape[1:]
    dtype, pad = terms.value.dtype, _pad(terms)
    lanes = target().lanes(dtype.itemsize)
    is_narrow = by.indptr.dtype == np.int32
    numbers = [by.indptr, by.others, by.edge_ids, by.positions]
    here = [NOTHING if x is None else x for x in numbers]
    narrow = here if is_narrow else [None] * 4
    wide = [NOTHING] * 4 if is_narrow else here
    W, span = _numbers(H, lanes)
    features = _features(terms, lanes)
    of_edge = features.narrow + 2 * features.pitch
    scratch = walk.scratch_elements(W, span, H * pad, of_edge, lanes, dtype.itemsize)
    given = np.zeros((1, H, C), dtype) if terms.offset is None else terms.offset
    offset = Rows(given, 0 if len(given) == 1 else given.strides[0] // dtype.itemsize)
    has_shares = terms.dropout > 0 or terms.edge_weight is not None or terms.aggregation == "mean"
    starts, parts, hubs = by.schedule
    partial_step = walk.partial_elements(span, H * pad)
    of_edges = [terms.edge, terms.bias, terms.edge_weight, terms.edge_value, more.get("has_grad_weights") or None]
    wants_ids = terms.dropout > 0 or any(x is not None for x in of_edges)
    fields = dict(
        indptr=narrow[0], others=narrow[1], edge_ids=narrow[2], positions=narrow[3], wide_indptr=wide[0],
        wide_others=wide[1], wide_edge_ids=wide[2], wide_positions=wide[3], has_ids=int(by.edge_ids is not None),
        wants_ids=int(wants_ids), E=len(by.others), mode=walk.NODES, starts=starts, parts=parts, hubs=hubs, most=MOST,
        partial=np.empty((len(parts), partial_step), dtype), partial_step=partial_step,
        rule=terms.rule, slope=terms.slope, scale=terms.scale, key=rows(terms.key), query=rows(terms.query),
        edge=rows(terms.edge), has_edge=int(terms.edge is not None), features=features, bias=rows(terms.bias),
        has_bias=int(terms.bias is not None), att=_padded(terms.att, pad), normalizes=int(terms.normalizes),
        dropout=Dropout(terms.seed, *threshold_and_gain(terms.dropout)), edge_weight=_or_nothing(terms.edge_weight),
        has_dropout=int(terms.dropout > 0), has_weight=int(terms.edge_weight is not None), has_shares=int(has_shares),
        aggregation=AGGREGATIONS[terms.aggregation], value=rows(terms.value), edge_value=rows(terms.edge_value),
        has_edge_value=int(terms.edge_value is not None), offset=offset, scores=kept.scores, keeps=0,
        bounds=kept.bounds, totals=kept.totals, chosen=kept.chosen, chosen_step=_chosen_step(terms),
        output=rows(kept.output), grad=NO_ROWS, grad_weights=NOTHING, has_grad_weights=0,
        pairs=NOTHING, dquery=NO_ROWS, dkey=NO_ROWS, dvalue=NO_ROWS, dedge=NO_ROWS, dbias=NOTHING, dweight=NOTHING,
        dedge_value=NO_ROWS, wants_dbias=0, fold=NOTHING, folds=0, sums=NOTHING, sums_from=0, H=H, W=W,
        span=span, width=H * pad, value_heads=_heads(H, C, pad, lanes),
        key_heads=_heads(H, terms.key.shape[2], pad, lanes), scratch="scratch", scratch_step=scratch,
    )  # fmt: skip
    return walk.NeighborJob(**{**fields, **more})


def _run(
    kernel: Callable[..., None], by: Walk, job: walk.NeighborJob, dtype: np.dtype[Any], pad: int = 0,
    in_parts: tuple[int, ...] = (walk.PART, walk.HUB),
) -> Array:  # fmt: skip
    """All nodes, then the parts of hubs, then hubs; returns what tasks have summed, added up in their order."""
    starts, parts, hubs = by.schedule
    tasks = len(starts) - 1
    rounds = [(walk.NODES, tasks, 0)]
    for mode in in_parts if len(hubs) else ():
        rounds.append((mode, len(hubs), tasks + len(parts)) if mode == walk.HUB else (mode, len(parts), tasks))
    sums = np.zeros((_rows_of_sums(by), 3, job.H, pad), dtype)
    for mode, n, start in rounds:
        _launch(kernel, job._replace(mode=mode, sums=sums, sums_from=start), n, dtype)
    return sums.sum(axis=0)


def _rows_of_sums(by: Walk) -> int:
    """One of each task of nodes, part of a hub and hub"""
    starts, parts, hubs = by.schedule
    return len(starts) - 1 + len(parts) + len(hubs)


def _launch(kernel: Any, job: walk.NeighborJob, tasks: int, dtype: np.dtype[Any]) -> None:
    if tasks:
        launch = kernel.prepare(job, tasks, dtype, 4 * job.E * job.H * (job.value_heads.C + job.key_heads.C + 8))
        launch(scratch=memory.scratch(team.scratch(job.scratch_step, dtype)))
