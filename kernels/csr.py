"""Attention over neighbours: of each target i to the sources j of its edges, which lie together (CSR).

    s[e, h]      score of an edge, by one of four rules; a is of the edge, and optional everywhere
                 SUM     leaky(key[j, h] + query[i, h] + a[e, h])                                           GAT
                 JOINT   sum over c of att[h, c] * leaky(key[j, h, c] + query[i, h, c] + a[e, h, c])        GATv2
                 DOT     scale * sum over d of query[i, h, d] * (key[j, h, d] + a[e, h, d]) + bias[e, h]  transformers
                 GIVEN   bias[e, h], for its softmax alone: edge_softmax.py
    p[e, h]      softmax of s over the edges of a target: exp(s - bound) / total
    w[e, h]      p * (kept by dropout) * (edge's weight) / (number of edges, for the mean)
    o[i, h, c]   sum over e of w[e, h] * (value[j, h, c] + value_a[e, h, c])

The gradients are in csr_backward.py. How the work is dealt to tasks, walk.py says.
"""

import math
from typing import NamedTuple

import numpy as np

from .edge_features import count_lines, lines_of, make_rows, rows_of
from .gather import (
    AHEAD,
    EDGES,
    Rows,
    add_gathered,
    copy,
    dot_gathered,
    fetch_row,
    fill,
    first_lanes,
    multiply,
    put_part,
    rounds,
    row_part,
    scale_heads,
    take_row,
)
from .jit import apart, inline, kernel, within
from .jobs import Elements
from .joint import joint_scores, leaky
from .largest import NONE, choose, clear_chosen, find_hidden, join_largest, keep_largest
from .simd import (
    fma,
    lane_sum,
    lanes_of,
    load,
    period_max,
    period_sum,
    prefetch,
    splat,
    store,
    where,
    zeros_of,
)
from .softmax import LOG2E, probability
from .walk import (
    DOT,
    HUB,
    JOINT,
    MAX,
    PART,
    SUM,
    NeighborJob,
    begin_of,
    carve,
    edges_of,
    features_desk,
    find_shares,
    from_edge,
    is_mine,
    next_batch,
    nodes_of,
    number,
    take_edges,
    weigh_shares,
)

INF = math.inf
TARGETS_AHEAD = 8  # about a batch; rows that will be written, or those of the way back, are as fast unasked for


# --- forward --------------------------------------------------------------------------------------------------------
@within
def find_scores(job, desk, i, j, first, n):
    """scores[e, h] = s, of SUM before its LeakyReLU: of the n edges from `first` on, of the targets i .. j - 1"""
    s, W, edges, lanes = desk.scores, job.W, desk.edges, lanes_of(desk.scores)
    for t in range(i, j):
        begin, end = edges_of(job, t, first, first + n)
        take_query(job, desk, t)
        find_products(job, from_edge(desk, begin - first, W), end - begin)
    if job.rule == DOT:
        for f in range(0, n * W, lanes):
            x = load(s, f)
            store(x * splat(x, job.scale), s, f)
    for e in range(n if job.has_bias else 0):
        for h in range(job.H):
            b = job.bias.data[edges[e] * job.bias.step + h]
            s[e * W + h] = b if b == -INF else s[e * W + h] + b
    if job.keeps:
        copy(job.scores + first * W, s, n * W)


@within
def find_products(job, desk, n):
    """What of the scores belongs to both ends: desk.y has the target's query"""
    s, nodes, edge, lines = desk.scores, desk.nodes, rows_of(job, desk, job.edge), lines_of(job, desk)
    if job.rule == DOT:
        dot_gathered(s, desk.y, job.key, nodes, edge, lines, job.has_edge, n, job.key_heads)
    elif job.rule == JOINT:
        joint_scores(s, desk.y, job.att, job.slope, job.key, nodes, edge, lines, job.has_edge, n, job.key_heads)
    else:
        find_sums(job, desk, n)


