"""From the shapes of one step of attention to a job for its kernel, made once (kernels/functional.py)."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from ..arrays import Shape
from ..kernels import functional as kernels
from ..kernels import jit
from ..kernels.scoring import ByteMatrices
from ..kernels.simd import target
from ..kernels.tiles import Matrices
from . import team
from .layouts import NOWHERE, Layout, Ready, as_matrices, contiguous, layout, padded
from .strides import broadcast

SOFT_WORK = 32  # what an element of a softmax costs, in multiply-adds
MASK_WORK = 8


@functools.lru_cache(512)
def product(dtype: np.dtype[Any], left: Layout, right: Layout, factor: float, selects: bool) -> Ready:
    """left right * factor; `selects` where 0 in left shall add nothing, not even 0 times NaN."""
    itemsize, (I, K), J = dtype.itemsize, left.shape[-2:], right.shape[-1]
    width, out = target().width(itemsize), contiguous((*left.shape[:-1], J), itemsize)
    scratch = (kernels.TASK_ROWS + kernels.TERMS) * width  # the sums and the panel of a task
    row_blocks, column_blocks = -(-I // kernels.TASK_ROWS), -(-J // width)
    job = kernels.ProductJob(
        left=as_matrices("left", left, itemsize), right=as_matrices("right", right, itemsize),
        out=as_matrices("out", out, itemsize), factor=np.full(kernels.TERMS, factor, dtype), selects=int(selects),
        I=I, J=J, K=K, row_blocks=row_blocks, column_blocks=column_blocks, scratch="scratch", scratch_step=scratch,
    )  # fmt: skip
    matrices = math.prod(left.shape[:-2])
    launch = kernels.product.prepare(job, matrices * row_blocks * column_blocks, dtype, matrices * I * J * K)
    return Ready(launch, team.scratch(scratch, dtype))


@functools.lru_cache(512)
def mask(dtype: np.dtype[Any], scores: Layout, bias: Layout, allowed: Layout, hidden: float) -> Ready:
    """scores + bias where seen, else `hidden`; bias and allowed are broadcast to the scores."""
    shape, itemsize = scores.shape, dtype.itemsize
    blocks, tasks = _row_blocks(shape)
    with_heads = shape if len(shape) > 2 else (1, *shape)  # a mask may have an axis for them where scores have none
    job = kernels.MaskJob(
        scores=as_matrices("scores", scores, itemsize), out=as_matrices("out", contiguous(shape, itemsize), itemsize),
        bias=as_matrices("bias", broadcast(bias, with_heads), itemsize),
        allowed=ByteMatrices(*as_matrices("allowed", broadcast(allowed, with_heads), 1)), limits="limits",
        hidden=hidden, Lq=shape[-2], Lk=shape[-1], blocks=blocks,
    )  # fmt: skip
    return Ready(kernels.mask.prepare(job, tasks, dtype, MASK_WORK * math.prod(shape)), 0)


@functools.lru_cache(512)
def softmax(dtype: np.dtype[Any], scores: Layout, eps: float) -> Ready:
    """weights from scores"""
    weights = contiguous(scores.shape, dtype.itemsize)
    return _softmax(kernels.softmax, dtype, scores, weights, NOWHERE, eps)


@functools.lru_cache(512)
def softmax_backward(dtype: np.dtype[Any], grad_weights: Layout, weights: Layout, eps: float) -> Ready:
    """grad_scores from grad_weights and weights"""
    made = as_matrices("grad_scores", contiguous(weights.shape, dtype.itemsize), dtype.itemsize)
    return _softmax(kernels.softmax_backward, dtype, grad_weights, weights, made, eps)


def _softmax(
    kernel: jit.Kernel, dtype: np.dtype[Any], given: Layout, weights: Layout, grad_scores: Matrices, eps: float
) -> Ready:
    shape, itemsize, (Lq, Lk) = given.shape, dtype.itemsize, given.shape[-2:]
    blocks, tasks = _row_blocks(shape)
    scratch = padded((Lk,), itemsize)[0] + target().lanes(itemsize)  # a row, and a vector for its maximum
    job = kernels.SoftmaxJob(
        given=as_matrices("given", given, itemsize), weights=as_matrices("weights", weights, itemsize),
        grad_scores=grad_scores, eps=eps, Lq=Lq, Lk=Lk, blocks=blocks, scratch="scratch", scratch_step=scratch,
    )  # fmt: skip
    return Ready(kernel.prepare(job, tasks, dtype, SOFT_WORK * math.prod(shape)), team.scratch(scratch, dtype))


def _row_blocks(shape: Shape) -> tuple[int, int]:
    """Blocks of rows in one matrix, and in all."""
    blocks = -(-shape[-2] // kernels.SOFT_ROWS)
    return blocks, math.prod(shape[:-2]) * blocks


__all__ = ["layout", "mask", "product", "softmax", "softmax_backward"]
