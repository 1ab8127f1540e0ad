"""Rows laid out as the tensor kernels want them: each beginning on 16 bytes, its elements side by side."""

from typing import NamedTuple

from numba import cuda

from .elements import STORAGE
from .jit import Elements, Indices, kernel


class CopyJob(NamedTuple):
    source: Elements
    at: Indices  # where each matrix of the source begins
    row: int
    col: int
    copy: Elements  # (matrices, rows, width), zeros from `columns` on
    rows: int
    columns: int
    width: int
    blocks: int  # of threads, for each matrix


class Variant(NamedTuple):
    element: str
    threads: int
    resident: int = 1
    inverted: bool = False  # 1 for 0, 0 for all else: bools that hide become bools that attend


@kernel(CopyJob, registers=40)
def pack(v):
    THREADS, INVERTED, STORED, zero = v.threads, v.inverted, STORAGE[v.element], STORAGE[v.element](0)

    def copy_rows(job):
        matrix, block = cuda.blockIdx.x // job.blocks, cuda.blockIdx.x % job.blocks
        for n in range(block * THREADS + cuda.threadIdx.x, job.rows * job.width, job.blocks * THREADS):
            row, column = n // job.width, n % job.width
            x = zero
            if column < job.columns:
                x = job.source[job.at[matrix] + row * job.row + column * job.col]
                if INVERTED:
                    x = STORED(x == zero)
            job.copy[matrix * job.rows * job.width + n] = x

    return copy_rows


class FillJob(NamedTuple):
    data: Elements
    count: int
    value: float


@kernel(FillJob, registers=32)
def fill(v):
    """data[:] = value, which is 0 where elements have 16 bits"""
    THREADS, STORED = v.threads, STORAGE[v.element]

    def fill_with(job):
        for n in range(cuda.blockIdx.x * THREADS + cuda.threadIdx.x, job.count, cuda.gridDim.x * THREADS):
            job.data[n] = STORED(job.value)

    return fill_with
