"""Attention of a few queries over many keys, bound by memory: each key and value is read once, and lies in the lanes.

    rows (R, D)   the queries of all heads that share a key head: row i * G + g is query i of head g
    s (R, keys)   their scores over one chunk of keys, then probabilities          out (R, Dv)   what is summed

Here the lanes are channels for the products and keys for the softmax. Every row is done by itself, over its own keys,
so that its bits depend on nothing else. A part of the keys is a task; parts are merged in their order.
"""

import math
from typing import NamedTuple

import numpy as np

from .blocks import COLS, INF, ROWS, AttentionJob, padded
from .jit import apart, inline, kernel
from .jobs import Elements
from .scoring import bias_of, biased, capped, lies_in_rows, masked, slope_of, sloped
from .simd import (
    fma,
    given,
    lane_sum,
    lanes_from,
    lanes_of,
    load,
    load_live,
    row_sums,
    splat,
    store,
    target,
    tile_column,
    tile_lanes,
    tile_load,
    tile_map,
    tile_multiply_add,
    tile_row,
    tile_rows,
    tile_store,
    tile_zeros,
    where,
    zeros_of,
)
from .softmax import probability
from .tiles import Matrix, add_to, all_finite, copy_rows, matrix, padded_rows, rows_from, whole_vectors

SINGLE = 64 // target().lanes(4)  # vectors of the tile for one row: as many chains hide the latency of one
SUMMED_KEYS = 128  # a sum over more would lose digits: see tiles.add_columns_times_block


class Rows(NamedTuple):
    """Scratch of one task. Rows are padded to whole vectors, those of s to the keys of a chunk."""

    query: Elements
    output: Elements
    scores: Elements
    additive: Elements  # of one query and one chunk
    before: Elements  # what `output` was before this chunk: one query, all its heads
    bound: Elements  # one number a row
    total: Elements
    lane: Elements  # for each row of a tile as many vectors as a vector has lanes


def scratch_elements(rows: int, D: int, Dv: int, keys_per_block: int, itemsize: int) -> int:
    """What `carve` lays out, in elements."""
    lanes = target().lanes(itemsize)
    step, v_step, numbers = (padded(n, itemsize) for n in (D, Dv, rows))
    return rows * (step + 2 * v_step + keys_per_block) + keys_per_block + 2 * numbers + ROWS * lanes * lanes


@inline
def carve(job, slot, R, step, v_step):
    KB = job.keys_per_block
    query = job.scratch + slot * job.scratch_step
    output = query + R * step
    scores = output + R * v_step
    additive = scores + R * KB
    before = additive + KB
    bound = before + R * v_step
    total = bound + whole_vectors(query, R)
    return Rows(query, output, scores, additive, before, bound, total, total + whole_vectors(query, R))


@inline
def times_plus(sum, x, y):
    return fma(x, y, sum)


@apart
def dot_keys(square, key, j, live, query, D, partial):
    """The sum over d of key[j + r, d] * query[d] for a vector of keys; those from `live` on repeat the last"""
    lanes = lanes_of(query)
    whole = D // lanes * lanes
    for r in range(lanes):
        at = (j + min(r, live - 1)) * key.row
        sum = zeros_of(query)
        for d in range(0, whole, lanes):
            sum = fma(load(key.data, at + d), load(query, d), sum)
        if whole < D:
            sum = fma(load_live(key.data, at + whole, D - whole), load(query, whole), sum)
        store(sum, partial, r * lanes)
    return row_sums(tile_load(square, partial, 0, lanes, lanes))


@apart
def dot_rows(like, key, at, query, step, rows, D, partial, turned):
    """What the lanes have of the sum over d of key[at + d] * query[row, d], for as many rows as the tile has: the key
    is loaded once for all of them."""
    lanes, sums = lanes_of(query), like
    whole = D // lanes * lanes
    for d in range(0, whole, lanes):
        sums = tile_map(times_plus, sums, (tile_load(like, query, d, step, rows), tile_row(like, key, at + d)))
    tile_store(sums, partial, 0, turned, rows)
    for row in range(rows if whole < D else 0):
        x = load_live(key, at + whole, D - whole)
        store(fma(x, load(query, row * step + whole), load(partial, row * turned)), partial, row * turned)


@apart
def key_scores(like, square, r, row, rows, key, first, last, D, step, KB):
    """1. s = q . k of some rows and the keys first .. last of the chunk, for as many rows at once as a tile has. (For
    eight heads that share a key all took 1.6 times as long head by head.)"""
    lanes, high, end = lanes_of(r.query), tile_rows(like), row + rows
    while row < end:
        some, query, turned = min(high, end - row), r.query + row * step, lanes * lanes
        some = some if 2 * some > high else 1
        for j in range(first, last, lanes):
            out = r.scores + (row * KB + j - first)
            if some == 1:
                store(dot_keys(square, key, j, min(lanes, last - j), query, D, r.lane), out, 0)
                continue
            for n in range(lanes):
                at = min(j + n, last - 1) * key.row
                dot_rows(like, key.data, at, query, step, some, D, r.lane + n * lanes, turned)
            for n in range(some):
                store(row_sums(tile_load(square, r.lane, n * turned, lanes, lanes)), out, n * KB)
        row += some


