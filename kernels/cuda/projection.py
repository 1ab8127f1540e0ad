"""Linear projections of many rows on a GPU: the twin of the CPU's projection.py.

    left (I, K)   right (K, J)   out (I, J)   bias (J)       of any strides, rows and columns pairs of two axes

A block of threads makes `threads` rows by 64 columns of out. `project`: each thread 8 by 8 of them, as in SGEMM (Nath
et al., 2010); 16 of K at a time come to shared memory as float32, whatever they are, while those before are multiplied.
All products are of float32, never rounded to TF32. 16 bits that lie in aligned eights go through the tensor cores:
projection_halves.py.

Long sums, such as dW = x^T dy over all nodes of a graph, are cut into parts, each a block of threads of its own, that
`join` adds up in their order. How they are cut depends on shapes alone: the same bits every time.
"""

import functools
from typing import NamedTuple

from numba import cuda, types

from . import instructions as gpu
from .jit import Elements, Floats, device, kernel
from .tiles import widen

COLS, DEPTH = 64, 16  # of out; of K at a time
put_shared, shared_four, put_four_floats = gpu.put_shared_four, gpu.shared_four, gpu.put_four["float32"]


class Pairs(NamedTuple):
    """A matrix whose rows and columns are pairs: row i is (i // rows, i % rows), column j (j // cols, j % cols)."""

    data: Elements
    outer_row: int
    row: int
    outer_col: int
    col: int
    rows: int
    cols: int


class ProjectionJob(NamedTuple):
    left: Pairs
    right: Pairs
    out: Pairs
    bias: Elements  # (J)
    sums: Elements  # (J): the sums of the columns of `right`, which for dW = x^T dy are db
    parts: Floats  # (parts, I, line): the same of parts of K, where it is cut
    part_sums: Floats  # (parts, line)
    line: int  # J in whole fours
    has_bias: int
    wants_sums: int
    adds: int  # to what is there, of out and of sums
    left_by_rows: int  # whether neighbours lie in a row, as which they are read, or in a column
    right_by_rows: int
    I: int
    J: int
    K: int
    part: int  # of K
    count: int  # of parts


class Variant(NamedTuple):
    element: str
    threads: int  # and rows of a block: 64 or 128
    wide: bool  # whether left and right can be read by aligned fours
    paired: bool  # whether rows or columns of left or right are true pairs
    cut: bool  # into parts, or out cannot be written by aligned fours: the rest is for `join`
    selects: bool  # whether 0 of right times NaN or infinity of left is 0: a row that nobody saw has dy = 0
    resident: int = 3
    left_rows: bool = True  # of `project_halves`: as left_by_rows and right_by_rows
    right_rows: bool = True


@functools.cache
def writing(element):
    """put(pointer, index, x): one number, rounded to the element."""
    narrow = gpu.narrow.get(element)

    @device
    def put_float(pointer, index, x):
        pointer[index] = x

    @device
    def put_half(pointer, index, x):
        pointer[index] = narrow(x)

    return put_float if narrow is None else put_half


