"""From the shapes of one step of attention to a job for its kernel, made once (kernels/functional.py)."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from .checks import Shape
from .kernels import functional as kernels
from .kernels import jit
from .kernels.scoring import ByteMatrices
from .kernels.simd import target
from .kernels.tiles import Matrices
from .plan import _NOWHERE, Layout, _broadcast, _contiguous, _matrices, layout, padded

SOFT_WORK = 32  # what an element of a softmax costs, in multiply-adds
MASK_WORK = 8


class Plan(NamedTuple):
    """A job ready to be launched with its arrays, and the elements of scratch that one thread needs."""

    launch: jit.Launch
    scratch: int
    dtype: np.dtype[Any]

    def __call__(self, **arrays: Any) -> None:
        self.launch(scratch=jit.scratch(self.scratch * jit.slots(), self.dtype), **arrays)


@functools.lru_cache(512)
def product(dtype: np.dtype[Any], left: Layout, right: Layout, factor: float, selects: bool) -> Plan:
    """left right * factor; `selects` where 0 in left shall add nothing, not even 0 times NaN."""
    itemsize, (I, K), J = dtype.itemsize, left.shape[-2:], right.shape[-1]
    width, out = target().width(itemsize), _contiguous((*left.shape[:-1], J), itemsize)
    scratch = (kernels.TASK_ROWS + kernels.TERMS) * width  # the sums and the panel of a task
    row_blocks, column_blocks = -(-I // kernels.TASK_ROWS), -(-J // width)
    job = kernels.ProductJob(
        left=_matrices("left", left, itemsize), right=_matrices("right", right, itemsize),
        out=_matrices("out", out, itemsize), factor=np.full(kernels.TERMS, factor, dtype), selects=int(selects),
        I=I, J=J, K=K, row_blocks=row_blocks, column_blocks=column_blocks, scratch="scratch", scratch_step=scratch,
    )  # fmt: skip
    matrices = math.prod(left.shape[:-2])
    launch = kernels.product.prepare(job, matrices * row_blocks * column_blocks, dtype, matrices * I * J * K)
    return Plan(launch, scratch, dtype)


@functools.lru_cache(512)
def mask(dtype: np.dtype[Any], scores: Layout, bias: Layout, allowed: Layout, hidden: float) -> Plan:
    """scores + bias where seen, else `hidden`; bias and allowed are broadcast to the scores."""
    shape, itemsize = scores.shape, dtype.itemsize
    blocks, tasks = _row_blocks(shape)
    with_heads = shape if len(shape) > 2 else (1, *shape)  # a mask may have an axis for them where scores have none
    job = kernels.MaskJob(
        scores=_matrices("scores", scores, itemsize), out=_matrices("out", _contiguous(shape, itemsize), itemsize),
        bias=_matrices("bias", _broadcast(bias, with_heads), itemsize),
        allowed=ByteMatrices(*_matrices("allowed", _broadcast(allowed, with_heads), 1)), limits="limits",
        hidden=hidden, Lq=shape[-2], Lk=shape[-1], blocks=blocks,
    )  # fmt: skip
    return Plan(kernels.mask.prepare(job, tasks, dtype, MASK_WORK * math.prod(shape)), 0, dtype)


@functools.lru_cache(512)
def softmax(dtype: np.dtype[Any], scores: Layout, eps: float) -> Plan:
    """weights from scores"""
    weights = _contiguous(scores.shape, dtype.itemsize)
    return _softmax(kernels.softmax, dtype, scores, weights, _NOWHERE, eps)


@functools.lru_cache(512)
def softmax_backward(dtype: np.dtype[Any], grad_weights: Layout, weights: Layout, eps: float) -> Plan:
    """grad_scores from grad_weights and weights"""
    made = _matrices("grad_scores", _contiguous(weights.shape, dtype.itemsize), dtype.itemsize)
    return _softmax(kernels.softmax_backward, dtype, grad_weights, weights, made, eps)


def _softmax(
    kernel: jit.Kernel, dtype: np.dtype[Any], given: Layout, weights: Layout, grad_scores: Matrices, eps: float
) -> Plan:
    shape, itemsize, (Lq, Lk) = given.shape, dtype.itemsize, given.shape[-2:]
    blocks, tasks = _row_blocks(shape)
    scratch = padded((Lk,), itemsize)[0] + target().lanes(itemsize)  # a row, and a vector for its maximum
    job = kernels.SoftmaxJob(
        given=_matrices("given", given, itemsize), weights=_matrices("weights", weights, itemsize),
        grad_scores=grad_scores, eps=eps, Lq=Lq, Lk=Lk, blocks=blocks, scratch="scratch", scratch_step=scratch,
    )  # fmt: skip
    return Plan(kernel.prepare(job, tasks, dtype, SOFT_WORK * math.prod(shape)), scratch, dtype)


def _row_blocks(shape: Shape) -> tuple[int, int]:
    """Blocks of rows in one matrix, and in all."""
    blocks = -(-shape[-2] // kernels.SOFT_ROWS)
    return blocks, math.prod(shape[:-2]) * blocks


__all__ = ["layout", "mask", "product", "softmax", "softmax_backward"]
