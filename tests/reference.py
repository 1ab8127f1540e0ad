"""The specification: attention and its gradients in plain NumPy and float64, written to be read.

Nothing here comes from the package. Arrays are (..., H, L, D), or (L, D) for one head; key heads are repeated where
there are fewer of them than query heads. The order of a score is

    s = scale * q.k  ->  softcap: cap * tanh(s / cap)  ->  + bias - slope * |i + offset - j|  ->  mask  ->  softmax

What is hidden (by `visible`, or by a bias of -inf) is selected out, never multiplied by zero, so NaN or infinity there
reaches nothing. What is seen follows IEEE arithmetic: a NaN score, or one of +inf, makes its row NaN, and a seen value
of NaN does so too, even where its weight has underflowed to 0 or dropout has dropped it. A score of -inf that comes
from the data has weight 0. A row with no score above -inf has output 0, weights 0, lse -inf and gradients 0.

With `dtype` the same formula runs in another precision: `naive32` and `naive32_gradients` are the yardstick for
"error at most 2x that of the same-precision naive formula".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

Array = NDArray[Any]
_ieee = np.errstate(all="ignore")  # inf - inf is NaN and log(0) is -inf: these are the answers, not accidents


class Scores(NamedTuple):
    """What forward and backward share; all of shape (..., H, Lq, Lk) but key and value."""

    query: Array
    key: Array  # repeated to the number of query heads, as is value
    value: Array
    scale: Any
    through_cap: Array | None  # the derivative of the softcap, if there is one
    seen: NDArray[np.bool_]
    final: Array  # -inf where not seen


@_ieee
def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    visible: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    slopes: ArrayLike | None = None,
    offset: int = 0,
    keep: ArrayLike | None = None,
    eps: float = 0.0,
    dtype: DTypeLike = np.float64,
) -> tuple[Array, Array, Array]:
    """Exact attention.

    Parameters
    ----------
    visible : bool, broadcasts to (..., H, Lq, Lk)
        True where query i may attend to key j.
    bias : float, broadcasts likewise
        Added to the scores; -inf hides.
    slopes : float (H,), or any shape that broadcasts to (..., H)
        ALiBi: slope * abs(i + offset - j) is taken off.
    keep : float, broadcasts as bias does
        What dropout multiplies the weights with: 0, or 1 / (1 - p).
    eps : float
        What the layers add to the sum of exp(score - largest score).
    dtype
        The precision of every step.

    Returns
    -------
    output : (..., H, Lq, Dv)
    lse : (..., H, Lq)
        The natural logarithm of the sum of exp(score).
    weights : (..., H, Lq, Lk)
        Before dropout; they sum to 1, or are all 0 for an empty row, and are 0 where not seen.
    """
    s = _scores(query, key, value, visible, bias, scale, softcap, slopes, offset, np.dtype(dtype))
    weights, lse = _softmax(s, eps)
    return _selected_product(_dropped(weights, keep), s.value, s.seen), lse, weights


@_ieee
def gradients(
    grad_output: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    grad_lse: ArrayLike | None = None,
    visible: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    slopes: ArrayLike | None = None,
    offset: int = 0,
    keep: ArrayLike | None = None,
    dtype: DTypeLike = np.float64,
) -> dict[str, Array]:
    """The gradients of sum(grad_output * output) + sum(grad_lse * lse).

    Returns
    -------
    dict
        ``query``, ``key``, ``value``: of the shapes of the inputs. ``scores``: (..., H, Lq, Lk), with respect to the
        scores that enter the softmax, so it is also the gradient of a bias of that full shape: reduce it with
        `reduce_to` over what a smaller bias was broadcast along. 0 where not seen.
    """
    dtype = np.dtype(dtype)
    s = _scores(query, key, value, visible, bias, scale, softcap, slopes, offset, dtype)
    p, _ = _softmax(s)
    do = np.asarray(grad_output, dtype)

    dv = _selected_product(_transposed(_dropped(p, keep)), do, _transposed(s.seen))
    dp = np.where(s.seen, _dropped(do @ _transposed(s.value), keep), 0)
    delta = np.where(s.seen, p * dp, 0).sum(-1, keepdims=True)
    ds = dp - delta
    if grad_lse is not None:
        ds = ds + np.asarray(grad_lse, dtype)[..., None]  # the derivative of lse by a score is its weight
    ds = np.where(s.seen, p * ds, 0)

    raw = ds if s.through_cap is None else np.where(s.seen, ds * s.through_cap, 0)
    dq = s.scale * _selected_product(raw, s.key, s.seen)
    dk = s.scale * _selected_product(_transposed(raw), s.query, _transposed(s.seen))
    return {
        "query": dq,
        "key": _summed_over_groups(dk, np.shape(key)),
        "value": _summed_over_groups(dv, np.shape(value)),
        "scores": ds,
    }


def multi_head(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    parameters: Mapping[str, ArrayLike],
    heads: int,
    **terms: Any,
) -> tuple[Array, Array]:
    """Multi-head attention on (B, L, channels): heads of x w + b attend, are joined, and go through w_o.

    Returns
    -------
    output : (B, Lq, d)
    weights : (B, heads, Lq, Lk)
    """
    p = {name: np.asarray(x, np.float64) for name, x in parameters.items()}

    def projected(x: ArrayLike, name: str) -> Array:
        y: Array = np.asarray(x, np.float64) @ p[f"w_{name}"] + p.get(f"b_{name}", 0)
        return y

    def split(x: Array) -> Array:
        return np.swapaxes(x.reshape(*x.shape[:2], heads, -1), 1, 2)

    q, k, v = (split(projected(x, name)) for x, name in ((query, "q"), (key, "k"), (value, "v")))
    output, _, weights = attention(q, k, v, **terms)
    return projected(np.swapaxes(output, 1, 2).reshape(*np.shape(query)[:2], -1), "o"), weights


def naive32(query: Array, key: Array, value: Array, **terms: Any) -> tuple[Array, Array, Array]:
    """`attention` with every step in the precision of `query`: softmax(q k^T) v as anyone would write it in NumPy."""
    return attention(query, key, value, **terms, dtype=query.dtype)


def naive32_gradients(grad_output: Array, query: Array, key: Array, value: Array, **terms: Any) -> dict[str, Array]:
    """`gradients` with every step in the precision of `query`."""
    return gradients(grad_output, query, key, value, **terms, dtype=query.dtype)


def reduce_to(gradient: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of an array of `shape` that was broadcast to the shape of `gradient`: the sum over the copies."""
    added = gradient.ndim - len(shape)
    stretched = tuple(added + axis for axis, n in enumerate(shape) if n == 1)
    summed: Array = gradient.sum(axis=(*range(added), *stretched)).reshape(shape)
    return summed


