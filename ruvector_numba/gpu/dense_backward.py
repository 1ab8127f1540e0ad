"""Gradients and weights of dense attention on a GPU; the way there is dense.py's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..plan.strides import sharing
from ..results import InputGradients
from .arrays import GpuArray, Space
from .dense import GpuCall, Past, score_terms, terms_of
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
    rows = space.keep(space.empty((3, n), "float32"))
    shift, inverse, delta = (space.pointer(rows, i * n) for i in range(3))
    terms, sight = score_terms(c, space)
    if grad_lse is None:
        lse = space.scratch(heads * Lq)
        zero(space, GpuArray(lse, 0, (heads * Lq,), (1,), "float32", None), 0.0)
    else:
        lse = space.pointer(compact(space, grad_lse))
    return blocks.GradientJob(
        query=matrices(space, c.query), key=matrices(space, c.key, a.group), value=matrices(space, c.value, a.group),
        output=matrices(space, past.output), grad_output=matrices(space, grad_output),
        grad_query=matrices(space, dq), grad_key=matrices(space, dk, a.group), grad_value=matrices(space, dv, a.group),
        top=kept[0], total=kept[1], grad_lse=lse, shift=shift, inverse=inverse, delta=delta, terms=terms,
        sight=sight, slope=a.scale, Lq=Lq, Lk=Lk, D=whole(D, c.query.element), Dv=past.output.shape[-1], H=a.heads,
        matrices=heads, key_matrices=heads // a.group, heads=1, group=a.group,
    )  # fmt: skip


def _prepared(past: Past, space: Space, job: Any) -> int:
    """shift, inverse and delta of each query."""
    from ..kernels.cuda import dense_backward
    from ..plan import cuda_dense as plan

    channels = plan.width(max(job.D, job.Dv))
    assert channels is not None
    v = plan.preparing(past.call.query.element, channels)
    dense_backward.prepare(v, job, plan.prepare_grid(v, job.Lq, job.matrices), space.stream)
    return channels


def backward(past: Past, grad_output: GpuArray, grad_lse: GpuArray | None, wants_bias: bool) -> InputGradients:
    from ..kernels.cuda import dense_backward
    from ..plan import cuda_dense as plan

    c, space, element = past.call, past.call.space(), past.call.query.element
    dq, dk, dv = (room(space, x.shape, element) for x in (c.query, c.key, c.value))
    bias = space.empty(c.bias.shape, "float32") if wants_bias and c.bias is not None else None
    if past.kept is None:
        for x in (dq, dk, dv, *(() if bias is None else (bias,))):
            zero(space, x, 0.0)
    else:
        job = _gradient_job(past, space, grad_output, grad_lse, (dq, dk, dv))
        channels = _prepared(past, space, job)
        v = plan.variant("to_query", element, channels, terms_of(c))
        dense_backward.to_query(v, job, plan.grid(job.Lq, v.rows, job.matrices), space.stream)
        for part in plan.makes(channels):
            v = plan.variant("to_key", element, channels, terms_of(c))._replace(makes=part)
            dense_backward.to_key(v, job, plan.grid(job.Lk, v.rows, job.key_matrices), space.stream)
        if bias is not None:
            _bias_gradient(c, space, job, bias)
    query, key, value = (past.home(cut(x, y.shape[-1])) for x, y in ((dq, c.query), (dk, c.key), (dv, c.value)))
    return InputGradients(query, key, value, past.home(bias))


def _bias_gradient(c: GpuCall, space: Space, job: Any, bias: GpuArray) -> None:
    """The gradient of the float mask, in float32, each distinct matrix of it in one place."""
    from ..kernels.cuda import pairs
    from ..plan import cuda_dense as plan

    a = c.checked
    shape = (1,) * (len(a.batch) + 3 - len(bias.shape)) + bias.shape
    matrices, members, begins = sharing(shape[:-2], (*a.batch, a.heads))
    v, (R, C) = plan.in_pairs(c.query.element, terms_of(c)), shape[-2:]
    more = pairs.PairJob(
        attention=job, out=space.pointer(bias), begins=space.upload(begins), members=space.upload(members), R=R, C=C
    )
    pairs.bias_gradient(v, more, plan.bias_grid(v, R * C, matrices), space.stream)


def weights(past: Past, space: Space, chosen: Any, out: GpuArray, averaged: int) -> None:
    from ..kernels.cuda import pairs
    from ..plan import cuda_dense as plan

    c, a = past.call, past.call.checked
    if past.kept is None:
        return zero(space, out, 0.0)
    job = _gradient_job(past, space, past.output._replace(shape=a.output_shape), None, (c.query, c.key, c.value))
    _prepared(past, space, job)
    v, rows = plan.in_pairs(c.query.element, terms_of(c)), space.upload(chosen.astype(np.int64))
    more = pairs.PairJob(attention=job, out=space.pointer(out), rows=rows, count=len(chosen), averaged=averaged)
    pairs.weights(v, more, plan.weights_grid(v, job.Lk, len(chosen) * (job.matrices // averaged)), space.stream)
