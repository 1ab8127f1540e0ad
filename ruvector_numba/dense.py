"""Dense attention on NumPy arrays: forward, backward, weights, and the union of attentions over disjoint keys."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from . import checks, gpu, halves, masks
from .checks import Array, Call
from .errors import DimensionMismatchError, InvalidInputError
from .plan import memory
from .results import AttentionCache, InputGradients

__all__ = [
    "Past",
    "attention_backward",
    "attention_forward",
    "forward",
    "merge",
    "scaled_dot_product_attention",
]


def scaled_dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    attn_mask: masks.Mask | ArrayLike | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    seed: int | None = None,
    out: Array | None = None,
    device: str | None = None,
    dtype: str | None = None,
    precision: str | None = None,
) -> Array:
    """softmax(query key^T * scale) value, exactly, without forming the Lq x Lk weights.

    The signature and meaning of torch's function of this name, on NumPy arrays; what torch lacks is keyword-only.

    Parameters
    ----------
    query : array (..., H, Lq, D), float32, float64, float16, or bfloat16 of the package ml_dtypes
        Any strides, any number of leading batch axes, or just (L, D). Half precision is computed in float32 throughout,
        and rounded once, at the end.
    key : array (..., Hk, Lk, D)
    value : array (..., Hk, Lk, Dv)
    attn_mask : bool array, float array, or mask of `ruvector_numba.masks`, optional
        Arrays broadcast to (..., H, Lq, Lk). True attends; a float is added to the score, and -inf hides.
    dropout_p : float
        The probability that a weight is dropped; the others are multiplied by 1 / (1 - dropout_p).
    is_causal : bool
        Query i sees keys j <= i only, counted from the top left, as in torch. Composes with `attn_mask`.
    scale : float, optional
        1 / sqrt(D) by default.
    enable_gqa : bool
        Let H be a multiple of Hk; query head h then uses key head h // (H // Hk).
    softcap : float, optional
        Scores become softcap * tanh(score / softcap), before anything is added to them (Gemma 2).
    alibi_slopes : array (H,), optional
        slope * |i + offset - j| is subtracted (ALiBi, Press et al. 2022); the offset is 0, or Lk - Lq under a mask
        aligned bottom_right. Any shape (..., H) that broadcasts over the batch.
    seed : int, optional
        Of the dropout: the same seed drops the same weights, on any number of threads. Fresh for each call if None.
    out : array (..., H, Lq, Dv), optional
        Where to write the result; it must not overlap an input.
    device : "cuda", optional
        Move arrays of NumPy to the GPU, and the results back. Arrays that lie on a GPU already (of torch, CuPy, Numba,
        or of anything with ``__cuda_array_interface__`` or DLPack) are read there without it, float32, float16 or
        bfloat16, and the result is an array of the same library.
    dtype : "bfloat16", optional
        What the bits of uint16 arrays mean: all three are bfloat16 numbers, and so is the result, uint16 again. NumPy
        has no such type, and arrays of ml_dtypes.bfloat16 need no such word.
    precision : "bfloat16", optional
        Of the products alone, for float32 arrays: inputs are rounded to bfloat16, 3 digits, and sums and softmax are
        float32 as ever. Results are off by some 1 % of the largest, nearly all of it from rounding the inputs. It pays
        on AMD's CPUs that multiply bfloat16 (avx512bf16 in ``rv.info()["features"]``).

    Returns
    -------
    array (..., H, Lq, Dv)
        `out`, if given. A query that sees no key gets zeros.

    Raises
    ------
    InvalidInputError, InvalidMaskError, DimensionMismatchError
        Before any work; nothing is modified.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> q = k = np.eye(2, dtype=np.float32)
    >>> rv.scaled_dot_product_attention(q, k, np.ones((2, 3), np.float32), is_causal=True)
    array([[1., 1., 1.],
           [1., 1., 1.]], dtype=float32)
    """
    terms = (dropout_p, is_causal, scale, enable_gqa, softcap, alibi_slopes, seed)
    if gpu.concerns(device, query, key, value):
        return _on_gpu(precision, dtype, query, key, value, attn_mask, out, device, *terms).result
    c = _checked(precision, query, key, value, attn_mask, *terms, dtype)
    return _forward(c, None if out is None else checks.output(out, c), wants_sums=False).output


def attention_forward(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    attn_mask: masks.Mask | ArrayLike | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    seed: int | None = None,
    out: Array | None = None,
    device: str | None = None,
    dtype: str | None = None,
    precision: str | None = None,
) -> AttentionCache:
    """As `scaled_dot_product_attention`, and remember what its gradients need.

    The parameters and errors are the same.

    Returns
    -------
    AttentionCache
        With the output, the logsumexp of each query's scores, and the weights on demand.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> x = np.eye(3)
    >>> cache = rv.attention_forward(x, x, x, is_causal=True)
    >>> cache.lse.shape, cache.weights(rows=0)
    ((3,), array([[1., 0., 0.]]))
    >>> float(rv.attention_backward(np.ones((3, 3)), cache).value.sum())
    9.0
    """
    terms = (dropout_p, is_causal, scale, enable_gqa, softcap, alibi_slopes, seed)
    if gpu.concerns(device, query, key, value):
        there = _on_gpu(precision, dtype, query, key, value, attn_mask, out, device, *terms)
        lse = there.given(there.lse)
        return AttentionCache(query, key, value, mask=attn_mask, output=there.result, lse=lse, record=there)
    c = _checked(precision, query, key, value, attn_mask, *terms, dtype)
    result = forward(c, None if out is None else checks.output(out, c))
    return AttentionCache(query, key, value, mask=attn_mask, output=result.output, lse=result.lse, record=result)


def attention_backward(
    grad_output: ArrayLike, cache: AttentionCache, grad_lse: ArrayLike | None = None
) -> InputGradients:
    """The gradients of a loss by query, key, value and float mask, given its gradient by the output.

    Parameters
    ----------
    grad_output : array (..., H, Lq, Dv)
        The gradient of the loss with respect to ``cache.output``.
    cache : AttentionCache
        Of `attention_forward`.
    grad_lse : array (..., H, Lq), optional
        The gradient with respect to ``cache.lse``, if the loss depends on it.

    Returns
    -------
    InputGradients

    Raises
    ------
    InvalidInputError, DimensionMismatchError
        If the gradients do not have the shapes and dtype of the results.

    Notes
    -----
    Weights are computed again, tile by tile, as in FlashAttention-2 (Dao, 2023); no array of Lq x Lk elements is formed
    unless a float mask of that size asks for its gradient.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> x = np.eye(4, dtype=np.float32)
    >>> gradients = rv.attention_backward(x, rv.attention_forward(x, x, x))
    >>> gradients.query.shape, gradients.bias
    ((4, 4), None)
    """
    past = cache.record if isinstance(cache, AttentionCache) else cache
    if getattr(past, "on_gpu", False):
        return past.backward(grad_output, grad_lse)  # type: ignore[union-attr]
    if not isinstance(past, Past):
        made_by = "built by hand" if isinstance(cache, AttentionCache) else f"a {type(cache).__name__}"
        hint = "give what attention_forward returned; a layer's cache goes to the layer's own backward"
        raise InvalidInputError(f"cache is {made_by if past is None or past is cache else 'of a layer'}", hint=hint)
    shape, c = past.output.shape, past.call
    grad = checks.gradient("grad_output", grad_output, shape, c.given)
    lse = None if grad_lse is None else checks.gradient("grad_lse", grad_lse, shape[:-1], c.arithmetic)
    return past.backward(grad, lse)


def merge(outputs: Sequence[ArrayLike], lses: Sequence[ArrayLike], *, dtype: str | None = None) -> tuple[Array, Array]:
    """The attention over all keys, from attentions of the same queries over disjoint parts of the keys. Exact.

    Parameters
    ----------
    outputs : sequence of arrays (..., Lq, Dv)
    lses : sequence of arrays (..., Lq)
        The logsumexp of each; a part where a query sees nothing has -inf there, and does not count.
    dtype : "bfloat16", optional
        What the bits of uint16 outputs mean.

    Returns
    -------
    output : array (..., Lq, Dv)
    lse : array (..., Lq)

    Raises
    ------
    InvalidInputError, DimensionMismatchError

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> q, k = np.ones((1, 4)), np.arange(24.0).reshape(6, 4) / 10
    >>> parts = [rv.attention_forward(q, half, half) for half in (k[:2], k[2:])]
    >>> output, lse = rv.merge([p.output for p in parts], [p.lse for p in parts])
    >>> np.allclose(output, rv.scaled_dot_product_attention(q, k, k))
    True
    """
    if not (isinstance(outputs, Iterable) and isinstance(lses, Iterable)):
        raise InvalidInputError("outputs and lses are sequences of arrays", hint="rv.merge([a, b], [lse_a, lse_b])")
    parts = [checks.from_sequence(f"outputs[{i}]", x) for i, x in enumerate(outputs)]
    logs = [checks.from_sequence(f"lses[{i}]", x) for i, x in enumerate(lses)]
    if not parts or len(parts) != len(logs):
        hint = "give one lse for each output, and at least one of both"
        raise InvalidInputError(f"{len(parts)} outputs and {len(logs)} lses", hint=hint)
    for i, (x, log) in enumerate(zip(parts, logs, strict=True)):
        shapes = {f"outputs[{i}].shape": x.shape, f"lses[{i}].shape": log.shape, "outputs[0].shape": parts[0].shape}
        if x.ndim < 2 or x.shape != parts[0].shape or log.shape != x.shape[:-1]:
            raise DimensionMismatchError(parts[0].shape, x.shape, shapes=shapes, hint="(..., Lq, Dv) and (..., Lq)")
        is_float = (
            x.dtype.kind == "f" or halves.is_bfloat16(x.dtype) or (dtype == "bfloat16" and x.dtype == halves.BITS)
        )
        if not is_float or log.dtype.kind != "f" or x.dtype != parts[0].dtype:
            dtypes = {f"outputs[{i}].dtype": x.dtype, f"lses[{i}].dtype": log.dtype, "outputs[0].dtype": parts[0].dtype}
            raise InvalidInputError("outputs and lses are floats of one kind", shapes=dtypes, hint="cast them")
    wide = [halves.widened(x) for x in parts]
    given = np.stack(logs).astype(np.float64, copy=False)
    output, shift, log = _merged(np.stack(wide), given, np.where(np.isneginf(given), given, 0))
    lse = shift + log
    return halves.rounded(output, parts[0].dtype), lse.astype(logs[0].dtype, copy=False)


def _on_gpu(precision: str | None, dtype: str | None, *arguments: Any) -> Any:
    """The same on a GPU, loaded when first wanted."""
    from . import gpu_dense

    if precision is not None:
        hint = "it is for float32 arrays on the CPU: cast them"
        raise InvalidInputError(f"precision is {precision!r}, and arrays are on a GPU", hint=hint)
    return gpu_dense.run(*arguments, dtype=dtype)


def _checked(precision: str | None, *arguments: Any) -> Call:
    """A checked call; one whose products shall be of bfloat16 has its arrays rounded."""
    c = checks.call(*arguments)
    if not checks.precision(precision, c):
        return c
    from .plan import dense as plan

    query, key, value = (plan.rounded(x, halves.BITS) for x in (c.query, c.key, c.value))
    return c._replace(query=query, key=key, value=value)


# --- from checked calls to plans -----------------------------------------------------------------------------------
class Past(NamedTuple):
    """A checked call and what came of it: what later questions about it need. It copies none of the call's arrays."""

    call: Call
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
        chosen = checks.rows(rows, c.query.shape[-2])
        shape = (*c.query.shape[:-2], len(chosen), c.key.shape[-2])
        checks.memory(shape, c.given, "weights")
        result = np.zeros(shape, c.given)
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
        shape = self.output.shape[:-1]
        lse = np.zeros(shape) if grad_lse is None else grad_lse.astype(np.float64, order="C")
        stored = self.call.query.dtype
        grad_output = (
            halves.stored(grad_output)
            if grad_output.itemsize == stored.itemsize
            else halves.rounded(grad_output, stored)
        )
        return _backward(self, grad_output, lse, wants_bias and self.call.seen.bias is not None)


