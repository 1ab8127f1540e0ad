"""The softmax of numbers that belong to edges, over the edges into each target, and its gradient.

    s[e, h]      a score of each edge and head, in the caller's order; those of a target lie together in the walk
    w[e, h]      exp(s - bound) / total, where bound is the largest score of a target, total the sum of exp(s - bound)
    ds[e, h]     w * (dw - delta), where delta is the sum of w * dw over the target's edges

What is of a target is found first, in `bound` and `total`, then what is of its edges. The edges of a batch lie on the
desk meanwhile; those that are too many are read twice. The parts of a hub leave what they found, and a second time each
part knows what all of them have.
"""

import math

import numpy as np

from .csr import find_weights, soften
from .gather import AHEAD, EDGES, Rows, copy, fill, first_lanes, rounds, row_part
from .jit import apart, kernel, within
from .simd import lanes_of, load, period_sum, prefetch, splat, store, where
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


# --- edges in the caller's order, and on the desk -------------------------------------------------------------------
@apart
def gather_numbers(out, rows, edges, n, H, W):
    """out[e, h] = rows[edges[e], h]"""
    lanes = lanes_of(out)
    for g in range(0, H, lanes):
        live = min(lanes, H - g)
        for e in range(n):
            prefetch(rows.data, edges[e + AHEAD] * rows.step + g)
            store(row_part(rows, edges[e] * rows.step + g, live, lanes), out, e * W + g)


@within
def take(job, desk, first, n):
    """scores = s, or backward w, and changes = dw: of the n edges from `first` on"""
    take_edges(job, desk, first, n)
    gather_numbers(desk.scores, job.bias, desk.edges, n, job.H, job.W)
    if job.has_grad_weights:
        gather_numbers(desk.changes, Rows(job.grad_weights, job.H), desk.edges, n, job.H, job.W)


@within
def put(job, desk, n):
    """What was made of the n edges, which lies in weights. (Masked stores would take longer, see gather.py.)"""
    for e in range(n):
        at = desk.edges[e] * job.H
        for h in range(job.H):
            job.dbias[at + h] = desk.weights[e * job.W + h]


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
    put(job, desk, n)


@within
def do_long(job, desk, task, first, last, measure, finish):
    """One target's edges first .. last - 1"""
    if job.mode == SECOND_PART:
        join_parts(job, desk, task)
    else:
        clear(job, desk)
        for p in range(first, last, EDGES):
            n = min(EDGES, last - p)
            take(job, desk, p, n)
            measure(job, desk, n, p > first)
    if job.mode == PART:
        here = job.partial + task * job.partial_step
        copy(here, desk.bound, job.span)
        copy(here + job.span, desk.total, job.span)
        return
    for p in range(first, last, EDGES):
        n = min(EDGES, last - p)
        take(job, desk, p, n)
        finish(job, desk, n)
        put(job, desk, n)


@within
def clear(job, desk):
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
            bound, before, fade, mine = here[h], desk.bound[h], 1.0, 1.0
            if bound > before:
                fade, desk.bound[h] = math.exp(np.float64(before - bound)), bound
            elif bound < before:
                mine = math.exp(np.float64(bound - before))
            desk.total[h] = desk.total[h] * fade + here[span + h] * mine


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
            w, dw = first_lanes(load(desk.scores, f), n * W - f, 0.0), load(desk.changes, f)
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
            w, dw = load(desk.scores, f), load(desk.changes, f)
            store(where(w == splat(w, 0.0), w, w * (dw - delta)), desk.weights, f)


@kernel
def backward(job: NeighborJob, slot, task):
    along(job, slot, task, add_products, subtract_delta)
