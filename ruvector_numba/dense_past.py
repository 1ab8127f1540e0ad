"""From a checked call of dense attention to its plan and kernels, and what later questions about it need."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from . import checks, halves
from .arrays import Array
from .dense_call import DenseCall
from .plan import memory
from .results import InputGradients
from .values import check_memory

__all__ = ["SOME_WEIGHTS", "Past", "forward", "merged"]

SOME_WEIGHTS = "ask for some of the weights: weights(rows=slice(0, 1000))"


@functools.cache
def _plans() -> Any:
    """At the first call, as it loads the kernels, 60 ms; asking Python for a module takes 1 us of each call."""
    from .plan import dense

    return dense


class Past(NamedTuple):
    """A checked call and what came of it: what later questions about it need. It copies none of the call's arrays."""

    call: DenseCall
    output: Array
    sums: Array | None  # (..., H, Lq, 2) float64: a shift in the kernel's unit, log(eps + sum of exp(score - shift))
    top: Array | None  # (..., H, Lq): the largest scores, in the kernel's unit, if it had
    exact: Array | None = None  # the output as it was computed; `output` itself, unless that is of half precision
    unit: float = 1.0

    @property
    def lse(self) -> Array:
        assert self.sums is not None
        shift, log = self.sums[..., 0], self.sums[..., 1]
        return (shift * self.unit + log).astype(self.call.arithmetic, copy=False)

    def weights(self, rows: Any = None) -> Array:
        """See `AttentionCache.weights`."""
        c = self.call
        chosen = checks.row_indices(rows, c.query.shape[-2])
        shape = (*c.query.shape[:-2], len(chosen), c.key.shape[-2])
        check_memory(shape, c.dtype, "weights", SOME_WEIGHTS)
        result = np.zeros(shape, c.dtype)
        if result.size:
            sums, done = _by_tiles(self).sums, 0
            assert sums is not None
            for run in np.split(chosen, np.flatnonzero(np.diff(chosen) != 1) + 1):
                there = slice(int(run[0]), int(run[-1]) + 1)
                _weights(_queries(c, there), sums[..., there, :], result[..., done : done + len(run), :])
                done += len(run)
        return result

    def backward(self, grad_output: Array, grad_lse: Array | None = None, wants_bias: bool = True) -> InputGradients:
        """See `attention_backward`; the gradients are checked. That of a bias costs a pass of its own."""
        shape, c = self.output.shape[:-1], self.call
        for name, x in (("query", c.query), ("key", c.key), ("value", c.value), ("bias", c.seen.bias)):
            if x is not None and (wants_bias or name != "bias"):
                hint = "it was broadcast: a gradient has as many numbers as the array seems to have"
                check_memory(x.shape, c.dtype, f"gradient of {name}", hint)
        lse = np.zeros(shape) if grad_lse is None else grad_lse.astype(np.float64, order="C")
        stored = self.call.query.dtype
        grad_output = (
            halves.stored(grad_output)
            if grad_output.itemsize == stored.itemsize
            else halves.rounded(grad_output, stored)
        )
        return _backward(self, grad_output, lse, wants_bias and self.call.seen.bias is not None)


@np.errstate(all="ignore")  # -inf - -inf is NaN, and such a part is not selected
def merged(
    outputs: Array, shifts: Array, logs: Array, unit: float = 1.0, eps: float = 0.0, top: Array | None = None
) -> tuple[Array, Array, Array]:
    """Merge along the first axis parts of sums exp(log) of exp(unit * (score - shift)): out = sum of shares * out.

    Also returned are the shift and the log of all. Parts that saw nothing, of log -inf, are left out. `eps` is added to
    the sum of exp(unit * (score - top)).
    """
    empty = np.isneginf(logs)
    shift = np.where(empty, -np.inf, shifts).max(axis=0)
    shares = np.where(empty, 0, np.exp(unit * (shifts - shift) + logs))
    total = shares.sum(axis=0)
    nothing = total == 0
    if top is not None:
        total = total + eps * np.exp(unit * (top - shift))
    shares = np.where(shares == 0, 0, shares / total)[..., None]
    output = np.zeros(outputs.shape[1:])
    for share, part in zip(shares, outputs, strict=True):
        output += np.where(share == 0, 0, share * part)
    return output.astype(outputs.dtype), np.where(nothing, 0, shift), np.where(nothing, -np.inf, np.log(total))


