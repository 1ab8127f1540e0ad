"""How arrays lie on a GPU, as kernels want them: rows that begin on 16 bytes, matrices by where they start, copies."""

from __future__ import annotations

import math
from typing import Any

from .. import gpu
from ..arrays import Shape
from ..plan import strides as strides_of
from .arrays import GpuArray, Space

__all__ = [
    "aligned", "compact", "cut", "inverted", "matrices", "named", "padded", "room", "starts", "viewed", "whole", "zero",
]  # fmt: skip


def matrices(space: Space, x: GpuArray, repeat: int = 1) -> Any:
    """`Matrices` of rows that begin on 16 bytes, copied there first if they do not; each `repeat` times."""
    from ..kernels.cuda.blocks import Matrices

    x = aligned(space, x)
    return Matrices(space.pointer(x), starts(space, x.shape[:-2], x.strides[:-2], repeat), x.strides[-2])


def named(space: Space, name: str, x: GpuArray, repeat: int = 1) -> Any:
    """The same of an array that is to come, or a copy of it, under a name."""
    from ..kernels.cuda.blocks import Matrices

    if not x.aligned:
        x = padded(x.shape, x.element)
    return Matrices(name, starts(space, x.shape[:-2], x.strides[:-2], repeat), x.strides[-2])


def starts(space: Space, shape: Shape, strides: tuple[int, ...], repeat: int = 1) -> Any:
    """The address of where each matrix of a stack begins, the last axis `repeat` times."""
    return space.constant((shape, strides, repeat), lambda: strides_of.starts(shape, strides, repeat))


def aligned(space: Space, x: GpuArray) -> GpuArray:
    """The array, or a copy with zeros behind each row's last element up to whole pieces of 16 bytes."""
    if x.aligned:
        return x
    from ..kernels.cuda import copying
    from ..plan import cuda_copying as plan

    made = space.keep(room(space, x.shape, x.element))
    heads, (rows, columns) = math.prod(x.shape[:-2]), x.shape[-2:]
    v = plan.variant(x.element)
    blocks = plan.pack_blocks(v, rows * made.shape[-1])
    job = copying.CopyJob(
        source=space.pointer(x), at=starts(space, x.shape[:-2], x.strides[:-2]), row=x.strides[-2], col=x.strides[-1],
        copy=space.pointer(made), rows=rows, columns=columns, width=made.shape[-1], blocks=blocks,
    )  # fmt: skip
    copying.pack(v, job, (blocks * heads, 1, 1), space.stream)
    return made


def room(space: Space, shape: Shape, element: str) -> GpuArray:
    """An array with rows of whole pieces of 16 bytes."""
    return space.empty(padded(shape, element).shape, element)


def padded(shape: Shape, element: str) -> GpuArray:
    shape = (*shape[:-1], whole(shape[-1], element))
    return GpuArray(0, 0, shape, gpu.contiguous_strides(shape), element, None)


def cut(x: GpuArray, n: int) -> Any:
    """The caller's array of the first n channels."""
    return x.native if x.shape[-1] == n else x.native[..., :n]


def whole(n: int, element: str) -> int:
    """n channels as rows hold them: whole pieces of 16 bytes."""
    piece = 16 // (4 if element == "float32" else 2)
    return max(piece, -(-n // piece) * piece)


def zero(space: Space, x: GpuArray, value: float) -> None:
    """Fill an array, which is contiguous, with 0 or, of float32, any number."""
    from ..kernels.cuda import copying
    from ..plan import cuda_copying as plan

    v, n = plan.variant(x.element), math.prod(x.shape)
    if n:
        job = copying.FillJob(data=space.pointer(x), count=n, value=value)
        copying.fill(v, job, plan.fill_grid(v, n), space.stream)


def compact(space: Space, x: GpuArray, inverted: bool = False) -> GpuArray:
    """The array, copied if its elements do not lie one behind the other, or to have its bools inverted."""
    if x.strides == gpu.contiguous_strides(x.shape) and not inverted:
        return x
    from ..kernels.cuda import copying
    from ..plan import cuda_copying as plan

    made, v = space.keep(space.empty(x.shape, x.element)), plan.variant(x.element, inverted)
    rows = x._replace(shape=(*x.shape, 1), strides=(*x.strides, 1))
    blocks = plan.pack_blocks(v, rows.shape[-2])
    job = copying.CopyJob(
        source=space.pointer(x), at=starts(space, rows.shape[:-2], rows.strides[:-2]), row=rows.strides[-2], col=1,
        copy=space.pointer(made), rows=rows.shape[-2], columns=1, width=1, blocks=blocks,
    )  # fmt: skip
    if math.prod(x.shape):
        copying.pack(v, job, (blocks * math.prod(rows.shape[:-2]), 1, 1), space.stream)
    return made


def viewed(x: GpuArray, shape: Shape) -> GpuArray:
    """A contiguous array in another shape."""
    return x._replace(shape=shape, strides=gpu.contiguous_strides(shape))


def inverted(space: Space, x: GpuArray) -> GpuArray:
    """True where the array of bools is False."""
    return compact(space, x, inverted=True)
