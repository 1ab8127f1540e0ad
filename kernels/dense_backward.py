"""Dense attention, backward: the gradients of queries, keys and values, from scores that are computed again.

    p = exp(s - lse)   dv = p^T do   dp = do v^T   ds = p (dp - delta)   dq = ds k   dk = ds^T q

Keys come in tiles; whichever task owns a gradient sums it in one order.
"""

import math

from .blocks import (
    COLS,
    INF,
    ROWS,
    TALL,
    AttentionJob,
    carve,
    carve_gradients,
    find_keys,
    is_whole,
    place_chunk,
    queries_of,
    sees,
    stage_additive,
)
from .dense import add_seen_columns, apply_dropout, keys_of, load_queries, scores, values_of
from .jit import apart, inline, kernel
from .packed import by_channels, carve_packed, pack_keys, pack_queries, zip_rows
from .scoring import biased_gradient, slope_of, visible_gradient
from .simd import (
    as_words,
    either,
    fma,
    given,
    given_words,
    lanes_of,
    load,
    per_lane,
    splat,
    store,
    tile_load,
    tile_map,
    tile_row,
    tile_rows,
    tile_steps,
    tile_store,
    tile_zeros,
    where,
    width_of,
    zeros_of,
)
from .softmax import LN2, probability, times
from .tiles import (
    Matrix,
    add_block_times_rows,
    add_columns_times_block,
    all_finite,
    clear,
    copy_rows,
    dot,
    matrix,
    padded_rows,
    row_products,
    rows_from,
    transposed,
    transposed_back,
    whole_vectors,
)


@inline
def gradient_scale(job):
    """What dq and dk are times: the scale of q k, which for scores in base 2 has log2(e) in it that ds has not."""
    return job.scale * (LN2 if job.natural is None else 1.0)


@inline
def score_gradient(p, dp, delta):
    return p * (dp - delta)


@inline
def score_gradient_with_epsilon(p, dp, delta, p_top, eps):
    """The largest score has more to answer for: it sets how much eps weighs. (If several are, each answers for all.)"""
    return p * (dp - where(p >= p_top, delta + splat(delta, eps) * delta, delta))


@apart
def weights_and_gradients(like, b, g, column, key, value, first, last, k0, job, slope, additive, edge):
    """p and ds of the queries from `column` and keys first .. last of the tile, into b.scores and g.scores."""
    rows, width, D, Dv = tile_rows(like), width_of(b.query), job.D, job.Dv // per_lane(g.output)
    for j in range(first, last, rows):
        live, at = min(rows, last - j), j * width + column
        # 1. p = exp(s - lse)
        scale = given(job.packed, job.scale)
        s = scores(like, b, column, key, D, job.deep, j, live, scale, job.softcap, slope, additive, edge, g.scores)
        p = tile_map(probability, s, (tile_row(like, b.shift, column), job.natural))
        tile_store(p, b.scores, at, width, live)
        # 2. dp = v . do, of the weights that dropout kept;  ds = p (dp - delta)
        dp = row_products(like, rows_from(value, j), live, g.output + column, Dv, job.deep)
        dp = apply_dropout(like, dp, b, column, k0 + j, job.dropout)
        p = tile_load(like, b.scores, at, width, live)
        ds = through_softmax(like, p, dp, b, g, column, job.wants_top, job.eps)
        ds = hide_gradient(like, ds, b, g, column, j, live, job.softcap, additive, edge, job.bias_gradient)
        tile_store(ds, g.scores, at, width, live)
        # 3. what dv is made of: the weights that dropout kept
        if job.dropout is not None:
            tile_store(apply_dropout(like, p, b, column, k0 + j, job.dropout), b.scores, at, width, live)


@apart
def through_softmax(like, p, dp, b, g, column, has_top, eps):
    delta = tile_row(like, g.delta, column)
    if has_top:
        return tile_map(score_gradient_with_epsilon, p, (dp, delta, tile_row(like, b.top, column), eps))
    return tile_map(score_gradient, p, (dp, delta))


