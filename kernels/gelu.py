"""GELU (Hendrycks and Gimpel, 2016): y = x Phi(x), where Phi(x), the share of the normal distribution below x, is
erfc(-x / sqrt(2)) / 2. Of each number alone, in double precision, and exactly: not the approximation by tanh.
"""

import math
from typing import NamedTuple

import numpy as np

from .jit import inline, kernel
from .jobs import Elements

SQRT_HALF = math.sqrt(0.5)
DENSITY = 1 / math.sqrt(2 * math.pi)


class GeluJob(NamedTuple):
    x: Elements
    grad: Elements  # of backward: dy
    out: Elements  # y, or backward dx
    size: int
    chunk: int  # of one task


@inline
def below(x):
    """Phi(x); by erfc, 1 + erf would have no digits left where x is low"""
    return 0.5 * math.erfc(-SQRT_HALF * x)


@kernel
def forward(job: GeluJob, slot, task):
    # task -> some numbers
    for i in range(task * job.chunk, min(job.size, (task + 1) * job.chunk)):
        x = np.float64(job.x[i])
        job.out[i] = x * below(x)


@kernel
def backward(job: GeluJob, slot, task):
    # task -> some numbers
    for i in range(task * job.chunk, min(job.size, (task + 1) * job.chunk)):
        x = np.float64(job.x[i])
        job.out[i] = np.float64(job.grad[i]) * (below(x) + x * DENSITY * math.exp(-0.5 * x * x))
