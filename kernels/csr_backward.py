"""The way back through attention over neighbours (csr.py): by target, for ds and what targets get, then by source.

    dp = <do[i, h], value[j, h] + value_a[e, h]> * w / p         delta[i, h] = sum over e of p * dp
    ds = p * (dp - delta)                                        and through the rule to key, query and a
    dvalue[j, h, c] = sum over the edges from j of w[e, h] * do[i, h, c]

Between the two, of each edge only the pair (ds, w) is kept. By source first, with delta from a kept output, there is a
gather less, of values or keys; but a pass more over all edges, and pairs that are written where they are read, far
apart. It was as fast (GAT 1.02, GATv2 0.96, GraphTransformer 1.01 times; Zen 3, by turns), and kept more.
"""

from .csr import find_weights, take_query
from .edge_features import count_lines, give_rows, gradients_of, lines_of, make_rows, rows_of
from .gather import (
    AHEAD,
    EDGES,
    Rows,
    add,
    add_gathered,
    copy,
    dot_gathered,
    fetch_row,
    fill,
    first_lanes,
    multiply,
    put_numbers_of,
    put_part,
    put_row,
    rounds,
    spread,
    take_row,
)
from .jit import apart, inline, kernel, within
from .joint import joint_gradients, leaky_slope
from .largest import add_chosen, dot_chosen, keep_chosen
from .simd import fma, lanes_of, load, period_sum, splat, store, store_live, where
from .walk import (
    ATT,
    DOT,
    FOLD,
    HUB,
    JOINT,
    MAX,
    NODES,
    OFFSET,
    PART,
    SECOND_PART,
    SUM,
    SUMS,
    NeighborJob,
    carve,
    edges_of,
    features_desk,
    fetch_number,
    find_shares,
    from_edge,
    is_mine,
    next_batch,
    nodes_of,
    number,
    take_edges,
    take_numbers,
    weigh_shares,
)


# --- backward, by target ---------------------------------------------------------------------------------------------
@within
def weight_gradients(job, desk, first, n):
    """gradients[e, h] = dp, desk.x has do; adds to delta"""
    H, W, dp, lanes = job.H, job.W, desk.gradients, lanes_of(desk.gradients)
    if job.aggregation == MAX:  # the rows are asked for in either branch: ahead of both, sums took 1.1 times as long
        dot_chosen(job, desk, rows_of(job, desk, job.edge_value), lines_of(job, desk), first, n)
    else:
        edge_value, lines = rows_of(job, desk, job.edge_value), lines_of(job, desk)
        dot_gathered(dp, desk.x, job.value, desk.nodes, edge_value, lines, job.has_edge_value, n, job.value_heads)
    if job.has_shares:
        thin_gradients(job, desk, n)
    for e in range(n if job.has_grad_weights else 0):
        for h in range(H):
            dp[e * W + h] += job.grad_weights[desk.edges[e] * H + h]
    for g in range(0, W if job.normalizes else 0, lanes):
        sum = splat(load(dp, g), 0.0)
        for k in range(rounds(n, W, lanes)):
            f = g + k * job.span
            p, d = load(desk.weights, f), load(dp, f)
            sum = sum + where(p > splat(p, 0.0), p * d, p)  # p is 0 where hidden, and d may be NaN there
        store(load(desk.delta, g) + period_sum(sum, W), desk.delta, g)


@within
def thin_gradients(job, desk, n):
    """dp *= w / p, and by the way the gradient of the edges' weights"""
    W = job.W
    for e in range(n if job.has_weight else 0):
        total = 0.0
        for h in range(job.H):
            at = e * W + h
            if desk.weights[at] != 0 and desk.shares[at] != 0:
                total += desk.shares[at] * desk.weights[at] * desk.gradients[at]
        job.dweight[desk.edges[e]] = total
    weigh_shares(job, desk, n)
    for f in range(0, n * W, lanes_of(desk.shares)):
        d, share = load(desk.gradients, f), load(desk.shares, f)
        store(where(share == splat(d, 0.0), splat(d, 0.0), d * share), desk.gradients, f)


@within
def take_scores(job, desk, first, n):
    """What forward kept of n edges"""
    take_edges(job, desk, first, n)
    if job.features.K:
        make_rows(features_desk(job, desk), desk.edges, job.edge, job.features, n)
    copy(desk.scores, job.scores + first * job.W, n * job.W)


