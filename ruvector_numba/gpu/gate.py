"""The gate of `GraphTransformer` with ``beta=True``, on a GPU: how much of the root and how much of the attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .arrays import GpuArray
from .layouts import viewed
from .projection import matrix, product, turned
from .work import Found, Work

__all__ = ["Gated", "gated", "gated_back"]


class Gated(NamedTuple):
    """What the way back needs: both sides and the gate."""

    output: GpuArray  # (N, C)
    root: GpuArray
    gate: GpuArray  # (N)


def gated(work: Work, output: GpuArray, root: GpuArray) -> tuple[GpuArray, Gated]:
    from ..kernels.cuda import gate as kernels

    space = work.space
    out, kept = space.keep(space.empty(output.shape, work.element)), space.empty(output.shape[:1], "float32")
    made = Gated(output, root, space.keep(kept))
    _launch(kernels.forward, work, _job(work, made, out=out))
    return out, made


def gated_back(work: Work, grad: GpuArray, kept: Gated, found: Found) -> tuple[GpuArray, GpuArray]:
    """The gradients of the attention's output and of the root."""
    from ..kernels.cuda import gate as kernels

    space, (N, C) = work.space, grad.shape
    doutput, droot, dgate = (space.keep(space.empty(shape, work.element)) for shape in ((N, C), (N, C), (N, 1)))
    _launch(kernels.backward, work, _job(work, kept, grad=grad, doutput=doutput, droot=droot, dgate=dgate))
    # d[0] = dgate^T o, d[1] = dgate^T r, d[2] = d[0] - d[1]
    made = space.keep(space.empty((3, C), work.element))
    rows = [made._replace(**_row(made, n, C)) for n in range(3)]
    for x, row in zip((kept.output, kept.root), rows, strict=False):
        product(space, turned(matrix(dgate)), matrix(x), matrix(row), over_rows=True)
    both = viewed(made, (2, C))
    minus = work.constant("minus", lambda: np.array([[1.0, -1.0]], np.float32))
    product(space, matrix(minus), matrix(both), matrix(rows[2]))
    found.put("lin_beta.weight", made, (1, 3 * C))
    return doutput, droot


def _row(x: GpuArray, n: int, C: int) -> dict[str, Any]:
    from .arrays import part

    one = part(x, n * C, C)
    return dict(data=one.data, start=one.start, shape=(1, C), strides=(C, 1))


def _job(work: Work, kept: Gated, **more: GpuArray) -> Any:
    """What both ways look at, and `more`."""
    from ..kernels.cuda.gate import GateJob

    space, (N, C), p = work.space, kept.output.shape, work.parameters
    weight = work.constant("lin_beta.weight", lambda: p["lin_beta.weight"])
    arrays = dict(output=kept.output, root=kept.root, weight=weight, gate=kept.gate, **more)
    return GateJob(N=N, C=C, **{name: space.pointer(x) for name, x in arrays.items()})


def _launch(kernel: Any, work: Work, job: Any) -> None:
    from ..plan import cuda_gate as plan

    v = plan.variant(work.element)
    if job.N:
        kernel(v, job, plan.grid(v, job.N), work.space.stream)
