"""Attention over neighbours: of each target i to the sources j of its edges, which lie together (CSR).

    s[e, h]      score of an edge, by one of four rules; a is of the edge, and optional everywhere
                 SUM     leaky(key[j, h] + query[i, h] + a[e, h])                                           GAT
                 JOINT   sum over c of att[h, c] * leaky(key[j, h, c] + query[i, h, c] + a[e, h, c])        GATv2
                 DOT     scale * sum over d of query[i, h, d] * (key[j, h, d] + a[e, h, d]) + bias[e, h]  transformers
                 GIVEN   bias[e, h]
    p[e, h]      softmax of s over the edges of a target: exp(s - bound) / total
    w[e, h]      p * (kept by dropout) * (edge's weight) / (number of edges, for the mean)
    o[i, h, c]   sum over e of w[e, h] * (value[j, h, c] + value_a[e, h, c])

The gradients are in csr_backward.py. How the work is dealt to tasks, walk.py says.
"""

import math
from typing import NamedTuple

from .gather import (
    EDGES,
    Rows,
    add_gathered,
    dot_gathered,
    first_lanes,
    joint_scores,
    keep_largest,
    leaky,
    put_row,
    scale,
    take_row,
)
from .jit import Elements, apart, kernel
from .simd import fma, lane_max, lane_sum, lanes_of, load, load_live, splat, store, where
from .softmax import LOG2E, probability
from .walk import (
    DOT,
    JOINT,
    MAX,
    NODES,
    PART,
    SUM,
    NeighborJob,
    carve,
    find_shares,
    number,
    take_edges,
    weigh_shares,
)

INF = math.inf


# --- forward --------------------------------------------------------------------------------------------------------
@apart
def find_scores(job, desk, pad, n):
    """weights[h, e] = s: desk.y has the target's query"""
    H, D, s = job.H, job.D, desk.weights
    if job.rule == DOT:
        dot_gathered(s, desk.y, pad, job.key, desk.index, n, H, D, job.scale, False)
        if job.has_edge:
            dot_gathered(s, desk.y, pad, job.edge, desk.ids, n, H, D, job.scale, True)
    elif job.rule == JOINT:
        joint_scores(s, desk.y, pad, job.att, job.slope, job.key, job.edge, job.has_edge, desk.index, desk.ids, n, H, D)
    elif job.rule == SUM:
        find_sums(job, desk, pad, s, n)
        for h in range(H):
            for e in range(0, n, lanes_of(s)):
                store(leaky(load(s, h * EDGES + e), job.slope), s, h * EDGES + e)
    else:
        for h in range(H):
            for e in range(n):
                s[h * EDGES + e] = 0
    if job.has_bias:
        for e in range(n):
            for h in range(H):
                b = job.bias.data[desk.ids[e] * job.bias.step + h]
                s[h * EDGES + e] = b if b == -INF else s[h * EDGES + e] + b


@apart
def find_sums(job, desk, pad, out, n):
    """out[h, e] = key + query + a: apart from LeakyReLU, which by vectors has no branches to guess wrong"""
    for e in range(n):
        key = job.key.data + desk.index[e] * job.key.step
        for h in range(job.H):
            out[h * EDGES + e] = key[h] + desk.y[h * pad]
        if job.has_edge:
            a = job.edge.data + desk.ids[e] * job.edge.step
            for h in range(job.H):
                out[h * EDGES + e] += a[h]


@apart
def soften(desk, h, n):
    """p = exp(s - bound), added to the total; returns what the sums so far are worth under the new bound."""
    s = desk.weights + h * EDGES
    lanes, top = lanes_of(s), splat(load(s, 0), -INF)
    for e in range(0, n, lanes):
        x = first_lanes(load(s, e), n - e, -INF)
        top = where(x > top, x, top)
    before, most = desk.bound[h], lane_max(top)
    factor = 1.0
    if most > before:
        factor, desk.bound[h] = 0.0 if before == -INF else math.exp((before - most) * 1.0), most
    shift = splat(top, 0 if desk.bound[h] == -INF else desk.bound[h])
    total = load_live(s, 0, 0)
    for e in range(0, n, lanes):
        p = probability(first_lanes(load(s, e), n - e, -INF), shift, LOG2E)
        store(p, s, e)
        total = total + p
    desk.total[h] = desk.total[h] * factor + lane_sum(total)
    return factor


@apart
def attend(job, desk, pad, i, first, last, best):
    """Target i to its edges first .. last - 1: what is summed is left on the desk."""
    H, C = job.H, job.C
    take_row(desk.y, pad, job.query, i, H, job.D)
    for h in range(H):
        desk.bound[h], desk.total[h] = -INF, 0
        for c in range(pad):
            desk.value[h * pad + c] = 0
    if job.aggregation == MAX:
        for c in range(H * C):
            best[c] = -1
    for p in range(first, last, EDGES):
        n = min(EDGES, last - p)
        take_edges(job, desk, p, n)
        find_scores(job, desk, pad, n)
        if job.keeps:
            for e in range(n):
                for h in range(H):
                    job.scores[(p + e) * H + h] = desk.weights[h * EDGES + e]
        for h in range(H if job.normalizes else 0):
            factor = soften(desk, h, n)
            if factor != 1 and p > first:
                scale(desk.value + h * pad, pad, factor)
        if job.has_shares:
            find_shares(job, desk, i, n)
            weigh_shares(job, desk, n)
            for h in range(H):
                for e in range(n):
                    desk.weights[h * EDGES + e] *= desk.shares[h * EDGES + e]
        if job.aggregation == MAX:
            keep_largest(
                desk.value, pad, best, desk.weights, job.value, job.edge_value, job.has_edge_value, desk.index,
                desk.ids, job.bias, job.has_bias, p, n, H, C,
            )  # fmt: skip
        else:
            add_gathered(desk.value, pad, desk.weights, job.value, desk.index, n, H, C, job.has_bias)
            if job.has_edge_value:
                add_gathered(desk.value, pad, desk.weights, job.edge_value, desk.ids, n, H, C, job.has_bias)


