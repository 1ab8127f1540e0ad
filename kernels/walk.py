"""Walking along the edges of a graph: the job of the kernels of attention over neighbours, their scratch, and batches.

A task is some nodes with about as many edges as any other's. It is done by batches: of as many of its nodes as have no
more than EDGES edges together, or of the edges of one node, EDGES at a time. What is alike for all edges is done for a
batch at once, in loops that are long enough to be worth beginning.

A hub, a node with more than a task should have, is cut into parts, each a task that leaves what it summed in `partial`,
and then one task adds them up in their order. All this depends on the graph alone, so results do not depend on threads.
"""

import math
from typing import NamedTuple

import numpy as np

from .gather import AHEAD, EDGES, Heads, Rows, fill
from .jit import apart, inline, within
from .jobs import Bytes, Elements, Indices, Ints
from .scoring import Dropout, mixed
from .simd import as_indices, lanes_of, line_of, load, prefetch, splat, store, where

INF = math.inf
SUM, JOINT, DOT, GIVEN = 0, 1, 2, 3  # rules for scores, see csr.py; those that are given, edge_softmax.py
ADD, MEAN, MAX = 0, 1, 2  # aggregations
NODES, PART, SECOND_PART, HUB = 0, 1, 2, 3  # what a task is
# Rows of a task's `sums`, gradients of what all nodes share: by target those of `offset` and, of JOINT, of `att`; by
# source as many from FOLD on as there are folds.
OFFSET, ATT, FOLD, SUMS = 0, 1, 1, 3


class Features(NamedTuple):
    """What edges have, where the kernels multiply it by a matrix (edge_features.py): D is the channels of all heads."""

    K: int  # 0 if there is no matrix, and rows of edges are (H, C) themselves
    D: int
    pitch: int  # of a row in scratch: D, padded to whole tiles
    narrow: int  # K, padded to whole vectors
    matrix: Elements  # (K, pitch)
    turned: Elements  # (D, narrow): its transpose
    sums: Elements  # (tasks, K, pitch): what tasks add to dmatrix


class NeighborJob(NamedTuple):
    indptr: Ints | None  # of the walk: by target, or by source for `backward_sources`; if None, the wide ones count
    others: Ints | None  # the node at the other end
    edge_ids: Ints | None  # the caller's number of the edge at a position, if has_ids
    positions: Ints | None  # by target, of the edge at a position by source
    wide_indptr: Indices
    wide_others: Indices
    wide_edge_ids: Indices
    wide_positions: Indices
    has_ids: int
    wants_ids: int  # does anything lie in the caller's order of edges?
    E: int
    # what a task is
    mode: int
    starts: Indices  # (tasks + 1): first node of each
    parts: Indices  # (P, 3): which hub, first edge, last edge
    hubs: Indices  # (hubs, 3): node, first part, last part
    most: int  # edges of a node that is no hub
    partial: Elements  # (P, step)
    partial_step: int
    # the rule
    rule: int
    slope: float
    scale: float
    key: Rows
    query: Rows
    edge: Rows
    has_edge: int
    features: Features  # of the edges, whose product with a matrix is what `edge` and `edge_value` stand for
    bias: Rows
    has_bias: int
    att: Elements  # (H, D), padded: of JOINT
    # what is done with scores
    normalizes: int
    dropout: Dropout
    edge_weight: Elements
    has_dropout: int
    has_weight: int
    has_shares: int  # is w anything but p?
    aggregation: int
    value: Rows
    edge_value: Rows
    has_edge_value: int
    offset: Rows  # what each target's row of the output begins with
    scores: Elements  # (E, W) by position, of SUM before the LeakyReLU; kept if `keeps`
    keeps: int
    # Their logsumexp alone would cost p digits: exp(s - lse), with s in the hundreds.
    bounds: Elements  # (Nt, span): heads, repeated to a whole vector; kept with the scores
    totals: Elements
    chosen: Bytes  # (E, chosen_step): of MAX, see largest.py; kept with the scores
    chosen_step: int
    output: Rows
    # backward: given
    grad: Rows  # of the output
    grad_weights: Elements  # (E, H), the caller's order; of p itself
    has_grad_weights: int
    # backward: made
    pairs: Elements  # (E, 2, W) and a vector: ds and w, by position
    dquery: Rows
    dkey: Rows
    dvalue: Rows
    dedge: Rows
    dbias: Elements  # (E, H), the caller's order: ds
    dweight: Elements  # (E)
    dedge_value: Rows
    wants_dbias: int
    fold: Elements  # (2, H, C), padded: key = <fold[0], value> and, of the same nodes, query = <fold[1], value>
    folds: int  # how many of them
    sums: Elements  # (tasks, SUMS, H, pad): what a task adds up, a row for each of OFFSET, ATT or FOLD
    sums_from: int  # the row of task 0
    H: int
    W: int  # numbers of one edge: heads, padded as gather.py says
    span: int  # numbers that repeat as whole vectors: W, and at least a vector
    width: int  # H * pad
    value_heads: Heads  # how the C channels of values lie
    key_heads: Heads  # and the D of keys
    scratch: Elements
    scratch_step: int


