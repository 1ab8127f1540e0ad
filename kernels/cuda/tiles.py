"""Products of a warp's rows with a tile in shared memory.

A warp owns 16 * tall rows of whatever it makes, spread over its lanes as tensor cores have it. With g = lane // 4,
t = lane % 4, row slot r = 2 * m + half stands for row 16 * m + 8 * half + g, and

    sums[(m * blocks + b) * 4 + 2 * half + e]    row slot 2 * m + half, column 8 * b + 2 * t + e

A tile lies in shared memory row by row, each row padded by 16 bytes: eight rows then lie in different banks.

    times_transposed    sums += rows tile^T      rows of a matrix (queries) with rows of the tile (keys): scores
    times               sums += x tile           x laid out as sums are (probabilities), the tile's rows (values)

The tensor cores round float32; for it, lanes multiply and add one by one, and read the left factor from memory.

Numba's integers are of 64 bits, and NVVM does not know that these are small: what stays in registers is cast to 32.
"""

import functools
from typing import NamedTuple

from numba import cuda, types

from . import instructions as gpu
from .elements import ELEMENTS
from .jit import WARP, device

of_lane, warp_waits = gpu.of_lane, gpu.warp_waits


def pitch(element, width):
    """Elements from one row of a tile to the next."""
    return width + 16 // ELEMENTS[element].itemsize


def held(element, width, tall, hold=True):
    """How many words hold a warp's rows as the tensor cores' left factor; without `hold`, of 16 rows, they are read
    each time."""
    return tall * width // 4 if hold and element != "float32" else 1


def passed(element, tall, columns, threads):
    """How many float32 of shared memory a block needs for `times`: its left factor, all warps'."""
    return threads // WARP * 16 * tall * (columns + 1) if element == "float32" else 1


