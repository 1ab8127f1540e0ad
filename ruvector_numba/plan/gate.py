"""The gate of `GraphTransformer` with ``beta=True``: from its arrays to jobs of kernels/gate.py, which it runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import Array
from ..kernels import gate as kernels
from . import memory
from .layouts import NO_ROWS, padded, rows

__all__ = ["backward", "forward"]

ROWS = 256  # of one task


def forward(output: Array, root: Array, weight: Array) -> tuple[Array, Array]:
    """g root + (1 - g) output, and g (N), of rows (N, C) and weights (1, 3 C)."""
    out, gate = memory.empty(output.shape, output.dtype), memory.empty((len(output),), output.dtype)
    _run(kernels.forward, output, root, weight, gate, out=rows(out))
    return out, gate


def backward(grad: Array, output: Array, root: Array, gate: Array, weight: Array) -> tuple[Array, Array, Array]:
    """The gradients of output, root and weight."""
    doutput, droot = (memory.empty(output.shape, output.dtype) for _ in range(2))
    grad = np.ascontiguousarray(grad)
    more = dict(grad=rows(grad), out=rows(doutput), droot=rows(droot))
    of_output, of_root = _run(kernels.backward, output, root, weight, gate, **more)
    return doutput, droot, np.concatenate([of_output, of_root, of_output - of_root])[None]


def _run(kernel: Any, output: Array, root: Array, weight: Array, gate: Array, **more: Any) -> Array:
    """Returns what the tasks have summed, (2, C)."""
    N, C = output.shape
    of_output, of_root, of_difference = np.split(weight[0], 3)
    tasks, width = -(-N // ROWS), padded((C,), output.itemsize)[0]
    both = np.zeros((2, width), output.dtype)
    both[:, :C] = of_output + of_difference, of_root - of_difference
    sums = np.zeros((tasks, 2, width), output.dtype)
    job = kernels.GateJob(
        output=rows(np.ascontiguousarray(output)), root=rows(np.ascontiguousarray(root)), weight=both, gate=gate,
        sums=sums, N=N, C=C, pad=width, rows=ROWS, **{"grad": NO_ROWS, "droot": NO_ROWS, **more},
    )  # fmt: skip
    if tasks:
        kernel.prepare(job, tasks, output.dtype, 4 * N * C)()
    return sums.sum(axis=0)[:, :C]
