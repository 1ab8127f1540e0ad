"""Rows of float16 and bfloat16 to float32, and float32 to them: where that is not done on the way.

    stored, plain (matrices) x (L, D)        a task takes `rows` rows of one matrix

The loops of products read keys and values over and over, once for each block of queries. Where the CPU has no
instruction for products of halves they would widen every number as often, and one broadcast costs more than the
multiply-adds that it serves: bfloat16 fell to 70 % of the speed of float32, float16 to 40 %. Widened once for a call,
keys and values cost 5 % of it at 128 queries, and the less the more there are.
"""

from typing import NamedTuple

from .jit import kernel
from .tiles import Matrices, StoredMatrices, copy_rows, matrix


class CopyJob(NamedTuple):
    stored: StoredMatrices
    plain: Matrices
    L: int
    D: int
    rows: int


@kernel
def widen(job: CopyJob, slot, task):
    pieces = (job.L + job.rows - 1) // job.rows
    i, first = task // pieces, task % pieces * job.rows
    copy_rows(matrix(job.plain, i, first), matrix(job.stored, i, first), min(job.rows, job.L - first), job.D)


@kernel
def round_off(job: CopyJob, slot, task):
    pieces = (job.L + job.rows - 1) // job.rows
    i, first = task // pieces, task % pieces * job.rows
    copy_rows(matrix(job.stored, i, first), matrix(job.plain, i, first), min(job.rows, job.L - first), job.D)