@within
def take_weights(job, desk, i, n):
    """weights = p, and what becomes of them behind the softmax"""
    find_weights(job, desk, job.bounds + i * job.span, job.totals + i * job.span, n)
    if job.has_shares:
        find_shares(job, desk, i, n)


@within
def keep_gradients(job, desk, first, n):
    """dp for `take_gradients`, in place of ds"""
    for e in range(n):
        for h in range(job.W):
            job.pairs[(first + e) * 2 * job.W + h] = desk.gradients[e * job.W + h]


@within
def take_gradients(job, desk, first, n):
    """The dp that were kept, where other edges came after"""
    for e in range(n):
        for h in range(job.W):
            desk.gradients[e * job.W + h] = job.pairs[(first + e) * 2 * job.W + h]
    if job.has_shares:
        weigh_shares(job, desk, n)


@within
def score_gradients(job, desk, first, n, sums):
    """gradients = ds = p * (dp - delta), of what is on the desk, through the rule: added up in desk.key_sums, and by
    edge in dedge. weights = w"""
    H, W, ds, lanes, nodes, edges = job.H, job.W, desk.gradients, lanes_of(desk.gradients), desk.nodes, desk.edges
    edge, lines = rows_of(job, desk, job.edge), lines_of(job, desk)
    dedge, dedge_value = gradients_of(job, desk, job.dedge), gradients_of(job, desk, job.dedge_value)
    # 1. ds; of SUM, where query and key are numbers, it is their gradient too
    for g in range(0, W, lanes):
        delta = load(desk.delta, g)
        sum = splat(delta, 0.0)
        for k in range(rounds(n, W, lanes)):
            f = g + k * job.span
            p, d = load(desk.weights, f), load(ds, f)
            if job.normalizes:
                d = where(p > splat(p, 0.0), p * (d - delta), p)
            if job.rule == SUM:
                d = d * leaky_slope(load(desk.scores, f), job.slope)
            store(d, ds, f)
            sum = sum + first_lanes(d, n * W - f, 0.0)
        if job.rule == SUM:
            store(load(desk.key_sums, g) + period_sum(sum, W), desk.key_sums, g)
    if job.wants_dbias:
        put_numbers_of(job.dbias, ds, edges, n, H, W)
    # 2. w
    if job.has_shares:
        multiply(desk.weights, desk.shares, n * W)
    # 3. what the query gets, and what belongs to the edge
    if job.rule == JOINT:
        joint_gradients(
            desk.key_sums, sums + ATT * job.width, ds, W, desk.y, job.att, job.slope, job.key, edge, job.has_edge,
            dedge, job.has_edge, nodes, lines, n, job.key_heads, False,
        )  # fmt: skip
    if job.has_edge_value:
        spread(dedge_value, lines, desk.weights, desk.x, n, job.value_heads, 1.0, False)
        if job.aggregation == MAX:
            keep_chosen(job, dedge_value, lines, first, n)
    if job.rule == DOT:
        add_gathered(desk.key_sums, ds, W, job.key, nodes, n, job.key_heads, True, job.has_bias)
        if job.has_edge:
            add_gathered(desk.key_sums, ds, W, edge, lines, n, job.key_heads, True, job.has_bias)
            spread(dedge, lines, ds, desk.y, n, job.key_heads, job.scale, job.features.K and job.has_edge_value)


@within
def put_pairs(job, desk, first, n):
    """Each edge's ds and w, one behind the other."""
    W, end = job.W, (first + n) * 2 * job.W
    for e in range(n):
        for g in range(0, W, lanes_of(desk.weights)):
            put_numbers(job, load(desk.gradients, e * W + g), (first + e) * 2 * W + g, end)
        for g in range(0, W, lanes_of(desk.weights)):
            put_numbers(job, load(desk.weights, e * W + g), ((first + e) * 2 + 1) * W + g, end)


@inline
def put_numbers(job, x, at, end):
    """W numbers, or a vector of them. It may run into what is stored later, but not past the end: that is others'."""
    if at + lanes_of(x) <= end:
        store(x, job.pairs, at)
    else:
        store_live(x, job.pairs, at, job.W)


@within
def clear_target(job, desk, i):
    take_row(desk.x, job.grad, i, job.value_heads)
    take_query(job, desk, i)
    fill(desk.delta, job.span, 0.0)
    fill(desk.key_sums, job.width, 0.0)


