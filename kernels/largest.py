"""Aggregation "max" on graphs: in each channel the largest of what the softmax has weighed, and the way back.

    o[i, h, c]       the largest over the edges e of w[e, h] * (value[j, h, c] + value_a[e, h, c])
    chosen (E, ...)  by position: bits, of the channels in which that edge was the largest, as a row lies in scratch

Of equal ones the first counts, NaN before all, and none that a bias hides. Gradients go to the edge that was chosen
alone, in each channel. Bits, because those of sources are taken from anywhere: 8 bytes of an edge with 64 channels,
where the numbers of the edges that a target has chosen are 512.

Until all edges of a target were seen, two rows of numbers in scratch say which was the largest so far: the place in its
batch, -1 before any, and which batch of the target's it was in.
"""

import math

from .gather import AHEAD, EDGES, VECTORS, blocks, fetch_row, put_part, row_part, row_places
from .jit import apart, inline, within
from .simd import (
    bits_at,
    fma,
    lane_sum,
    lanes_of,
    load,
    prefetch,
    splat,
    store,
    tile_at,
    tile_map,
    tile_splats,
    tile_store_at,
    tile_zeros,
    where,
    zeros_of,
)
from .softmax import plus, times
from .walk import begin_of

INF = math.inf
NONE, OLDER = -1.0, -2.0  # no edge yet; one of another batch


# --- bits -----------------------------------------------------------------------------------------------------------
@inline
def byte_of(c, lanes):
    """Where the bit of channel c of scratch lies among the bytes of an edge; a vector has whole bytes"""
    return c // lanes * (max(lanes, 8) // 8) + c % lanes // 8


@inline
def if_chosen(job, position, c, x, other):
    """x in the channels from c of scratch on in which this edge was chosen, else the other"""
    return where(bits_at(x, job.chosen, position * job.chosen_step + byte_of(c, lanes_of(job.output.data))), x, other)


@within
def clear_chosen(job, first, n):
    for b in range(first * job.chosen_step, (first + n) * job.chosen_step):
        job.chosen[b] = 0


@within
def choose(job, desk, i):
    """What target i has found, as bits of its edges"""
    first, lanes, C, pad = begin_of(job, i), lanes_of(desk.value), job.value_heads.C, job.value_heads.pad
    for h in range(job.H):
        for c in range(h * pad, h * pad + C):
            if desk.place[c] >= 0:
                position = first + int(desk.batch[c]) * EDGES + int(desk.place[c])
                at = position * job.chosen_step + byte_of(c, lanes)
                job.chosen[at] = job.chosen[at] | 1 << c % lanes % 8


# --- forward --------------------------------------------------------------------------------------------------------
@inline
def placed(place, value, top, e):
    """e, where the value takes the place of what is at the top"""
    here = splat(place, e)
    found = where(value == value, where(value > top, here, place), here)
    return where(place == splat(place, NONE), here, found)


@within
def find_hidden(job, desk, n):
    """gradients[e, h], which forward are none, = 1 where a bias hides the edge, else 0"""
    for e in range(n if job.has_bias else 0):
        for h in range(job.H):
            hides = job.bias.data[desk.edges[e] * job.bias.step + h] == -INF
            desk.gradients[e * job.W + h] = 1.0 if hides else 0.0


@inline
def unless_hidden(place, before, hidden):
    return where(hidden > splat(hidden, 0.0), before, place)


@inline
def value_placed(top, value, place, e):
    return where(place == splat(place, e), value, top)


@inline
def older(place):
    return where(place < splat(place, 0.0), place, splat(place, OLDER))


@inline
def updated(before, place, x):
    """x where an edge of this batch has a place"""
    return where(place < splat(place, 0.0), before, x)


@apart
def keep_largest(out, place, batch, weights, hidden, hides, rows, edge_rows, has_edge, nodes, lines, n, round, heads):
    """out[h, c] = the largest of weights[e, h] * (rows[nodes[e], h, c] + edge_rows[lines[e], h, c]) and of what it was;
    place and batch say whose, and these edges are the batch `round` of their target"""
    for v in range(0, heads.whole, VECTORS):
        keep_block(
            out, place, batch, weights, hidden, hides, rows, edge_rows, has_edge, nodes, lines, n, round, heads, v, None
        )
    whole = blocks(heads.whole)
    for v in range(whole, whole + heads.rests, VECTORS):
        keep_block(
            out, place, batch, weights, hidden, hides, rows, edge_rows, has_edge, nodes, lines, n, round, heads, v,
            heads.rest,
        )  # fmt: skip