def forward(c: DenseCall, out: Array | None = None, wants_sums: bool = True, by_tiles: bool = False) -> Past:
    """A checked call's output and, if wanted, the sums that its weights and gradients need."""
    plan = _plans()
    shape = c.output_shape
    if out is None:
        check_memory(shape, c.dtype, "output", "attend with some of the queries or heads at a time")
        out = memory.result(shape, c.dtype)
    sums = np.empty((*shape[:-1], 2)) if wants_sums else None
    top = np.empty(shape[:-1], c.arithmetic) if c.eps else None
    if 0 in c.query.shape[:-1] or 0 in c.key.shape[:-1]:
        out[...] = 0
        if sums is not None:
            sums[...] = 0, -np.inf
        return Past(c, out, sums, None if top is None else np.full_like(top, -np.inf))
    if not (c.query.shape[-1] and shape[-1]):
        wide = forward(_with_channels(c), None, wants_sums, by_tiles)
        out[...] = wide.output[..., : shape[-1]]
        exact = None if wide.exact is None else np.ascontiguousarray(wide.exact[..., : shape[-1]])
        return wide._replace(call=c, output=out, exact=exact)
    ready = plan.forward(problem := plan.problem(c, out), wants_sums, by_tiles)
    more = plan.staged(c, problem, ready)
    if ready.splits == 1:
        exact = memory.result(shape, c.arithmetic) if c.rounds and wants_sums else out
        ready(c, output=halves.stored(out), exact=exact, sums=sums, top=top, **more)
        return Past(c, out, sums, top, exact, ready.unit)
    heads = math.prod(shape[:-2])
    parts = np.empty((heads, ready.splits, *shape[-2:]), c.arithmetic)
    pairs, tops = np.empty((*parts.shape[:-1], 2)), np.empty(parts.shape[:-1], c.arithmetic)
    ready(c, output=parts, exact=parts, sums=pairs, top=tops, **more)
    shifts, logs = (pairs[..., n].swapaxes(0, 1) for n in range(2))
    top = tops.max(axis=1) if c.eps else None
    output, shift, log = merged(parts.swapaxes(0, 1), shifts, logs, ready.unit, c.eps, top)
    output, top = output.reshape(shape), None if top is None else top.reshape(shape[:-1])
    out[...] = halves.rounded(output, out.dtype)
    sums = np.stack([shift, log], axis=-1).reshape(*shape[:-1], 2)
    return Past(c, out, sums, top, output if c.rounds else out, ready.unit)


def _by_tiles(past: Past) -> Past:
    """The sums and largest scores as weights and gradients form the scores.

    For few queries the forward pass sums a score in another order. The two differ by a rounding of the score, which
    for large scores is too much: weights would no longer sum to 1.
    """
    plan = _plans()
    if not plan.is_few(plan.problem(past.call, past.output)):
        return past
    again = forward(past.call, by_tiles=True)
    return again._replace(output=past.output, exact=past.exact)


def _with_channels(c: DenseCall) -> DenseCall:
    """The same attention where D or Dv is 0: scores of 0, values that nobody looks at."""

    def one(x: Array) -> Array:
        return x if x.shape[-1] else np.zeros((*x.shape[:-1], 1), x.dtype)

    return c._replace(query=one(c.query), key=one(c.key), value=one(c.value))


