"""Dense attention, streaming: the forward pass, and what the backward pass shares with it.

    query (B * H) x (Lq, D)   key (B * Hk) x (Lk, D)   value (B * Hk) x (Lk, Dv)   output (B * H) x (Lq, Dv)

No array of Lq x Lk elements is ever formed: a task takes a block of queries past the keys, chunk by chunk. Of each
query it keeps m, l and o (`shift`, `total` and `output` of a block), and of each tile of scores s in base 2 it adds

    m' = max(m, s)  where a score passes the bound, m + 16; else m' = m, which need not be the largest: see softmax.py
    p  = 2^(s - m')
    l <- l 2^(m - m') + sum p
    o <- o 2^(m - m') + p v             in the end out = o / l

A task owns what it writes, and the order of every sum depends on the sizes of one head alone.
"""

import math

import numpy as np

from .blocks import (
    COLS,
    INF,
    ROWS,
    TALL,
    AttentionJob,
    carve,
    chunk,
    find_keys,
    interior,
    is_narrow,
    place_chunk,
    sees,
    stage_additive,
)
from .jit import apart, inline, kernel
from .packed import by_channels, carve_packed, pack_keys, zip_rows
from .scoring import biased, cap_slope, capped, draw_dice, dropped, slope_of, sloped, visible
from .simd import (
    either,
    fma,
    given,
    given_words,
    lanes_of,
    load_live,
    per_lane,
    splat,
    store_live,
    tile_column_max,
    tile_column_sum,
    tile_exceeds,
    tile_lanes,
    tile_load,
    tile_map,
    tile_row,
    tile_rows,
    tile_steps,
    tile_store,
    tile_zeros,
    unless,
    width_of,
    zeros_of,
)
from .softmax import LN2, add_to_total, headroom_of, plus, probability, raise_bound, scaled
from .tiles import (
    Matrix,
    add_columns_times_block,
    all_finite,
    matrix,
    row_products,
    rows_from,
    transposed,
    transposed_back,
    whole_vectors,
)

LONG = 1024  # keys: beyond that many, what is lost by adding up chunks is kept


# --- what forward and backward share ---------------------------------------------------------------------------------
@apart
def scores(like, b, column, key, D, deep, j, live, scale, softcap, slope, additive, edge, slope_of_cap):
    """One tile: key j + r by the queries from `column`, through the terms; -inf where hidden.

    `scale` is None where the queries are scaled already. Where the caller gives it room, the derivative of the softcap
    is left in slope_of_cap[key, query].
    """
    # s[r, query] = sum_d key[j + r, d] * query[query, d]
    width, at, D = width_of(b.query), j * width_of(b.query) + column, D // per_lane(b.query)
    s = row_products(like, rows_from(key, j), live, b.query + column, D, deep)
    if scale is not None:
        s = tile_map(scaled, s, (scale,))
    if softcap is not None:
        s = tile_map(capped, s, (softcap,))
        if slope_of_cap is not None:
            tile_store(tile_map(cap_slope, s, (softcap,)), slope_of_cap, at, width, live)
    if additive is not None:
        s = tile_map(biased, s, (tile_load(like, additive, at, width, live),))
    if slope is not None:
        s = tile_map(sloped, s, (slope, tile_row(like, b.position, column), tile_steps(like, like, j)))
    if edge is not None:
        terms = (tile_row(like, b.near, column), tile_row(like, b.far, column), tile_steps(like, like, j))
        s = tile_map(visible, s, terms)
    return s


@apart
def apply_dropout(like, p, b, column, key, dropout):
    """The tile of probabilities, or of their gradients, after dropout, if there is any.

    Optional, and so a kernel of its own: as a number that is tested in each tile, as `wants_top` is, it made gradients
    without dropout 1.02 times as slow (Zen 3), for a tile lies in registers around the test.
    """
    if dropout is None:
        return p
    width = width_of(b.query)
    dice = tile_row(like, b.dice, column)
    terms = (dice, tile_row(like, b.dice, width + column), tile_steps(like, dice, key), dropout.threshold, dropout.gain)
    return tile_map(dropped, p, terms)