@apart
def put_key_sums(job, rows, i, x):
    """The gradient of a query or key; of SUM a number for each head"""
    if job.rule == SUM:
        lanes = lanes_of(x)
        for h in range(0, job.H, lanes):
            put_part(rows, i * rows.step + h, load(x, h), min(lanes, job.H - h), lanes)
    else:
        put_row(rows, i, x, job.key_heads, job.scale if job.rule == DOT else 1.0)


@within
def gradients(job, desk, i, j, first, last, finds, gives, sums, task):
    """Targets i .. j - 1 from their edges first .. last - 1: a batch, or more of one target. It finds delta and gives
    what needs it: at once where the edges are a batch, else in two rounds, as delta is needed whole. (Only a target
    alone has more edges than a batch: then `here` is the desk itself.)"""
    at_once = finds and gives and last - first <= EDGES
    for round in range(0 if finds else 1, 2 if gives and not at_once else 1):
        for at in range(first, max(last, first + 1), EDGES):
            n = min(EDGES, last - at)
            if n:
                take_scores(job, desk, at, n)
            for t in range(i, j):
                begin, end = edges_of(job, t, at, at + n)
                here = from_edge(desk, begin - at, job.W)
                if round == 0 and at == first:
                    clear_target(job, desk, t)
                take_weights(job, here, t, end - begin)
                if round == 0:
                    weight_gradients(job, here, begin, end - begin)
                else:
                    take_gradients(job, desk, at, n)
                if round == 1 or at_once:
                    score_gradients(job, here, begin, end - begin, sums)
                else:
                    keep_gradients(job, desk, at, n)
                if at_once:
                    put_target(job, desk, t, sums)
            if round == 1 or at_once:
                put_pairs(job, desk, at, n)
                if job.features.K and n:
                    give_rows(features_desk(job, desk), desk.edges, job.dedge, job.features, n, task)
    if finds and gives and not at_once:
        put_target(job, desk, i, sums)


@within
def put_target(job, desk, i, sums):
    put_key_sums(job, job.dquery, i, desk.key_sums)
    add(sums + OFFSET * job.width, desk.x, job.width)


@kernel
def backward_targets(job: NeighborJob, slot, task):
    # task -> as in forward, with two rounds over a hub's parts: delta is needed whole before the second
    desk = carve(job, slot)
    count_lines(job, desk)
    width, is_hub, row = job.width, job.mode == HUB, job.sums_from + task
    sums = job.sums + row * SUMS * width
    here = job.partial + task * job.partial_step
    if is_hub or job.mode == SECOND_PART:
        hub = task if is_hub else job.parts[3 * task]
        clear_target(job, desk, job.hubs[3 * hub])
        for part in range(job.hubs[3 * hub + 1], job.hubs[3 * hub + 2]):
            before = job.partial + part * job.partial_step
            if is_hub:
                add(desk.key_sums, before, width)
            else:
                add(desk.delta, before + width, job.span)
        if is_hub:
            put_target(job, desk, job.hubs[3 * hub], sums)
            return
    i, end = nodes_of(job, task)
    while i < end:
        j, first, last = next_batch(job, task, i, end)
        if is_mine(job, first, last):
            gradients(job, desk, i, j, first, last, job.mode != SECOND_PART, job.mode != PART, sums, row)
        i = j
    if job.mode == PART:
        copy(here + width, desk.delta, job.span)
    elif job.mode == SECOND_PART:
        copy(here, desk.key_sums, width)


# --- backward, by source ---------------------------------------------------------------------------------------------
@within
def collect(job, desk, i, j, first, last, finishes, sums):
    """Sources i .. j - 1 from their edges first .. last - 1, a batch, or more for one source: desk.value = dvalue and
    desk.key_sums = dkey. If it finishes, they are given to each."""
    for at in range(first, max(last, first + 1), EDGES):
        n = min(EDGES, last - at)
        if n:
            take_pairs(job, desk, at, n)
        for t in range(i, j):
            begin, end = edges_of(job, t, at, at + n)
            if at == first:
                if job.rule == JOINT:
                    fetch_row(job.key, t + 2, 0, job.key_heads.H * job.key_heads.C)
                    take_row(desk.y, job.key, t, job.key_heads)
                fill(desk.value, job.width, 0.0)
                fill(desk.key_sums, job.width, 0.0)
            add_gradients(job, from_edge(desk, begin - at, job.W), end - begin)
            if finishes and at + EDGES >= last:
                give(job, desk, t, sums)