def _backward(past: Past, grad_output: Array, grad_lse: Array, wants_bias: bool) -> InputGradients:
    plan = _plans()
    c, output = past.call, past.output if past.exact is None else past.exact
    shape_of_bias = () if c.seen.bias is None else c.seen.bias.shape
    bias = np.zeros(shape_of_bias, c.bias_dtype) if wants_bias else None
    D, Dv = c.query.shape[-1], c.value.shape[-1]
    if 0 in c.query.shape[:-1] or 0 in c.key.shape[:-1]:
        query, key, value = (np.zeros(x.shape, c.dtype) for x in (c.query, c.key, c.value))
        return InputGradients(query, key, value, bias)
    if not (D and Dv):
        none = np.zeros((*output.shape[:-1], 1), output.dtype)
        wide_past = past._replace(call=_with_channels(c), exact=output if Dv else none)
        wide = _backward(wide_past, grad_output if Dv else none.astype(c.query.dtype), grad_lse, wants_bias)
        return InputGradients(wide.query[..., :D], wide.key[..., :D], wide.value[..., :Dv], wide.bias)
    if c.query.dtype == halves.BITS and not plan.is_in_pairs(plan.layout(grad_output)):
        grad_output = np.ascontiguousarray(grad_output)
    problem, layout, again = plan.problem(c, output), plan.layout(grad_output), _by_tiles(past)
    ready, *others = plan.backward(problem, layout, plan.threads())
    arguments = dict(
        output=output, exact=output, sums=again.sums, top=again.top, grad_output=grad_output, grad_lse=grad_lse,
        **plan.staged(c, problem, ready),
    )  # fmt: skip
    made = _room_for_gradients(c)
    for each in (ready, *others):
        each(c, **made, **arguments)
    if bias is not None:
        ready, shape = plan.bias_backward(problem, layout)
        made_bias = np.zeros(shape, c.arithmetic)
        ready(c, grad_bias=made_bias, **arguments)
        bias = halves.rounded(_summed(made_bias, shape_of_bias), bias.dtype)
    if c.rounds:
        query, key, value = (made[f"rounded_{name}"].view(c.dtype) for name in ("query", "key", "value"))
        return InputGradients(query, key, value, bias)
    key, value = made["grad_key"][..., :D], made["grad_value"][..., :Dv]
    return InputGradients(made["grad_query"], np.ascontiguousarray(key), np.ascontiguousarray(value), bias)


def _room_for_gradients(c: DenseCall) -> dict[str, Array]:
    """Where gradients are summed, those of keys and values in rows of whole vectors, and where they are rounded."""
    plan = _plans()
    kind, named = c.arithmetic, {"key": c.key, "value": c.value}
    shapes = {f"grad_{name}": plan.padded(x.shape, kind.itemsize) for name, x in named.items()}
    if not c.rounds:
        return {name: memory.result(shape, kind) for name, shape in ({"grad_query": c.query.shape} | shapes).items()}
    made: dict[str, Array] = {name: plan.room(shape, name) for name, shape in shapes.items()}
    made |= {f"rounded_{name}": memory.result(x.shape, x.dtype) for name, x in (("query", c.query), *named.items())}
    return {"grad_query": np.empty(0, kind), **made}  # each element of it is made at once, and rounded


def _summed(made: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of a bias of this shape: the few sums that are left where it had one row or one column."""
    rows, columns = (1, 1, *shape)[-2:]
    if rows == 1:
        made = made.sum(axis=1, keepdims=True)
    if columns == 1:
        made = made.sum(axis=2, keepdims=True)
    return made.reshape(shape)


def _queries(c: DenseCall, rows: slice) -> DenseCall:
    """The same call for some successive queries only."""
    seen, start = c.seen, rows.start

    def some(x: Array | None) -> Array | None:
        return x if x is None or x.ndim < 2 or x.shape[-2] == 1 else x[..., rows, :]

    there = replace(
        seen, first=seen.first + start, last=seen.last + start, offset=seen.offset + start, limits=some(seen.limits),
        allowed=some(seen.allowed), bias=some(seen.bias),
    )  # fmt: skip
    return c._replace(query=c.query[..., rows, :], seen=there)


def _weights(c: DenseCall, sums: Array, result: Array) -> None:
    plan = _plans()
    c = _with_channels(c)
    result = halves.stored(result)
    ready = plan.weights(problem := plan.problem(c, result))
    more = plan.staged(c, problem, ready)
    ready(c, sums=np.ascontiguousarray(sums), output=result, exact=result, **more)
