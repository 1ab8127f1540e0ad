"""The way back through attention over neighbours (csr.py): by target, for ds and what targets get, then by source.

    dp = <do[i, h], value[j, h] + value_a[e, h]> * w / p         delta[i, h] = sum over e of p * dp
    ds = p * (dp - delta)                                        and through the rule to key, query and a
    dvalue[j, h, c] = sum over the edges from j of w[e, h] * do[i, h, c]

Between the two, of each edge only the pair (w, ds) is kept.
"""

from .csr import find_sums, find_weights
from .gather import (
    EDGES,
    add_gathered,
    dot_gathered,
    first_lanes,
    joint_gradients,
    leaky_slope,
    put_row,
    scale,
    take_row,
)
from .jit import apart, inline, kernel
from .simd import lane_sum, lanes_of, load, load_live, splat, store, where
from .walk import (
    DOT,
    HUB,
    JOINT,
    MAX,
    NODES,
    PART,
    SUM,
    NeighborJob,
    carve,
    fetch_pairs,
    find_shares,
    number,
    take_edges,
    weigh_shares,
)


# --- backward, by target ---------------------------------------------------------------------------------------------
@apart
def weight_gradients(job, desk, pad, i, first, n, later):
    """changes[h, e] = dp, desk.x has do; adds to delta, and keeps w, and dp if it is needed later"""
    H, C, dp, lanes = job.H, job.C, desk.changes, lanes_of(job.scratch)
    take_edges(job, desk, first, n)
    find_weights(job, desk, i, first, n)
    if job.aggregation == MAX:
        gather_largest(job, desk, pad, i, first, n)
    else:
        dot_gathered(dp, desk.x, pad, job.value, desk.index, n, H, C, 1.0, False)
        if job.has_edge_value:
            dot_gathered(dp, desk.x, pad, job.edge_value, desk.ids, n, H, C, 1.0, True)
    if job.has_shares:
        thin_gradients(job, desk, i, n)
    if job.has_grad_weights:
        for e in range(n):
            for h in range(H):
                dp[h * EDGES + e] += job.grad_weights[desk.ids[e] * H + h]
    for h in range(H if job.normalizes else 0):
        sum = load_live(dp, 0, 0)
        for e in range(h * EDGES, h * EDGES + n, lanes):
            p, d = load(desk.weights, e), load(dp, e)
            sum = sum + where(p > splat(p, 0.0), p * d, p)  # p is 0 where hidden, and d may be NaN there
        desk.delta[h] += lane_sum(sum)
    for e in range(n):
        pair = job.pairs + (first + e) * 2 * H
        for h in range(H):
            share = desk.shares[h * EDGES + e] if job.has_shares else 1
            pair[h] = desk.weights[h * EDGES + e] * share
        if later:
            for h in range(H):
                pair[H + h] = dp[h * EDGES + e]


@apart
def gather_largest(job, desk, pad, i, first, n):
    """dp where the value of an edge was the largest: from those channels alone"""
    H, C = job.H, job.C
    for h in range(H):
        for e in range(n):
            desk.changes[h * EDGES + e] = 0
        for c in range(C):
            e = job.best[(i * H + h) * C + c] - first
            if 0 <= e and e < n:
                value = job.value.data[desk.index[e] * job.value.step + h * C + c]
                if job.has_edge_value:
                    value += job.edge_value.data[desk.ids[e] * job.edge_value.step + h * C + c]
                desk.changes[h * EDGES + e] += desk.x[h * pad + c] * value


@apart
def thin_gradients(job, desk, i, n):
    """dp *= w / p, and by the way the gradient of the edges' weights"""
    find_shares(job, desk, i, n)
    for e in range(n if job.has_weight else 0):
        total = 0.0
        for h in range(job.H):
            at = h * EDGES + e
            if desk.weights[at] != 0 and desk.shares[at] != 0:
                total += desk.shares[at] * desk.weights[at] * desk.changes[at]
        job.dweight[desk.ids[e]] = total
    weigh_shares(job, desk, n)
    for h in range(job.H):
        for e in range(n):
            at = h * EDGES + e
            desk.changes[at] = desk.changes[at] * desk.shares[at] if desk.shares[at] != 0 else 0


@apart
def take_again(job, desk, i, first, n):
    """What `weight_gradients` had on the desk, where other edges came after."""
    H = job.H
    take_edges(job, desk, first, n)
    for e in range(n):
        for h in range(H):
            desk.changes[h * EDGES + e] = job.pairs[((first + e) * 2 + 1) * H + h]
    find_weights(job, desk, i, first, n)


