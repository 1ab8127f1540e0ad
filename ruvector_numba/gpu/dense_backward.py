"""Gradients and weights of dense attention on a GPU; the way there is dense.py's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..results import InputGradients
from .arrays import GpuArray, Space
from .dense import Call, Past, score_terms, terms_of
from .layouts import compact, cut, matrices, room, whole, zero

__all__ = ["backward", "weights"]


def _gradient_job(
    past: Past, space: Space, grad_output: GpuArray, grad_lse: GpuArray | None, made: tuple[GpuArray, ...]
) -> Any:
    from ..kernels.cuda import blocks

    c, a = past.call, past.call.checked
    heads, (Lq, D), (Lk, _) = math.prod(a.query.shape[:-2]), a.query.shape[-2:], a.value.shape[-2:]
    dq, dk, dv = made
    assert past.kept is not None
    n = heads * Lq
    kept = [space.pointer(past.kept, i * n) for i in range(2)]
    both = space.keep(space.empty((2, n), "float32"))
    made_first = [space.pointer(both, i * n) for i in range(2)]
    terms, sight = score_terms(c, space)
    if grad_lse is None:
        lse = space.scratch(heads * Lq)
        zero(space, GpuArray(lse, 0, (heads * Lq,), (1,), "float32", None), 0.0)
    else:
        lse = space.pointer(compact(space, grad_lse))
    return blocks.GradientJob(
        matrices(space, c.query), matrices(space, c.key, a.group), matrices(space, c.value, a.group),
        matrices(space, past.output), matrices(space, grad_output), matrices(space, dq), matrices(space, dk),
        matrices(space, dv), *kept, lse, *made_first, terms, sight, a.scale, Lq, Lk, whole(D, c.query.element),
        past.output.shape[-1], a.heads, 1, a.group,
    )  # fmt: skip


def _prepared(past: Past, space: Space, job: Any) -> int:
    """shift and delta of each query."""
    from ..kernels.cuda import blocks, dense_backward
    from ..plan import cuda_dense as plan

    c, heads = past.call, math.prod(past.call.checked.query.shape[:-2])
    channels = plan.width(max(job.D, job.Dv))
    assert channels is not None
    v = blocks.Variant(c.query.element, channels, 16, 1, 32 if isinstance(c.query.data, np.ndarray) else 128)
    rows = v.threads // 32 * dense_backward.ROWS_OF_A_WARP
    dense_backward.prepare(v, job, (-(-job.Lq // rows), heads, 1), space.stream)
    return channels


def backward(past: Past, grad_output: GpuArray, grad_lse: GpuArray | None, wants_bias: bool) -> InputGradients:
    from ..kernels.cuda import dense_backward
    from ..plan import cuda_dense as plan

    c, a, space, element = past.call, past.call.checked, past.call.space(), past.call.query.element
    dq, dk, dv = (room(space, x.shape, element) for x in (c.query, c.key, c.value))
    bias = space.empty(c.bias.shape, "float32") if wants_bias and c.bias is not None else None
    if past.kept is None:
        for x in (dq, dk, dv, *(() if bias is None else (bias,))):
            zero(space, x, 0.0)
    else:
        job = _gradient_job(past, space, grad_output, grad_lse, (dq, dk, dv))
        channels = _prepared(past, space, job)
        heads = math.prod(a.query.shape[:-2])
        v = plan.variant("to_query", element, channels, terms_of(c))
        dense_backward.to_query(v, job, (-(-job.Lq // v.rows), heads, 1), space.stream)
        for part in plan.makes(channels):
            v = plan.variant("to_key", element, channels, terms_of(c))._replace(makes=part)
            dense_backward.to_key(v, job, (-(-job.Lk // v.rows), heads // a.group, 1), space.stream)
        if bias is not None:
            _bias_gradient(c, space, job, bias)
    query, key, value = (past.given(cut(x, y.shape[-1])) for x, y in ((dq, c.query), (dk, c.key), (dv, c.value)))
    return InputGradients(query, key, value, None if bias is None else past.given(bias.native))


def _bias_gradient(c: Call, space: Space, job: Any, bias: GpuArray) -> None:
    """The gradient of the float mask, in float32, each distinct matrix of it in one place."""
    from ..kernels.cuda import blocks, pairs

    a = c.checked
    shape = (1,) * (len(a.batch) + 3 - len(bias.shape)) + bias.shape
    matrices = math.prod(shape[:-2])
    owner = np.broadcast_to(np.arange(matrices).reshape(shape[:-2]), (*a.batch, a.heads)).reshape(-1)
    members = np.argsort(owner, kind="stable").astype(np.int64)
    begins = np.searchsorted(owner[members], np.arange(matrices + 1)).astype(np.int64)
    v = blocks.Variant(
        c.query.element, 64, 16, 1, 32 if isinstance(c.query.data, np.ndarray) else 128, 1, 2, *terms_of(c)
    )
    more = pairs.PairJob(
        job, space.pointer(bias), space.pointer(None), 0, 1, space.upload(begins), space.upload(members), *shape[-2:]
    )
    pairs.bias_gradient(v, more, (-(-shape[-2] * shape[-1] // (v.threads // 32)), matrices, 1), space.stream)


def weights(past: Past, space: Space, chosen: Any, out: GpuArray, averaged: int) -> None:
    from ..kernels.cuda import blocks, pairs

    c, a = past.call, past.call.checked
    if past.kept is None:
        return zero(space, out, 0.0)
    job = _gradient_job(past, space, past.output._replace(shape=a.output_shape), None, (c.query, c.key, c.value))
    _prepared(past, space, job)
    threads = 32 if isinstance(c.query.data, np.ndarray) else 128
    v = blocks.Variant(c.query.element, 64, 16, 1, threads, 1, 2, *terms_of(c))
    nothing = space.pointer(None)
    more = pairs.PairJob(
        job, space.pointer(out), space.upload(chosen.astype(np.int64)), len(chosen), averaged, nothing, nothing, 0, 0
    )
    grid = (-(-job.Lk // threads), len(chosen), math.prod(a.query.shape[:-2]) // averaged)
    pairs.weights(v, more, grid, space.stream)