@apart
def keep_block(
    out, place, batch, weights, hidden, hides, rows, edge_rows, has_edge, nodes, lines, n, round, heads, v, live
):  # fmt: skip
    """`keep_largest` for the vectors v, v + 1, ... of a row"""
    zeros, width = tile_zeros(out, VECTORS, 1), VECTORS * lanes_of(out)
    head_of, in_row, in_scratch = row_places(zeros, heads, v)
    top, before = tile_at(zeros, out, in_scratch, 0, None), tile_at(zeros, place, in_scratch, 0, None)
    found = tile_map(older, before, ())
    for e in range(n):
        fetch_row(rows, nodes[e + AHEAD], heads.in_row[v], width)
        x = tile_at(zeros, rows.data, in_row, nodes[e] * rows.step, live)
        if has_edge:
            x = tile_map(plus, x, (tile_at(zeros, edge_rows.data, in_row, lines[e] * edge_rows.step, live),))
        x = tile_map(times, x, (tile_splats(zeros, weights, head_of, e * heads.W),))
        new = tile_map(placed, found, (x, top, e))
        if hides:
            new = tile_map(unless_hidden, new, (found, tile_splats(zeros, hidden, head_of, e * heads.W)))
        top = tile_map(value_placed, top, (x, new, e))
        found = new
    tile_store_at(top, out, in_scratch, 0, None)
    batches = tile_map(updated, tile_at(zeros, batch, in_scratch, 0, None), (found, splat(zeros_of(out), round)))
    tile_store_at(batches, batch, in_scratch, 0, None)
    tile_store_at(tile_map(updated, before, (found, found)), place, in_scratch, 0, None)


@within
def join_largest(job, desk, part, c, x):
    """What a part of a hub has found in channel c of scratch, x, beside what those before it have"""
    place = job.partial + part * job.partial_step + (job.width + 2 * job.span)
    if place[c] >= 0 and (desk.place[c] < 0 or x > desk.value[c] or x != x):
        hub = job.parts[3 * part]
        before = job.parts[3 * part + 1] - begin_of(job, job.hubs[3 * hub])  # edges of the parts before
        e = before + int(place[job.width + c]) * EDGES + int(place[c])
        desk.value[c], desk.batch[c], desk.place[c] = x, e // EDGES, e % EDGES


# --- backward -------------------------------------------------------------------------------------------------------
@apart
def dot_chosen(job, desk, edge_value, lines, first, n):
    """gradients[e, h] = sum over the channels c in which the edge was chosen of do[i, h, c] * (value + value_a), of the
    n edges at the positions from `first` on"""
    C, pad, lanes = job.value_heads.C, job.value_heads.pad, lanes_of(desk.gradients)
    for e in range(n):
        row = desk.nodes[e] * job.value.step
        fetch_row(job.value, desk.nodes[e + AHEAD], 0, job.H * C)
        for h in range(job.H):
            sum = zeros_of(desk.gradients)
            for c in range(0, C, lanes):
                live = min(lanes, C - c)
                y = row_part(job.value, row + h * C + c, live, lanes)
                if job.has_edge_value:
                    y = y + row_part(edge_value, lines[e] * edge_value.step + h * C + c, live, lanes)
                product = y * load(desk.x, h * pad + c)
                sum = sum + if_chosen(job, first + e, h * pad + c, product, zeros_of(desk.gradients))
            desk.gradients[e * job.W + h] = lane_sum(sum)


@apart
def add_chosen(job, desk, n):
    """desk.value[h, c] += w[e, h] * do[i, h, c], where the edge was chosen, of n edges of a source"""
    C, pad, lanes = job.value_heads.C, job.value_heads.pad, lanes_of(desk.value)
    for e in range(n):
        row = desk.nodes[e] * job.grad.step
        prefetch(job.chosen, desk.positions[e + AHEAD] * job.chosen_step)
        fetch_row(job.grad, desk.nodes[e + AHEAD], 0, job.H * C)
        for h in range(job.H):
            w = desk.pairs[(2 * e + 1) * job.W + h]
            for c in range(0, C, lanes):
                x = row_part(job.grad, row + h * C + c, min(lanes, C - c), lanes)
                so_far = load(desk.value, h * pad + c)
                sum = fma(x, splat(x, w), so_far)
                store(if_chosen(job, desk.positions[e], h * pad + c, sum, so_far), desk.value, h * pad + c)


@apart
def keep_chosen(job, rows, ids, first, n):
    """rows[ids[e], h, c] = 0 where the edge at position first + e was not chosen"""
    C, pad, lanes = job.value_heads.C, job.value_heads.pad, lanes_of(rows.data)
    for e in range(n):
        for h in range(job.H):
            for c in range(0, C, lanes):
                at, live = ids[e] * rows.step + h * C + c, min(lanes, C - c)
                x = row_part(rows, at, live, lanes)
                put_part(rows, at, if_chosen(job, first + e, h * pad + c, x, splat(x, 0.0)), live, lanes)