@device
def cell(r, b, blocks):
    """Where a lane has row slot r of block b, the first of its two columns: the second is behind it."""
    return (r // 2 * blocks + b) * 4 + r % 2 * 2


class Operations(NamedTuple):
    load_rows: object
    times_transposed: object
    times: object
    add_row: object


@functools.cache
def operations(element, width, tall, columns, hold=True):
    """Those of a warp of 16 * tall rows with tiles of `columns` rows of `width` elements."""
    make = _by_lanes if element == "float32" else _by_tensor_cores
    return Operations(*make(element, width, tall, columns, hold), _add_row(element, width, tall, columns))


def _by_tensor_cores(element, width, tall, columns, hold):
    PITCH, STEPS, BLOCKS = pitch(element, width), width // 16, columns // 8
    PAIRS, WIDE = columns // 16, width // 8
    WIDE_PAIRS, int32 = width // 16, types.int32
    multiply_add, pair = ELEMENTS[element].multiply_add, ELEMENTS[element].pair
    address, word, fragments, fragments_transposed = gpu.address, gpu.word, gpu.fragments, gpu.fragments_transposed

    @device
    def left(pointer, at, m, s, D):
        """The left factor's four words of step s, nothing where at[slot] < 0."""
        column, near, far = int32(s * 16 + 2 * (cuda.threadIdx.x & 3)), at[2 * m], at[2 * m + 1]
        a, b, c, d = int32(0), int32(0), int32(0), int32(0)
        if near >= 0 and column < D:
            a = word(pointer, near + column)
        if far >= 0 and column < D:
            b = word(pointer, far + column)
        if near >= 0 and column + 8 < D:
            c = word(pointer, near + column + 8)
        if far >= 0 and column + 8 < D:
            d = word(pointer, far + column + 8)
        return a, b, c, d

    @device
    def load_rows(rows, pointer, at, D):
        """rows = pointer[at[slot] : at[slot] + D] for each row slot"""
        if hold:
            for m in range(tall):
                for s in range(STEPS):
                    i = (m * STEPS + s) * 4
                    rows[i], rows[i + 1], rows[i + 2], rows[i + 3] = left(pointer, at, m, s, D)

    @device
    def times_transposed(sums, rows, tile, offset, pointer, at, D):
        lane = cuda.threadIdx.x & 31
        mine = address(tile, int32(offset + ((lane >> 4) * 8 + (lane & 7)) * PITCH + (lane >> 3 & 1) * 8))
        for s in range(STEPS):
            read = left(pointer, at, 0, s, D) if not hold else (0, 0, 0, 0)
            for p in range(PAIRS):
                f = fragments(mine + 2 * (p * 16 * PITCH + s * 16))
                for m in range(tall):
                    i, j = (m * STEPS + s) * 4, (m * BLOCKS + 2 * p) * 4
                    a = (rows[i], rows[i + 1], rows[i + 2], rows[i + 3]) if hold else read
                    c = multiply_add(a, (f[0], f[1]), (sums[j], sums[j + 1], sums[j + 2], sums[j + 3]))
                    sums[j], sums[j + 1], sums[j + 2], sums[j + 3] = c[0], c[1], c[2], c[3]
                    c = multiply_add(a, (f[2], f[3]), (sums[j + 4], sums[j + 5], sums[j + 6], sums[j + 7]))
                    sums[j + 4], sums[j + 5], sums[j + 6], sums[j + 7] = c[0], c[1], c[2], c[3]

    @device
    def times(sums, x, tile, offset, shared):
        lane = cuda.threadIdx.x & 31
        mine = address(tile, int32(offset + (lane & 15) * PITCH + (lane >> 4) * 8))
        for k in range(PAIRS):
            for p in range(WIDE_PAIRS):
                f = fragments_transposed(mine + 2 * (k * 16 * PITCH + p * 16))
                for m in range(tall):
                    i, j = (m * BLOCKS + 2 * k) * 4, (m * WIDE + 2 * p) * 4
                    a = (
                        pair(x[i], x[i + 1]), pair(x[i + 2], x[i + 3]), pair(x[i + 4], x[i + 5]),
                        pair(x[i + 6], x[i + 7]),
                    )  # fmt: skip
                    c = multiply_add(a, (f[0], f[1]), (sums[j], sums[j + 1], sums[j + 2], sums[j + 3]))
                    sums[j], sums[j + 1], sums[j + 2], sums[j + 3] = c[0], c[1], c[2], c[3]
                    c = multiply_add(a, (f[2], f[3]), (sums[j + 4], sums[j + 5], sums[j + 6], sums[j + 7]))
                    sums[j + 4], sums[j + 5], sums[j + 6], sums[j + 7] = c[0], c[1], c[2], c[3]

    return load_rows, times_transposed, times


def _by_lanes(element, width, tall, columns, hold):
    PITCH, BLOCKS, WIDE, SLOTS = pitch(element, width), columns // 8, width // 8, 2 * tall
    LINE = columns + 1  # of what `times` passes through shared memory
    float32, int32 = types.float32, types.int32

    @device
    def load_rows(rows, pointer, at, D):
        """Nothing: they are read where they are needed."""

    @device
    def times_transposed(sums, rows, tile, offset, pointer, at, D):
        mine = int32(offset + (cuda.threadIdx.x & 3) * 2 * PITCH)
        for k in range(D):
            for r in range(SLOTS):
                x = pointer[at[r] + k] if at[r] >= 0 else float32(0)
                for b in range(BLOCKS):
                    i, there = cell(r, b, BLOCKS), int32(mine + b * 8 * PITCH + k)
                    sums[i] += x * tile[there]
                    sums[i + 1] += x * tile[there + PITCH]

    @device
    def times(sums, x, tile, offset, shared):
        warp, g, t = cuda.threadIdx.x >> 5, (cuda.threadIdx.x & 31) >> 2, cuda.threadIdx.x & 3
        line = int32((warp * 16 * tall + g) * LINE)
        warp_waits()
        for r in range(SLOTS):
            for b in range(BLOCKS):
                for e in range(2):
                    shared[line + r * 8 * LINE + 8 * b + 2 * t + e] = x[cell(r, b, BLOCKS) + e]
        warp_waits()
        for j in range(columns):
            for r in range(SLOTS):
                p = shared[line + r * 8 * LINE + j]
                for c in range(WIDE):
                    i, there = cell(r, c, WIDE), int32(offset + j * PITCH + 8 * c + 2 * t)
                    sums[i] += p * tile[there]
                    sums[i + 1] += p * tile[there + 1]

    return load_rows, times_transposed, times


def _add_row(element, width, tall, columns):
    BLOCKS, WIDE = columns // 8, width // 8
    widened = widen(element)

    @device
    def add_row(sums, x, hidden, j, pointer, at, D):
        """sums += x[:, j] times pointer[at : at + D] in those rows that see column j: see `hidden_bits`"""
        lane = cuda.threadIdx.x & 31
        owner, t = (lane & 28) + (j & 7) // 2, lane & 3
        for r in range(2 * tall):
            p, mark = types.float32(0), types.int32(0)
            for b in range(BLOCKS):
                for e in range(2):
                    i = cell(r, b, BLOCKS) + e
                    if b == j // 8 and e == j % 2:
                        p, mark = x[i], types.int32(hidden >> i & 1)
            p, mark = of_lane(p, owner), of_lane(mark, owner)
            for c in range(WIDE):
                for e in range(2):
                    i, d = cell(r, c, WIDE) + e, 8 * c + 2 * t + e
                    if mark == 0 and d < D:
                        sums[i] += p * widened(pointer[at + d])

    return add_row


@functools.cache
def widen(element):
    """An element of the type as float32."""
    found = ELEMENTS[element].widen
    if found is not None:
        return found

    @device
    def itself(x):
        return x

    return itself


# --- tiles in shared memory ------------------------------------------------------------------------------------------
@functools.cache
def loading(element, width, rows, threads):
    """begin(tile, offset, pointer, at, stride, live, D) begins to copy `rows` rows of D elements, of which `live` are
    there, to tile[offset:]. take_out(tile, offset, odd) clears the rows that hold NaN or infinity and marks them, and
    forget(odd) takes the marks away."""
    PITCH, PER_COPY = pitch(element, width), 16 // ELEMENTS[element].itemsize
    high, low = ELEMENTS[element].exponents
    COPIES = min(width // PER_COPY, threads)  # of a row at once
    ROWS_AT_ONCE, PARTS = threads // COPIES, width // PER_COPY // COPIES
    ROUNDS = -(-rows // ROWS_AT_ONCE)
    WHOLE = rows % ROWS_AT_ONCE == 0
    address, copy, read, int32 = gpu.address, gpu.copy, gpu.read, types.int32

    @device
    def begin(tile, offset, pointer, at, stride, live, D):
        row, column = int32(cuda.threadIdx.x // COPIES), int32(cuda.threadIdx.x % COPIES * PER_COPY)
        to = address(tile, int32(offset + row * PITCH + column))
        source = at + row * stride + column
        for i in range(ROUNDS):
            for p in range(PARTS):
                if WHOLE or row + i * ROWS_AT_ONCE < rows:
                    wanted = row + i * ROWS_AT_ONCE < live and column + p * COPIES * PER_COPY < D
                    moved = (i * ROWS_AT_ONCE * PITCH + p * COPIES * PER_COPY) * 16 // PER_COPY
                    copy(to + moved, pointer, source + p * COPIES * PER_COPY if wanted else at, wanted)
            source += ROWS_AT_ONCE * stride

    @device
    def take_out(tile, offset, odd):
        row, column = int32(cuda.threadIdx.x // COPIES), int32(cuda.threadIdx.x % COPIES * PER_COPY)
        source, found = address(tile, int32(offset + row * PITCH + column)), int32(0)
        for i in range(ROUNDS):
            for p in range(PARTS):
                if WHOLE or row + i * ROWS_AT_ONCE < rows:
                    words = read(source + (i * ROWS_AT_ONCE * PITCH + p * COPIES * PER_COPY) * 16 // PER_COPY)
                    for w in range(4):
                        if words[w] & high == high or words[w] & low == low:
                            odd[row + i * ROWS_AT_ONCE], found = 1, int32(1)
        if cuda.syncthreads_or(found) == 0:
            return False
        for n in range(cuda.threadIdx.x, rows * width, threads):
            if odd[n // width] != 0:
                tile[offset + n // width * PITCH + n % width] = 0
        cuda.syncthreads()
        return True

    @device
    def forget(odd):
        """No row is odd: must be said before the first and after each tile that had some."""
        cuda.syncthreads()
        for n in range(cuda.threadIdx.x, rows, threads):
            odd[n] = 0
        cuda.syncthreads()

    return begin, take_out, forget


@functools.cache
def storing(element):
    """put(pointer, index, low, high): two neighbours, rounded to the element."""
    pair, put_word = ELEMENTS[element].pair, gpu.put_word

    @device
    def put_pair(pointer, index, low, high):
        put_word(pointer, index, pair(low, high))

    @device
    def put_floats(pointer, index, low, high):
        pointer[index] = low
        pointer[index + 1] = high

    return put_floats if pair is None else put_pair
