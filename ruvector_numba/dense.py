"""Dense attention on NumPy arrays: forward, backward, weights, and the union of attentions over disjoint keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import checks, gpu, halves, masks
from .arrays import Array, Shape
from .dense_call import DenseCall
from .dense_past import Past, forward, merged
from .errors import DimensionMismatchError, InvalidInputError
from .results import AttentionCache, InputGradients, read_only
from .values import switch

__all__ = [
    "attention_backward",
    "attention_forward",
    "merge",
    "scaled_dot_product_attention",
]

_Arrays = tuple[Any, Any, Any, Any]  # query, key, value and mask, as the caller gave them


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
    InvalidInputError
        If an array has fewer than two axes or none of these dtypes, the three differ in dtype or number of axes, an
        option has a wrong type or value, or `out` has another dtype, cannot be written to or overlaps an input.
    DimensionMismatchError
        If sizes of the arrays that must agree do not, or `out` has another shape than the result.
    InvalidMaskError
        If `attn_mask` does not fit the scores, or is neither bool nor of the inputs' dtype; beside half precision
        float32 will do.
    OutOfMemoryError
        If the result is larger than this machine's memory. All these are raised before any work; nothing is modified.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> q = k = np.eye(2, dtype=np.float32)
    >>> rv.scaled_dot_product_attention(q, k, np.ones((2, 3), np.float32), is_causal=True)
    array([[1., 1., 1.],
           [1., 1., 1.]], dtype=float32)
    """
    options: dict[str, Any] = dict(
        dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, softcap=softcap,
        alibi_slopes=alibi_slopes, seed=seed,
    )  # fmt: skip
    if gpu.concerns(device, query, key, value):
        return _on_gpu((query, key, value, attn_mask), out, device, dtype, precision, options).result
    c = _checked((query, key, value, attn_mask), dtype, precision, options)
    return forward(c, checks.check_output(out, c), wants_sums=False).output


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

    Parameters
    ----------
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        As in `scaled_dot_product_attention`.
    softcap, alibi_slopes, seed, device, dtype, precision
        As in `scaled_dot_product_attention`.
    out : array (..., H, Lq, Dv), optional
        Where to write the result; it must not overlap an input. The cache refers to it: use it for nothing else before
        the backward pass.

    Returns
    -------
    AttentionCache
        With the output, the logsumexp of each query's scores, and the weights on demand. It refers to query, key,
        value, mask and output and copies none: change none of them in place before the backward pass. The output is
        read-only, unless it is `out`.

    Raises
    ------
    InvalidInputError, DimensionMismatchError, InvalidMaskError, OutOfMemoryError
        As in `scaled_dot_product_attention`.

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
    options: dict[str, Any] = dict(
        dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, softcap=softcap,
        alibi_slopes=alibi_slopes, seed=seed,
    )  # fmt: skip
    if gpu.concerns(device, query, key, value):
        there = _on_gpu((query, key, value, attn_mask), out, device, dtype, precision, options)
        lse = there.home(there.lse)
        return AttentionCache(query, key, value, mask=attn_mask, output=there.result, lse=lse, record=there)
    c = _checked((query, key, value, attn_mask), dtype, precision, options)
    result = forward(c, checks.check_output(out, c))
    output = read_only(result.output) if out is None else result.output
    return AttentionCache(query, key, value, mask=attn_mask, output=output, lse=result.lse, record=result)


