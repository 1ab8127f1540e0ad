"""From a graph and arrays of its nodes and edges to the jobs of attention over neighbours (kernels/csr.py).

It runs its jobs: how many there are, one or four, depends on the graph.
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
from .layouts import NO_ROWS, NOTHING, by_width, rows
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
    sizes, nodes = _sizes(terms), len(by_target.indptr) - 1
    kept_nodes, kept_edges = (nodes, len(by_target.others)) if keeps else (0, 0)
    kept = Kept(
        output=memory.empty((nodes, sizes.H, sizes.C), sizes.dtype),
        bounds=memory.empty((kept_nodes, sizes.span), sizes.dtype),
        totals=memory.empty((kept_nodes, sizes.span), sizes.dtype),
        scores=memory.empty((kept_edges, sizes.W), sizes.dtype),
        chosen=memory.empty((kept_edges, _chosen_step(terms, sizes)), np.dtype(np.uint8)),
    )
    _run(kernels.forward, by_target, _job(by_target, terms, kept, keeps=int(keeps)), sizes.dtype)
    return kept


def coefficients(by_target: Walk, terms: NeighborTerms, kept: Kept) -> Array:
    """(E, H) in the caller's order: after the softmax, before dropout and the edges' weights."""
    out = np.empty((len(kept.scores), terms.value.shape[1]), kept.scores.dtype)
    job = _job(by_target, terms, kept, dbias=out)
    dtype, tasks = out.dtype, len(job.starts) - 1
    _launch(kernels.coefficients, job, tasks, dtype)
    return out


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


# --- backward --------------------------------------------------------------------------------------------------------
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
    sizes = _sizes(terms)
    together, made = _room(terms, joined)
    fields = _gradient_fields(terms, kept, made, grad, grad_weights)
    # 1. by target: ds and w of each edge, and what targets and edges get
    job = _job(by_target, terms, kept, **fields)
    of_matrix = np.zeros((_rows_of_sums(by_target), job.features.K, job.features.pitch), sizes.dtype)
    job = job._replace(features=job.features._replace(sums=of_matrix))
    in_parts = walk.PART, walk.SECOND_PART, walk.HUB
    by_targets = _run(backwards.backward_targets, by_target, job, sizes.dtype, sizes.pad, in_parts)
    # 2. by source: what sources get
    folds = 0 if terms.fold is None else len(terms.fold)
    job = _job(by_source, terms, kept, **fields, fold=_padded(terms.fold, sizes.pad), folds=folds)
    by_sources = _run(backwards.backward_sources, by_source, job, sizes.dtype, sizes.pad)
    matrix = att = None
    if terms.matrix is not None:
        matrix = of_matrix.sum(axis=0)[:, : sizes.H * sizes.C].reshape(terms.matrix.shape)
    if folds:
        att = by_sources[walk.FOLD : walk.FOLD + folds, :, : sizes.C]
    elif terms.rule == JOINT:
        att = by_targets[walk.ATT, :, : sizes.D]
    return Made(**made, matrix=matrix, joined=together, offset=by_targets[walk.OFFSET, :, : sizes.C], att=att)


def _room(terms: NeighborTerms, joined: tuple[str, ...]) -> tuple[Array, dict[str, Any]]:
    """The array of the gradients that lie side by side, and by their names all that nodes and edges get.

    None are those of what was not given, and what is part of another: a key's that is a value or a product with it,
    edge values' that are made of the same features as `edge`, and of SUM a bias's beside an edge's: both are ds.
    """
    dtype, (N, H, C) = terms.value.dtype, terms.value.shape
    together = memory.empty((N, len(joined), H, C), dtype)
    made: dict[str, Any] = {name: together[:, n] for n, name in enumerate(joined)}
    is_made = {
        "key": terms.rule == DOT or (terms.rule == SUM and terms.fold is None),
        "edge_value": terms.matrix is None,
        "bias": terms.rule != SUM or terms.edge is None,
    }
    for name in ("query", "key", "value", "edge", "bias", "edge_weight", "edge_value"):
        x = getattr(terms, name)
        if name not in made:
            made[name] = memory.empty(x.shape, dtype) if x is not None and is_made.get(name, True) else None
    return together, made


def _gradient_fields(
    terms: NeighborTerms, kept: Kept, made: dict[str, Any], grad: Array, grad_weights: Array | None
) -> dict[str, Any]:
    """What the backward passes are given and make."""
    dtype = terms.value.dtype
    # What an edge adds to its score has the score's gradient: the bias, or of SUM `edge`, of which a head has a number.
    dscores = made["edge"] if terms.rule == SUM and terms.edge is not None else made["bias"]
    has_grad_weights = grad_weights is not None
    return dict(
        grad=rows(grad), grad_weights=_or_nothing(grad_weights), has_grad_weights=int(has_grad_weights),
        wants_ids=int(_wants_ids(terms) or has_grad_weights),
        pairs=memory.empty((2 * kept.scores.size + target().lanes(dtype.itemsize),), dtype),
        dquery=rows(made["query"]), dkey=rows(made["key"]), dvalue=rows(made["value"]),
        dedge=rows(made["edge"]), dbias=_or_nothing(dscores), wants_dbias=int(dscores is not None),
        dweight=_or_nothing(made["edge_weight"]), dedge_value=rows(made["edge_value"]),
    )  # fmt: skip


# --- jobs ----------------------------------------------------------------------------------------------------------
class Sizes(NamedTuple):
    """How many there are of what, and how they are padded."""

    dtype: np.dtype[Any]
    lanes: int
    H: int
    C: int  # channels of a value
    D: int  # and of a key
    pad: int  # the larger of both, in whole vectors
    W: int  # numbers of an edge, a head each: padded to a power of two that divides a vector, or to whole vectors
    span: int  # the same, but a vector at least


def _sizes(terms: NeighborTerms) -> Sizes:
    return _sizes_of(terms.value.dtype, *terms.value.shape[1:], terms.key.shape[2])


@functools.lru_cache(256)
def _sizes_of(dtype: np.dtype[Any], H: int, C: int, D: int) -> Sizes:
    lanes = target().lanes(dtype.itemsize)
    pad = max(-(-n // lanes) * lanes for n in (C, D))
    return Sizes(dtype, lanes, H, C, D, pad, *_numbers(H, lanes))


def _numbers(H: int, lanes: int) -> tuple[int, int]:
    """W and span"""
    W = 1 << (H - 1).bit_length() if H < lanes else -(-H // lanes) * lanes
    return W, max(W, lanes)


def _chosen_step(terms: NeighborTerms, sizes: Sizes) -> int:
    """Bytes of an edge that say in which channels it was the largest."""
    vectors = sizes.H * sizes.pad // sizes.lanes if terms.aggregation == "max" else 0
    return vectors * max(1, sizes.lanes // 8)


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


def _wants_ids(terms: NeighborTerms) -> bool:
    """Does anything lie in the caller's order of edges?"""
    of_edges = terms.edge, terms.bias, terms.edge_weight, terms.edge_value
    return terms.dropout > 0 or any(x is not None for x in of_edges)


