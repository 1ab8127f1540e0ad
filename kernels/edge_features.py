"""Features of edges on their way to rows of channels, a batch of edges at a time: no array of edges is so wide.

    edge (E, K)        the caller's         matrix (K, D)       D channels of all heads
    made (EDGES, D)    of a batch, in scratch, and read from there as rows of edges are (gather.py)

    made[e, :] = edge[edges[e], :] matrix
    dedge[edges[e], :] = dmade[e, :] matrix^T           dmatrix += sum over e of edge[edges[e], :]^T dmade[e, :]

Made again in each pass, and not kept: a row of 8 numbers comes from memory where one of 64 would have to be written
before. With the product as an array of a million edges GATv2 took 2.2 times as long, GraphTransformer 2.5 (8 features,
64 channels, both passes; Zen 3).

Where only products lie between, the target's query could go through the matrix instead, once for all its edges:
<q, edge matrix> = <edge, matrix q>. That is 32 multiply-adds an edge where this is 512, but in loops of 8 and of 4, and
this is one product of matrices for 128 edges: GraphTransformer took 1.07 times as long forward, 1.7 by target.
"""

from .gather import AHEAD, EDGES, Rows, copy, fetch_row
from .jit import apart, inline
from .simd import tile_lanes, tile_map, tile_multiply_add, tile_rows, tile_store, tile_zeros
from .softmax import plus
from .tiles import SUMMED, Matrix, add_to, all_finite
from .walk import features_desk

TALL, WIDE, ALL = 4, 2, 8  # rows and vectors of a tile, or rows of one vector: eight chains of multiply-adds


@inline
def rows_of(job, desk, rows):
    """Where the rows of edges lie"""
    return Rows(features_desk(job, desk).made, job.features.pitch) if job.features.K else Rows(rows.data, rows.step)


@inline
def gradients_of(job, desk, rows):
    """Where their gradients go"""
    return Rows(features_desk(job, desk).dmade, job.features.pitch) if job.features.K else Rows(rows.data, rows.step)


@inline
def lines_of(job, desk):
    """Which row is whose"""
    return features_desk(job, desk).lines if job.features.K else desk.edges


@apart
def count_lines(job, desk):
    for e in range(EDGES + AHEAD if job.features.K else 0):
        features_desk(job, desk).lines[e] = e


@apart
def multiply_rows(tile, out, pitch, x, x_next, x_row, rows, y, y_row, n, adds):
    """out[r, :] = sum over t < n of x[t * x_next + r * x_row] * y[t, :], or adds that; `pitch` is whole tiles"""
    for d in range(0, pitch, tile_lanes(tile)):
        for r in range(0, rows, tile_rows(tile)):
            live, sum = min(tile_rows(tile), rows - r), tile
            for t in range(0, n, SUMMED):
                at, begin, many = x + (t * x_next + r * x_row), y + (t * y_row + d), min(SUMMED, n - t)
                part = tile_multiply_add(tile, at, x_next, x_row, live, begin, y_row, many)
                sum = tile_map(plus, sum, (part,))
            if adds:
                add_to(sum, out, r * pitch + d, pitch, live)
            else:
                tile_store(sum, out, r * pitch + d, pitch, live)


@apart
def make_rows(here, edges, edge, features, n):
    """made, of n edges, whose features are copied side by side"""
    K, narrow, pitch = features.K, features.narrow, features.pitch
    for e in range(n):
        fetch_row(edge, edges[e + AHEAD], 0, K)  # by target, else these are edges of before
        copy(here.features + e * narrow, edge.data + edges[e] * edge.step, K)
    tile = tile_zeros(here.made, TALL, WIDE)
    multiply_rows(tile, here.made, pitch, here.features, 1, narrow, n, features.matrix, pitch, K, False)


@apart
def give_rows(here, edges, dedge, features, n, task):
    """What follows from dmade, of the n edges whose features are there"""
    K, D, narrow, pitch = features.K, features.D, features.narrow, features.pitch
    sums = features.sums + task * K * pitch
    if not all_finite(Matrix(here.features, narrow, 1), n, K):
        for e in range(n):
            leave_out(here.features + e * narrow, K, here.dmade + e * pitch, D)
    wide, tall = tile_zeros(sums, TALL, WIDE), tile_zeros(sums, ALL, 1)
    multiply_rows(wide, sums, pitch, here.features, narrow, 1, K, here.dmade, pitch, n, True)
    multiply_rows(tall, here.features, narrow, here.dmade, 1, pitch, n, features.turned, narrow, D, False)
    for e in range(n):
        copy(dedge.data + edges[e] * dedge.step, here.features + e * narrow, K)


@apart
def leave_out(row, K, gradient, D):
    """Features that are NaN or infinite add nothing where no channel has a gradient."""
    odd = 0 * row[0]
    for k in range(K):
        odd += row[k] * 0
    if odd != 0:
        some = False
        for d in range(D):
            some |= gradient[d] != 0
        for k in range(0 if some else K):
            row[k] = 0