def attention_backward(
    grad_output: ArrayLike, cache: AttentionCache, grad_lse: ArrayLike | None = None, *, wants_bias: bool = True
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
    wants_bias : bool
        False if nobody asks for the gradient of a float mask, which is a pass of its own: `bias` is None then, and the
        rest is done in some two thirds of the time.

    Returns
    -------
    InputGradients

    Raises
    ------
    InvalidInputError
        If `cache` is not one of `attention_forward`, or a gradient has another dtype than its result.
    DimensionMismatchError
        If a gradient has another shape than its result.
    OutOfMemoryError
        If a gradient is larger than this machine's memory, as that of an array that was broadcast may be.

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
        return past.backward(grad_output, grad_lse, switch("wants_bias", wants_bias))  # type: ignore[union-attr]
    if not isinstance(past, Past):
        made_by = "built by hand" if isinstance(cache, AttentionCache) else f"a {type(cache).__name__}"
        hint = "give what attention_forward returned; a layer's cache goes to the layer's own backward"
        raise InvalidInputError(f"cache is {made_by if past is None or past is cache else 'of a layer'}", hint=hint)
    shape, c = past.output.shape, past.call
    grad = checks.gradient("grad_output", grad_output, shape, c.dtype)
    lse = None if grad_lse is None else checks.gradient("grad_lse", grad_lse, shape[:-1], c.arithmetic)
    return past.backward(grad, lse, switch("wants_bias", wants_bias))


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
    InvalidInputError
        If there is not one lse for each output, and at least one of both; if an array holds no floats, or the outputs
        have fewer than two axes or differ in dtype.
    DimensionMismatchError
        If the outputs differ in shape, or an lse has not the shape of its output without the last axis.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> q, k = np.ones((1, 4)), np.arange(24.0).reshape(6, 4) / 10
    >>> parts = [rv.attention_forward(q, half, half) for half in (k[:2], k[2:])]
    >>> output, lse = rv.merge([p.output for p in parts], [p.lse for p in parts])
    >>> np.allclose(output, rv.scaled_dot_product_attention(q, k, k))
    True
    """
    if not all(isinstance(x, Iterable) and getattr(x, "ndim", 1) for x in (outputs, lses)):
        raise InvalidInputError("outputs and lses are sequences of arrays", hint="rv.merge([a, b], [lse_a, lse_b])")
    parts = [checks.from_sequence(f"outputs[{i}]", x) for i, x in enumerate(outputs)]
    logs = [checks.from_sequence(f"lses[{i}]", x) for i, x in enumerate(lses)]
    if not parts or len(parts) != len(logs):
        hint = "give one lse for each output, and at least one of both"
        raise InvalidInputError(f"{len(parts)} outputs and {len(logs)} lses", hint=hint)
    for i, (x, log) in enumerate(zip(parts, logs, strict=True)):
        _check_part(i, x.shape, log.shape, parts[0].shape)
        if dtype is not None:
            checks.check_bits(f"outputs[{i}]", x, dtype)
        is_float = x.dtype.kind == "f" or halves.is_bfloat16(x.dtype) or dtype is not None
        if not is_float or log.dtype.kind != "f" or x.dtype != parts[0].dtype:
            dtypes = {f"outputs[{i}].dtype": x.dtype, f"lses[{i}].dtype": log.dtype, "outputs[0].dtype": parts[0].dtype}
            raise InvalidInputError("outputs and lses are floats of one kind", shapes=dtypes, hint="cast them")
    wide = [halves.widened(x) for x in parts]
    stacked = np.stack(logs).astype(np.float64, copy=False)
    output, shift, log = merged(np.stack(wide), stacked, np.where(np.isneginf(stacked), stacked, 0))
    lse = shift + log
    return halves.rounded(output, parts[0].dtype), lse.astype(logs[0].dtype, copy=False)


def _check_part(i: int, output: Shape, lse: Shape, first: Shape) -> None:
    """Do the shapes of one output and its lse fit each other, and the first output?"""
    shapes = {f"outputs[{i}].shape": output, f"lses[{i}].shape": lse, "outputs[0].shape": first}
    hint = "outputs are (..., Lq, Dv), lses (..., Lq)"
    if len(output) < len(lse) and lse[:-1] == output:
        raise DimensionMismatchError(lse[:-1], lse, shapes=shapes, hint="are outputs and lses swapped?")
    if len(output) < 2:
        raise InvalidInputError(f"outputs[{i}] has {len(output)} axes", shapes=shapes, hint=hint)
    if output != first:
        raise DimensionMismatchError(first, output, shapes=shapes, hint=hint)
    if lse != output[:-1]:
        shapes = {f"outputs[{i}].shape": output, f"lses[{i}].shape": lse, "expected": output[:-1]}
        raise DimensionMismatchError(output[:-1], lse, shapes=shapes, hint=hint)


def _on_gpu(
    arrays: _Arrays, out: Any, device: str | None, dtype: str | None, precision: str | None, options: dict[str, Any]
) -> Any:
    """The same on a GPU, loaded when first wanted."""
    from .gpu import dense as gpu_dense

    if precision is not None:
        hint = "it is for float32 arrays on the CPU: cast them"
        raise InvalidInputError(f"precision is {precision!r}, and arrays are on a GPU", hint=hint)
    return gpu_dense.run(*arrays, out, device, dtype, options)


def _checked(arrays: _Arrays, dtype: str | None, precision: str | None, options: dict[str, Any]) -> DenseCall:
    """A checked call; for precision="bfloat16" the arrays are rounded first."""
    c = checks.call(*arrays, **options, dtype=dtype)
    if not checks.rounds_products(precision, c):
        return c
    from .plan import dense as plan

    query, key, value = (plan.rounded(x, halves.BITS) for x in (c.query, c.key, c.value))
    return c._replace(query=query, key=key, value=value)
