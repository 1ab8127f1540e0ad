"""Dense attention: streaming forward, and its backward right under it.

    query (B * H) x (Lq, D)   key (B * Hk) x (Lk, D)   value (B * Hk) x (Lk, Dv)   output (B * H) x (Lq, Dv)

No array of Lq x Lk elements is ever formed: a task takes a block of queries past the keys, chunk by chunk. A task owns
what it writes, and the order of every sum depends on the sizes of one head alone.
"""

import math

from .blocks import (
    COLS,
    INF,
    ROWS,
    TALL,
    AttentionJob,
    carve,
    chunk,
    find_keys,
    place_chunk,
    sees,
    stage_additive,
)
from .jit import apart, inline, kernel
from .scoring import modified, thinned, throw_dice, uncapped, visible
from .simd import (
    lanes_of,
    splat,
    tile_column_sum,
    tile_exceeds,
    tile_load,
    tile_map,
    tile_row,
    tile_rows,
    tile_steps,
    tile_store,
    tile_zeros,
    where,
    width_of,
)
from .softmax import LN2, LOG2E, plus, probability, raise_bound
from .tiles import (
    add_block_times_rows,
    add_columns_times_block,
    all_finite,
    dot,
    matrix,
    multiply_add,
    transposed,
    transposed_back,
)


@inline
def scores(like, b, column, key, D, j, live, softcap, slope, additive, edge):
    """One tile: key j + r by the queries from `column`, through the terms; -inf where hidden."""
    # s[r, query] = sum_d key[j + r, d] * query[query, d]
    width, at = width_of(b.query), j * width_of(b.query) + column
    s = multiply_add(like, key.data + j * key.row, key.col, key.row, live, b.query + column, width, D)
    steps = tile_steps(like, like, j)
    if additive is not None:
        terms = (softcap, tile_load(like, additive, at, width, live), slope, tile_row(like, b.position, column), steps)
        s = tile_map(modified, s, terms)
    else:
        if softcap is not None:
            s = tile_map(modified, s, (softcap, None, slope, tile_row(like, b.position, column), steps))
        else:
            if slope is not None:
                s = tile_map(modified, s, (None, None, slope, tile_row(like, b.position, column), steps))
    if edge is not None:
        s = tile_map(visible, s, (tile_row(like, b.near, column), tile_row(like, b.far, column), steps))
    return s


# --- forward --------------------------------------------------------------------------------------------------------
@apart
def attend(like, b, column, key, value, first, last, D, Dv, k0, job, slope, additive, edge):
    """The queries from `column`, as many as the tile `like` is wide, attend to keys first .. last of the chunk."""
    rows, width, total = tile_rows(like), width_of(b.query), b.total + column
    for j in range(first, last, rows):
        live, at = min(rows, last - j), j * width + column
        # 1. s = k . q, with its terms
        s = scores(like, b, column, key, D, j, live, job.softcap, slope, additive, edge)
        # 2. p = exp(s - shift), l += sum p
        if tile_exceeds(s, tile_row(like, b.bound, column)):
            waiting = b.scores + (first * width + column)
            raise_bound(
                s, like, b.bound + column, b.shift + column, total, waiting, j - first, b.output + column, Dv, job.natural
            )
        p = tile_map(probability, s, (tile_row(like, b.shift, column), job.natural))
        tile_store(tile_map(plus, tile_row(like, total, 0), (tile_column_sum(p),)), total, 0, width, 1)
        if job.dropout is not None:
            p = thin(like, p, b, column, k0 + j, job.dropout)
        tile_store(p, b.scores, at, width, live)
    # 3. out[d, query] += sum_key v[key, d] * p[key, query]
    if value is not None:
        waiting = b.scores + (first * width + column)
        row0 = value.data + first * value.row
        add_columns_times_block(like, b.output + column, row0, value.row, value.col, Dv, waiting, last - first)


@inline
def thin(like, p, b, column, key, dropout):
    """The tile of probabilities, or of their gradients, after dropout."""
    width = width_of(b.query)
    dice = tile_row(like, b.dice, column)
    terms = (dice, tile_row(like, b.dice, width + column), tile_steps(like, dice, key), dropout.threshold, dropout.gain)
    return tile_map(thinned, p, terms)


@apart
def add_seen_columns(out, m, D, b, block, k0, first, last, column, nq, additive):
    """As `add_columns_times_block` where m may hold NaN or infinity in rows that some queries do not see."""
    width = width_of(block)
    for query in range(column, nq):
        for j in range(first, last):
            if sees(b, additive, k0, j, query):
                for d in range(D):
                    out[d * width + query] += m.data[j * m.row + d * m.col] * block[j * width + query]


@apart
def stream(wide, tall, b, job, head, q0, nq, keys, slope, careful):
    """The block past all its keys; True if some query did not see some key of a chunk."""
    lowest, near, far, highest = keys
    lanes, D, Dv, k0, some_hidden = lanes_of(b.query), job.D, job.Dv, lowest, False
    for i in range(width_of(b.query)):
        b.bound[i], b.shift[i], b.total[i] = -INF, 0, 0
    for i in range(Dv * width_of(b.query)):
        b.output[i] = 0
    while k0 < highest:
        n, whole = chunk(k0, near, far, highest, job.keys_per_block)
        key, value = matrix(job.key, head, k0), matrix(job.value, head, k0)
        place_chunk(b, job, nq, q0, k0, n, whole)
        additive = stage_additive(b, job.bias, job.mask, head, q0, nq, k0, n)
        hidden = not whole or additive is not None
        some_hidden = some_hidden or hidden
        products = None if careful and hidden else value
        if whole:
            attend(wide, b, 0, key, value, 0, n, D, Dv, k0, job, slope, additive, None)
        else:
            for column in range(0, nq, lanes):
                first, last = b.first[column // lanes], b.last[column // lanes]
                attend(tall, b, column, key, value, first, last, D, Dv, k0, job, slope, additive, True)
        k0 += n
    return some_hidden
