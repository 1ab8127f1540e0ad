"""The softmax of numbers that belong to edges, over the edges into each target, and its gradient.

    s[e, h]      a score of each edge and head, in the caller's order; those of a target lie together in the walk
    w[e, h]      exp(s - bound) / total, where bound is the largest score of a target, total the sum of exp(s - bound)
    ds[e, h]     w * (dw - delta), where delta is the sum of w * dw over the target's edges

What is of a target is found first, in `bound` and `total`, then what is of its edges. The edges of a batch lie on the
desk meanwhile; those that are too many are read twice. The parts of a hub leave what they found, and a second time each
part knows what all of them have.
"""

import math

from .csr import find_weights, join_totals, soften
from .gather import EDGES, Rows, copy, fill, first_lanes, put_numbers_of, rounds, take_numbers_of
from .jit import apart, kernel, within
from .simd import lanes_of, load, period_sum, splat, store, where
from .walk import (
    NODES,
    PART,
    SECOND_PART,
    NeighborJob,
    carve,
    edges_of,
    from_edge,
    is_mine,
    next_batch,
    nodes_of,
    take_edges,
)

INF = math.inf


# --- along the edges -------------------------------------------------------------------------------------------------
@within
def take(job, desk, first, n):
    """scores = s, or backward w, and gradients = dw: of the n edges from `first` on"""
    take_edges(job, desk, first, n)
    take_numbers_of(desk.scores, job.bias, desk.edges, n, job.H, job.W)
    if job.has_grad_weights:
        take_numbers_of(desk.gradients, Rows(job.grad_weights, job.H), desk.edges, n, job.H, job.W)


@within
def along(job, slot, task, measure, finish):
    # task -> some targets, or a part of a hub's edges: first to be measured, and a second time to be finished
    desk = carve(job, slot)
    i, end = nodes_of(job, task)
    while i < end:
        j, first, last = next_batch(job, task, i, end)
        if last > first and is_mine(job, first, last):
            if job.mode == NODES and last - first <= EDGES:
                do_batch(job, desk, i, j, first, last - first, measure, finish)
            else:
                do_long(job, desk, task, first, last, measure, finish)
        i = j


@within
def do_batch(job, desk, i, j, first, n, measure, finish):
    """The targets i .. j - 1, whose n edges are one batch"""
    take(job, desk, first, n)
    for t in range(i, j):
        begin, end = edges_of(job, t, first, first + n)
        here = from_edge(desk, begin - first, job.W)
        clear(job, here)
        measure(job, here, end - begin, False)
        finish(job, here, end - begin)
    put_numbers_of(job.dbias, desk.weights, desk.edges, n, job.H, job.W)


@within
def do_long(job, desk, task, first, last, measure, finish):
    """One target's edges first .. last - 1"""
    if job.mode == SECOND_PART:
        join_parts(job, desk, task)
    else:
        clear(job, desk)
        for at in range(first, last, EDGES):
            n = min(EDGES, last - at)
            take(job, desk, at, n)
            measure(job, desk, n, at > first)
    if job.mode == PART:
        here = job.partial + task * job.partial_step
        copy(here, desk.bound, job.span)
        copy(here + job.span, desk.total, job.span)
        return
    for at in range(first, last, EDGES):
        n = min(EDGES, last - at)
        take(job, desk, at, n)
        finish(job, desk, n)
        put_numbers_of(job.dbias, desk.weights, desk.edges, n, job.H, job.W)


@within
def clear(job, desk):
    """Nothing measured yet. Backward the bound is 0 throughout: sums of parts are added as they are."""
    fill(desk.bound, job.span, 0.0 if job.has_grad_weights else -INF)
    fill(desk.total, job.span, 0.0)


@apart
def join_parts(job, desk, task):
    """What all parts of the hub have found that this task has a part of, in their order: the same for each of them"""
    hub, span = job.hubs + 3 * job.parts[3 * task], job.span
    clear(job, desk)
    for part in range(hub[1], hub[2]):
        here = job.partial + part * job.partial_step
        for h in range(span):
            join_totals(desk, here[h], here[span + h], h)


# --- forward --------------------------------------------------------------------------------------------------------
@apart
def add_exponentials(job, desk, n, again):
    """bound and total of a target, with n edges more"""
    soften(job, desk, n, again)


@apart
def divide(job, desk, n):
    """weights = w"""
    find_weights(job, desk, desk.bound, desk.total, n)


@kernel
def forward(job: NeighborJob, slot, task):
    along(job, slot, task, add_exponentials, divide)


# --- backward -------------------------------------------------------------------------------------------------------
@apart
def add_products(job, desk, n, again):
    """total += the sum of w * dw, but of edges that are hidden, whose dw may be NaN: delta, when all are added"""
    W, lanes = job.W, lanes_of(desk.scores)
    for g in range(0, W, lanes):
        sum = splat(load(desk.scores, g), 0.0)
        for k in range(rounds(n, W, lanes)):
            f = g + k * job.span
            w, dw = first_lanes(load(desk.scores, f), n * W - f, 0.0), load(desk.gradients, f)
            sum = sum + where(w == splat(w, 0.0), splat(w, 0.0), w * dw)
        store(load(desk.total, g) + period_sum(sum, W), desk.total, g)


@apart
def subtract_delta(job, desk, n):
    """weights = ds"""
    W, lanes = job.W, lanes_of(desk.scores)
    for g in range(0, W, lanes):
        delta = load(desk.total, g)
        for k in range(rounds(n, W, lanes)):
            f = g + k * job.span
            w, dw = load(desk.scores, f), load(desk.gradients, f)
            store(where(w == splat(w, 0.0), w, w * (dw - delta)), desk.weights, f)


@kernel
def backward(job: NeighborJob, slot, task):
    along(job, slot, task, add_products, subtract_delta)
