"""Products of tiles, all of them the same loop of rank-1 updates.

The lanes of a vector are queries. Scores are kept transposed, s[key, query], in blocks as wide as COLS vectors, so the
softmax never reduces across lanes, and the left operand of every product is read scalar by scalar from memory as it
lies: keys and values are not packed, whatever their strides. Remainders repeat the last row (simd/tile.py).
"""

from typing import NamedTuple

from .jit import apart, inline
from .jobs import Elements, Indices, Stored
from .simd import (
    fma,
    lane_sum,
    lanes_of,
    load,
    load_live,
    per_lane,
    splat,
    store,
    tile_lanes,
    tile_load,
    tile_map,
    tile_multiply_add,
    tile_rows,
    tile_store,
    transpose_square,
    width_of,
    zeros_of,
)
from .softmax import plus


class Matrices(NamedTuple):
    """A stack of matrices: their data, where each begins, and the steps to the next row and column, in elements."""

    data: Elements
    at: Indices
    row: int
    col: int


class StoredMatrices(NamedTuple):
    """As `Matrices`, of the caller's arrays, which may be float16 or bfloat16: what is read is float32 all the same."""

    data: Stored
    at: Indices
    row: int
    col: int


class Matrix(NamedTuple):
    data: Elements
    row: int
    col: int


@inline
def matrix(stack, i, first_row):
    """Matrix i of the stack, without its first rows."""
    return Matrix(stack.data + (stack.at[i] + first_row * stack.row), stack.row, stack.col)


@inline
def rows_from(m, i):
    """The matrix without its first i rows."""
    return Matrix(m.data + i * m.row, m.row, m.col)


@apart
def whole_vectors(like, n):
    """n rounded up to whole vectors of the pointer's elements: what a padded row takes."""
    lanes = lanes_of(like)
    return (n + lanes - 1) // lanes * lanes


SUMMED = 256  # channels: one chain of more would lose digits, of 1024 2.7 times as many as a library's product


@apart
def row_products(like, m, live, block, D, deep):
    """s[r, query] = sum over d < D of m[r, d] * block[d, query]: K . Q, or V . dO; with `deep`, D may pass SUMMED"""
    width = width_of(block)
    if deep is None:
        return tile_multiply_add(like, m.data, m.col, m.row, live, block, width, D)
    tile = like
    for d in range(0, D, SUMMED):
        data, n = m.data + d * m.col, min(SUMMED, D - d)
        part = tile_multiply_add(like, data, m.col, m.row, live, block + d * width, width, n)
        tile = tile_map(plus, tile, (part,))
    return tile


@apart
def add_columns_times_block(like, out, m, D, block, n):
    """out[d, query] += sum over key < n of m[key, d] * block[key, query]: P . V, or dS . K

    The sum over a chunk is complete before it is added: one running sum over all keys would lose half the digits that
    float32 can keep (values of one sign, flat weights, 1347 keys: four times the error of the plain formula).
    """
    rows, width = tile_rows(like), width_of(out)
    n = (n + per_lane(block) - 1) // per_lane(block)
    for d in range(0, D, rows):
        live = min(rows, D - d)
        tile = tile_multiply_add(like, m.data + d * m.col, m.row, m.col, live, block, width, n)
        add_to(tile, out, d * width, width, live)


@apart
def add_block_times_rows(wide, pair, narrow, out, out_row, block, n, rows, step, first, last):
    """out[key, d] += sum over first <= query < last of block[key, query] * rows[query, d]: P^T . dO, or dS^T . Q

    Here the lanes are d, as many as `step`: rows and out are padded to whole vectors. What tiles as wide as a block
    leave is done by tiles of two vectors and of one: four vectors are two times 2, not 3 and 1, where three are wide.
    If elements are words, of two queries each, `first` is even.
    """
    lanes, per, d = lanes_of(block), per_lane(block), 0
    first, last = first // per, (last + per - 1) // per
    while d < step:
        vectors, at = (step - d) // lanes, rows + (first * step + d)
        if vectors * lanes >= tile_lanes(wide) and (vectors != 4 or tile_lanes(wide) != 3 * lanes):
            add_strip(wide, out + d, out_row, block + first, n, at, step, last - first)
            d += tile_lanes(wide)
        elif vectors > 1:
            add_strip(pair, out + d, out_row, block + first, n, at, step, last - first)
            d += tile_lanes(pair)
        else:
            add_strip(narrow, out + d, out_row, block + first, n, at, step, last - first)
            d += lanes


@apart
def add_strip(like, out, out_row, block, n, rows, step, queries):
    """As many columns of out as the tile is wide. The rows of the block behind the n-th, in scratch, are read too, and
    not kept: of a tile that is always whole LLVM knows the offsets."""
    row = width_of(block) // per_lane(block)
    for key in range(0, n, tile_rows(like)):
        tile = tile_multiply_add(like, block + key * row, 1, row, tile_rows(like), rows, step, queries)
        add_to(tile, out, key * out_row, out_row, min(tile_rows(like), n - key))


