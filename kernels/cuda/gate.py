"""The gate of a graph transformer: g = sigmoid(w . [o, r, o - r]) weighs the root's r against attention's o.

out = g r + (1 - g) o            a warp for a row
"""

from typing import NamedTuple

import numpy as np
from numba import cuda, types

from . import instructions as gpu
from .jit import NOWHERE, WARP, Elements, Floats, kernel
from .projection import writing
from .scoring import LOG2E
from .tiles import widen
from .warps import adding

exp2, joined = gpu.exp2, adding()


class GateJob(NamedTuple):
    N: int
    C: int
    output: Elements  # (N, C), as root: o and r
    root: Elements
    weight: Elements  # (3, C)
    gate: Floats  # (N)
    # forward
    out: Elements = NOWHERE  # (N, C)
    # backward
    grad: Elements = NOWHERE  # (N, C): of out
    doutput: Elements = NOWHERE
    droot: Elements = NOWHERE
    dgate: Elements = NOWHERE  # (N): of w . [o, r, o - r]


@kernel(GateJob, registers=64)
def forward(v):
    WARPS, put, widened = v.threads // WARP, writing(v.element), widen(v.element)
    int32, int64, float32, one = types.int32, types.int64, types.float32, np.float32(1)

    def weigh(job):
        t, C = int32(cuda.threadIdx.x), int32(job.C)
        row, lane, z = int64(cuda.blockIdx.x) * WARPS + (t >> 5), t & 31, float32(0)
        if row < job.N:
            for c in range(lane, C, WARP):
                o, r = widened(job.output[row * C + c]), widened(job.root[row * C + c])
                z += o * widened(job.weight[c]) + r * widened(job.weight[C + c])
                z += (o - r) * widened(job.weight[2 * C + c])
            z = joined(z)
            g = one / (one + exp2(z * float32(-LOG2E)))
            for c in range(lane, C, WARP):
                o, r = widened(job.output[row * C + c]), widened(job.root[row * C + c])
                put(job.out, row * C + c, g * r + (one - g) * o)
            if lane == 0:
                job.gate[row] = g

    return weigh


@kernel(GateJob, registers=64)
def backward(v):
    WARPS, put, widened = v.threads // WARP, writing(v.element), widen(v.element)
    int32, int64, float32, one = types.int32, types.int64, types.float32, np.float32(1)

    def weigh_back(job):
        t, C = int32(cuda.threadIdx.x), int32(job.C)
        row, lane, d = int64(cuda.blockIdx.x) * WARPS + (t >> 5), t & 31, float32(0)
        if row < job.N:
            for c in range(lane, C, WARP):
                o, r = widened(job.output[row * C + c]), widened(job.root[row * C + c])
                d += widened(job.grad[row * C + c]) * (r - o)
            d = joined(d)
            g = job.gate[row]
            d *= g * (one - g)
            for c in range(lane, C, WARP):
                x, w = widened(job.grad[row * C + c]), widened(job.weight[2 * C + c])
                put(job.doutput, row * C + c, (one - g) * x + d * (widened(job.weight[c]) + w))
                put(job.droot, row * C + c, g * x + d * (widened(job.weight[C + c]) - w))
            if lane == 0:
                put(job.dgate, row, d)

    return weigh_back
