"""Rows that lie anywhere, read and written by the lanes of a group: the twin of the CPU's gather.py. See walk.py.

x is an array in registers; what a lane holds of a row begins at x[base].
"""

import functools
from typing import NamedTuple

from numba import cuda, types

from . import instructions as gpu
from .jit import device
from .projection import writing
from .tiles import widen


class Gather(NamedTuple):
    take: object
    put: object
    add: object
    leave: object
    fetch: object


@functools.cache
def gathering(v):
    """take(x, base, rows, node, head, sub, C, there): x = rows[node, head], 0 where there is none.
    put(rows, node, head, sub, C, x, base, there): the other way; add(...): x += what lies there, which this lane wrote.
    fetch(x, partial, at, sub), leave(partial, at, sub, x): a row of `partial`, which begins at `at`."""
    FOURS, LANES, WIDE = v.fours, v.lanes, v.wide
    four, one, put_four = gpu.four[v.element], gpu.one[v.element], gpu.put_four[v.element]
    four_floats, put_floats, put_one = gpu.four["float32"], gpu.put_four["float32"], writing(v.element)
    widened, int32, int64 = widen(v.element), types.int32, types.int64

    @device
    def take(x, base, rows, node, head, sub, C, there):
        for r in range(FOURS):
            c, n = int32(4 * (r * LANES + sub)), base + 4 * r
            at = int64(node) * rows.step + int64(head * C + c)
            if WIDE:
                x[n], x[n + 1], x[n + 2], x[n + 3] = four(rows.data, at, there and c < C)
            else:
                for q in range(4):
                    x[n + q] = one(rows.data, at + q, there and c + q < C)

    @device
    def put(rows, node, head, sub, C, x, base, there):
        for r in range(FOURS):
            c, n = int32(4 * (r * LANES + sub)), base + 4 * r
            at = int64(node) * rows.step + int64(head * C + c)
            if WIDE:
                if there and c < C:
                    put_four(rows.data, at, (x[n], x[n + 1], x[n + 2], x[n + 3]))
            else:
                for q in range(4):
                    if there and c + q < C:
                        put_one(rows.data, at + q, x[n + q])

    @device
    def add(rows, node, head, sub, C, x, base, there):
        for r in range(FOURS):
            for q in range(4):
                c = int32(4 * (r * LANES + sub) + q)
                if there and c < C:
                    x[base + 4 * r + q] += widened(rows.data[int64(node) * rows.step + int64(head * C + c)])

    @device
    def fetch(x, partial, at, sub):
        for r in range(FOURS):
            n = 4 * r
            x[n], x[n + 1], x[n + 2], x[n + 3] = four_floats(partial, at + 4 * (r * LANES + sub), True)

    @device
    def leave(partial, at, sub, x):
        for r in range(FOURS):
            n = 4 * r
            put_floats(partial, at + 4 * (r * LANES + sub), (x[n], x[n + 1], x[n + 2], x[n + 3]))

    return Gather(take, put, add, leave, fetch)


@functools.cache
def totals(v):
    """give(shared, x, job): what the lanes of a block's groups have summed, added up over the groups in their
    order, and left as one row of `sums`."""
    GROUPS, GROUP, LANES, HEADS, WIDTH = v.groups, v.group, v.lanes, v.heads, v.width
    int32, int64, float32 = types.int32, types.int64, types.float32

    @device
    def give(shared, x, job):
        t = int32(cuda.threadIdx.x)
        for n in range(WIDTH):
            shared[int32(t * WIDTH + n)] = x[n]
        cuda.syncthreads()
        if t < GROUP:
            head, sub = int32(int32(cuda.blockIdx.y) * HEADS + t // LANES), int32(t % LANES)
            row = int64(cuda.blockIdx.x) + job.sums_from
            for n in range(WIDTH):
                total, c = float32(0), int32(4 * (n // 4 * LANES + sub) + n % 4)
                for g in range(GROUPS):
                    total += shared[int32((g * GROUP + t) * WIDTH + n)]
                if head < job.H and c < job.C:
                    job.sums[(row * job.H + head) * job.C + c] = total
        cuda.syncthreads()

    return give
