"""Linear projections of arrays that lie on a GPU: the same products as projection.py, of the same layouts.

`product` takes arrays of four axes, (B, L, H, C): rows are pairs (batch, position), columns are pairs (head, channel).
`matrix` makes one of a plain (n, m), and `turned` one whose rows are another's columns. Everything is enqueued on the
stream of a `Space`, and what is allocated on the way stays as long as that does.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from .arrays import GpuArray, Space
from .layouts import zero

if TYPE_CHECKING:
    from ..plan.cuda_projection import Layout

__all__ = ["linear", "linear_backward", "matrix", "product", "turned"]


def product(
    space: Space,
    left: GpuArray,
    right: GpuArray,
    out: GpuArray,
    bias: GpuArray | None = None,
    sums: GpuArray | None = None,
    over_rows: bool = False,
    adds: bool = False,
) -> None:
    """out[i, j] = sum over k of left[i, k] * right[k, j] + bias[j], where each index is a pair.

    `sums`, if given, gets the sum of each column of `right`. If it `adds`, both are added to what is there.

    `over_rows` says that k counts rows, as in dW = x^T dy: such sums are long and are cut into parts, and in them NaN
    or infinity in `left` times 0 in `right` is 0, for a row that nobody saw has the gradient 0. Arrays are of one
    element type; `bias` and `sums` are contiguous.
    """
    from ..kernels.cuda import projection as kernels
    from ..kernels.cuda.projection_halves import project_halves
    from ..plan import cuda_projection as plan

    if not math.prod(out.shape):
        if sums is not None and not adds:
            zero(space, sums, 0.0)
        return
    p = plan.plan(out.element, *(_layout(x) for x in (left, right, out)), over_rows)
    parts = part_sums = space.nothing
    if p.variant.cut:
        parts = space.scratch(p.parts * p.I * p.line)
        part_sums = space.scratch(p.parts * p.line) if sums is not None else parts
    job = kernels.ProjectionJob(
        left=kernels.Pairs(space.pointer(left), *p.left), right=kernels.Pairs(space.pointer(right), *p.right),
        out=kernels.Pairs(space.pointer(out), *p.out), bias=space.pointer(bias), sums=space.pointer(sums),
        parts=parts, part_sums=part_sums, line=p.line, has_bias=int(bias is not None),
        wants_sums=int(sums is not None), adds=int(adds), left_by_rows=p.left_by_rows, right_by_rows=p.right_by_rows,
        I=p.I, J=p.J, K=p.K, part=p.part, count=p.parts,
    )  # fmt: skip
    (project_halves if p.halves else kernels.project)(p.variant, job, p.grid, space.stream)
    if p.variant.cut:
        kernels.join(p.join, job, p.join_grid, space.stream)


def linear(space: Space, x: GpuArray, weight: GpuArray, bias: GpuArray | None = None) -> GpuArray:
    """x weight^T + bias, of x (N, d_in), weight (d_out, d_in) and bias (d_out,): as torch keeps them."""
    out = space.keep(space.empty((x.shape[0], weight.shape[0]), x.element))
    product(space, matrix(x), turned(matrix(weight)), matrix(out), bias)
    return out


def linear_backward(
    space: Space,
    grad: GpuArray,
    x: GpuArray,
    weight: GpuArray,
    dx: GpuArray | None = None,
    made: tuple[GpuArray, GpuArray] | None = None,
) -> tuple[GpuArray, GpuArray, GpuArray]:
    """The gradients of x, weight and bias, given that of `linear`'s result (N, d_out).

    They are added to `dx` and to those of weight and bias that were `made` before, where these are given.
    """
    adds = dx is not None
    dx = space.keep(space.empty(x.shape, x.element)) if dx is None else dx
    product(space, matrix(grad), matrix(weight), matrix(dx), adds=adds)
    dweight, dbias = made or (space.keep(space.empty(a, x.element)) for a in (weight.shape, weight.shape[:1]))
    product(
        space, turned(matrix(x)), matrix(grad), turned(matrix(dweight)), None, dbias, over_rows=True,
        adds=made is not None,
    )  # fmt: skip
    return dx, dweight, dbias


def matrix(x: GpuArray) -> GpuArray:
    """(n, m) as (1, n, 1, m)"""
    (n, m), (row, col) = x.shape, x.strides
    return x._replace(shape=(1, n, 1, m), strides=(0, row, 0, col))


def turned(x: GpuArray) -> GpuArray:
    """Rows for columns: the transpose of (B, L, H, C) as `product` reads it, without a copy."""
    return x._replace(shape=x.shape[2:] + x.shape[:2], strides=x.strides[2:] + x.strides[:2])


def _layout(x: GpuArray) -> Layout:
    from ..plan.cuda_projection import Layout

    first = x.data[x.start :].ctypes.data if isinstance(x.data, np.ndarray) else x.data
    itemsize = 4 if x.element == "float32" else 2
    return Layout(x.shape, x.strides, next((n for n in (8, 4) if first % (n * itemsize) == 0), 1))