@apart
def score_gradients(job, desk, pad, first, n, i, sums):
    """ds = p * (dp - delta), of what is on the desk, through the rule: added up in desk.terms, by edge in dedge, and
    kept in the pair"""
    H, C, D, ds = job.H, job.C, job.D, desk.changes
    if job.rule == SUM:
        find_sums(job, desk, pad, desk.shares, n)
        for h in range(H):
            for e in range(0, n, lanes_of(ds)):
                store(leaky_slope(load(desk.shares, h * EDGES + e), job.slope), desk.shares, h * EDGES + e)
    for h in range(H):
        sum = load_live(ds, 0, 0)
        for e in range(0, n, lanes_of(ds)):
            at = h * EDGES + e
            p, d = load(desk.weights, at), load(ds, at)
            if job.normalizes:
                d = where(p > splat(p, 0.0), p * (d - splat(d, desk.delta[h])), p)
            if job.rule == SUM:
                d = d * load(desk.shares, at)
            d = first_lanes(d, n - e, 0.0)
            store(d, ds, at)
            sum = sum + d
        if job.rule == SUM:
            desk.terms[h * pad] += lane_sum(sum)
    if job.wants_dbias:
        for e in range(n):
            for h in range(H):
                job.dbias[desk.ids[e] * H + h] = ds[h * EDGES + e]
    if job.rule == DOT:
        for h in range(H):
            scale(ds + h * EDGES, n, job.scale)
    for e in range(n):
        pair = job.pairs + ((first + e) * 2 + 1) * H
        for h in range(H):
            pair[h] = ds[h * EDGES + e]
    if job.rule == JOINT:
        joint_gradients(
            desk.terms, sums + H * pad, ds, desk.y, pad, job.att, job.slope, job.key, job.edge, job.has_edge,
            job.dedge, job.has_edge, desk.index, desk.ids, n, H, D,
        )  # fmt: skip
    elif job.rule == DOT:
        add_gathered(desk.terms, pad, ds, job.key, desk.index, n, H, D, job.has_bias)
        if job.has_edge:
            add_gathered(desk.terms, pad, ds, job.edge, desk.ids, n, H, D, job.has_bias)
            spread(job.dedge, desk.ids, ds, desk.y, pad, n, H, D)
    if job.has_edge_value:
        for e in range(n):
            for h in range(H):
                ds[h * EDGES + e] = job.pairs[(first + e) * 2 * H + h]
        spread(job.dedge_value, desk.ids, ds, desk.x, pad, n, H, C)
        if job.aggregation == MAX:
            keep_chosen(job.dedge_value, desk.ids, job.best + i * H * C, first, n, H * C)


@apart
def keep_chosen(rows, ids, best, first, n, width):
    """0 where another edge's value was the largest"""
    for e in range(n):
        for c in range(width):
            if best[c] != first + e:
                rows.data[ids[e] * rows.step + c] = 0


@apart
def spread(rows, ids, weights, x, pad, n, H, C):
    """rows[ids[e], h, c] = weights[h, e] * x[h, c]"""
    for e in range(n):
        for h in range(H):
            w = weights[h * EDGES + e]
            for c in range(C):
                rows.data[ids[e] * rows.step + h * C + c] = w * x[h * pad + c] if w != 0 else 0


@apart
def clear_target(job, desk, pad, i):
    take_row(desk.x, pad, job.grad, i, job.H, job.C)
    take_row(desk.y, pad, job.query, i, job.H, job.D)
    for h in range(job.H):
        desk.delta[h] = 0
        for c in range(pad):
            desk.terms[h * pad + c] = 0


@inline
def add_row(out, x, n):
    for c in range(n):
        out[c] += x[c]


@kernel
def backward_targets(job: NeighborJob, slot, task):
    # task -> as in forward, with two rounds over a hub's parts: delta is needed whole before the second
    desk, pad = carve(job, slot)
    H, width = job.H, job.H * pad
    sums = job.sums + (job.sums_from + task) * 3 * width
    if job.mode == NODES:
        for i in range(job.starts[task], job.starts[task + 1]):
            first = number(job.indptr, job.wide_indptr, i)
            last = number(job.indptr, job.wide_indptr, i + 1)
            if last - first <= job.most:
                clear_target(job, desk, pad, i)
                for p in range(first, last, EDGES):
                    weight_gradients(job, desk, pad, i, p, min(EDGES, last - p), last - first > EDGES)
                for p in range(first, last, EDGES):
                    if last - first > EDGES:
                        take_again(job, desk, i, p, min(EDGES, last - p))
                    score_gradients(job, desk, pad, p, min(EDGES, last - p), i, sums)
                put_row(job.dquery, i, desk.terms, pad, H, job.D)
                add_row(sums, desk.x, width)
        return
    hub = task if job.mode == HUB else job.parts[3 * task]
    i = job.hubs[3 * hub]
    clear_target(job, desk, pad, i)
    if job.mode == HUB:
        for part in range(job.hubs[3 * hub + 1], job.hubs[3 * hub + 2]):
            add_row(desk.terms, job.partial + part * job.partial_step, width)
        put_row(job.dquery, i, desk.terms, pad, H, job.D)
        add_row(sums, desk.x, width)
        return
    here, first, last = job.partial + task * job.partial_step, job.parts[3 * task + 1], job.parts[3 * task + 2]
    if job.mode == PART:
        for p in range(first, last, EDGES):
            weight_gradients(job, desk, pad, i, p, min(EDGES, last - p), True)
        for h in range(H):
            here[width + h] = desk.delta[h]
        return
    for part in range(job.hubs[3 * hub + 1], job.hubs[3 * hub + 2]):
        add_row(desk.delta, job.partial + (part * job.partial_step + width), H)
    for p in range(first, last, EDGES):
        take_again(job, desk, i, p, min(EDGES, last - p))
        score_gradients(job, desk, pad, p, min(EDGES, last - p), i, sums)
    for c in range(width):
        here[c] = desk.terms[c]