@apart
def hide_gradient(like, ds, b, g, column, j, live, softcap, additive, edge, of_bias):
    """ds back through the softcap, which a bias comes after, and exactly 0 where hidden."""
    width, at = width_of(b.query), j * width_of(b.query) + column
    if softcap is not None and of_bias is None:
        ds = tile_map(times, ds, (tile_load(like, g.scores, at, width, live),))
    if additive is not None:
        ds = tile_map(biased_gradient, ds, (tile_load(like, additive, at, width, live),))
    if edge is not None:
        terms = (tile_row(like, b.near, column), tile_row(like, b.far, column), tile_steps(like, like, j))
        ds = tile_map(visible_gradient, ds, terms)
    return ds


@apart
def add_seen_rows(out, out_row, b, block, k0, n, rows, step, nq, additive):
    """As `add_block_times_rows` where rows may hold NaN or infinity for queries that do not see some keys: the same
    sums, in the same order, without what is hidden. As in `add_seen_columns` not the same bits, if `job.packed`."""
    width = width_of(block)
    for j in range(n):
        for d in range(0, step, lanes_of(block)):
            sum = zeros_of(block)
            for query in range(nq):
                if sees(b, additive, k0, j, query):
                    sum = fma(splat(sum, block[j * width + query]), load(rows, query * step + d), sum)
            store(load(out, j * out_row + d) + sum, out, j * out_row + d)


