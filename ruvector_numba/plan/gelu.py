"""GELU: from arrays of any shape to jobs of kernels/gelu.py, which it runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import Array
from ..kernels import gelu as kernels
from . import memory
from .layouts import NOTHING

__all__ = ["backward", "forward"]

CHUNK = 1 << 13  # numbers of one task
WORK = 60  # what a number costs, in multiply-adds


def forward(x: Array) -> Array:
    return _run(kernels.forward, x, NOTHING)


def backward(x: Array, grad: Array) -> Array:
    """The gradient of x, given that of what `forward` made of it."""
    return _run(kernels.backward, x, np.ascontiguousarray(grad))


def _run(kernel: Any, x: Array, grad: Array) -> Array:
    out = memory.empty(x.shape, x.dtype)
    job = kernels.GeluJob(np.ascontiguousarray(x), grad, out, x.size, CHUNK)
    if x.size:
        kernel.prepare(job, -(-x.size // CHUNK), x.dtype, WORK * x.size)()
    return out
