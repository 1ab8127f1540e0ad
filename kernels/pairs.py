"""What is made for pairs of a query and a key, by those who ask for it: the weights, and the gradient of a bias."""

from .blocks import (
    COLS,
    ROWS,
    TALL,
    AttentionJob,
    carve,
    carve_gradients,
    find_keys,
    is_whole,
    place_chunk,
    sees,
    stage_additive,
)
from .dense import keys_of, load_queries, scores
from .dense_backward import load_gradients, normalise, take_tile
from .jit import apart, inline, kernel
from .packed import by_channels, carve_packed
from .scoring import slope_of
from .simd import (
    given,
    lane_sum,
    lanes_of,
    load,
    load_live,
    tile_column,
    tile_load,
    tile_map,
    tile_row,
    tile_store,
    tile_transposed,
    tile_zeros,
    width_of,
)
from .softmax import probability
from .tiles import add_to, matrix


@kernel
def bias_backward(job: AttentionJob, slot, task):
    # task -> one distinct bias matrix and one block of queries, for all the heads that the matrix was broadcast to
    b, g, grad, KB = carve(job, slot), carve_gradients(job, slot), job.bias_gradient, job.keys_per_block
    room = carve_packed(job, b, slot)
    width = width_of(b.query)
    m, block = task // job.blocks, task % job.blocks
    q0 = block * width
    nq = min(width, job.Lq - q0)
    wide, tall = tile_zeros(b.output, ROWS, COLS), tile_zeros(b.output, TALL, 1)
    for member in range(grad.begins[m], grad.begins[m + 1]):
        head = grad.members[member]
        lowest, near, far, highest = find_keys(b, job, head, q0, nq, 0, job.Lk)
        slope = given(job.slopes, slope_of(job.slopes, head))
        if lowest < highest:
            load_queries(b, job, head, q0, nq)
            load_gradients(b, g, room, job, head, q0, nq)
        for tile in range(lowest // KB, (highest + KB - 1) // KB):
            k0 = tile * KB
            n = min(KB, job.Lk - k0)
            whole = is_whole(b, nq, k0, n, near, far)
            take_tile(wide, tall, b, g, job, head, q0, nq, k0, n, whole, slope)
            row = q0 if grad.by_query else block
            add_bias_gradient(matrix(grad.out, m, row), grad, g.scores, width, nq, n, k0 if grad.by_key else tile)


@apart
def add_bias_gradient(out, grad, ds, width, nq, n, col):
    """out[query, col + key] += ds[key, query]; an axis that was broadcast has one slot here. Squares are turned in
    registers: element by element all gradients took 1.2 to 1.3 times as long."""
    lanes, square = lanes_of(ds), tile_column(ds)
    whole = n // lanes * lanes if grad.by_query and grad.by_key else 0
    for row in range(0, nq, lanes):
        for j in range(0, whole, lanes):
            turned = tile_transposed(tile_load(square, ds, j * width + row, width, lanes))
            add_to(turned, out.data, row * out.row + col + j, out.row, min(lanes, nq - row))
    for j in range(whole, n):
        at = (col + (j if grad.by_key else 0)) * out.col
        for i in range(nq if grad.by_query else 0):
            out.data[i * out.row + at] += ds[j * width + i]
        if not grad.by_query:
            out.data[at] += sum_of(ds, j * width, nq)


@inline
def sum_of(x, at, n):
    """x[at] + ... + x[at + n - 1]"""
    lanes = lanes_of(x)
    whole = n // lanes * lanes
    total = load_live(x, at + whole, n - whole)
    for i in range(0, whole, lanes):
        total = total + load(x, at + i)
    return lane_sum(total)


@kernel
def weights(job: AttentionJob, slot, task):
    # task -> one block of queries of one head; output is (B * H) x (Lq, Lk) and begins as zeros
    head, block = task // job.blocks, task % job.blocks
    b = carve(job, slot)
    width, lanes, q0, KB = width_of(b.query), lanes_of(b.query), block * width_of(b.query), job.keys_per_block
    nq = min(width, job.Lq - q0)
    tall = tile_zeros(b.output, TALL, 1)
    lowest, near, far, highest = find_keys(b, job, head, q0, nq, 0, job.Lk)
    slope, additive = given(job.slopes, slope_of(job.slopes, head)), given(job.additive, b.additive)
    D, scale = job.D, given(job.packed, job.scale)
    load_queries(b, job, head, q0, nq)
    normalise(b, job, head * job.Lq + q0, nq, job.natural)
    for k0 in range(lowest // KB * KB, highest, KB):
        n, key = min(KB, job.Lk - k0), by_channels(job.packed, keys_of(job, head, k0))
        place_chunk(b, job, nq, q0, k0, n, False)
        stage_additive(b, job.additive, job.bias, job.mask, head, q0, nq, k0, n)
        for column in range(0, nq, lanes):
            first, last = b.first[column // lanes], b.last[column // lanes]
            for j in range(first, last, TALL):
                live = min(TALL, last - j)
                s = scores(tall, b, column, key, D, job.deep, j, live, scale, job.softcap, slope, additive, True, None)
                p = tile_map(probability, s, (tile_row(tall, b.shift, column), job.natural))
                tile_store(p, b.scores, j * width + column, width, live)
            queries = column, min(nq, column + lanes)
            write_weights(job, job.exact, head, q0, b, queries, first, last, k0, additive)


@apart
def write_weights(job, exact, head, q0, b, queries, first, last, k0, additive):
    """As `dense.write_output`, of the weights."""
    if job.wants_output:
        put_weights(matrix(job.output, head, q0), b, queries, first, last, k0, additive)
    if exact is not None and job.wants_exact:
        put_weights(matrix(exact, head, q0), b, queries, first, last, k0, additive)


@apart
def put_weights(out, b, queries, first, last, k0, additive):
    width = width_of(b.query)
    for i in range(queries[0], queries[1]):
        for j in range(first, last):
            if sees(b, additive, k0, j, i):  # where it does not, NaN in the row may have left NaN
                out.data[i * out.row + (k0 + j) * out.col] = b.scores[j * width + i] * b.total[i]