class Desk(NamedTuple):
    """Scratch of one task. Numbers of edges may be written a vector too far, where those of later edges will be."""

    nodes: Indices  # the other ends of EDGES edges, and of AHEAD more: their rows will be needed soon
    edges: Indices  # their numbers, the caller's
    positions: Indices  # by target, of edges by source
    scores: Elements  # (EDGES, W)
    weights: Elements
    gradients: Elements  # dp, then ds; forward, of MAX, whether a bias hides the edge
    shares: Elements
    pairs: Elements  # (EDGES, 2, W)
    bound: Elements  # (span)
    total: Elements
    delta: Elements
    factor: Elements
    value: Elements  # (H, pad), as those that follow, C channels or D: sums of values, or of what they get
    key_sums: Elements  # backward: what the query, or by source the key, gets
    x: Elements  # rows that are given
    y: Elements
    place: Elements  # forward, of MAX, in the memory of x and key_sums: see largest.py
    batch: Elements


INDICES = 4 * (EDGES + AHEAD)  # that `carve` lays out; the last are the numbers of lines, see `features_desk`


def scratch_elements(W: int, span: int, width: int, of_edge: int, lanes: int, itemsize: int) -> int:
    """What `carve` lays out, in elements. Numbers of edges end in a vector that stores may run into."""
    return INDICES * 8 // itemsize + 6 * EDGES * W + 5 * lanes + 4 * span + 4 * width + EDGES * of_edge


def partial_elements(span: int, width: int) -> int:
    """What a part leaves: forward its sums, bounds and totals, and two rows of MAX; backward delta, or its sums."""
    return 3 * width + 2 * span


@inline
def carve(job, slot):
    here, n, soon = job.scratch + slot * job.scratch_step, EDGES, EDGES + AHEAD
    index = as_indices(here)
    numbers, step = here + INDICES * line_of(here) // 8, n * job.W + lanes_of(here)
    bound = numbers + (5 * step + n * job.W)
    value = bound + 4 * job.span
    return Desk(
        index, index + soon, index + 2 * soon,
        numbers, numbers + step, numbers + 2 * step, numbers + 3 * step, numbers + 4 * step,
        bound, bound + job.span, bound + 2 * job.span, bound + 3 * job.span,
        value, value + job.width, value + 2 * job.width, value + 3 * job.width,
        value + 2 * job.width, value + job.width,
    )  # fmt: skip


class FeaturesDesk(NamedTuple):
    """The rest of the scratch: no fields of the desk, which functions are given field by field."""

    lines: Indices  # 0, 1, ... from the desk's first edge on
    features: Elements  # (EDGES, narrow)
    made: Elements  # (EDGES, pitch)
    dmade: Elements


@inline
def features_desk(job, desk):
    features = desk.value + 4 * job.width
    made = features + EDGES * job.features.narrow
    return FeaturesDesk(desk.nodes + 3 * (EDGES + AHEAD), features, made, made + EDGES * job.features.pitch)


@inline
def from_edge(desk, e, W):
    """The desk, but for the edges before e"""
    f = e * W
    return Desk(
        desk.nodes + e, desk.edges + e, desk.positions + e,
        desk.scores + f, desk.weights + f, desk.gradients + f, desk.shares + f, desk.pairs + 2 * f,
        desk.bound, desk.total, desk.delta, desk.factor, desk.value, desk.key_sums, desk.x, desk.y,
        desk.place, desk.batch,
    )  # fmt: skip


# --- edges ----------------------------------------------------------------------------------------------------------
@apart
def number(narrow, wide, at):
    return wide[at] if narrow is None else np.int64(narrow[at])


