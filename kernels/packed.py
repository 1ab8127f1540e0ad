"""Two bfloat16 numbers in each 32-bit lane: what is laid out for products that multiply both and add them up at once.

    s[key, query]   = sum over pairs of channels   key[key, 2d : 2d + 2]       query[2d : 2d + 2, query]
    out[d, query]  += sum over pairs of keys       value[2j : 2j + 2, d]       p[2j : 2j + 2, query]
    dk[key, d]     += sum over pairs of queries    ds[key, 2i : 2i + 2]        query[2i : 2i + 2, d]

Pairs of channels adjoin in memory, so keys and values are read as they lie for the scores and for dp. Pairs of keys and
of queries do not: rows are zipped, a chunk of values for each block of queries, which costs under 2 % of its products;
as often as it is read, zipping a whole head once would save little and take memory. Rounding p and ds to bfloat16 is
what every product of bfloat16 does. An odd last row is zipped with zeros.

The loops that multiply are those of tiles.py; their operands are pointers to words, and that is all they know.
"""

from typing import NamedTuple

from .jit import apart, inline
from .jobs import Words
from .simd import (
    as_bfloat16,
    given_words,
    lanes_of,
    load,
    per_lane,
    splat,
    store,
    tile_lanes,
    width_of,
    zipped,
    zipped_rows,
)
from .tiles import Matrix, whole_vectors


class Packed(NamedTuple):
    """Scratch of one block of queries, in words; rows are padded to whole vectors."""

    stage: Words  # values, or backward keys, of one chunk: half as many rows as it has keys
    query_rows: Words  # backward: the block's queries and output gradients, half as many rows as queries
    output_rows: Words


@inline
def carve_packed(job, b, slot):
    """At the end of the slot's scratch; nothing is there unless the job is packed."""
    k_step, v_step = whole_vectors(b.output, job.D), whole_vectors(b.output, job.Dv)
    rows = width_of(b.output) // 2
    end = given_words(1, job.scratch + (slot + 1) * job.scratch_step)
    query_rows = end + -rows * (k_step + v_step)
    return Packed(query_rows + -(job.keys_per_block // 2 * max(k_step, v_step)), query_rows, query_rows + rows * k_step)


@inline
def by_channels(packed, m):
    """The matrix as pairs of channels, if the job is packed: its rows are even."""
    data = given_words(packed, m.data)
    return Matrix(data, m.row // per_lane(data), m.col)


@apart
def zip_rows(packed, out, step, m, n, D):
    """out[i, d] = (m[2i, d], m[2i + 1, d]) for n rows of a bfloat16 matrix"""
    if packed is not None:
        lanes = lanes_of(out)
        for i in range((n + 1) // 2):
            at = 2 * i * m.row
            after = at + m.row if 2 * i + 1 < n else at
            for d in range(0, D, lanes):
                x = zipped_rows(m.data, at + d, after + d, min(lanes, D - d), 2 * i + 1 < n)
                store(x, out, i * step + d)


@apart
def pack_keys(packed, like, out, x, n):
    """out[j, query] = (x[2j, query], x[2j + 1, query]) for n keys, and the queries of a row of `like`; out may be x."""
    if packed is not None:
        width, lanes = width_of(x), lanes_of(x)
        for j in range((n + 1) // 2):
            for i in range(0, tile_lanes(like), lanes):
                low = load(x, 2 * j * width + i)
                high = splat(low, 0.0)
                if 2 * j + 1 < n:
                    high = load(x, (2 * j + 1) * width + i)
                store(zipped(low, high), out, j * width + i)


@apart
def pack_queries(packed, x, n, factor):
    """x[key, query] * factor as bfloat16, for n keys, in place: each row takes half of what it took."""
    if packed is not None:
        width, lanes, out = width_of(x), lanes_of(x), as_bfloat16(x)
        for j in range(n):
            for i in range(0, width, lanes):
                s = load(x, j * width + i)
                store(s * splat(s, factor), out, j * width + i)