# --- backward, by source ---------------------------------------------------------------------------------------------
@apart
def collect(job, desk, pad, j, first, last, waste):
    """desk.value = dvalue and desk.terms = dkey of source j, from its edges first .. last - 1"""
    H, C, D = job.H, job.C, job.D
    take_row(desk.y, pad, job.key, j, H, D)
    for c in range(H * pad):
        desk.value[c], desk.terms[c] = 0, 0
    for p in range(first, last, EDGES):
        n = min(EDGES, last - p)
        take_pairs(job, desk, p, n)
        if job.aggregation == MAX:
            add_largest(job, desk, pad, n)
        else:
            add_gathered(desk.value, pad, desk.weights, job.grad, desk.index, n, H, C, job.has_bias)
        if job.rule == SUM:
            for h in range(H):
                sum = load_live(desk.changes, 0, 0)
                for e in range(0, n, lanes_of(desk.changes)):
                    sum = sum + first_lanes(load(desk.changes, h * EDGES + e), n - e, 0.0)
                desk.terms[h * pad] += lane_sum(sum)
        elif job.rule == DOT:
            add_gathered(desk.terms, pad, desk.changes, job.query, desk.index, n, H, D, job.has_bias)
        elif job.rule == JOINT:
            joint_gradients(
                desk.terms, waste, desk.changes, desk.y, pad, job.att, job.slope, job.query, job.edge, job.has_edge,
                job.edge, 0, desk.index, desk.ids, n, H, D,
            )  # fmt: skip


@apart
def take_pairs(job, desk, first, n):
    """The other end and the pair (w, ds) of the edges at n positions by source."""
    H = job.H
    for e in range(n):
        position = number(job.positions, job.wide_positions, first + e)
        desk.index[e] = number(job.others, job.wide_others, first + e)
        desk.places[e] = position
        if job.has_edge:  # else a look at random memory for nothing
            desk.ids[e] = number(job.edge_ids, job.wide_edge_ids, position) if job.has_ids else position
        for h in range(H):
            desk.weights[h * EDGES + e] = job.pairs[position * 2 * H + h]
            desk.changes[h * EDGES + e] = job.pairs[position * 2 * H + H + h]
        fetch_pairs(job, first + e)


@apart
def add_largest(job, desk, pad, n):
    """dvalue in the channels where the edge's value was the largest"""
    H, C = job.H, job.C
    for e in range(n):
        row = desk.index[e] * H * C
        for h in range(H):
            for c in range(C):
                if job.best[row + h * C + c] == desk.places[e]:
                    w = desk.weights[h * EDGES + e]
                    desk.value[h * pad + c] += w * job.grad.data[desk.index[e] * job.grad.step + h * C + c]


@apart
def give(job, desk, pad, j, sums):
    """Write what source j gets; its key, where it is a product with its value, and the key's gradient go into that."""
    H, C, D, width = job.H, job.C, job.D, job.H * pad
    if job.folds:
        take_row(desk.x, pad, job.value, j, H, C)
        for f in range(job.folds):
            for h in range(H):
                d = desk.terms[h * pad] if f == 0 else job.dquery.data[j * job.dquery.step + h]
                for c in range(pad):
                    desk.value[h * pad + c] += d * job.fold[f * width + h * pad + c]
                    sums[(1 + f) * width + h * pad + c] += d * desk.x[h * pad + c]
    elif job.rule == JOINT:
        add_row(desk.value, desk.terms, width)
    else:
        put_row(job.dkey, j, desk.terms, pad, H, D)
    put_row(job.dvalue, j, desk.value, pad, H, C)


@kernel
def backward_sources(job: NeighborJob, slot, task):
    # task -> as in forward
    desk, pad = carve(job, slot)
    width = job.H * pad
    sums = job.sums + (job.sums_from + task) * 3 * width
    if job.mode == NODES:
        for j in range(job.starts[task], job.starts[task + 1]):
            first = number(job.indptr, job.wide_indptr, j)
            last = number(job.indptr, job.wide_indptr, j + 1)
            if last - first <= job.most:
                collect(job, desk, pad, j, first, last, desk.x)
                give(job, desk, pad, j, sums)
    elif job.mode == PART:
        here = job.partial + task * job.partial_step
        j = job.hubs[3 * job.parts[3 * task]]
        collect(job, desk, pad, j, job.parts[3 * task + 1], job.parts[3 * task + 2], desk.x)
        for c in range(width):
            here[c], here[width + c] = desk.value[c], desk.terms[c]
    else:
        for c in range(width):
            desk.value[c], desk.terms[c] = 0, 0
        for part in range(job.hubs[3 * task + 1], job.hubs[3 * task + 2]):
            here = job.partial + part * job.partial_step
            add_row(desk.value, here, width)
            add_row(desk.terms, here + width, width)
        give(job, desk, pad, job.hubs[3 * task], sums)