def central_differences(f: Callable[[Array], Any], x: ArrayLike, eps: float = 1e-6) -> Array:
    """The gradient of the scalar function f at x, one element at a time, with an error of the order of eps**2."""
    x = np.array(x, np.float64)
    gradient = np.empty_like(x)
    for at in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[at] += eps
        below[at] -= eps
        gradient[at] = (f(above) - f(below)) / (above[at] - below[at])
    return gradient


def _scores(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    visible: ArrayLike | None,
    bias: ArrayLike | None,
    scale: float | None,
    softcap: float | None,
    slopes: ArrayLike | None,
    offset: int,
    dtype: np.dtype[Any],
) -> Scores:
    q, k, v = (np.asarray(array, dtype) for array in (query, key, value))
    k, v = _repeated(k, q), _repeated(v, q)
    Lq, Lk = q.shape[-2], k.shape[-2]
    scale = dtype.type(q.shape[-1] ** -0.5 if scale is None else scale)

    s = scale * (q @ _transposed(k))
    seen = np.broadcast_to(True if visible is None else np.asarray(visible, bool), s.shape)
    through_cap = None
    if softcap is not None:
        t = np.tanh(s / dtype.type(softcap))
        s, through_cap = dtype.type(softcap) * t, 1 - t * t
    if bias is not None:
        bias = np.asarray(bias, dtype)
        s = s + bias
        seen = seen & ~np.isneginf(bias)
    if slopes is not None:
        distance = np.abs(np.arange(Lq)[:, None] + offset - np.arange(Lk)).astype(dtype)
        s = s - np.asarray(slopes, dtype)[..., None, None] * distance
    return Scores(q, k, v, scale, through_cap, seen, np.where(seen, s, -np.inf).astype(dtype))


def _softmax(s: Scores, eps: float = 0.0) -> tuple[Array, Array]:
    """The weights and the logarithm of their denominator."""
    maximum = s.final.max(axis=-1, keepdims=True, initial=-np.inf)
    shift = np.where(np.isneginf(maximum), 0, maximum)  # an empty row: exp(-inf - 0) is 0, exp(-inf + inf) is not
    e = np.exp(s.final - shift)
    total = e.sum(axis=-1, keepdims=True)
    total = np.where(total == 0, 0, total + e.dtype.type(eps))
    weights = np.where(s.seen & (total != 0), e / total, 0)
    return weights, (np.log(total) + shift)[..., 0]


def _selected_product(weights: Array, rows: Array, seen: NDArray[np.bool_]) -> Array:
    """weights @ rows, to which a slot that is not seen adds nothing, whatever it holds; weights are 0 there."""
    if np.isfinite(rows).all():
        product: Array = weights @ rows
        return product
    total = np.zeros((*weights.shape[:-1], rows.shape[-1]), np.result_type(weights, rows))
    for j in range(rows.shape[-2]):
        total += np.where(seen[..., j, None], weights[..., j, None] * rows[..., None, j, :], 0)
    return total


def _dropped(weights: Array, keep: ArrayLike | None) -> Array:
    return weights if keep is None else weights * np.asarray(keep, weights.dtype)


def _transposed(x: Array) -> Array:
    return np.swapaxes(x, -1, -2)


def _repeated(x: Array, query: Array) -> Array:
    """Key or value, each head as often as query heads share it: query head h reads key head h // G."""
    return x if x.ndim < 3 else np.repeat(x, query.shape[-3] // max(1, x.shape[-3]), axis=-3)


def _summed_over_groups(gradient: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of key or value: the sum over the query heads that share a head."""
    if len(shape) < 3 or 0 in shape:
        return gradient.reshape(shape)
    G = gradient.shape[-3] // shape[-3]
    summed: Array = gradient.reshape(*shape[:-2], G, *shape[-2:]).sum(axis=-3)
    return summed
