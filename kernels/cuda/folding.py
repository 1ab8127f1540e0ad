"""GAT's edge attributes add (att . weight) attr to a score; here are the gradients of the two that are folded."""

from typing import NamedTuple

from numba import cuda, types

from .jit import Elements, kernel
from .projection import writing
from .tiles import widen


class FoldJob(NamedTuple):
    grad: Elements  # (H, D): of att . weight, which is the sum over c of att[h, c] * weight[h, c, d]
    att: Elements  # (H, C)
    weight: Elements  # (H, C, D)
    datt: Elements
    dweight: Elements
    C: int
    D: int
    rows: int  # H * C


@kernel(FoldJob, registers=64)
def fold_back(v):
    """A thread for each head and channel."""
    widened, put, THREADS = widen(v.element), writing(v.element), v.threads
    int64, float32 = types.int64, types.float32

    def fold_gradients(job):
        row, found = int64(cuda.blockIdx.x * THREADS + cuda.threadIdx.x), float32(0)
        if row < job.rows:
            head, a = row // job.C, widened(job.att[row])
            for d in range(job.D):
                g = widened(job.grad[head * job.D + d])
                found += g * widened(job.weight[row * job.D + d])
                put(job.dweight, row * job.D + d, g * a)
            put(job.datt, row, found)

    return fold_gradients
