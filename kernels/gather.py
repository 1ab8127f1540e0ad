"""Products with rows that lie anywhere: what attention over neighbours is made of. Lanes are channels.

    rows (N, H, C)          of nodes or of edges; node n begins at n * step, and its heads and channels are contiguous
    index (n)               which rows, for the n <= EDGES edges that are worked on
    weights (H, EDGES)      a number for each edge and head
    x, out (H, C)           of one node, in scratch: each head padded to whole vectors, `pad` apart

Memory is what this costs: a row is 4 cache lines at 4 x 16 float32, and comes from anywhere. All channels of a row are
used for all that is needed of it while it is near.
"""

import math
from typing import NamedTuple

from .jit import Elements, apart, inline
from .simd import fma, lane_sum, lanes_from, lanes_of, load, load_live, prefetch, splat, store, store_live, where

INF = math.inf
EDGES = 64  # of one node at a time: their rows stay in the first-level cache


class Rows(NamedTuple):
    data: Elements
    step: int


@apart
def take_row(out, pad, rows, i, H, C):
    """out[h, c] = rows[i, h, c], and zeros to whole vectors"""
    lanes = lanes_of(out)
    for h in range(H):
        for c in range(0, C, lanes):
            store(load_live(rows.data, i * rows.step + h * C + c, min(lanes, C - c)), out, h * pad + c)


@apart
def put_row(rows, i, x, pad, H, C):
    """rows[i, h, c] = x[h, c]"""
    lanes = lanes_of(x)
    for h in range(H):
        for c in range(0, C, lanes):
            store_live(load(x, h * pad + c), rows.data, i * rows.step + h * C + c, min(lanes, C - c))


@apart
def fetch_row(rows, i, elements, line):
    """Ask for a row that will be needed soon, of so many elements and so many to a cache line."""
    for c in range(0, elements, line):
        prefetch(rows.data, i * rows.step + c)


@inline
def row_part(rows, at, live, lanes):
    """One vector of a row, of which so many lanes are there."""
    return load(rows.data, at) if live == lanes else load_live(rows.data, at, live)


@inline
def first_lanes(x, n, other):
    """x in the first n lanes, `other` in the rest

    Not numbers stored behind the last: a vector cannot be loaded before such stores have left the core, and so would
    have to wait for all that came before them, the softmax of the last head (135 cycles a head, of 1500 for 10 edges).
    """
    return where(lanes_from(x, 0) < splat(x, n), x, splat(x, other))


@apart
def scale(x, n, factor):
    """x[i] *= factor for n numbers and what is behind them to a whole vector"""
    for i in range(0, n, lanes_of(x)):
        v = load(x, i)
        store(v * splat(v, factor), x, i)


@apart
def dot_gathered(out, x, pad, rows, index, n, H, C, factor, adds):
    """out[h, e] = sum over c of x[h, c] * rows[index[e], h, c] * factor, or added to it"""
    lanes = lanes_of(out)
    whole = C // lanes * lanes
    for e in range(n):
        at = index[e] * rows.step
        for h in range(H):
            sum = load_live(x, 0, 0)
            for c in range(0, whole, lanes):
                sum = fma(load(x, h * pad + c), load(rows.data, at + h * C + c), sum)
            if whole < C:
                sum = fma(load(x, h * pad + whole), load_live(rows.data, at + h * C + whole, C - whole), sum)
            done = lane_sum(sum * splat(sum, factor))
            out[h * EDGES + e] = out[h * EDGES + e] + done if adds else done


@apart
def add_gathered(out, pad, weights, rows, index, n, H, C, selects):
    """out[h, c] += sum over e of weights[h, e] * rows[index[e], h, c]; if it selects, a weight of 0 adds nothing"""
    lanes = lanes_of(out)
    whole = C // lanes * lanes
    for h in range(H):
        w = weights + h * EDGES
        for c in range(0, whole, lanes):
            sum = load_live(out, 0, 0)
            for e in range(n):
                if not selects or w[e] != 0:
                    sum = fma(splat(sum, w[e]), load(rows.data, index[e] * rows.step + h * C + c), sum)
            store(load(out, h * pad + c) + sum, out, h * pad + c)
        if whole < C:
            sum = load_live(out, 0, 0)
            for e in range(n):
                if not selects or w[e] != 0:
                    at = index[e] * rows.step + h * C + whole
                    sum = fma(splat(sum, w[e]), load_live(rows.data, at, C - whole), sum)
            store(load(out, h * pad + whole) + sum, out, h * pad + whole)