@apart
def add_key_value_gradients(wide, tall, b, g, room, job, head, k0, n, nq, additive, careful):
    """dv += p^T do and dk += ds^T q for one tile of keys, each group of keys with the queries that see it. Packed, the
    queries are not scaled, and ds is; p is packed already.
    """
    dv, dk = matrix(job.gradients.value, head, k0), matrix(job.gradients.key, head, k0)
    v_step, k_step = whole_vectors(b.query, job.Dv), whole_vectors(b.query, job.D)
    if careful:
        add_seen_rows(dv.data, dv.row, b, b.scores, k0, n, g.output_rows, v_step, nq, additive)
        add_seen_rows(dk.data, dk.row, b, g.scores, k0, n, g.query_rows, k_step, nq, additive)
        return
    pack_queries(job.packed, g.scores, n, gradient_scale(job))
    p, ds = given_words(job.packed, b.scores), given_words(job.packed, g.scores)
    query = either(given(job.packed, room.query_rows), g.query_rows)
    do = either(given(job.packed, room.output_rows), g.output_rows)
    pair = tile_zeros(b.output, ROWS, 2)
    for j in range(0, n, TALL):
        rows, at = min(TALL, n - j), j * (width_of(p) // per_lane(p))
        first, last = queries_of(b, j, rows, nq)
        add_block_times_rows(wide, pair, tall, dv.data + j * dv.row, dv.row, p + at, rows, do, v_step, first, last)
        add_block_times_rows(wide, pair, tall, dk.data + j * dk.row, dk.row, ds + at, rows, query, k_step, first, last)


@apart
def clear_unseen(b, g, n, nq):
    """p and ds are 0 for the keys of the tile that no query of a column sees."""
    width, lanes = width_of(b.query), lanes_of(b.query)
    for column in range(0, nq, lanes):
        for j in range(n):
            if j < b.first[column // lanes] or j >= b.last[column // lanes]:
                for i in range(column, column + lanes):
                    b.scores[j * width + i], g.scores[j * width + i] = 0, 0


@apart
def take_tile(wide, tall, b, g, job, head, q0, nq, k0, n, whole, slope):
    """Fill b.scores with p and g.scores with ds, for the block and the tile of keys k0 .. k0 + n."""
    lanes = lanes_of(b.query)
    key, value = (by_channels(job.packed, keys_of(job, head, k0)), by_channels(job.packed, values_of(job, head, k0)))
    place_chunk(b, job, nq, q0, k0, n, whole)
    stage_additive(b, job.additive, job.bias, job.mask, head, q0, nq, k0, n)
    additive = given(job.additive, b.additive)
    if whole:
        weights_and_gradients(wide, b, g, 0, key, value, 0, n, k0, job, slope, additive, None)
    else:
        clear_unseen(b, g, n, nq)
        for column in range(0, nq, lanes):
            first, last = b.first[column // lanes], b.last[column // lanes]
            weights_and_gradients(tall, b, g, column, key, value, first, last, k0, job, slope, additive, True)


@apart
def add_query_gradient(wide, tall, b, g, ds, packed, key, zipped, D, k0, n, nq, whole, additive, careful):
    """dq^T += k^T ds. Packed, `zipped` are pairs of the keys, and `ds` is where those of g.scores go."""
    lanes, width = lanes_of(b.query), width_of(b.query)
    if careful:
        add_seen_columns(b.output, key, D, b, g.scores, k0, 0, n, 0, width, nq, additive)
    elif whole:
        pack_keys(packed, wide, ds, g.scores, n)
        add_columns_times_block(wide, b.output, zipped, D, ds, n)
    else:
        for column in range(0, nq, lanes):
            first, last = b.first[column // lanes], b.last[column // lanes]
            there, rows = ds + (first // per_lane(ds) * width + column), rows_from(zipped, first // per_lane(ds))
            pack_keys(packed, tall, there, g.scores + (first * width + column), last - first)
            add_columns_times_block(tall, b.output + column, rows, D, there, last - first)


@apart
def normalise(b, job, at, nq, unit):
    """p = exp(s - b.shift) * b.total, where b.shift is that of the forward pass, and b.total one by its sum.

    Not exp(s - lse): the logarithm of many keys is a large number to subtract from scores near 0, and takes digits from
    the difference (10,000 flat weights: 3.6 times the error of the plain formula, gradients 1.9 times). Packed, b.shift
    is the logsumexp as it is rounded, and b.total what that left: nearly 1, so that do * b.total, which is rounded to
    bfloat16, is nearly always do.
    """
    natural = LN2 if unit is None else 1.0
    for i in range(nq):
        shift, log = job.sums[2 * (at + i)], job.sums[2 * (at + i) + 1]
        b.shift[i] = 0 if log == -INF else shift
        if job.packed is not None and log != -INF:
            b.shift[i] = shift + log / natural
        b.total[i] = 0 if log == -INF else math.exp((b.shift[i] - shift) * natural - log)


@apart
def load_top(b, top, at, nq, unit):
    """The probability of each query's largest score, by the function that makes the others: the same bits."""
    for i in range(width_of(b.query)):
        b.top[i] = top[at + i] if i < nq else -INF
    for i in range(0, width_of(b.query), lanes_of(b.query)):
        store(probability(load(b.top, i), load(b.shift, i), unit), b.top, i)


@apart
def load_gradients(b, g, room, job, head, q0, nq):
    """The block's output gradients, transposed and by rows, its queries by rows, and delta.

    What p lacks to be a probability is given here, to do and delta, where it costs nothing.
    """
    width, Dv = width_of(b.query), job.Dv
    v_step, k_step = whole_vectors(b.query, Dv), whole_vectors(b.query, job.D)
    for i in range(width):
        b.shift[i], b.total[i], g.delta[i] = 0, 0, 0
    normalise(b, job, head * job.Lq + q0, nq, job.natural)
    if job.wants_top:
        load_top(b, job.top, head * job.Lq + q0, nq, job.natural)
    # rows: do * total, and the outputs for a moment, where the transposed do will lie
    padded_rows(g.output_rows, v_step, matrix(job.gradients.output, head, q0), nq, Dv, b.total)
    out = matrix(either(job.exact, job.output), head, q0)  # rounded to half precision it would cost ds its last digits
    for i in range(nq):
        lse_part = job.gradients.lse[head * job.Lq + q0 + i] * b.total[i]
        g.delta[i] = dot(out.data + i * out.row, out.col, g.output_rows + i * v_step, Dv) - lse_part
        b.factor[i] = gradient_scale(job)
    padded_rows(g.query_rows, k_step, matrix(job.query, head, q0), nq, job.D, b.factor)
    given_do, do = matrix(job.gradients.output, head, q0), Matrix(g.output_rows, v_step, 1)
    do = either(given(job.packed, by_channels(job.packed, given_do)), do)
    transposed(g.output, do, nq, Dv // per_lane(g.output), None)
    zip_rows(job.packed, room.output_rows, v_step, given_do, nq, Dv)
    zip_rows(job.packed, room.query_rows, k_step, matrix(job.query, head, q0), nq, job.D)


@apart
def gradients_of_block(job, b, g, room, head, block, first_tile, last_tile):
    """One block of queries and tiles first .. last of keys: dq of the block, and its share of dk and dv."""
    width, KB = width_of(b.query), job.keys_per_block
    q0 = block * width
    nq = min(width, job.Lq - q0)
    wide, tall = tile_zeros(b.output, ROWS, COLS), tile_zeros(b.output, TALL, 1)
    lowest, near, far, highest = find_keys(b, job, head, q0, nq, 0, job.Lk)
    first_tile, last_tile = max(first_tile, lowest // KB), min(last_tile, (highest + KB - 1) // KB)
    slope, additive = given(job.slopes, slope_of(job.slopes, head)), given(job.additive, b.additive)
    if first_tile < last_tile:
        load_queries(b, job, head, q0, nq)
        load_gradients(b, g, room, job, head, q0, nq)
    for i in range(job.D * width):
        b.output[i] = 0
    k_step, v_step = whole_vectors(b.query, job.D), whole_vectors(b.query, job.Dv)
    for tile in range(first_tile, last_tile):
        k0 = tile * KB
        n = min(KB, job.Lk - k0)
        whole = is_whole(b, nq, k0, n, near, far)
        take_tile(wide, tall, b, g, job, head, q0, nq, k0, n, whole, slope)
        key, careful = keys_of(job, head, k0), False
        if not whole or additive is not None:  # what is not finite, times a p or ds of 0, would reach what it must not
            careful = not (
                all_finite(key, n, job.D)
                and all_finite(Matrix(g.query_rows, k_step, 1), nq, job.D)
                and all_finite(Matrix(g.output_rows, v_step, 1), nq, job.Dv)
            )
        if not careful:
            pack_queries(job.packed, b.scores, n, 1.0)
        if job.gradients.to_query:
            zip_rows(job.packed, room.stage, k_step, key, n, job.D)
            zipped = either(given(job.packed, Matrix(room.stage, k_step, 1)), key)
            ds = either(
                given(job.packed, as_words(b.scores + KB // 2 * width)), g.scores
            )  # p needs half of its room now
            add_query_gradient(
                wide, tall, b, g, ds, job.packed, key, zipped, job.D, k0, n, nq, whole, additive, careful
            )
        if job.gradients.to_key:
            add_key_value_gradients(wide, tall, b, g, room, job, head, k0, n, nq, additive, careful)
    if job.gradients.to_query:
        for i in range(nq):
            b.factor[i] = gradient_scale(job)
        made = either(job.rounded, job.gradients)
        transposed_back(matrix(made.query, head, q0), nq, job.D, b.output, b.factor)


@apart
def write_key_gradients(job, rounded, head, k0, n):
    """dk and dv, which were summed in float32, in the type of the keys and values."""
    if rounded is not None:
        copy_rows(matrix(rounded.key, head, k0), matrix(job.gradients.key, head, k0), n, job.D)
        copy_rows(matrix(rounded.value, head, k0), matrix(job.gradients.value, head, k0), n, job.Dv)


@kernel
def backward(job: AttentionJob, slot, task):
    # task -> some heads of a group, some blocks of queries, some tiles of keys. Whether one task does a whole key head
    # (five products) or dq and dk, dv are made by smaller tasks apart (seven), each element is summed in one order: dq
    # over tiles, dk and dv over heads and then blocks
    b, g, G = carve(job, slot), carve_gradients(job, slot), job.gradients
    room = carve_packed(job, b, slot)
    tiles = (job.Lk + job.keys_per_block - 1) // job.keys_per_block
    tile_groups, block_groups = (tiles + G.tiles - 1) // G.tiles, (job.blocks + G.blocks - 1) // G.blocks
    first_tile, rest = task % tile_groups * G.tiles, task // tile_groups
    first_block, heads = (block_groups - 1 - rest % block_groups) * G.blocks, rest // block_groups
    k0 = first_tile * job.keys_per_block
    n = min(job.Lk, (first_tile + G.tiles) * job.keys_per_block) - k0
    if G.to_key:  # while they are near: zeros from NumPy cost 3 % at L=128
        head = heads * G.heads
        clear(matrix(G.key, head, k0), n)
        clear(matrix(G.value, head, k0), n)
    for head in range(heads * G.heads, heads * G.heads + G.heads):
        for block in range(first_block, min(job.blocks, first_block + G.blocks)):
            gradients_of_block(job, b, g, room, head, block, first_tile, min(tiles, first_tile + G.tiles))
    if G.to_key:
        write_key_gradients(job, job.rounded, heads * G.heads, k0, n)
