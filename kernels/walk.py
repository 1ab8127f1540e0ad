"""Walking along the edges of a graph: what the kernels of attention over neighbours are told, and what they do it with.

A task is some nodes with about as many edges as any other's. A hub, a node with more than a task should have, is cut
into parts, each a task that leaves what it summed in `partial`, and then one task adds them up in their order. All
this depends on the graph alone, so results do not depend on threads.
"""

from typing import NamedTuple

import numpy as np

from .gather import EDGES, Rows, fetch_row
from .jit import Elements, Indices, Ints, apart, inline
from .scoring import Dropout, mixed
from .simd import as_indices
from .tiles import whole_vectors

SUM, JOINT, DOT, GIVEN = 0, 1, 2, 3  # rules for scores, see csr.py
ADD, MEAN, MAX = 0, 1, 2  # aggregations
NODES, PART, SECOND_PART, HUB = 0, 1, 2, 3  # what a task is
AHEAD = 24  # edges: their rows are on the way while others are worked on


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
    E: int
    # what a task is
    mode: int
    starts: Indices  # (tasks + 1): first node of each
    parts: Indices  # (P, 3): which hub, first edge, last edge
    hubs: Indices  # (hubs, 3): node, first part, last part
    most: int  # edges of a node that is no hub
    partial: Elements  # (P, step)
    partial_step: int
    partial_best: Indices  # (P, H * C)
    # the rule
    rule: int
    slope: float
    scale: float
    key: Rows
    query: Rows
    edge: Rows
    has_edge: int
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
    scores: Elements  # (E, H) by position; kept if `keeps`
    keeps: int
    # Their logsumexp alone would cost p digits: exp(s - lse), with s in the hundreds.
    bounds: Elements  # (Nt, H)
    totals: Elements
    best: Indices  # (Nt, H * C): for MAX, the position of the edge whose value it is
    output: Rows
    # backward: given
    grad: Rows  # of the output
    grad_weights: Elements  # (E, H), the caller's order; of p itself
    has_grad_weights: int
    # backward: made
    pairs: Elements  # (E, 2, H): w and ds, by position
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
    sums: Elements  # (tasks, 3, H, pad): of do; of what `att` or `fold` get
    sums_from: int  # the row of task 0
    H: int
    C: int
    D: int
    line: int  # elements in a cache line
    scratch: Elements
    scratch_step: int


class Desk(NamedTuple):
    """Scratch of one task."""

    index: Indices  # (EDGES)
    ids: Indices
    places: Indices
    weights: Elements  # (H, EDGES)
    changes: Elements
    shares: Elements
    bound: Elements  # (H)
    total: Elements
    delta: Elements
    value: Elements  # (H, pad): sums, and one row that is given; C channels or D
    terms: Elements
    x: Elements
    y: Elements


def scratch_elements(H: int, pad: int, lanes: int, itemsize: int) -> int:
    """What `carve` lays out, in elements."""
    numbers = -(-H // lanes) * lanes
    return 3 * EDGES * 8 // itemsize + 3 * H * EDGES + 3 * numbers + 4 * H * pad


def partial_elements(H: int, pad: int) -> int:
    """What a part leaves: forward its sums, bounds and totals; backward delta, or its sums."""
    return 2 * H * pad + 2 * H


@inline
def carve(job, slot):
    H, pad = job.H, max(whole_vectors(job.scratch, job.C), whole_vectors(job.scratch, job.D))
    here = job.scratch + slot * job.scratch_step
    numbers = whole_vectors(here, H)
    weights = here + 3 * EDGES * job.line // 8
    bound = weights + 3 * H * EDGES
    value = bound + 3 * numbers
    index = as_indices(here)
    return Desk(
        index, index + EDGES, index + 2 * EDGES, weights, weights + H * EDGES, weights + 2 * H * EDGES,
        bound, bound + numbers, bound + 2 * numbers,
        value, value + H * pad, value + 2 * H * pad, value + 3 * H * pad,
    ), pad  # fmt: skip


# --- edges ----------------------------------------------------------------------------------------------------------
@apart
def number(narrow, wide, p):
    return wide[p] if narrow is None else np.int64(narrow[p])


@inline
def degree(job, i):
    return number(job.indptr, job.wide_indptr, i + 1) - number(job.indptr, job.wide_indptr, i)


@apart
def take_edges(job, desk, first, n):
    """Both ends' numbers of the edges at n positions; rows that come soon are asked for."""
    for e in range(n):
        p = first + e
        desk.index[e] = number(job.others, job.wide_others, p)
        desk.ids[e] = number(job.edge_ids, job.wide_edge_ids, p) if job.has_ids else p
        if p + AHEAD < job.E:
            fetch_row(job.value, number(job.others, job.wide_others, p + AHEAD), job.H * job.C, job.line)
            if job.rule == DOT or job.rule == SUM:
                fetch_row(job.key, number(job.others, job.wide_others, p + AHEAD), job.H * job.D, job.line)


@apart
def is_kept(dropout, edge, head):
    """32 bits from (seed, head, edge) alone: no state, so any order gives the same."""
    x = mixed(np.uint64(dropout.seed) + np.uint64(head) * np.uint64(0x9E3779B97F4A7C15))
    x = mixed(x + np.uint64(edge) * np.uint64(0xD1B54A32D192ED03))
    return np.int64(x & np.uint64(0xFFFFFFFF)) >= dropout.threshold


@apart
def find_shares(job, desk, i, n):
    """shares[h, e] = w / p, but for the edges' own weights: what becomes of a weight after the softmax"""
    share = 1 / degree(job, i) if job.aggregation == MEAN else 1.0
    for h in range(job.H):
        for e in range(n):
            x = share
            if job.has_dropout:
                x = share * job.dropout.gain if is_kept(job.dropout, desk.ids[e], h) else 0.0
            desk.shares[h * EDGES + e] = x


@apart
def weigh_shares(job, desk, n):
    if job.has_weight:
        for h in range(job.H):
            for e in range(n):
                desk.shares[h * EDGES + e] *= job.edge_weight[desk.ids[e]]


@apart
def fetch_pairs(job, p):
    """Ask for what the walk by source will soon read: of the target, and of the edge."""
    if p + AHEAD < job.E:
        soon = number(job.others, job.wide_others, p + AHEAD)
        fetch_row(job.grad, soon, job.H * job.C, job.line)
        if job.rule == DOT or job.rule == JOINT:
            fetch_row(job.query, soon, job.H * job.D, job.line)
        place = number(job.positions, job.wide_positions, p + AHEAD)
        fetch_row(Rows(job.pairs, 2 * job.H), place, 2 * job.H, job.line)