def forward(c: Call, out: Array | None = None) -> Past:
    """A checked call's output, and what its weights and gradients will need."""
    return _forward(c, out, wants_sums=True)


@np.errstate(all="ignore")  # -inf - -inf is NaN, and such a part is not selected
def _merged(
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


def _forward(c: Call, out: Array | None, wants_sums: bool, by_tiles: bool = False) -> Past:
    from .plan import dense as plan  # at the first call, as it loads the kernels: 60 ms

    shape = c.output_shape
    out = memory.result(shape, c.given) if out is None else out
    sums = np.empty((*shape[:-1], 2)) if wants_sums else None
    top = np.empty(shape[:-1], c.arithmetic) if c.eps else None
    if 0 in c.query.shape[:-1] or 0 in c.key.shape[:-1]:
        out[...] = 0
        if sums is not None:
            sums[...] = 0, -np.inf
        return Past(c, out, sums, None if top is None else np.full_like(top, -np.inf))
    if not (c.query.shape[-1] and shape[-1]):
        wide = _forward(_with_channels(c), None, wants_sums, by_tiles)
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
    output, shift, log = _merged(parts.swapaxes(0, 1), shifts, logs, ready.unit, c.eps, top)
    output, top = output.reshape(shape), None if top is None else top.reshape(shape[:-1])
    out[...] = halves.rounded(output, out.dtype)
    sums = np.stack([shift, log], axis=-1).reshape(*shape[:-1], 2)
    return Past(c, out, sums, top, output if c.rounds else out, ready.unit)


def _by_tiles(past: Past) -> Past:
    """The sums and largest scores as weights and gradients form the scores.

    For few queries the forward pass sums a score in another order. The two differ by a rounding of the score, which
    for large scores is too much: weights would no longer sum to 1.
    """
    from .plan import dense as plan

    if not plan.is_few(plan.problem(past.call, past.output)):
        return past
    again = _forward(past.call, None, wants_sums=True, by_tiles=True)
    return again._replace(output=past.output, exact=past.exact)


def _with_channels(c: Call) -> Call:
    """The same attention where D or Dv is 0: scores of 0, values that nobody looks at."""

    def one(x: Array) -> Array:
        return x if x.shape[-1] else np.zeros((*x.shape[:-1], 1), x.dtype)

    return c._replace(query=one(c.query), key=one(c.key), value=one(c.value))


def _backward(past: Past, grad_output: Array, grad_lse: Array, wants_bias: bool) -> InputGradients:
    from .plan import dense as plan

    c, output = past.call, past.output if past.exact is None else past.exact
    shape_of_bias = () if c.seen.bias is None else c.seen.bias.shape
    bias = np.zeros(shape_of_bias, c.bias_given) if wants_bias else None
    D, Dv = c.query.shape[-1], c.value.shape[-1]
    if 0 in c.query.shape[:-1] or 0 in c.key.shape[:-1]:
        query, key, value = (np.zeros(x.shape, c.given) for x in (c.query, c.key, c.value))
        return InputGradients(query, key, value, bias)
    if not (D and Dv):
        none = np.zeros((*output.shape[:-1], 1), output.dtype)
        wide_past = past._replace(call=_with_channels(c), exact=output if Dv else none)
        wide = _backward(wide_past, grad_output if Dv else none.astype(c.query.dtype), grad_lse, wants_bias)
        return InputGradients(wide.query[..., :D], wide.key[..., :D], wide.value[..., :Dv], wide.bias)
    if grad_output.dtype != c.query.dtype:
        grad_output = plan.rounded(grad_output, c.query.dtype)
    elif c.query.dtype == halves.BITS and not plan.is_in_pairs(plan.layout(grad_output)):
        grad_output = np.ascontiguousarray(grad_output)
    problem, layout, again = plan.problem(c, output), plan.layout(grad_output), _by_tiles(past)
    ready, *others = plan.backward(problem, layout, plan.threads())
    given = dict(
        output=output, exact=output, sums=again.sums, top=again.top, grad_output=grad_output, grad_lse=grad_lse,
        **plan.staged(c, problem, ready),
    )  # fmt: skip
    made = _room_for_gradients(c)
    for each in (ready, *others):
        each(c, **made, **given)
    if bias is not None:
        ready, shape = plan.bias_backward(problem, layout)
        made_bias = np.zeros(shape, c.arithmetic)
        ready(c, grad_bias=made_bias, **given)
        bias = halves.rounded(_summed(made_bias, shape_of_bias), bias.dtype)
    if c.rounds:
        query, key, value = (made[f"rounded_{name}"].view(c.given) for name in ("query", "key", "value"))
        return InputGradients(query, key, value, bias)
    key, value = made["grad_key"][..., :D], made["grad_value"][..., :Dv]
    return InputGradients(made["grad_query"], np.ascontiguousarray(key), np.ascontiguousarray(value), bias)


def _room_for_gradients(c: Call) -> dict[str, Array]:
    """Where gradients are summed, those of keys and values in rows of whole vectors, and where they are rounded."""
    from .plan import dense as plan

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


def _queries(c: Call, rows: slice) -> Call:
    """The same call for some successive queries only."""
    seen, start = c.seen, rows.start

    def some(x: Array | None) -> Array | None:
        return x if x is None or x.ndim < 2 or x.shape[-2] == 1 else x[..., rows, :]

    there = replace(
        seen, first=seen.first + start, last=seen.last + start, offset=seen.offset + start, limits=some(seen.limits),
        allowed=some(seen.allowed), bias=some(seen.bias),
    )  # fmt: skip
    return c._replace(query=c.query[..., rows, :], seen=there)


def _weights(c: Call, sums: Array, result: Array) -> None:
    from .plan import dense as plan

    c = _with_channels(c)
    result = halves.stored(result)
    ready = plan.weights(problem := plan.problem(c, result))
    more = plan.staged(c, problem, ready)
    ready(c, sums=np.ascontiguousarray(sums), output=result, exact=result, **more)
