"""Sums of what groups of lanes have left, in one order: of rows, and of heads."""

from typing import NamedTuple

from numba import cuda, types

from .jit import WARP, Elements, Floats, kernel
from .projection import writing


class SumJob(NamedTuple):
    sums: Floats  # (rows, columns)
    out: Elements  # (columns)
    rows: int
    columns: int


@kernel(SumJob, registers=40)
def add_up(v):
    """out = the sum of all rows: those of each warp, and then the warps', in their order"""
    THREADS, WARPS, write = v.threads, v.threads // WARP, writing(v.element)
    int32, int64, float32 = types.int32, types.int64, types.float32

    def add_rows(job):
        shared = cuda.shared.array(THREADS, float32)
        t = int32(cuda.threadIdx.x)
        column, found = int32(int32(cuda.blockIdx.x) * WARP + (t & 31)), float32(0)
        if column < job.columns:
            for row in range(t >> 5, job.rows, WARPS):
                found += job.sums[int64(row) * job.columns + column]
        shared[t] = found
        cuda.syncthreads()
        if t < WARP and column < job.columns:
            found = float32(0)
            for warp in range(WARPS):
                found += shared[int32(warp * WARP + t)]
            write(job.out, int64(column), found)

    return add_rows


class HeadsJob(NamedTuple):
    numbers: Floats  # (E, H)
    out: Elements  # (E)
    E: int
    H: int


@kernel(HeadsJob, registers=48)
def add_heads(v):
    """out = the sum over heads"""
    THREADS, write = v.threads, writing(v.element)

    def add_numbers(job):
        e = types.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        if e < job.E:
            found = types.float32(0)
            for h in range(job.H):
                found += job.numbers[e * job.H + h]
            write(job.out, e, found)

    return add_numbers
