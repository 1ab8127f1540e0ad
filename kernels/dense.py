"""Dense attention: streaming forward.

    query (B * H) x (Lq, D)   key (B * Hk) x (Lk, D)   value (B * Hk) x (Lk, Dv)   output (B * H) x (Lq, Dv)

No array of Lq x Lk elements is ever formed: a task takes a block of queries past the keys, chunk by chunk. A task owns
what it writes, and the order of every sum depends on the sizes of one head alone.
"""

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
from .jit import apart, kernel
from .scoring import modified, thinned, throw_dice, visible
from .simd import (
    given,
    lanes_of,
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
    width_of,
)
from .softmax import plus, probability, raise_bound
from .tiles import (
    Matrix,
    add_columns_times_block,
    all_finite,
    matrix,
    multiply_add,
    rows_from,
    transposed,
    transposed_back,
)


@apart
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
def attend(like, b, column, key, value, first, last, k0, nq, job, slope, additive, edge, careful):
    """The queries from `column`, as many as the tile `like` is wide, attend to keys first .. last of the chunk."""
    rows, width, total, D, Dv = tile_rows(like), width_of(b.query), b.total + column, job.D, job.Dv
    for j in range(first, last, rows):
        live, at = min(rows, last - j), j * width + column
        # 1. s = k . q, with its terms
        s = scores(like, b, column, key, D, j, live, job.softcap, slope, additive, edge)
        # 2. p = exp(s - shift), l += sum p
        if tile_exceeds(s, tile_row(like, b.bound, column)):
            waiting = b.scores + (first * width + column)
            raise_bound(
                s,
                like,
                b.bound + column,
                b.shift + column,
                total,
                waiting,
                j - first,
                b.output + column,
                Dv,
                job.natural,
            )
        p = tile_map(probability, s, (tile_row(like, b.shift, column), job.natural))
        tile_store(tile_map(plus, tile_row(like, total, 0), (tile_column_sum(p),)), total, 0, width, 1)
        p = thin(like, p, b, column, k0 + j, job.dropout)
        tile_store(p, b.scores, at, width, live)
    # 3. out[d, query] += sum_key v[key, d] * p[key, query]
    waiting = b.scores + (first * width + column)
    if careful:
        add_seen_columns(b.output, value, Dv, b, k0, first, last, column, tile_lanes(like), nq, additive)
    else:
        add_columns_times_block(like, b.output + column, rows_from(value, first), Dv, waiting, last - first)


@apart
def thin(like, p, b, column, key, dropout):
    """The tile of probabilities after dropout, if there is any."""
    if dropout is None:
        return p
    width = width_of(b.query)
    dice = tile_row(like, b.dice, column)
    terms = (dice, tile_row(like, b.dice, width + column), tile_steps(like, dice, key), dropout.threshold, dropout.gain)
    return tile_map(thinned, p, terms)


@apart
def add_seen_columns(out, m, D, b, k0, first, last, column, lanes, nq, additive):
    """As `add_columns_times_block` where m may hold NaN or infinity in rows that some queries do not see."""
    width = width_of(out)
    for query in range(column, min(nq, column + lanes)):
        for j in range(first, last):
            if sees(b, additive, k0, j, query):
                for d in range(D):
                    out[d * width + query] += m.data[j * m.row + d * m.col] * b.scores[j * width + query]


@apart
def stream(wide, tall, b, job, head, q0, nq, keys, slope, careful):
    """The block past all its keys; True if some query did not see some key of a chunk."""
    lowest, near, far, highest = keys
    lanes, Dv, k0, some_hidden = lanes_of(b.query), job.Dv, lowest, False
    for i in range(width_of(b.query)):
        b.bound[i], b.shift[i], b.total[i] = -INF, 0, 0
    for i in range(Dv * width_of(b.query)):
        b.output[i] = 0
    while k0 < highest:
        n, whole = chunk(k0, near, far, highest, job.keys_per_block)
        key, value = matrix(job.key, head, k0), matrix(job.value, head, k0)
        place_chunk(b, job, nq, q0, k0, n, whole)
        stage_additive(b, job.additive, job.bias, job.mask, head, q0, nq, k0, n)
        additive = given(job.additive, b.additive)
        hidden = not whole or additive is not None
        some_hidden = some_hidden or hidden
        with_care = careful and hidden
        if whole:
            attend(wide, b, 0, key, value, 0, n, k0, nq, job, slope, additive, None, with_care)
        else:
            for column in range(0, nq, lanes):
                first, last = b.first[column // lanes], b.last[column // lanes]
                attend(tall, b, column, key, value, first, last, k0, nq, job, slope, additive, True, with_care)
        k0 += n
    return some_hidden


@kernel
def forward(job: AttentionJob, slot, task):
    # task -> one block of queries of one head; the last blocks first, which under a causal mask are the largest
    head, block = task // job.blocks, job.blocks - 1 - task % job.blocks
    b = carve(job, slot)
    width, q0 = width_of(b.query), block * width_of(b.query)
    nq = min(width, job.Lq - q0)
    wide, tall = tile_zeros(b.query, ROWS, COLS), tile_zeros(b.query, TALL, 1)
    keys = find_keys(b, job, head, q0, nq, 0, job.Lk)
    throw_dice(b.dice, width, job.dropout, head, q0)
    slope = given(job.slopes, slope_of(job.slopes, head))
    # 1. the block's queries, transposed and scaled
    for i in range(width):
        b.factor[i] = job.scale
    transposed(b.query, matrix(job.query, head, q0), nq, job.D, b.factor)
    # 2. past the keys. A hidden NaN or infinity times a weight of 0 is NaN, and shows: then once more, with care
    some_hidden = stream(wide, tall, b, job, head, q0, nq, keys, slope, False)
    if some_hidden and not all_finite(Matrix(b.output, width, 1), job.Dv, nq):
        stream(wide, tall, b, job, head, q0, nq, keys, slope, True)
    # 3. out = sum p v / sum p, and 0 where nothing was seen
    for i in range(nq):
        b.factor[i] = 0 if b.total[i] == 0 else 1 / b.total[i]
    transposed_back(matrix(job.output, head, q0), nq, job.Dv, b.output, b.factor)


@apart
def slope_of(slopes, head):
    if slopes is None:
        return 0.0
    return slopes[head]