@within
def add_gradients(job, desk, n):
    """Of n edges of a source, to what is summed"""
    W, nodes = job.W, desk.nodes
    ds, weights = desk.pairs, desk.pairs + W  # ds first, so that it is read as it was stored, at once
    if job.aggregation == MAX:
        add_chosen(job, desk, n)
    else:
        add_gathered(desk.value, weights, 2 * W, job.grad, nodes, n, job.value_heads, True, job.has_bias)
    if job.rule == SUM:
        for g in range(0, W, lanes_of(ds)):
            sum = load(desk.key_sums, g)
            for e in range(n):
                sum = sum + load(ds, 2 * e * W + g)
            store(sum, desk.key_sums, g)
    elif job.rule == DOT:
        add_gathered(desk.key_sums, ds, 2 * W, job.query, nodes, n, job.key_heads, True, job.has_bias)
    elif job.rule == JOINT:
        joint_gradients(
            desk.key_sums, None, ds, 2 * W, desk.y, job.att, job.slope, job.query, rows_of(job, desk, job.edge),
            job.has_edge, job.edge, 0, nodes, lines_of(job, desk), n, job.key_heads, True,
        )  # fmt: skip


@within
def take_pairs(job, desk, first, n):
    """The other end and the pair (ds, w) of the edges at n positions by source. Vectors run into what comes after
    them, which is stored later."""
    width, pairs = 2 * job.W, Rows(job.pairs, 2 * job.W)
    take_numbers(desk.nodes, job.others, job.wide_others, first, n, job.E)
    take_numbers(desk.positions, job.positions, job.wide_positions, first, n, job.E)
    for e in range(n):
        fetch_row(pairs, desk.positions[e + AHEAD], 0, width)
        position = desk.positions[e]
        if job.features.K and job.has_ids:
            fetch_number(job.edge_ids, job.wide_edge_ids, desk.positions[e + AHEAD])
        if job.has_edge and job.rule == JOINT:  # else a look at random memory for nothing
            desk.edges[e] = number(job.edge_ids, job.wide_edge_ids, position) if job.has_ids else position
            fetch_row(job.edge, desk.edges[e], 0, job.features.K)
        for g in range(0, width, lanes_of(desk.pairs)):
            store(load(job.pairs, position * width + g), desk.pairs, e * width + g)
    if job.features.K and job.rule == JOINT:
        make_rows(features_desk(job, desk), desk.edges, job.edge, job.features, n)


@within
def give(job, desk, j, sums):
    """Write what source j gets; its key, where it is a product with its value, and the key's gradient go into that."""
    H, pad, width, lanes = job.H, job.value_heads.pad, job.width, lanes_of(desk.value)
    if job.folds:
        take_row(desk.x, job.value, j, job.value_heads)
    for f in range(job.folds):
        for h in range(H):
            d = desk.key_sums[h] if f == 0 else job.dquery.data[j * job.dquery.step + h]
            for c in range(h * pad, (h + 1) * pad if d != 0 else 0, lanes):  # 0 of NaN that nobody saw is 0
                gradient, out = splat(load(desk.x, c), d), (FOLD + f) * width + c
                store(fma(gradient, load(job.fold, f * width + c), load(desk.value, c)), desk.value, c)
                store(fma(gradient, load(desk.x, c), load(sums, out)), sums, out)
    if job.rule == JOINT:
        add(desk.value, desk.key_sums, width)
    elif not job.folds:
        put_key_sums(job, job.dkey, j, desk.key_sums)
    put_row(job.dvalue, j, desk.value, job.value_heads, 1.0)


@kernel
def backward_sources(job: NeighborJob, slot, task):
    # task -> as in forward
    desk = carve(job, slot)
    count_lines(job, desk)
    width = job.width
    sums = job.sums + (job.sums_from + task) * SUMS * width
    if job.mode == HUB:
        fill(desk.value, width, 0.0)
        fill(desk.key_sums, width, 0.0)
        for part in range(job.hubs[3 * task + 1], job.hubs[3 * task + 2]):
            here = job.partial + part * job.partial_step
            add(desk.value, here, width)
            add(desk.key_sums, here + width, width)
        give(job, desk, job.hubs[3 * task], sums)
        return
    i, end = nodes_of(job, task)
    while i < end:
        j, first, last = next_batch(job, task, i, end)
        if is_mine(job, first, last):
            collect(job, desk, i, j, first, last, job.mode == NODES, sums)
        i = j
    if job.mode == PART:
        here = job.partial + task * job.partial_step
        copy(here, desk.value, width)
        copy(here + width, desk.key_sums, width)