@apart
def fetch_number(narrow, wide, at):
    """Ask for what will be needed soon"""
    if narrow is None:
        prefetch(wide, at)
    else:
        prefetch(narrow, at)


@inline
def begin_of(job, i):
    """Where the edges of node i begin, and those of i - 1 end"""
    return number(job.indptr, job.wide_indptr, i)


@inline
def edges_of(job, i, first, last):
    """Where those of node i begin and end that are among the edges first .. last - 1"""
    return max(begin_of(job, i), first), min(begin_of(job, i + 1), last)


@inline
def degree(job, i):
    return begin_of(job, i + 1) - begin_of(job, i)


@apart
def batch_end(job, i, end):
    """The node behind the batch that begins with i: of no more than EDGES edges, but for those of i alone"""
    last, j = begin_of(job, i) + EDGES, i + 1
    while j < end and begin_of(job, j + 1) <= last:
        j += 1
    return j


@apart
def nodes_of(job, task):
    """The nodes of a task: some, or the hub that it has a part of"""
    if job.mode == NODES:
        return job.starts[task], job.starts[task + 1]
    i = job.hubs[3 * job.parts[3 * task]]
    return i, i + 1


@apart
def next_batch(job, task, i, end):
    """The node behind the batch that begins with i, and where its edges begin and end; of a part of a hub, its own"""
    if job.mode != NODES:
        return end, job.parts[3 * task + 1], job.parts[3 * task + 2]
    j = batch_end(job, i, end)
    first, last = begin_of(job, i), begin_of(job, j)
    return j, first, last


@inline
def is_mine(job, first, last):
    """Does a task of nodes do this batch, or is it a hub, whose parts are others' tasks?"""
    return job.mode != NODES or last - first <= job.most


@within
def take_edges(job, desk, first, n):
    """Both numbers of the edges at n > 0 positions, and of the AHEAD that come after them."""
    take_numbers(desk.nodes, job.others, job.wide_others, first, n, job.E)
    if job.wants_ids and job.has_ids:
        take_numbers(desk.edges, job.edge_ids, job.wide_edge_ids, first, n, job.E)
    elif job.wants_ids:
        for e in range(n + AHEAD):
            desk.edges[e] = min(first + e, job.E - 1)


@apart
def take_numbers(out, narrow, wide, first, n, E):
    """Behind the last of E there is no other: it is repeated."""
    there = min(n + AHEAD, E - first)
    for e in range(there):
        out[e] = number(narrow, wide, first + e)
    for e in range(there, n + AHEAD):
        out[e] = out[there - 1]


@inline
def drawn(dropout, head):
    """What the dice of a head's edges begin with"""
    return mixed(np.uint64(dropout.seed) + np.uint64(head) * np.uint64(0x9E3779B97F4A7C15))


@inline
def is_kept(dropout, start, edge):
    """32 bits from (seed, head, edge) alone: no state, so any order gives the same."""
    x = mixed(start + np.uint64(edge) * np.uint64(0xD1B54A32D192ED03))
    return np.int64(x & np.uint64(0xFFFFFFFF)) >= dropout.threshold


@within
def find_shares(job, desk, i, n):
    """shares[e, h] = w / p, but for the edges' own weights: what becomes of a weight after the softmax"""
    share, W = 1 / degree(job, i) if job.aggregation == MEAN else 1.0, job.W
    fill(desk.shares, n * W, share)
    for h in range(job.H if job.has_dropout else 0):
        start, gain = drawn(job.dropout, h), share * job.dropout.gain
        for e in range(n):
            desk.shares[e * W + h] = gain * is_kept(job.dropout, start, desk.edges[e])  # no branch to guess wrong


@within
def weigh_shares(job, desk, n):
    """shares = w / p; 0 for an edge that its score hides, whose own weight may be NaN"""
    if job.has_weight:
        for e in range(n):
            prefetch(job.edge_weight, desk.edges[e + AHEAD])
            weight = job.edge_weight[desk.edges[e]]
            for h in range(job.H):
                desk.shares[e * job.W + h] *= weight
        for f in range(0, n * job.W if job.normalizes else 0, lanes_of(desk.scores)):
            s, share = load(desk.scores, f), load(desk.shares, f)
            store(where(s <= splat(s, -INF), splat(s, 0.0), share), desk.shares, f)