@apart
def keep_largest(out, pad, best, weights, rows, edge_rows, has_edge, index, ids, bias, has_bias, first, n, H, C):
    """out[h, c] = the largest of weights[h, e] * (rows[index[e], h, c] + edge_rows[ids[e], h, c]), and
    best[h, c] its position, -1 before any; the first of equal ones, NaN before all, and none that a bias hides"""
    for h in range(H):
        for e in range(n):
            w = weights[h * EDGES + e]
            if not has_bias or bias.data[ids[e] * bias.step + h] != -INF:
                for c in range(C):
                    value = rows.data[index[e] * rows.step + h * C + c]
                    if has_edge:
                        value += edge_rows.data[ids[e] * edge_rows.step + h * C + c]
                    value *= w
                    if best[h * C + c] < 0 or value > out[h * pad + c] or value != value:
                        out[h * pad + c], best[h * C + c] = value, first + e


@inline
def leaky(z, slope):
    """LeakyReLU: z above 0, slope * z below"""
    return where(z > splat(z, 0.0), z, z * splat(z, slope))


@inline
def leaky_slope(z, slope):
    """Its derivative, `slope` at 0 as torch has it."""
    return where(z > splat(z, 0.0), splat(z, 1.0), splat(z, slope))


@inline
def joint(x, rows, edge_rows, has_edge, row, edge, at, place, live, lanes):
    """z = x + rows[row] (+ edge_rows[edge]) at one vector of channels"""
    z = load(x, place) + row_part(rows, row * rows.step + at, live, lanes)
    if has_edge:
        z = z + row_part(edge_rows, edge * edge_rows.step + at, live, lanes)
    return z


@apart
def joint_scores(out, x, pad, att, slope, rows, edge_rows, has_edge, index, ids, n, H, C):
    """out[h, e] = sum over c of att[h, c] * leaky(x[h, c] + rows[index[e], h, c] + edge_rows[ids[e], h, c])"""
    lanes = lanes_of(out)
    for e in range(n):
        for h in range(H):
            sum = load_live(x, 0, 0)
            for c in range(0, C, lanes):
                place = h * pad + c
                z = joint(x, rows, edge_rows, has_edge, index[e], ids[e], h * C + c, place, min(lanes, C - c), lanes)
                sum = fma(leaky(z, slope), load(att, place), sum)
            out[h * EDGES + e] = lane_sum(sum)


@apart
def joint_gradients(
    dx, datt, ds, x, pad, att, slope, rows, edge_rows, has_edge, dedge_rows, wants_edge, index, ids, n, H, C
):
    """dz = ds[h, e] * att[h, c] * leaky'(z): added up in dx, by edge in dedge_rows; datt += ds[h, e] * leaky(z)

    x and rows change places when the gradient of the other is wanted: z is their sum.
    """
    lanes = lanes_of(dx)
    for h in range(H):
        for c in range(0, C, lanes):
            place, live = h * pad + c, min(lanes, C - c)
            a, sum, att_sum = load(att, place), load_live(x, 0, 0), load_live(x, 0, 0)
            for e in range(n):
                d = splat(sum, ds[h * EDGES + e])
                z = joint(x, rows, edge_rows, has_edge, index[e], ids[e], h * C + c, place, live, lanes)
                dz = d * a * leaky_slope(z, slope)
                sum, att_sum = sum + dz, fma(d, leaky(z, slope), att_sum)
                if wants_edge:
                    store_live(dz, dedge_rows.data, ids[e] * dedge_rows.step + h * C + c, live)
            store(load(dx, place) + sum, dx, place)
            store(load(datt, place) + att_sum, datt, place)