@apart
def add_seen_columns(out, m, D, b, block, k0, first, last, column, lanes, nq, additive):
    """As `add_columns_times_block` where m may hold NaN or infinity in rows that some queries do not see: the same
    sums, in the same order, without what is hidden.

    Not the same bits where bfloat16 is multiplied by pairs (`job.packed`): there the block is rounded and two products
    are added at once, here neither.
    """
    width = width_of(out)
    for query in range(column, min(nq, column + lanes)):
        for d in range(D):
            sum = zeros_of(out)
            for j in range(first, last):
                if sees(b, additive, k0, j, query):
                    x = splat(sum, m.data[j * m.row + d * m.col])
                    sum = fma(x, splat(sum, block[j * width + query]), sum)
            at = d * width + query
            store_live(load_live(out, at, 1) + sum, out, at, 1)


@inline
def keys_of(job, head, k0):
    """The head's keys from k0 on, in the type that the products read."""
    return matrix(either(job.widened, job).key, head, k0)


@inline
def values_of(job, head, k0):
    return matrix(either(job.widened, job).value, head, k0)


@apart
def load_queries(b, job, head, q0, nq):
    """Put the block's queries into scratch, transposed and scaled, and draw their dice."""
    for i in range(lanes_of(b.query)):
        b.factor[i] = job.scale
    m = by_channels(job.packed, matrix(job.query, head, q0))
    transposed(b.query, m, nq, job.D // per_lane(b.query), unless(job.packed, b.factor))
    draw_dice(b.dice, width_of(b.query), job.dropout, head, q0)


# --- forward --------------------------------------------------------------------------------------------------------
@apart
def record_top(like, s, b, column, wanted):
    """The largest score of each query: the bound and the shift know it only roughly."""
    if wanted:
        tile_store(tile_column_max(s, tile_row(like, b.top, column)), b.top, column, width_of(b.query), 1)


@apart
def attend(like, b, column, key, value, zipped, first, last, k0, nq, job, slope, additive, edge, careful):
    """The queries from `column`, as many as the tile `like` is wide, attend to keys first .. last of the chunk.

    Packed, `key` are pairs of channels and `zipped` pairs of keys of `value`, else the same.
    """
    rows, width, total, D, Dv = tile_rows(like), width_of(b.query), b.total + column, job.D, job.Dv
    waiting = b.scores + (first * width + column)
    for i in range(width, width + tile_lanes(like)):
        total[i] = 0
    for j in range(first, last, rows):
        live, at = min(rows, last - j), j * width + column
        # 1. s = k . q, with its terms
        scale = given(job.packed, job.scale)
        s = scores(like, b, column, key, D, job.deep, j, live, scale, job.softcap, slope, additive, edge, None)
        record_top(like, s, b, column, job.wants_top)
        # 2. p = exp(s - shift), l += sum p
        if tile_exceeds(s, tile_row(like, b.bound, column)):
            raise_bound(
                s, like, b.bound + column, b.shift + column, total, waiting, j - first, b.output + column, Dv,
                headroom_of(job.packed, job.natural), job.natural,
            )  # fmt: skip
        p = tile_map(probability, s, (tile_row(like, b.shift, column), job.natural))
        tile_store(tile_map(plus, tile_row(like, total, width), (tile_column_sum(p),)), total, width, width, 1)
        tile_store(apply_dropout(like, p, b, column, k0 + j, job.dropout), b.scores, at, width, live)
    add_to_total(like, total, job.split_keys > LONG)
    # 3. out[d, query] += sum_key v[key, d] * p[key, query]
    if careful:
        add_seen_columns(b.output, value, Dv, b, b.scores, k0, first, last, column, tile_lanes(like), nq, additive)
    else:
        p = given_words(job.packed, waiting)
        pack_keys(job.packed, like, p, waiting, last - first)
        rows = rows_from(zipped, first // per_lane(p))
        add_columns_times_block(like, b.output + column, rows, Dv, p, last - first)


@apart
def stream(wide, tall, b, room, job, head, q0, nq, keys, slope, careful):
    """The block past all its keys; True if some query did not see some key of a chunk."""
    lowest, near, far, highest = keys
    lanes, k0, some_hidden = lanes_of(b.query), lowest, False
    near, far = interior(lowest, near, far, highest, is_narrow(b, nq))
    for i in range(width_of(b.query)):
        b.bound[i], b.shift[i], b.total[i], b.lost[i], b.top[i] = -INF, 0, 0, 0, -INF
    for i in range(job.Dv * width_of(b.query)):
        b.output[i] = 0
    while k0 < highest:
        n, whole = chunk(k0, near, far, highest, job.keys_per_block)
        key, value, step = keys_of(job, head, k0), values_of(job, head, k0), whole_vectors(b.output, job.Dv)
        key, zipped = by_channels(job.packed, key), either(given(job.packed, Matrix(room.stage, step, 1)), value)
        zip_rows(job.packed, room.stage, step, value, n, job.Dv)
        place_chunk(b, job, nq, q0, k0, n, whole)
        stage_additive(b, job.additive, job.bias, job.mask, head, q0, nq, k0, n)
        additive = given(job.additive, b.additive)
        hidden = not whole or additive is not None
        some_hidden = some_hidden or hidden
        with_care = careful and hidden
        if whole:
            attend(wide, b, 0, key, value, zipped, 0, n, k0, nq, job, slope, additive, None, with_care)
        else:
            for column in range(0, nq, lanes):
                first, last = b.first[column // lanes], b.last[column // lanes]
                attend(tall, b, column, key, value, zipped, first, last, k0, nq, job, slope, additive, True, with_care)
        k0 += n
    return some_hidden


@apart
def add_epsilon(b, top, eps, at, nq, unit):
    """l += eps, in the unit that l has: exp(s - shift) and not exp(s - top)."""
    for i in range(nq):
        top[at + i] = b.top[i]
        if b.total[i] != 0:
            b.total[i] += eps * math.exp((b.top[i] - b.shift[i]) * (LN2 if unit is None else 1.0))


@apart
def write_sums(out, at, b, nq):
    """The shift and the logarithm of the sum of exp(score - shift), -inf for a query that sees nothing.

    Not their sum: beside scores of -1e30 it would forget how many there are.
    """
    for i in range(nq):
        out[2 * (at + i)] = 0 if b.total[i] == 0 else b.shift[i]
        out[2 * (at + i) + 1] = -INF if b.total[i] == 0 else math.log(np.float64(b.total[i]))


@apart
def write_output(job, exact, part, q0, nq, b):
    """out = sum p v times b.factor, rounded if the caller's arrays are, or as it is, or both."""
    if job.wants_output:
        transposed_back(matrix(job.output, part, q0), nq, job.Dv, b.output, b.factor)
    if exact is not None and job.wants_exact:
        transposed_back(matrix(exact, part, q0), nq, job.Dv, b.output, b.factor)


@kernel
def forward(job: AttentionJob, slot, task):
    # task -> one block of queries of one part of the keys of one head; the last blocks first, which under a causal
    # mask are the largest
    part, block = task // job.blocks, job.blocks - 1 - task % job.blocks
    head, first_key = part // job.splits, part % job.splits * job.split_keys
    b = carve(job, slot)
    room = carve_packed(job, b, slot)
    width, q0 = width_of(b.query), block * width_of(b.query)
    nq = min(width, job.Lq - q0)
    wide, tall = tile_zeros(b.output, ROWS, COLS), tile_zeros(b.output, TALL, 1)
    keys = find_keys(b, job, head, q0, nq, first_key, min(job.Lk, first_key + job.split_keys))
    slope = given(job.slopes, slope_of(job.slopes, head))
    # 1. the block's queries, transposed and scaled
    load_queries(b, job, head, q0, nq)
    # 2. past the keys. A hidden NaN or infinity times a weight of 0 is NaN, and shows: then once more, with care
    careful, done = False, False
    while not done:
        some_hidden = stream(wide, tall, b, room, job, head, q0, nq, keys, slope, careful)
        done = careful or not some_hidden or all_finite(Matrix(b.output, width, 1), job.Dv, nq)
        careful = True
    # 3. out = sum p v / sum p, and 0 where nothing was seen
    for i in range(nq):
        b.total[i] += b.lost[i]
    if job.wants_top:
        add_epsilon(b, job.top, job.eps, part * job.Lq + q0, nq, job.natural)
    for i in range(nq):
        b.factor[i] = 0 if b.total[i] == 0 else 1 / b.total[i]
    write_output(job, job.exact, part, q0, nq, b)
    if job.wants_sums:
        write_sums(job.sums, part * job.Lq + q0, b, nq)
