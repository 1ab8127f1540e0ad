"""Across the lanes of a tile that is one vector wide: sums of its rows, and transposes, by stages of shuffles."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import emit
from .kinds import I32, VectorType, vector_of
from .tile import collect


def _sums_of_rows(b, tile, value, least):
    """The sum of each row in log2(lanes) stages: a vector of as many lanes as the tile has rows, a power of two, and at
    least so many: then the sums are repeated."""
    sums = [b.extract_value(value, r) for r in range(tile.rows)]

    def joined(x, y, stage):
        n = x.type.count
        low, high = (
            [n + c - other if c & stage else c + same for c in range(n)] for other, same in ((stage, 0), (0, stage))
        )
        return b.fadd(_picked(b, x, y, low), _picked(b, x, y, high))

    stage = 1
    while stage < tile.rows:
        for r in range(0, tile.rows, 2 * stage):
            sums[r] = joined(sums[r], sums[r + stage], stage)
        stage *= 2
    total = sums[0]
    while total.type.count > tile.rows:  # the upper half is added to the lower
        half = total.type.count // 2
        total = b.fadd(*(_picked(b, total, total, [c + first for c in range(half)]) for first in (0, half)))
    return total if least <= tile.rows else _picked(b, total, total, [c % tile.rows for c in range(least)])


def _picked(b, x, y, lanes):
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def _sums_fit(tile):
    return tile.cols == 1 and tile.rows <= tile.vector.lanes and tile.rows & (tile.rows - 1) == 0


@intrinsic
def row_sums(context, tile):
    """The sum of each row of a tile, as one vector. The tile has as many rows as a vector lanes, or a power of two
    less: then the sums are repeated in the lanes."""
    lanes = tile.vector.lanes
    if _sums_fit(tile):
        return tile.vector(tile), lambda cx, b, sig, args: _sums_of_rows(b, tile, args[0], lanes)


@intrinsic
def store_row_sums(context, tile, pointer, offset):
    """pointer[offset + r] = the sum of row r, and nothing behind the last."""
    kind = VectorType(tile.vector.element, tile.rows)

    def build(cx, b, sig, args):
        emit.store(b, _sums_of_rows(b, tile, args[0], 1), args[1], args[2], kind)
        return emit.unit(cx)

    if _sums_fit(tile):
        return types.void(tile, pointer, types.intp), build


def _transposed(b, rows):
    """As many rows as each has lanes, in log2(lanes) stages."""
    rows, n, stage = list(rows), len(rows), 1
    while stage < n:
        low = [n + c - stage if c & stage else c for c in range(n)]
        high = [n + c if c & stage else c + stage for c in range(n)]
        for r in range(n):
            if not r & stage:
                pair = rows[r], rows[r + stage]
                rows[r], rows[r + stage] = _picked(b, *pair, low), _picked(b, *pair, high)
        stage *= 2
    return rows


@intrinsic
def tile_transposed(context, tile):
    """Of a tile that is one vector wide and as high."""

    def build(cx, b, sig, args):
        return collect(b, tile, _transposed(b, [b.extract_value(args[0], r) for r in range(tile.rows)]))

    return (tile(tile), build) if tile.cols == 1 and tile.rows == tile.vector.lanes else None


@intrinsic
def transpose_square(context, out, o, o_step, x, i, i_step, factor, f):
    """out[o + c * o_step + r] = x[i + r * i_step + c] * factor[f + c], lanes x lanes, in log2(lanes) stages

    Without a factor elements are moved, whatever they are.
    """
    vector = vector_of(out.element)

    def build(cx, b, sig, args):
        out, o, o_step, x, i, i_step, factor, f = args
        n = vector.lanes
        rows = [emit.load(b, x, b.add(i, b.mul(i_step, emit.count(r))), vector) for r in range(n)]
        if sig.args[6] is not types.none:
            scale = emit.load(b, factor, f, vector)
            rows = [b.fmul(row, scale) for row in rows]
        rows = _transposed(b, rows)
        for c in range(n):
            emit.store(b, rows[c], out, b.add(o, b.mul(o_step, emit.count(c))), vector)
        return emit.unit(cx)

    n = types.intp
    return types.void(out, n, n, x, n, n, factor, n), build
