"""What has an entry for each pair of a query and a key: the weights, and the gradient of a bias. Made on demand, in
float32 and one product at a time: the twin of the CPU's pairs.py, and no faster than it must be.
"""

import functools
from typing import NamedTuple

from numba import cuda, types

from . import instructions as gpu
from .blocks import INF, GradientJob, dealt
from .jit import NOWHERE, WARP, Floats, Indices, device, kernel
from .scoring import dice, kept, scoring, sees_from, sees_to
from .tiles import widen
from .warps import adding

exp2 = gpu.exp2


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


class Parts(NamedTuple):
    product: object
    score: object
    weight: object


@functools.cache
def parts(v):
    """product(x, i, y, j, head, n): of row i of x and row j of y, n numbers each.
    score(a, head, i, j): in base 2, -inf where query i does not see key j. weight(a, head, i, s): p from it."""
    widened, SLOPES = widen(v.element), v.slopes
    finish, _ = scoring(v.element, v.softcap, v.slopes, v.bias, v.mask)
    float32 = types.float32

    @device
    def product(x, i, y, j, head, n):
        x_at, y_at, found = x.at[head] + i * x.row, y.at[head] + j * y.row, float32(0)
        for d in range(n):
            found += widened(x.data[x_at + d]) * widened(y.data[y_at + d])
        return found

    @device
    def score(a, head, i, j):
        batch = head // a.H
        if j < sees_from(a.sight, batch, i) or j >= sees_to(a.sight, batch, i):
            return float32(-INF)
        slope = a.terms.slopes[head] if SLOPES else float32(0)
        return finish(a.terms, product(a.query, i, a.key, j, head, a.D), slope, head, i, j, True)

    @device
    def weight(a, head, i, s):
        where = head * a.Lq + i
        return exp2(s - a.shift[where]) * a.inverse[where] if s != -INF else float32(0)

    return Parts(product, score, weight)


@kernel(PairJob, registers=64)
def weights(v):
    """out[m, n, j] = the mean p of query rows[n] and key j over the m-th so many heads"""
    THREADS, (_, score, weight) = v.threads, parts(v)
    int32, float32 = types.int32, types.float32

    def attention_weights(job):
        a, (row, block) = job.attention, dealt(job.attention.Lk, THREADS)
        m, n = row // job.count, row % job.count
        j, i = int32(block * THREADS + cuda.threadIdx.x), int32(job.rows[n])
        if j < a.Lk:
            total = float32(0)
            for h in range(job.averaged):
                head = int32(m * job.averaged + h)
                total += weight(a, head, i, score(a, head, i, j))
            job.out[(m * job.count + n) * a.Lk + j] = total / float32(job.averaged)

    return attention_weights


@kernel(PairJob, registers=112)
def bias_gradient(v):
    """out[m, r, c] = the sum of ds over the heads of matrix m, and over the queries or keys where it has one row or
    column: a warp has one entry."""
    DROPOUT, WARPS, (product, score, weight), joined = v.dropout, v.threads // WARP, parts(v), adding()
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
                s = score(a, head, i, j)
                if s != -INF:
                    dp = product(a.grad_output, i, a.value, j, head, a.Dv)
                    if DROPOUT:
                        keep = kept(dice(a.terms.seed, head, i), j, a.terms.threshold)
                        dp = dp * float32(a.terms.gain) if keep else float32(0)
                    found += weight(a, head, i, s) * (dp - a.delta[head * a.Lq + i])
            found = joined(found)
            if cuda.threadIdx.x & 31 == 0:
                job.out[(matrix * job.R + r) * job.C + c] = found

    return gradient_of_bias