@apart
def row_scores(r, row, first, last, KB, softcap, slope, additive, position):
    """2. s through the terms; returns the largest."""
    lanes = lanes_of(r.query)
    out = r.scores + row * KB
    top = splat(load(r.query, 0), -INF)
    for j in range(first, last, lanes):
        s, live = load(out, j - first), min(lanes, last - j)
        if softcap is not None:
            s = capped(s, softcap)
        if additive is not None:
            s = biased(s, load_live(additive, j, live))
        if slope is not None:
            s = sloped(s, slope, splat(s, position), lanes_from(s, j))
        s = where(lanes_from(s, 0) < splat(s, live), s, splat(s, -INF))
        top = where(s > top, s, top)
        store(s, out, j - first)
    store(top, r.lane, 0)
    most = r.lane[0]
    for i in range(1, lanes):
        most = max(most, r.lane[i])
    return most


@apart
def row_softmax(r, row, n, most, KB, v_step, unit):
    """3. p = exp(s - bound), and what was summed under a lower bound is rescaled."""
    lanes = lanes_of(r.query)
    s, out = r.scores + row * KB, r.output + row * v_step
    if most > r.bound[row]:
        store(probability(splat(load(s, 0), r.bound[row]), splat(load(s, 0), most), unit), r.lane, 0)
        factor = r.lane[0]
        r.bound[row] = most
        r.total[row] *= factor
        for d in range(0, v_step, lanes):
            x = load(out, d)
            store(x * splat(x, factor), out, d)
    shift = 0 if r.bound[row] == -INF else r.bound[row]
    total = zeros_of(s)
    for j in range(0, n, lanes):
        p = probability(load(s, j), splat(total, shift), unit)
        store(p, s, j)
        total = total + p
    r.total[row] += lane_sum(total)


@apart
def add_values(like, narrow, out, v_step, p, KB, rows, value, n, Dv):
    """4. out[row, d] += sum over key < n of p[row, key] * value[key, d], for rows that see the same keys

    `narrow`, a tile one vector wide, does what wide ones leave, but for the last channels that are no whole vector.
    """
    lanes, wide = lanes_of(out), Dv // tile_lanes(like) * tile_lanes(like)
    whole = Dv // lanes * lanes
    add_whole_vectors(like, out, v_step, p, KB, rows, value, n, 0, wide)
    add_whole_vectors(narrow, out, v_step, p, KB, rows, value, n, wide, whole)
    for row in range(rows if whole < Dv else 0):
        sum = zeros_of(value.data)
        for key in range(n):
            sum = fma(splat(sum, p[row * KB + key]), load_live(value.data, key * value.row + whole, Dv - whole), sum)
        store(load(out, row * v_step + whole) + sum, out, row * v_step + whole)


@apart
def add_whole_vectors(like, out, v_step, p, KB, rows, value, n, first, last):
    for row in range(0, rows, tile_rows(like)):
        live = min(tile_rows(like), rows - row)
        for d in range(first, last, tile_lanes(like)):
            tile = tile_multiply_add(like, p + row * KB, 1, KB, live, value.data + d, value.row, n)
            add_to(tile, out + row * v_step, d, v_step, live)


@apart
def add_seen_values(out, p, additive, value, n, Dv):
    """As `add_values` for one row, where values that it does not see may be NaN or infinite: the same sums, in the same
    order, without what is hidden."""
    lanes = lanes_of(out)
    for d in range(0, Dv, lanes):
        sum, live = zeros_of(out), min(lanes, Dv - d)
        for key in range(n):
            if not additive[key] == -INF:
                sum = fma(splat(sum, p[key]), load_live(value.data, key * value.row + d, live), sum)
        store(load(out, d) + sum, out, d)


@apart
def stage_row(one, additive, bias, mask, head, i, k0, n):
    """additive[j] = bias[i, k0 + j], or -inf where the mask hides it; `one` is a tile of one vector"""
    lanes = lanes_of(additive)
    whole = n // lanes * lanes if lies_in_rows(bias) and lies_in_rows(mask) else 0
    for j in range(0, whole, lanes):
        tile = masked(bias_of(one, bias, head, i, 1, k0 + j), mask, head, i, 1, k0 + j)
        tile_store(tile, additive, j, 0, 1)
    for j in range(whole, n):
        x = 0.0
        if bias is not None:
            x = bias.data[bias.at[head] + i * bias.row + (k0 + j) * bias.col]
        if mask is not None:
            if mask.data[mask.at[head] + i * mask.row + (k0 + j) * mask.col] == 0:
                x = -INF
        additive[j] = x