@within
def find_sums(job, desk, n):
    """scores[e, h] = key + query + a"""
    out, lanes = desk.scores, lanes_of(desk.scores)
    for h in range(0, job.H, lanes):
        live, query = min(lanes, job.H - h), load(desk.y, h)
        for e in range(n):
            prefetch(job.key.data, desk.nodes[e + AHEAD] * job.key.step)
            if job.has_edge:
                prefetch(job.edge.data, desk.edges[e + AHEAD] * job.edge.step)
            x = query + row_part(job.key, desk.nodes[e] * job.key.step + h, live, lanes)
            if job.has_edge:
                x = x + row_part(job.edge, desk.edges[e] * job.edge.step + h, live, lanes)
            store(x, out, e * job.W + h)


@inline
def score(job, desk, f):
    """s, of a vector of edges and heads"""
    s = load(desk.scores, f)
    return leaky(s, job.slope) if job.rule == SUM else s


@within
def soften(job, desk, n, again):
    """weights = p = exp(s - bound), where the bound is the largest score, added to the total. If the n edges come again
    to a target, factor is what its sums so far are worth under the new bound. (The exponentials of all targets of a
    batch as one loop were not faster.)"""
    W, span, lanes, count = job.W, job.span, lanes_of(desk.scores), n * job.W
    many = rounds(n, W, lanes)
    for g in range(0, W, lanes):
        # 1. the largest score of each head
        before = load(desk.bound, g)
        top, none = before, splat(before, -INF)
        for k in range(many):
            f = g + k * span
            x = first_lanes(score(job, desk, f), count - f, -INF)
            top = where(x > top, x, top)
        top = period_max(top, W)
        store(top, desk.bound, g)
        # 2. p, and its sum over the edges
        shift, sum = where(top > none, top, splat(top, 0.0)), splat(top, 0.0)
        for k in range(many):
            f = g + k * span
            p = probability(first_lanes(score(job, desk, f), count - f, -INF), shift, LOG2E)
            store(p, desk.weights, f)
            sum = sum + p
        sum = period_sum(sum, W)
        if again:
            factor = probability(before, shift, LOG2E)
            sum = fma(load(desk.total, g), factor, sum)
            store(factor, desk.factor, g)
        store(sum, desk.total, g)


@within
def add_values(job, desk, i, n, round):
    """What n edges of target i add to its sums, the batch `round` of them"""
    W, values, edge_value, lines = job.W, job.value_heads, rows_of(job, desk, job.edge_value), lines_of(job, desk)
    if job.normalizes:
        soften(job, desk, n, round > 0)
        if round > 0:
            scale_heads(desk.value, desk.factor, values)
    else:
        for f in range(0, n * W, lanes_of(desk.scores)):
            store(score(job, desk, f), desk.weights, f)
    if job.has_shares:
        find_shares(job, desk, i, n)
        weigh_shares(job, desk, n)
        multiply(desk.weights, desk.shares, n * W)
    if job.aggregation == MAX:
        find_hidden(job, desk, n)
        keep_largest(
            desk.value, desk.place, desk.batch, desk.weights, desk.gradients, job.has_bias, job.value, edge_value,
            job.has_edge_value, desk.nodes, lines, n, round, values,
        )  # fmt: skip
    else:
        fetches = job.rule != JOINT  # whose values are its keys
        add_gathered(desk.value, desk.weights, W, job.value, desk.nodes, n, values, fetches, job.has_bias)
        if job.has_edge_value:
            add_gathered(desk.value, desk.weights, W, edge_value, lines, n, values, True, job.has_bias)