@apart
def finish(job, desk, pad, i):
    """o = offset + sum of w v / sum of p, and the offset alone where there is nothing to sum"""
    lanes = lanes_of(desk.value)
    for h in range(job.H):
        l, factor = desk.total[h], 1.0
        if job.normalizes:
            factor = 0.0 if l == 0 else 1 / l
        job.bounds[i * job.H + h], job.totals[i * job.H + h] = desk.bound[h], l
        for c in range(0, job.C, lanes):
            x = load(desk.value, h * pad + c)
            o = load_live(job.offset.data, i * job.offset.step + h * job.C + c, min(lanes, job.C - c))
            store(fma(x, splat(x, factor), o), desk.value, h * pad + c)
    put_row(job.output, i, desk.value, pad, job.H, job.C)


@apart
def add_parts(job, desk, pad, first, last, best):
    """What the parts of a hub have summed, each under its own bound, as if `attend` had done it at once."""
    H, C = job.H, job.C
    for h in range(H):
        desk.bound[h], desk.total[h] = -INF, 0
        for c in range(pad):
            desk.value[h * pad + c] = 0
    for part in range(first, last):
        here = job.partial + part * job.partial_step
        for h in range(H):
            bound, before, factor, mine = here[H * pad + h], desk.bound[h], 1.0, 1.0
            if bound > before:
                mine, desk.bound[h] = math.exp((before - bound) * 1.0), bound
            elif bound < before:
                factor = math.exp((bound - before) * 1.0)
            desk.total[h] = desk.total[h] * mine + here[H * pad + H + h] * factor
            for c in range(pad):
                desk.value[h * pad + c] *= mine
                x = here[h * pad + c] * factor
                if job.aggregation != MAX:
                    desk.value[h * pad + c] += x
                elif c < C and job.partial_best[part * H * C + h * C + c] >= 0:
                    if part == first or best[h * C + c] < 0 or x > desk.value[h * pad + c] or x != x:
                        desk.value[h * pad + c], best[h * C + c] = x, job.partial_best[part * H * C + h * C + c]
                elif c < C and part == first:
                    best[h * C + c] = -1


@kernel
def forward(job: NeighborJob, slot, task):
    # task -> some targets, or a part of a hub's edges, or a hub whose parts are done
    desk, pad = carve(job, slot)
    if job.mode == NODES:
        for i in range(job.starts[task], job.starts[task + 1]):
            first = number(job.indptr, job.wide_indptr, i)
            last = number(job.indptr, job.wide_indptr, i + 1)
            if last - first <= job.most:
                attend(job, desk, pad, i, first, last, job.best + i * job.H * job.C)
                finish(job, desk, pad, i)
    elif job.mode == PART:
        i = job.hubs[3 * job.parts[3 * task]]
        best = job.partial_best + task * job.H * job.C
        attend(job, desk, pad, i, job.parts[3 * task + 1], job.parts[3 * task + 2], best)
        here, sums = job.partial + task * job.partial_step, job.H * pad
        for c in range(sums):
            here[c] = desk.value[c]
        for h in range(job.H):
            here[sums + h], here[sums + job.H + h] = desk.bound[h], desk.total[h]
    else:
        i, first, last = job.hubs[3 * task], job.hubs[3 * task + 1], job.hubs[3 * task + 2]
        add_parts(job, desk, pad, first, last, job.best + i * job.H * job.C)
        finish(job, desk, pad, i)


# --- terms of nodes --------------------------------------------------------------------------------------------------
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
                sum = load_live(job.fold, 0, 0)
                for c in range(0, C, lanes):
                    x = load_live(job.value.data, n * job.value.step + h * C + c, min(lanes, C - c))
                    sum = fma(x, load(job.fold, (f * H + h) * job.pad + c), sum)
                job.out[(f * job.N + n) * H + h] = lane_sum(sum)


# --- coefficients ----------------------------------------------------------------------------------------------------
@apart
def find_weights(job, desk, i, first, n):
    """weights[h, e] = p, from what forward kept; 0 where the score is -inf, whatever else is NaN"""
    H, lanes = job.H, lanes_of(job.scores)
    for e in range(n):
        for h in range(H):
            desk.weights[h * EDGES + e] = job.scores[(first + e) * H + h]
    for h in range(H):
        s = desk.weights + h * EDGES
        bound, l = job.bounds[i * H + h], job.totals[i * H + h]
        for e in range(0, n, lanes):
            x = first_lanes(load(s, e), n - e, -INF)
            hidden = x <= splat(x, -INF)
            if job.normalizes:
                x = probability(x, splat(x, 0 if l == 0 else bound), LOG2E) * splat(x, 0 if l == 0 else 1 / l)
            store(where(hidden, splat(x, 0.0), x), s, e)


@kernel
def coefficients(job: NeighborJob, slot, task):
    # task -> some targets, hubs or not; dbias[e, h] = p, in the caller's order
    desk, pad = carve(job, slot)
    for i in range(job.starts[task], job.starts[task + 1]):
        last = number(job.indptr, job.wide_indptr, i + 1)
        for p in range(number(job.indptr, job.wide_indptr, i), last, EDGES):
            n = min(EDGES, last - p)
            find_weights(job, desk, i, p, n)
            for e in range(n):
                at = number(job.edge_ids, job.wide_edge_ids, p + e) if job.has_ids else p + e
                for h in range(job.H):
                    job.dbias[at * job.H + h] = desk.weights[h * EDGES + e]
