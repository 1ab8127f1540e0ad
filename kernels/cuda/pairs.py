"""What has an entry for each pair of a query and a key: the weights, and the gradient of a bias. Made on demand, in
float32 and one product at a time: the twin of the CPU's pairs.py, and no faster than it must be.
"""

from typing import NamedTuple

from numba import cuda, types

from . import instructions as gpu
from .blocks import INF, GradientJob, dealt
from .jit import NOWHERE, WARP, Floats, Indices, device, kernel
from .scoring import dice, kept, scoring, sees_from, sees_to
from .tiles import widen

across, exp2 = gpu.across, gpu.exp2


class PairJob(NamedTuple):
    """`attention` tells of scores and of what the forward pass kept, its delta of the backward pass."""

    attention: GradientJob
    out: Floats
    # weights
    rows: Indices = NOWHERE  # which queries
    count: int = 0  # how many of them
    averaged: int = 1  # over so many heads
    # gradient of a bias, whose matrix m belongs to the heads members[begins[m] : begins[m + 1]]
    begins: Indices = NOWHERE
    members: Indices = NOWHERE
    R: int = 0  # rows and columns of a matrix: Lq or 1, Lk or 1
    C: int = 0


@kernel(PairJob, registers=64)
def weights(v):
    """out[m, n, j] = the mean p of query rows[n] and key j over the m-th so many heads"""
    widened, SLOPES, THREADS = widen(v.element), v.slopes, v.threads
    score, _ = scoring(v.element, v.softcap, v.slopes, v.bias, v.mask)
    int32, float32 = types.int32, types.float32

    @device
    def weight(a, head, i, j):
        batch = head // a.H
        if j < sees_from(a.sight, batch, i) or j >= sees_to(a.sight, batch, i):
            return float32(0)
        q_at, k_at, s = a.query.at[head] + i * a.query.row, a.key.at[head] + j * a.key.row, float32(0)
        for d in range(a.D):
            s += widened(a.query.data[q_at + d]) * widened(a.key.data[k_at + d])
        slope = a.terms.slopes[head] if SLOPES else float32(0)
        s = score(a.terms, s, slope, head, i, j, True)
        where = head * a.Lq + i
        return exp2(s - a.shift[where]) * a.inverse[where] if s != -INF else float32(0)

    def attention_weights(job):
        a, (row, block) = job.attention, dealt(job.attention.Lk, THREADS)
        m, n = row // job.count, row % job.count
        j, i = int32(block * THREADS + cuda.threadIdx.x), int32(job.rows[n])
        if j < a.Lk:
            total = float32(0)
            for h in range(job.averaged):
                total += weight(a, int32(m * job.averaged + h), i, j)
            job.out[(m * job.count + n) * a.Lk + j] = total / float32(job.averaged)

    return attention_weights


@kernel(PairJob, registers=112)
def bias_gradient(v):
    """out[m, r, c] = the sum of ds over the heads of matrix m, and over the queries or keys where it has one row or
    column: a warp has one entry."""
    widened, SLOPES, DROPOUT, WARPS = widen(v.element), v.slopes, v.dropout, v.threads // WARP
    score, _ = scoring(v.element, v.softcap, v.slopes, v.bias, v.mask)
    int32, float32 = types.int32, types.float32

    def gradient_of_bias(job):
        a, (matrix, block) = job.attention, dealt(job.R * job.C, WARPS)
        entry = block * WARPS + (cuda.threadIdx.x >> 5)
        if entry < job.R * job.C:
            r, c = entry // job.C, entry % job.C
            rows, columns = a.Lq if job.R == 1 else 1, a.Lk if job.C == 1 else 1
            first, heads = job.begins[matrix], job.begins[matrix + 1] - job.begins[matrix]
            found = float32(0)
            for n in range(cuda.threadIdx.x & 31, heads * rows * columns, WARP):
                head = job.members[first + n // (rows * columns)]
                i, j = int32(r + n // columns % rows), int32(c + n % columns)
                batch = head // a.H
                if sees_from(a.sight, batch, i) <= j and j < sees_to(a.sight, batch, i):
                    q_at, k_at, s = a.query.at[head] + i * a.query.row, a.key.at[head] + j * a.key.row, float32(0)
                    for d in range(a.D):
                        s += widened(a.query.data[q_at + d]) * widened(a.key.data[k_at + d])
                    slope = a.terms.slopes[head] if SLOPES else float32(0)
                    s = score(a.terms, s, slope, head, i, j, True)
                    if s != -INF:
                        g_at, v_at, dp = (
                            a.grad_output.at[head] + i * a.grad_output.row,
                            a.value.at[head] + j * a.value.row,
                            float32(0),
                        )
                        for d in range(a.Dv):
                            dp += widened(a.grad_output.data[g_at + d]) * widened(a.value.data[v_at + d])
                        if DROPOUT:
                            keep = kept(dice(a.terms.seed, head, i), j, a.terms.threshold)
                            dp = dp * float32(a.terms.gain) if keep else float32(0)
                        where = head * a.Lq + i
                        found += exp2(s - a.shift[where]) * a.inverse[where] * (dp - a.delta[where])
            for distance in (1, 2, 4, 8, 16):
                found += across(found, distance)
            if cuda.threadIdx.x & 31 == 0:
                job.out[(matrix * job.R + r) * job.C + c] = found

    return gradient_of_bias