@within
def attend(job, desk, i, j, first, last, finishes):
    """Targets i .. j - 1 to their edges first .. last - 1: a batch, or one target to more. Unless it finishes, what is
    summed is left on the desk."""
    for at in range(first, max(last, first + 1), EDGES):
        n = min(EDGES, last - at)
        if job.aggregation == MAX and job.keeps:
            clear_chosen(job, at, n)
        if n:
            take_edges(job, desk, at, n)
            if job.features.K:
                make_rows(features_desk(job, desk), desk.edges, job.edge, job.features, n)
            find_scores(job, desk, i, j, at, n)
        for t in range(i, j):
            begin, end = edges_of(job, t, at, at + n)
            here = from_edge(desk, begin - at, job.W)
            fetch_target(job, t + TARGETS_AHEAD)
            if at == first:
                fill(desk.bound, job.span, -INF)
                fill(desk.total, job.span, 0.0)
                fill(desk.value, job.width, 0.0)
                if job.aggregation == MAX:
                    fill(desk.place, job.width, NONE)
            add_values(job, here, t, end - begin, (at - first) // EDGES)
            if finishes and at + EDGES >= last:
                finish(job, here, t)


@apart
def fetch_target(job, i):
    """Ask for what belongs to target i: rows that lie far apart, which the CPU does not foresee"""
    fetch_row(job.query, i, 0, job.H if job.rule == SUM else job.H * job.key_heads.C)
    if job.offset.step:
        fetch_row(job.offset, i, 0, job.H * job.value_heads.C)


@within
def take_query(job, desk, i):
    """desk.y = the query of target i; of SUM, where it is a number for each head, these lie as those of an edge"""
    if job.rule == SUM:
        lanes = lanes_of(desk.y)
        for h in range(0, job.H, lanes):
            store(row_part(job.query, i * job.query.step + h, min(lanes, job.H - h), lanes), desk.y, h)
    else:
        take_row(desk.y, job.query, i, job.key_heads)


@within
def finish(job, desk, i):
    """o = offset + sum of w v / sum of p, and the offset alone where there is nothing to sum"""
    values, lanes = job.value_heads, lanes_of(desk.value)
    for g in range(0, job.span, lanes):
        l = load(desk.total, g)
        zero, one = splat(l, 0.0), splat(l, 1.0)
        store(where(l <= zero, zero, one / l) if job.normalizes else one, desk.factor, g)
        if job.keeps:
            store(load(desk.bound, g), job.bounds, i * job.span + g)
            store(l, job.totals, i * job.span + g)
    for h in range(job.H):
        for c in range(0, values.C, lanes):
            x, live = load(desk.value, h * values.pad + c), min(lanes, values.C - c)
            o = row_part(job.offset, i * job.offset.step + h * values.C + c, live, lanes)
            at = i * job.output.step + h * values.C + c
            put_part(job.output, at, fma(x, splat(x, desk.factor[h]), o), live, lanes)
    if job.aggregation == MAX and job.keeps:
        choose(job, desk, i)


@apart
def join_totals(desk, bound, total, h):
    """The bound and total of a head, with those of a part added; what sums under each of both are worth now"""
    before, mine, other = desk.bound[h], 1.0, 1.0
    if bound > before:
        mine, desk.bound[h] = math.exp(np.float64(before - bound)), bound
    elif bound < before:
        other = math.exp(np.float64(bound - before))
    desk.total[h] = desk.total[h] * mine + total * other
    return mine, other


@within
def add_parts(job, desk, first, last):
    """What the parts of a hub have summed, each under its own bound, as if `attend` had done it at once."""
    H, pad, width, span = job.H, job.value_heads.pad, job.width, job.span
    if job.aggregation == MAX:
        fill(desk.place, width, NONE)
    fill(desk.bound, span, -INF)
    fill(desk.total, span, 0.0)
    fill(desk.value, width, 0.0)
    for part in range(first, last):
        here = job.partial + part * job.partial_step
        for h in range(span):
            mine, other = join_totals(desk, here[width + h], here[width + span + h], h)
            for c in range(h * pad, (h + 1) * pad if h < H else 0):
                desk.value[c] *= mine
                if job.aggregation == MAX:
                    join_largest(job, desk, part, c, here[c] * other)
                else:
                    desk.value[c] += here[c] * other


@kernel
def forward(job: NeighborJob, slot, task):
    # task -> some targets, or a part of a hub's edges, or a hub whose parts are done
    desk = carve(job, slot)
    count_lines(job, desk)
    if job.mode == HUB:
        add_parts(job, desk, job.hubs[3 * task + 1], job.hubs[3 * task + 2])
        finish(job, desk, job.hubs[3 * task])
        return
    i, end = nodes_of(job, task)
    is_part = job.mode == PART
    while i < end:
        j, first, last = next_batch(job, task, i, end)
        if is_mine(job, first, last):
            attend(job, desk, i, j, first, last, not is_part)
        i = j
    if is_part:
        here = job.partial + task * job.partial_step
        copy(here, desk.value, job.width)
        copy(here + job.width, desk.bound, job.span)
        copy(here + (job.width + job.span), desk.total, job.span)
        if job.aggregation == MAX:
            found = here + (job.width + 2 * job.span)
            copy(found, desk.place, job.width)
            copy(found + job.width, desk.batch, job.width)


# --- folded keys and queries -----------------------------------------------------------------------------------------
class FoldJob(NamedTuple):
    """out[f, n, h] = sum over c of fold[f, h, c] * value[n, h, c]: what GAT's scores are sums of"""

    value: Rows
    fold: Elements  # (F, H, C), padded
    out: Elements  # (F, N, H)
    F: int
    N: int
    H: int
    C: int
    pad: int
    nodes: int  # of one task


@kernel
def fold(job: FoldJob, slot, task):
    # task -> some nodes
    H, C, lanes = job.H, job.C, lanes_of(job.fold)
    for n in range(task * job.nodes, min(job.N, (task + 1) * job.nodes)):
        for h in range(H):
            for f in range(job.F):
                sum = zeros_of(job.fold)
                for c in range(0, C, lanes):
                    x = row_part(job.value, n * job.value.step + h * C + c, min(lanes, C - c), lanes)
                    sum = fma(x, load(job.fold, (f * H + h) * job.pad + c), sum)
                job.out[(f * job.N + n) * H + h] = lane_sum(sum)


# --- coefficients ----------------------------------------------------------------------------------------------------
@within
def find_weights(job, desk, bounds, totals, n):
    """weights[e, h] = p, of scores on the desk, whose target has these; 0 where one is -inf, whatever else is NaN"""
    W, lanes, count = job.W, lanes_of(desk.weights), n * job.W
    for g in range(0, W, lanes):
        bound, l = load(bounds, g), load(totals, g)
        zero, one = splat(l, 0.0), splat(l, 1.0)
        shift, factor = where(l <= zero, zero, bound), where(l <= zero, zero, one / l)
        for k in range(rounds(n, W, lanes)):
            f = g + k * job.span
            s = first_lanes(score(job, desk, f), count - f, -INF)
            p = probability(s, shift, LOG2E) * factor if job.normalizes else s
            store(where(s <= splat(s, -INF), zero, p), desk.weights, f)


@kernel
def coefficients(job: NeighborJob, slot, task):
    # task -> some targets, hubs or not; dbias[e, h] = p, in the caller's order
    desk = carve(job, slot)
    for i in range(job.starts[task], job.starts[task + 1]):
        last = begin_of(job, i + 1)
        for at in range(begin_of(job, i), last, EDGES):
            n = min(EDGES, last - at)
            copy(desk.scores, job.scores + at * job.W, n * job.W)
            find_weights(job, desk, job.bounds + i * job.span, job.totals + i * job.span, n)
            for e in range(n):
                edge = number(job.edge_ids, job.wide_edge_ids, at + e) if job.has_ids else at + e
                for h in range(job.H):
                    job.dbias[edge * job.H + h] = desk.weights[e * job.W + h]