@device
def pair_at(i, n, outer, inner):
    """Where number i of pairs (i // n, i % n) is"""
    return types.int64(i // types.int32(n)) * outer + types.int64(i % types.int32(n)) * inner


# Most matrices have no true pairs: they are spared the divisions.
@device
def row_at(m, i):
    return types.int64(i) * m.row if i < m.rows else pair_at(i, m.rows, m.outer_row, m.row)


@device
def column_at(m, j):
    return types.int64(j) * m.col if j < m.cols else pair_at(j, m.cols, m.outer_col, m.col)


@functools.cache
def fetching(v):
    """fetch(x, n, m, i, j, down, right, by_rows, last_row, last_col): x[4 * s + q] = m[i + s * down, j + s * right],
    q behind it in its row or, unless by rows, in its column; 0 behind the last row and column."""
    WIDE, PAIRED, one, four = v.wide, v.paired, gpu.one[v.element], gpu.four[v.element]
    int32, int64 = types.int32, types.int64

    @device
    def place(m, i, j):
        if PAIRED:
            return pair_at(i, m.rows, m.outer_row, m.row) + pair_at(j, m.cols, m.outer_col, m.col)
        return int64(i) * m.row + int64(j) * m.col

    @device
    def fetch(x, n, m, i, j, down, right, by_rows, last_row, last_col):
        for s in range(n):
            row, column = int32(i + s * down), int32(j + s * right)
            if WIDE:
                there = row < last_row and column < last_col
                x[4 * s], x[4 * s + 1], x[4 * s + 2], x[4 * s + 3] = four(m.data, place(m, row, column), there)
            else:
                for q in range(4):
                    there = row < last_row and column < last_col
                    x[4 * s + q] = one(m.data, place(m, row, column), there)
                    row, column = int32(row + 1 - by_rows), int32(column + by_rows)

    return fetch


@device
def place_of_block(job, rows):
    """The part of K that a block of threads sums, and the first of its rows and columns."""
    n, across = types.int32(cuda.blockIdx.x), types.int32((types.int32(job.J) + COLS - 1) // COLS)
    return types.int32(cuda.blockIdx.y), types.int32(n // across * rows), types.int32(n % across * COLS)


# --- by lanes --------------------------------------------------------------------------------------------------------
class LanePasses(NamedTuple):
    begin: object
    keep: object
    is_odd: object
    multiply_add: object
    put_sums: object
    write: object


@functools.cache
def lane_passes(v):
    """What `project` is made of."""
    ROWS, CUT, SELECTS = v.threads, v.cut, v.selects
    PITCH, COL_PITCH, HALF, HALF_COLS = ROWS + 4, COLS + 4, ROWS // 2, COLS // 2
    BROUGHT = ROWS * DEPTH // v.threads
    one, put_four, put, widened = gpu.one[v.element], gpu.put_four[v.element], writing(v.element), widen(v.element)
    int32, int64, float32 = types.int32, types.int64, types.float32

    @device
    def begin(job, sums, z, col):
        """The bias, in the first part of K."""
        for b in range(8):
            j = int32(col + b % 4 + b // 4 * HALF_COLS)
            x = one(job.bias, j, job.has_bias != 0 and z == 0 and j < job.J)
            for a in range(8):
                sums[a * 8 + b] = x

    @device
    def keep(tile, n, x, at, step, pitch, by_rows):
        """What was fetched, to the tile, (DEPTH, pitch): by fours where these lie so in it too."""
        for s in range(n):
            four = (x[4 * s], x[4 * s + 1], x[4 * s + 2], x[4 * s + 3])
            if by_rows:
                put_shared(tile, int32(at + s * step), four)
            else:
                for q in range(4):
                    tile[int32(at + s * step + q * pitch)] = x[4 * s + q]

    @device
    def is_odd(x):
        odd = int32(0)
        for n in range(BROUGHT):
            if x[n] - x[n] != 0:
                odd = int32(1)
        return odd

    @device
    def multiply_add(sums, left, at, right, to, spoiled):
        """sums += left[k, rows of this thread] right[k, its columns] of one tile"""
        x = cuda.local.array(8, float32)
        y = cuda.local.array(8, float32)
        for k in range(DEPTH):
            x[0], x[1], x[2], x[3] = shared_four(left, int32(at + k * PITCH))
            x[4], x[5], x[6], x[7] = shared_four(left, int32(at + k * PITCH + HALF))
            y[0], y[1], y[2], y[3] = shared_four(right, int32(to + k * COL_PITCH))
            y[4], y[5], y[6], y[7] = shared_four(right, int32(to + k * COL_PITCH + HALF_COLS))
            if SELECTS and spoiled:
                for a in range(8):
                    for b in range(8):
                        sums[a * 8 + b] += x[a] * y[b] if y[b] != 0 else float32(0)
            else:
                for a in range(8):
                    for b in range(8):
                        sums[a * 8 + b] += x[a] * y[b]

    @device
    def put_sums(job, z, j, total):
        """The sum of column j of right."""
        if CUT:
            job.part_sums[int64(z) * job.line + j] = total
        else:
            if job.adds != 0:
                total += widened(job.sums[j])
            put(job.sums, int64(j), total)

    @device
    def write(job, sums, z, row, col):
        """To where it belongs, four neighbours of a row at once."""
        for half in range(2):
            j = int32(col + half * HALF_COLS)
            if j < job.J:
                to_column = int64(j) if CUT else column_at(job.out, j)
                for a in range(8):
                    i, n = int32(row + a % 4 + a // 4 * HALF), a * 8 + half * 4
                    if i < job.I:
                        if CUT:
                            four = (sums[n], sums[n + 1], sums[n + 2], sums[n + 3])
                            put_four_floats(job.parts, (int64(z) * job.I + i) * job.line + to_column, four)
                        else:
                            at = row_at(job.out, i) + to_column
                            if job.adds != 0:
                                for b in range(4):
                                    sums[n + b] += widened(job.out.data[at + b])
                            put_four(job.out.data, at, (sums[n], sums[n + 1], sums[n + 2], sums[n + 3]))

    return LanePasses(begin, keep, is_odd, multiply_add, put_sums, write)


# Registers: 168 for 3 blocks of 128 threads; 255 for 2, where numbers are read one by one or selected.
@kernel(ProjectionJob, registers=255)
def project(v):
    THREADS, ROWS, SELECTS = v.threads, v.threads, v.selects
    PITCH, COL_PITCH = ROWS + 4, COLS + 4
    TILE, COL_TILE = DEPTH * PITCH, DEPTH * COL_PITCH
    BOTH, COL_BOTH = 2 * TILE, 2 * COL_TILE
    FOURS, COL_FOURS = ROWS * DEPTH // THREADS // 4, COLS * DEPTH // THREADS // 4  # that a thread brings of each
    BROUGHT, COL_BROUGHT = 4 * FOURS, 4 * COL_FOURS
    begin, keep, is_odd, multiply_add, put_sums, write = lane_passes(v)
    fetch, int32, float32 = fetching(v), types.int32, types.float32

    def project_rows(job):
        left = cuda.shared.array(BOTH, float32, 16)
        right = cuda.shared.array(COL_BOTH, float32, 16)
        sums = cuda.local.array(64, float32)
        x = cuda.local.array(BROUGHT, float32)
        y = cuda.local.array(COL_BROUGHT, float32)

        # 1. Rows i0 to i0 + ROWS, columns j0 to j0 + COLS, of part z of K. out begins as the bias.
        t, I, J = int32(cuda.threadIdx.x), int32(job.I), int32(job.J)
        z, i0, j0 = place_of_block(job, ROWS)
        first, last = int32(z * job.part), int32(min(job.K, (z + 1) * job.part))
        mine, other = int32(4 * (t >> 3)), int32(4 * (t & 7))
        begin(job, sums, z, int32(j0 + other))

        # 2. Which fours this thread brings: neighbouring threads those that are neighbours in memory.
        by_rows, col_by_rows = int32(job.left_by_rows), int32(job.right_by_rows)
        i, k, di, dk = int32(t % (ROWS // 4) * 4), int32(t // (ROWS // 4)), int32(0), int32(4)
        if by_rows != 0:
            i, k, di, dk = int32(t >> 2), int32((t & 3) * 4), int32(THREADS // 4), int32(0)
        j, l, dj, dl = int32((t & 15) * 4), int32(t >> 4), int32(0), int32(THREADS // 16)
        if col_by_rows == 0:
            j, l, dj, dl = int32(t >> 2), int32((t & 3) * 4), int32(THREADS // 4), int32(0)
        to, step = int32(k * PITCH + i), int32(dk * PITCH + di)
        col_to, col_step = int32(l * COL_PITCH + j), int32(dl * COL_PITCH + dj)
        fetch(x, FOURS, job.left, int32(i0 + i), int32(first + k), di, dk, by_rows, I, last)
        fetch(y, COL_FOURS, job.right, int32(first + l), int32(j0 + j), dl, dj, col_by_rows, last, J)

        # 3. Along K, two tiles of each in turn.
        now, col_now, total = int32(0), int32(0), float32(0)
        for k0 in range(first, last, DEPTH):
            keep(left, FOURS, x, int32(now + to), step, PITCH, by_rows == 0)
            keep(right, COL_FOURS, y, int32(col_now + col_to), col_step, COL_PITCH, col_by_rows != 0)
            spoiled = False
            if SELECTS:
                spoiled = cuda.syncthreads_or(is_odd(x)) != 0
            else:
                cuda.syncthreads()
            if k0 + DEPTH < last:
                soon = int32(k0 + DEPTH)
                fetch(x, FOURS, job.left, int32(i0 + i), int32(soon + k), di, dk, by_rows, I, last)
                fetch(y, COL_FOURS, job.right, int32(soon + l), int32(j0 + j), dl, dj, col_by_rows, last, J)
            multiply_add(sums, left, int32(now + mine), right, int32(col_now + other), spoiled)
            if job.wants_sums != 0 and i0 == 0 and t < COLS:
                for d in range(DEPTH):
                    total += right[int32(col_now + d * COL_PITCH + t)]
            now, col_now = int32(TILE - now), int32(COL_TILE - col_now)

        # 4. To where it belongs.
        if job.wants_sums != 0 and i0 == 0 and t < COLS and j0 + t < J:
            put_sums(job, z, int32(j0 + t), total)
        write(job, sums, z, int32(i0 + mine), int32(j0 + other))

    return project_rows


# --- parts -----------------------------------------------------------------------------------------------------------
@kernel(ProjectionJob, registers=40)
def join(v):
    """The sums of parts, in their order."""
    put, widened, THREADS = writing(v.element), widen(v.element), v.threads
    int32, int64, float32 = types.int32, types.int64, types.float32

    def join_parts(job):
        n = int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x  # I * line may be more than int32 counts
        line, found, count = job.line, float32(0), int32(job.count)
        i, j = int32(n // line), int32(n % line)
        if i < job.I and j < job.J:
            for z in range(count):
                found += job.parts[int64(z) * job.I * line + n]
            at = row_at(job.out, i) + column_at(job.out, j)
            if job.adds != 0:
                found += widened(job.out.data[at])
            put(job.out.data, at, found)
        if n < job.J and job.wants_sums != 0:
            found = float32(0)
            for z in range(count):
                found += job.part_sums[int64(z) * line + n]
            if job.adds != 0:
                found += widened(job.sums[n])
            put(job.sums, n, found)

    return join_parts
