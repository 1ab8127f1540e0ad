"""Products of tiles, all of them the same loop of rank-1 updates.

The lanes of a vector are queries. Scores are kept transposed, s[key, query], in blocks as wide as COLS vectors, so the
softmax never reduces across lanes, and the left operand of every product is read scalar by scalar from memory as it
lies: keys and values are never packed or copied, whatever their strides. Remainders repeat the last row (simd.py).
"""

from typing import NamedTuple

from .jit import Elements, Indices, apart, inline
from .simd import (
    fma,
    lane_sum,
    lanes_of,
    load,
    load_live,
    tile_load,
    tile_rank1,
    tile_rows,
    tile_store,
    transpose_square,
    width_of,
)


class Matrices(NamedTuple):
    """A stack of matrices: their data, where each begins, and the steps to the next row and column, in elements."""

    data: Elements
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


@inline
def multiply_add(tile, x, x_next, x_row, live, y, y_next, n):
    """tile[r, :] += sum over t < n of x[t * x_next + r * x_row] * y[t * y_next :]"""
    for t in range(n):
        tile = tile_rank1(tile, x, t * x_next, x_row, live, y, t * y_next)
    return tile


@apart
def add_columns_times_block(like, out, m, D, block, n):
    """out[d, query] += sum over key < n of m[key, d] * block[key, query]: P . V, or dS . K"""
    rows, width = tile_rows(like), width_of(out)
    for d in range(0, D, rows):
        live = min(rows, D - d)
        tile = tile_load(like, out, d * width, width, live)
        tile = multiply_add(tile, m.data + d * m.col, m.row, m.col, live, block, width, n)
        tile_store(tile, out, d * width, width, live)


@apart
def transposed(out, m, n, D, factor):
    """out[d, row] = m[row, d] * factor[0] for n rows; the columns beyond n become 0. `factor` repeats over a vector."""
    width, lanes = width_of(out), lanes_of(out)
    rows, columns = 0, 0
    if m.col == 1:  # whole squares by shuffles: element by element the forward pass at L=128 falls from 78 to 62 %
        rows, columns = n // lanes * lanes, D // lanes * lanes
        for row in range(0, rows, lanes):
            for d in range(0, columns, lanes):
                transpose_square(out, d * width + row, width, m.data, row * m.row + d, m.row, factor, 0)
    for d in range(D):
        for row in range(rows if d < columns else 0, n):
            out[d * width + row] = m.data[row * m.row + d * m.col] * factor[0]
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
def all_finite(m, n, D):
    """Is every one of n x D elements finite? x * 0 is NaN where it is not."""
    lanes = lanes_of(m.data)
    columns = D // lanes * lanes if m.col == 1 else 0
    zero = load_live(m.data, 0, 0)
    found = zero
    rest = m.data[0] * 0
    for row in range(n):
        for d in range(0, columns, lanes):
            found = fma(load(m.data, row * m.row + d), zero, found)
        for d in range(columns, D):
            rest += m.data[row * m.row + d * m.col] * 0
    return lane_sum(found) + rest == 0