@apart
def take_chunk(square, wide, narrow, single, one, r, job, key_head, i, k0, first, last, step, v_step):
    """Query i of every head of the group past the keys first .. last of the chunk that begins with k0."""
    G, KB, head0 = job.group, job.keys_per_block, key_head * job.group
    key, value, n = matrix(job.key, head0, k0), matrix(job.value, head0, k0 + first), last - first
    output, p = r.output + i * G * v_step, r.scores + i * G * KB
    rows, before = Matrix(output, v_step, 1), Matrix(r.before, v_step, 1)
    key_scores(narrow, square, r, i * G, G, key, first, last, job.D, step, KB)
    for g in range(G):
        row, head = i * G + g, head0 + g
        slope, additive = given(job.slopes, slope_of(job.slopes, head)), given(job.additive, r.additive)
        if job.additive is not None:
            stage_row(one, r.additive, job.bias, job.mask, head, i, k0, last)
        position = float(i + job.offset - k0)
        most = row_scores(r, row, first, last, KB, job.softcap, slope, additive, position)
        row_softmax(r, row, n, most, KB, v_step, job.natural)
    if job.additive is not None:
        copy_rows(before, rows, G, v_step)
    for j in range(0, n, SUMMED_KEYS):
        keys = min(SUMMED_KEYS, n - j)
        if G > 1:
            add_values(wide, narrow, output, v_step, p + j, KB, G, rows_from(value, j), keys, job.Dv)
        else:
            add_values(single, one, output, v_step, p + j, KB, G, rows_from(value, j), keys, job.Dv)
    # A hidden NaN or infinity times a weight of 0 is NaN, and shows: then once more, with care
    if job.additive is not None and not all_finite(rows, G, v_step):
        copy_rows(rows, before, G, v_step)
        for g in range(G):
            stage_row(one, r.additive, job.bias, job.mask, head0 + g, i, k0, last)
            for j in range(0, n, SUMMED_KEYS):
                seen, keys = r.additive + (first + j), min(SUMMED_KEYS, n - j)
                add_seen_values(output + g * v_step, p + (g * KB + j), seen, rows_from(value, j), keys, job.Dv)


@kernel
def forward(job: AttentionJob, slot, task):
    # task -> one part of the keys of one key head, for all the queries that share it
    key_head, split = task // job.splits, task % job.splits
    G, Lq, KB = job.group, job.Lq, job.keys_per_block
    R, step, v_step = G * Lq, whole_vectors(job.scratch, job.D), whole_vectors(job.scratch, job.Dv)
    r = carve(job, slot, R, step, v_step)
    square, wide, narrow = tile_column(r.query), tile_zeros(r.query, ROWS, COLS), tile_zeros(r.query, ROWS, 1)
    single, one = tile_zeros(r.query, 1, SINGLE), tile_zeros(r.query, 1, 1)
    for row in range(R):
        r.lane[0] = job.scale
        query = rows_from(matrix(job.query, key_head * G + row % G, 0), row // G)
        padded_rows(r.query + row * step, step, query, 1, job.D, r.lane)
        r.bound[row], r.total[row] = -INF, 0
        for d in range(v_step):
            r.output[row * v_step + d] = 0
    start, stop = split * job.split_keys, min(job.Lk, (split + 1) * job.split_keys)
    limits = job.limits + key_head * G // job.H * job.limits_batch
    for k0 in range(start, stop, KB):
        for i in range(Lq):
            lo = max(k0, max(i + job.first, limits[i * job.limits_row]))
            hi = min(min(stop, k0 + KB), min(i + job.last, limits[i * job.limits_row + 1]))
            if lo < hi:
                take_chunk(square, wide, narrow, single, one, r, job, key_head, i, k0, lo - k0, hi - k0, step, v_step)
    for row in range(R):
        part = (key_head * G + row % G) * job.splits + split
        write_row(job, r, job.exact, part, row // G, row, v_step)


@apart
def write_scaled(out, row, Dv, factor):
    for d in range(Dv):
        out.data[d * out.col] = row[d] * factor


@apart
def write_row(job, r, exact, part, i, row, v_step):
    """out = sum p v / sum p, and 0 where nothing was seen; the sums if wanted."""
    total = r.total[row]
    if job.wants_top:  # here the bound is the largest score
        job.top[part * job.Lq + i] = r.bound[row]
        total += 0 if total == 0 else job.eps
    factor = 0 if total == 0 else 1 / total
    if job.wants_output:
        write_scaled(matrix(job.output, part, i), r.output + row * v_step, job.Dv, factor)
    if exact is not None and job.wants_exact:
        write_scaled(matrix(exact, part, i), r.output + row * v_step, job.Dv, factor)
    if job.wants_sums:
        at = 2 * (part * job.Lq + i)
        job.sums[at] = 0 if total == 0 else r.bound[row]
        job.sums[at + 1] = -INF if total == 0 else math.log(np.float64(total))
