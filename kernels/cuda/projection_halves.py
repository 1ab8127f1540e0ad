"""Linear projections on a GPU, of 16 bits that lie in aligned eights: by tensor cores, each warp 32 rows, 32 of K at a
time as they lie. The rest is projection.py's.
"""

import functools
from typing import NamedTuple

from numba import cuda, types

from . import instructions as gpu
from .elements import ELEMENTS, STORAGE
from .jit import device, kernel
from .projection import COLS, ProjectionJob, column_at, lane_passes, place_of_block, row_at
from .tiles import cell, storing, widen

STEP = 32  # of K at a time


class TilePitches(NamedTuple):
    """How tiles of left and of right lie in shared memory: numbers from line to line, and lines."""

    left: int
    lines: int
    right: int
    right_lines: int


def pitches(v):
    left = (STEP + 8, v.threads) if v.left_rows else (v.threads + 8, STEP)
    right = (COLS + 8, STEP) if v.right_rows else (STEP + 8, COLS)
    return TilePitches(*left, *right)


class TensorPasses(NamedTuple):
    begin: object
    fetch: object
    add_column: object
    select: object
    add_products: object
    finish: object


@functools.cache
def tensor_passes(v):
    """What `project_halves` is made of."""
    ROWS, CUT, LEFT_ROWS, RIGHT_ROWS = v.threads, v.cut, v.left_rows, v.right_rows
    PITCH, LINES, COL_PITCH, _ = pitches(v)
    STORED, PAIRED = STORAGE[v.element], v.paired
    multiply_add, widened = ELEMENTS[v.element].multiply_add, widen(v.element)
    put_pair, one = storing(v.element), gpu.one[v.element]
    address, copy, read = gpu.address, gpu.copy, gpu.read
    HIGH, LOW = ELEMENTS[v.element].exponents
    left_fragments = gpu.fragments if v.left_rows else gpu.fragments_transposed
    right_fragments = gpu.fragments_transposed if v.right_rows else gpu.fragments
    int32, int64 = types.int32, types.int64

    @device
    def begin(job, sums, z, col):
        """The bias, in the first part of K."""
        for b in range(8):
            for e in range(2):
                j = int32(col + 8 * b + e)
                x = one(job.bias, j, job.has_bias != 0 and z == 0 and j < job.J)
                for m in range(2):
                    sums[(m * 8 + b) * 4 + e] = x
                    sums[(m * 8 + b) * 4 + 2 + e] = x

    @device
    def fetch(tile, offset, pitch, lines, m, row0, col0, by_rows, last_row, last_col):
        """Begin to copy lines of the tile, which are rows of m or columns, eight numbers at a time."""
        t, eights = int32(cuda.threadIdx.x), int32((pitch - 8) // 8)
        for p in range(lines * (pitch - 8) // 8 // ROWS):
            line, c = int32((t + p * ROWS) // eights), int32((t + p * ROWS) % eights * 8)
            row, col = (row0 + line, col0 + c) if by_rows else (row0 + c, col0 + line)
            wanted, at = row < last_row and col < last_col, int64(0)
            if wanted and PAIRED:
                at = row_at(m, row) + column_at(m, col)
            elif wanted:
                at = int64(row) * m.row + int64(col) * m.col
            copy(address(tile, int32(offset + line * pitch + c)), m.data, at, wanted)

    @device
    def add_column(total, right, col_now, j):
        """With the sum of column j of a tile."""
        for k in range(STEP):
            total += widened(right[int32(col_now + (k * COL_PITCH + j if RIGHT_ROWS else j * COL_PITCH + k))])
        return total

    @device
    def leave_out(left, now, right, col_now):
        """Where a row of right is 0, so is the column of left: nobody saw it, and it may be NaN."""
        k, some = int32(cuda.threadIdx.x), False
        if k < STEP:
            for j in range(COLS):
                some |= widened(right[int32(col_now + (k * COL_PITCH + j if RIGHT_ROWS else j * COL_PITCH + k))]) != 0
            if not some:
                for i in range(ROWS):
                    left[int32(now + (i * PITCH + k if LEFT_ROWS else k * PITCH + i))] = STORED(0)
        cuda.syncthreads()

    @device
    def is_odd(left, now):
        """Does what this thread brought of left hold NaN or infinity?"""
        t, eights, found = int32(cuda.threadIdx.x), int32((PITCH - 8) // 8), int32(0)
        for p in range(LINES * (PITCH - 8) // 8 // ROWS):
            line, c = int32((t + p * ROWS) // eights), int32((t + p * ROWS) % eights * 8)
            words = read(address(left, int32(now + line * PITCH + c)))
            for w in range(4):
                if words[w] & HIGH == HIGH or words[w] & LOW == LOW:
                    found = int32(1)
        return found

    @device
    def select(left, now, right, col_now):
        if cuda.syncthreads_or(is_odd(left, now)) != 0:
            leave_out(left, now, right, col_now)

    @device
    def add_products(sums, left, now, right, col_now):
        """sums += left right of one tile: this warp's 32 rows, fragments as tiles.py and PTX have them"""
        lane, warp = int32(cuda.threadIdx.x & 31), int32(cuda.threadIdx.x >> 5)
        q, r = int32(lane >> 3), int32(lane & 7)
        a = cuda.local.array(8, int32)
        for s in range(STEP // 16):
            for m in range(2):
                i, k = int32(warp * 32 + m * 16 + r + (q & 1) * 8), int32(s * 16 + (q >> 1) * 8)
                if not LEFT_ROWS:
                    i, k = int32(warp * 32 + m * 16 + (q & 1) * 8), int32(s * 16 + r + (q >> 1) * 8)
                there = now + (i * PITCH + k if LEFT_ROWS else k * PITCH + i)
                a[4 * m], a[4 * m + 1], a[4 * m + 2], a[4 * m + 3] = left_fragments(address(left, int32(there)))
            for p in range(COLS // 16):
                k, j = int32(s * 16 + r + (q & 1) * 8), int32(p * 16 + (q >> 1) * 8)
                if not RIGHT_ROWS:
                    k, j = int32(s * 16 + (q & 1) * 8), int32(p * 16 + r + (q >> 1) * 8)
                there = col_now + (k * COL_PITCH + j if RIGHT_ROWS else j * COL_PITCH + k)
                f = right_fragments(address(right, int32(there)))
                for m in range(2):
                    x, n = (a[4 * m], a[4 * m + 1], a[4 * m + 2], a[4 * m + 3]), (m * 8 + 2 * p) * 4
                    c = multiply_add(x, (f[0], f[1]), (sums[n], sums[n + 1], sums[n + 2], sums[n + 3]))
                    sums[n], sums[n + 1], sums[n + 2], sums[n + 3] = c[0], c[1], c[2], c[3]
                    c = multiply_add(x, (f[2], f[3]), (sums[n + 4], sums[n + 5], sums[n + 6], sums[n + 7]))
                    sums[n + 4], sums[n + 5], sums[n + 6], sums[n + 7] = c[0], c[1], c[2], c[3]

    @device
    def finish(job, z, row, col, sums):
        """To where it belongs, two neighbours of a row at once."""
        rows = cuda.local.array(4, int64)
        cols = cuda.local.array(8, int64)
        for r in range(4):
            i = int32(row + 8 * r)
            rows[r] = -1
            if i < job.I:
                rows[r] = (int64(z) * job.I + i) * job.line if CUT else row_at(job.out, i)
        for b in range(8):
            j = int32(col + 8 * b)
            cols[b] = -1
            if j < job.J:
                cols[b] = int64(j) if CUT else column_at(job.out, j)
        if job.adds != 0 and not CUT:
            for r in range(4):
                for b in range(8):
                    if rows[r] >= 0 and cols[b] >= 0:
                        n, at = cell(r, b, 8), rows[r] + cols[b]
                        sums[n] += widened(job.out.data[at])
                        sums[n + 1] += widened(job.out.data[at + 1])
        for r in range(4):
            for b in range(8):
                if rows[r] >= 0 and cols[b] >= 0:
                    n, at = cell(r, b, 8), rows[r] + cols[b]
                    if CUT:
                        job.parts[at], job.parts[at + 1] = sums[n], sums[n + 1]
                    else:
                        put_pair(job.out.data, at, sums[n], sums[n + 1])

    return TensorPasses(begin, fetch, add_column, select, add_products, finish)


@kernel(ProjectionJob, registers=255)
def project_halves(v):
    ROWS, SELECTS, LEFT_ROWS, RIGHT_ROWS = v.threads, v.selects, v.left_rows, v.right_rows
    PITCH, LINES, COL_PITCH, COL_LINES = pitches(v)
    TILE, COL_TILE = LINES * PITCH, COL_LINES * COL_PITCH
    BOTH, COL_BOTH, STORED = 2 * TILE, 2 * COL_TILE, STORAGE[v.element]
    begin, fetch, add_column, select, add_products, finish = tensor_passes(v)
    commit, wait_for_all, put_sums = gpu.commit, gpu.wait_for_all, lane_passes(v).put_sums
    int32, float32 = types.int32, types.float32

    def project_by_tensor_cores(job):
        left = cuda.shared.array(BOTH, STORED, 16)
        right = cuda.shared.array(COL_BOTH, STORED, 16)
        sums = cuda.local.array(64, float32)

        # 1. Rows i0 to i0 + ROWS, columns j0 to j0 + COLS, of part z of K. out begins as the bias.
        t, I, J = int32(cuda.threadIdx.x), int32(job.I), int32(job.J)
        z, i0, j0 = place_of_block(job, ROWS)
        first, last = int32(z * job.part), int32(min(job.K, (z + 1) * job.part))
        row, col = int32(i0 + (t >> 5) * 32 + ((t & 31) >> 2)), int32(j0 + 2 * (t & 3))
        begin(job, sums, z, col)

        # 2. Along K: a tile of each is multiplied while the next arrives.
        now, col_now, total = int32(0), int32(0), float32(0)
        fetch(left, 0, PITCH, LINES, job.left, i0, first, LEFT_ROWS, I, last)
        fetch(right, 0, COL_PITCH, COL_LINES, job.right, first, j0, RIGHT_ROWS, last, J)
        commit()
        for k0 in range(first, last, STEP):
            wait_for_all()
            cuda.syncthreads()
            if k0 + STEP < last:
                soon = int32(k0 + STEP)
                fetch(left, int32(TILE - now), PITCH, LINES, job.left, i0, soon, LEFT_ROWS, I, last)
                fetch(right, int32(COL_TILE - col_now), COL_PITCH, COL_LINES, job.right, soon, j0, RIGHT_ROWS, last, J)
            commit()
            if job.wants_sums != 0 and i0 == 0 and t < COLS:
                total = add_column(total, right, col_now, t)
            if SELECTS:
                select(left, now, right, col_now)
            add_products(sums, left, now, right, col_now)
            now, col_now = int32(TILE - now), int32(COL_TILE - col_now)

        # 3. To where it belongs.
        if job.wants_sums != 0 and i0 == 0 and t < COLS and j0 + t < J:
            put_sums(job, z, int32(j0 + t), total)
        finish(job, z, row, col, sums)

    return project_by_tensor_cores