@inline
def add_to(tile, out, at, step, live):
    """out[at + r * step :] += tile[r, :]"""
    tile_store(tile_map(plus, tile, (tile_load(tile, out, at, step, live),)), out, at, step, live)


@apart
def transposed(out, m, n, D, factor):
    """out[d, row] = m[row, d] * factor[0] for n rows; the columns beyond n become 0.

    `factor` repeats over a vector, and is None where elements are words, which are moved.
    """
    width, lanes = width_of(out), lanes_of(out)
    rows, columns = 0, 0
    if m.col == 1:  # whole squares by shuffles: element by element the forward pass at L=128 falls from 78 to 62 %
        rows, columns = n // lanes * lanes, D // lanes * lanes
        for row in range(0, rows, lanes):
            for d in range(0, columns, lanes):
                transpose_square(out, d * width + row, width, m.data, row * m.row + d, m.row, factor, 0)
    for d in range(D):
        for row in range(rows if d < columns else 0, n):
            x = m.data[row * m.row + d * m.col]
            if factor is not None:
                x = x * factor[0]
            out[d * width + row] = x
        for row in range(n, width):
            out[d * width + row] = 0


@apart
def transposed_back(m, n, D, block, factor):
    """m[row, d] = block[d, row] * factor[row] for n rows"""
    width, lanes = width_of(block), lanes_of(block)
    rows, columns = 0, 0
    if m.col == 1:
        rows, columns = n // lanes * lanes, D // lanes * lanes
        for row in range(0, rows, lanes):
            for d in range(0, columns, lanes):
                transpose_square(m.data, row * m.row + d, m.row, block, d * width + row, width, factor, row)
    for row in range(n):
        for d in range(columns if row < rows else 0, D):
            m.data[row * m.row + d * m.col] = block[d * width + row] * factor[row]


@apart
def padded_rows(out, step, m, n, D, factor):
    """out[row, d] = m[row, d] * factor[row] for n rows, which are `step` apart and end in zeros."""
    lanes = lanes_of(out)
    for row in range(n):
        at, f = row * m.row, factor[row]
        if m.col == 1:
            for d in range(0, D // lanes * lanes, lanes):
                x = load(m.data, at + d)
                store(x * splat(x, f), out, row * step + d)
        for d in range(D // lanes * lanes if m.col == 1 else 0, D):
            out[row * step + d] = m.data[at + d * m.col] * f
        for d in range(D, step):
            out[row * step + d] = 0


@apart
def copy_rows(out, m, n, D):
    """out[row, d] = m[row, d] for n rows, widened or rounded if one of them is of half precision."""
    lanes = lanes_of(m.data)
    whole = D // lanes * lanes if m.col == 1 and out.col == 1 else 0
    for row in range(n):
        to, at = row * out.row, row * m.row
        for d in range(0, whole, lanes):
            store(load(m.data, at + d), out.data, to + d)
        for d in range(whole, D):
            out.data[to + d * out.col] = m.data[at + d * m.col]


@apart
def clear(m, n):
    """n whole rows of zeros"""
    for i in range(n * m.row):
        m.data[i] = 0


@inline
def dot(x, x_step, y, n):
    """sum over d < n of x[d * x_step] * y[d], of rows; y is padded to whole vectors"""
    total, lanes, rest = zeros_of(y), lanes_of(y), 0 * y[0]
    if x_step == 1:
        for d in range(0, n // lanes * lanes, lanes):
            total = fma(load(x, d), load(y, d), total)
        left = n % lanes
        total = fma(load_live(x, n - left, left), load_live(y, n - left, left), total)
    else:
        for d in range(n):
            rest += x[d * x_step] * y[d]
    return lane_sum(total) + rest


@apart
def all_finite(m, n, D):
    """Is every one of n x D elements finite? x * 0 is NaN where it is not."""
    lanes = lanes_of(m.data)
    columns = D // lanes * lanes if m.col == 1 else 0
    zero = zeros_of(m.data)
    even, odd = zero, zero  # two chains: one would wait for itself
    rest = m.data[0] * 0
    for row in range(n):
        at = row * m.row
        for d in range(0, columns - lanes, 2 * lanes):
            even, odd = fma(load(m.data, at + d), zero, even), fma(load(m.data, at + d + lanes), zero, odd)
        if columns % (2 * lanes):
            even = fma(load(m.data, at + columns - lanes), zero, even)
        for d in range(columns, D):
            rest += m.data[at + d * m.col] * 0
    return lane_sum(even + odd) + rest == 0