def _job(by: Walk, terms: NeighborTerms, kept: Kept, **more: Any) -> walk.NeighborJob:
    """A forward pass that keeps nothing, but for the fields that `more` has."""
    sizes = _sizes(terms)
    features = _features(terms, sizes.lanes)
    parts = (
        _walk_fields(by, sizes), _rule_fields(terms, sizes), _weight_fields(terms), _output_fields(terms, kept, sizes),
        _NO_GRADIENTS, _layout_fields(sizes, features), more,
    )  # fmt: skip
    fields = dict(features=features, wants_ids=int(_wants_ids(terms)))
    for part in parts:
        fields |= part
    return walk.NeighborJob(**fields)


def _walk_fields(by: Walk, sizes: Sizes) -> dict[str, Any]:
    """Which edges there are, in whose order, and what a task is."""
    starts, parts, hubs = by.schedule
    partial_step = walk.partial_elements(sizes.span, sizes.H * sizes.pad)
    indices = by_width(
        by.indptr.dtype == np.int32,
        indptr=by.indptr, others=by.others, edge_ids=by.edge_ids, positions=by.positions,
    )  # fmt: skip
    return dict(
        **indices, has_ids=int(by.edge_ids is not None), E=len(by.others),
        mode=walk.NODES, starts=starts, parts=parts, hubs=hubs, most=MOST,
        partial=np.empty((len(parts), partial_step), sizes.dtype), partial_step=partial_step,
    )  # fmt: skip


def _rule_fields(terms: NeighborTerms, sizes: Sizes) -> dict[str, Any]:
    """What scores are made of."""
    return dict(
        rule=terms.rule, slope=terms.slope, scale=terms.scale, key=rows(terms.key), query=rows(terms.query),
        edge=rows(terms.edge), has_edge=int(terms.edge is not None),
        bias=rows(terms.bias), has_bias=int(terms.bias is not None), att=_padded(terms.att, sizes.pad),
    )  # fmt: skip


def _weight_fields(terms: NeighborTerms) -> dict[str, Any]:
    """How scores become weights, and what these are of."""
    has_dropout, has_weight = terms.dropout > 0, terms.edge_weight is not None
    return dict(
        normalizes=int(terms.normalizes), dropout=Dropout(terms.seed, *threshold_and_gain(terms.dropout)),
        has_dropout=int(has_dropout), edge_weight=_or_nothing(terms.edge_weight), has_weight=int(has_weight),
        has_shares=int(has_dropout or has_weight or terms.aggregation == "mean"),
        aggregation=AGGREGATIONS[terms.aggregation], value=rows(terms.value),
        edge_value=rows(terms.edge_value), has_edge_value=int(terms.edge_value is not None),
    )  # fmt: skip


def _output_fields(terms: NeighborTerms, kept: Kept, sizes: Sizes) -> dict[str, Any]:
    """The output, what it begins with, and what is kept beside it."""
    offset = np.zeros((1, sizes.H, sizes.C), sizes.dtype) if terms.offset is None else terms.offset
    return dict(
        offset=Rows(offset, 0 if len(offset) == 1 else offset.strides[0] // sizes.dtype.itemsize),
        output=rows(kept.output), keeps=0, scores=kept.scores, bounds=kept.bounds, totals=kept.totals,
        chosen=kept.chosen, chosen_step=_chosen_step(terms, sizes),
    )  # fmt: skip


_NO_GRADIENTS: dict[str, Any] = dict(
    grad=NO_ROWS, grad_weights=NOTHING, has_grad_weights=0, pairs=NOTHING, dquery=NO_ROWS, dkey=NO_ROWS, dvalue=NO_ROWS,
    dedge=NO_ROWS, dbias=NOTHING, wants_dbias=0, dweight=NOTHING, dedge_value=NO_ROWS, fold=NOTHING, folds=0,
    sums=NOTHING, sums_from=0,
)  # fmt: skip


def _layout_fields(sizes: Sizes, features: walk.Features) -> dict[str, Any]:
    """How rows and numbers lie, and the scratch that a task needs of them."""
    dtype, lanes, H, C, D, pad, W, span = sizes
    of_edge = features.narrow + 2 * features.pitch
    return dict(
        H=H, W=W, span=span, width=H * pad, value_heads=_heads(H, C, pad, lanes), key_heads=_heads(H, D, pad, lanes),
        scratch="scratch", scratch_step=walk.scratch_elements(W, span, H * pad, of_edge, lanes, dtype.itemsize),
    )  # fmt: skip


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
    sums = np.zeros((_rows_of_sums(by), walk.SUMS, job.H, pad), dtype)
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
