"""The steps of attention as functions, each with its gradients, for people who compose their own.

>>> import numpy as np, ruvector_numba as rv
>>> query, key, value = np.random.default_rng(0).standard_normal((3, 2, 4, 10, 8))
>>> scores = rv.functional.attention_scores(query, key)  # scale * query key^T
>>> masked = rv.functional.apply_mask(scores, is_causal=True)  # -inf where hidden
>>> weights = rv.functional.softmax(masked)  # rows sum to 1
>>> output = rv.functional.weighted_sum(weights, value)  # weights value
>>> np.allclose(output, rv.scaled_dot_product_attention(query, key, value, is_causal=True))
True

and back again, from the gradient of a loss by the output; each takes the gradient first, then what the step was given
(a softmax, what it gave):

>>> grad_output = np.ones_like(output)
>>> grad_weights, grad_value = rv.functional.weighted_sum_backward(grad_output, weights, value)
>>> grad_masked = rv.functional.softmax_backward(grad_weights, weights)
>>> grad_scores, grad_bias = rv.functional.apply_mask_backward(grad_masked, is_causal=True)
>>> grad_query, grad_key = rv.functional.attention_scores_backward(grad_scores, query, key)
>>> whole = rv.attention_backward(grad_output, rv.attention_forward(query, key, value, is_causal=True))
>>> np.allclose(grad_query, whole.query) and np.allclose(grad_key, whole.key) and np.allclose(grad_value, whole.value)
True

Between any two steps you may do something else: another score, a penalty on the weights, a dropout of your own.
`scaled_dot_product_attention` does all of it in one pass, faster, without an array of Lq x Lk: use it where it does
what you want.

Arrays are (..., L, D) with any strides, float32 or float64, and are only read. Leading axes must be equal
(`numpy.broadcast_to` repeats one without a copy). Results are new arrays, with the same bits on any number of threads
and in any batch.

Hidden is -inf among scores, and exactly 0 among weights and among gradients of scores. A 0 there selects: what it would
multiply counts for nothing, be it NaN. So nothing hidden leaks, in either direction. A weight that has underflowed to 0
looks the same, and the step after the softmax cannot tell: of a key that a query sees with weight 0, NaN in the value
makes the row NaN in `scaled_dot_product_attention`, and does not here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks, masks, visibility
from .arrays import Array, Shape
from .errors import DimensionMismatchError, InvalidInputError
from .plan import memory
from .values import check_memory, real_number, switch

__all__ = [
    "apply_mask",
    "apply_mask_backward",
    "attention_scores",
    "attention_scores_backward",
    "softmax",
    "softmax_backward",
    "weighted_sum",
    "weighted_sum_backward",
]


def __dir__() -> list[str]:
    return __all__


# --- scores --------------------------------------------------------------------------------------------------------


def attention_scores(query: ArrayLike, key: ArrayLike, scale: float | None = None) -> Array:
    """scale * query key^T: how well each query fits each key.

    Parameters
    ----------
    query : array (..., Lq, D), float32 or float64
    key : array (..., Lk, D)
        Of the same leading axes and dtype.
    scale : float, optional
        1 / sqrt(D) by default.

    Returns
    -------
    array (..., Lq, Lk)

    Raises
    ------
    InvalidInputError
        If an array has fewer than two axes or is neither float32 nor float64, the two differ in dtype or number of
        axes, or `scale` is no finite number that the dtype can hold.
    DimensionMismatchError
        If the arrays differ in D or in their leading axes.
    OutOfMemoryError
        If the result is larger than this machine's memory.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> rv.functional.attention_scores(np.eye(2), np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), scale=1)
    array([[1., 3., 5.],
           [2., 4., 6.]])
    """
    query, key = _query_and_key(query, key)
    return _product(query, _transposed(key), _scale(scale, query))


def attention_scores_backward(
    grad_scores: ArrayLike, query: ArrayLike, key: ArrayLike, scale: float | None = None
) -> tuple[Array, Array]:
    """The gradients of `attention_scores`: scale * grad_scores key, and scale * grad_scores^T query.

    Parameters
    ----------
    grad_scores : array (..., Lq, Lk)
        The gradient of a loss by the scores. Where it is 0, as for what is hidden, query and key do not matter.
    query, key, scale
        As they were given to `attention_scores`.

    Returns
    -------
    grad_query : array (..., Lq, D)
    grad_key : array (..., Lk, D)

    Raises
    ------
    InvalidInputError, DimensionMismatchError, OutOfMemoryError
        As in `attention_scores`; also if `grad_scores` has another dtype or shape than the scores.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> query, key = np.ones((1, 3)), np.eye(2, 3)
    >>> grad_query, grad_key = rv.functional.attention_scores_backward(np.ones((1, 2)), query, key, scale=2)
    >>> grad_query
    array([[2., 2., 0.]])
    """
    query, key = _query_and_key(query, key)
    grad = checks.gradient("grad_scores", grad_scores, (*query.shape[:-1], key.shape[-2]), query.dtype)
    scale = _scale(scale, query)
    for x in query, key:
        check_memory(x.shape, x.dtype, "gradient")
    return _product(grad, key, scale, selects=True), _product(_transposed(grad), query, scale, selects=True)


# --- mask ----------------------------------------------------------------------------------------------------------


def apply_mask(scores: ArrayLike, attn_mask: masks.Mask | ArrayLike | None = None, is_causal: bool = False) -> Array:
    """The scores, with -inf where a query may not see a key, and plus the mask where it is a float array.

    Parameters
    ----------
    scores : array (..., H, Lq, Lk), float32 or float64
    attn_mask : bool array, float array, or mask of `ruvector_numba.masks`, optional
        Arrays broadcast to the scores. True attends; a float is added to the score, and -inf hides.
    is_causal : bool
        Query i sees keys j <= i only, counted from the top left. Composes with `attn_mask`.

    Returns
    -------
    array (..., H, Lq, Lk)
        What is hidden is -inf whatever the score was, NaN too.

    Raises
    ------
    InvalidInputError
        If `scores` has fewer than two axes or is neither float32 nor float64, or `is_causal` is neither True nor False.
    InvalidMaskError
        If the mask does not fit the scores, or is neither bool nor of their dtype.
    OutOfMemoryError
        If the result is larger than this machine's memory.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> rv.functional.apply_mask(np.ones((2, 3)), [[True, True, False]], is_causal=True)
    array([[  1., -inf, -inf],
           [  1.,   1., -inf]])
    """
    scores = _array("scores", scores, "(..., H, Lq, Lk), or (Lq, Lk)")
    return _masked(scores, _resolved(scores, attn_mask, is_causal), adds=True)


def apply_mask_backward(
    grad_masked: ArrayLike, attn_mask: masks.Mask | ArrayLike | None = None, is_causal: bool = False
) -> tuple[Array, Array | None]:
    """The gradients of `apply_mask`: grad_masked, and 0 where a score was hidden.

    Parameters
    ----------
    grad_masked : array (..., H, Lq, Lk)
        The gradient of a loss by the masked scores.
    attn_mask, is_causal
        As they were given to `apply_mask`.

    Returns
    -------
    grad_scores : array (..., H, Lq, Lk)
    grad_bias : array or None
        Of the float mask, summed over what it was broadcast along; None if there was none.

    Raises
    ------
    InvalidInputError, InvalidMaskError, OutOfMemoryError
        As in `apply_mask`, if what it says of `scores` is so of `grad_masked`.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> bias = np.array([0.5, -np.inf])
    >>> grad_scores, grad_bias = rv.functional.apply_mask_backward(np.ones((3, 2)), bias)
    >>> grad_bias
    array([3., 0.])
    """
    grad = _array("grad_masked", grad_masked, "(..., H, Lq, Lk), or (Lq, Lk)")
    seen = _resolved(grad, attn_mask, is_causal)
    grad_scores = _masked(grad, seen, adds=False)
    return grad_scores, None if seen.bias is None else _summed_to(grad_scores, seen.bias.shape)


# --- softmax -------------------------------------------------------------------------------------------------------


def softmax(scores: ArrayLike, eps: float = 0.0) -> Array:
    """exp(score - m) / (sum of exp(score - m) + eps), where m is the largest score of the row.

    Parameters
    ----------
    scores : array (..., Lq, Lk), float32 or float64
        -inf for what is hidden.
    eps : float
        0 or more. With it rows sum to a little less than 1.

    Returns
    -------
    array (..., Lq, Lk)
        Exactly 0 where a score is -inf. A row of nothing else is all 0, not NaN.

    Raises
    ------
    InvalidInputError
        If `scores` has fewer than two axes or is neither float32 nor float64, or `eps` is negative, or no number that
        the dtype can hold.
    OutOfMemoryError
        If the result is larger than this machine's memory.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> rv.functional.softmax([[0, 0], [0, -np.inf], [-np.inf, -np.inf]])
    array([[0.5, 0.5],
           [1. , 0. ],
           [0. , 0. ]])
    """
    from .plan import functional as plan

    scores = _array("scores", scores, "(..., Lq, Lk)")
    eps = _eps(eps, scores.dtype)
    weights = _room(scores.shape, scores.dtype)
    if weights.size:
        plan.softmax(scores.dtype, plan.layout(scores), eps)(given=scores, weights=weights)
    return weights


def softmax_backward(grad_weights: ArrayLike, weights: ArrayLike, eps: float = 0.0) -> Array:
    """The gradient of `softmax`: weights * (grad_weights - the sum of weights * grad_weights over the row).

    Parameters
    ----------
    grad_weights : array (..., Lq, Lk)
        The gradient of a loss by the weights. Where a weight is 0, as for what is hidden, it does not matter.
    weights : array (..., Lq, Lk)
        What `softmax` gave.
    eps : float
        As it was given to `softmax`. The largest score, which decides how much eps counts, then bears the rest of
        the gradient; equal ones share it.

    Returns
    -------
    array (..., Lq, Lk)
        The gradient by the scores, exactly 0 where a weight is 0.

    Raises
    ------
    InvalidInputError, OutOfMemoryError
        As in `softmax`, of `weights`; InvalidInputError also if `grad_weights` has another dtype than they.
    DimensionMismatchError
        If `grad_weights` has another shape than `weights`.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> rv.functional.softmax_backward([[1.0, 0.0, np.nan]], [[0.5, 0.5, 0.0]])
    array([[ 0.25, -0.25,  0.  ]])
    """
    from .plan import functional as plan

    weights = _array("weights", weights, "(..., Lq, Lk)")
    eps = _eps(eps, weights.dtype)
    grad = checks.gradient("grad_weights", grad_weights, weights.shape, weights.dtype)
    grad_scores = _room(weights.shape, weights.dtype)
    if weights.size:
        ready = plan.softmax_backward(weights.dtype, plan.layout(grad), plan.layout(weights), eps)
        ready(given=grad, weights=weights, grad_scores=grad_scores)
    return grad_scores


# --- weighted sum --------------------------------------------------------------------------------------------------


def weighted_sum(weights: ArrayLike, value: ArrayLike) -> Array:
    """weights value: for each query the sum of the values, each times its weight.

    Parameters
    ----------
    weights : array (..., Lq, Lk), float32 or float64
        Where a weight is exactly 0 the value adds nothing, be it NaN or infinite.
    value : array (..., Lk, Dv)
        Of the same leading axes and dtype.

    Returns
    -------
    array (..., Lq, Dv)

    Raises
    ------
    InvalidInputError
        If an array has fewer than two axes or is neither float32 nor float64, or the two differ in dtype or number of
        axes.
    DimensionMismatchError
        If the arrays differ in Lk or in their leading axes.
    OutOfMemoryError
        If the result is larger than this machine's memory.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> rv.functional.weighted_sum([[0.5, 0.5, 0.0]], [[1.0, 2.0], [3.0, 4.0], [np.nan, np.inf]])
    array([[2., 3.]])
    """
    weights, value = _weights_and_value(weights, value)
    return _product(weights, value, selects=True)


def weighted_sum_backward(grad_output: ArrayLike, weights: ArrayLike, value: ArrayLike) -> tuple[Array, Array]:
    """The gradients of `weighted_sum`: grad_output value^T, and weights^T grad_output.

    Parameters
    ----------
    grad_output : array (..., Lq, Dv)
        The gradient of a loss by the output. Where a weight is 0 it adds nothing to the gradient of that value.
    weights, value
        As they were given to `weighted_sum`.

    Returns
    -------
    grad_weights : array (..., Lq, Lk)
        Where a weight is 0 this is still how the loss would change with it: NaN, if the value is. `softmax_backward`
        does not look at it there.
    grad_value : array (..., Lk, Dv)

    Raises
    ------
    InvalidInputError, DimensionMismatchError, OutOfMemoryError
        As in `weighted_sum`; also if `grad_output` has another dtype or shape than the output.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> weights, value = [[0.9, 0.1]], [[1.0, 2.0], [3.0, 4.0]]
    >>> grad_weights, grad_value = rv.functional.weighted_sum_backward(np.ones((1, 2)), weights, value)
    >>> grad_weights, grad_value[0]
    (array([[3., 7.]]), array([0.9, 0.9]))
    """
    weights, value = _weights_and_value(weights, value)
    grad = checks.gradient("grad_output", grad_output, (*weights.shape[:-1], value.shape[-1]), weights.dtype)
    check_memory(value.shape, value.dtype, "gradient")
    return _product(grad, _transposed(value)), _product(_transposed(weights), grad, selects=True)


# --- from checked arrays to kernels --------------------------------------------------------------------------------


def _product(left: Array, right: Array, scale: float = 1.0, selects: bool = False) -> Array:
    """left right * scale; `selects` where 0 in left adds nothing."""
    from .plan import functional as plan  # at the first call, as it loads the kernels

    out = _room((*left.shape[:-1], right.shape[-1]), left.dtype)
    if out.size:
        plan.product(left.dtype, plan.layout(left), plan.layout(right), scale, selects)(left=left, right=right, out=out)
    return out


def _masked(x: Array, seen: visibility.Visibility, adds: bool) -> Array:
    """Where seen x, plus the bias if it `adds`; elsewhere -inf, or else 0."""
    from .plan import functional as plan

    out = _room(x.shape, x.dtype)
    if out.size == 0:
        return out
    allowed = np.ones((1, 1), np.bool_) if seen.allowed is None else seen.allowed
    if seen.bias is not None:
        allowed = np.asarray(allowed & ~np.isneginf(seen.bias))
    bias = np.zeros((1, 1), x.dtype) if seen.bias is None or not adds else seen.bias
    hidden = -math.inf if adds else 0.0
    ready = plan.mask(x.dtype, plan.layout(x), plan.layout(bias), plan.layout(allowed), hidden)
    ready(scores=x, bias=bias, allowed=allowed.view(np.uint8), limits=_limits(x.shape, seen), out=out)
    return out


def _limits(scores: Shape, seen: visibility.Visibility) -> NDArray[np.int64]:
    """(..., Lq, 2): the first key that each query of each head may see, and the first that it no longer may."""
    Lq, Lk = scores[-2:]
    limits, i = np.empty((*scores[:-1], 2), np.int64), np.arange(Lq)
    limits[..., 0], limits[..., 1] = np.maximum(0, i + seen.first), np.minimum(Lk, i + seen.last)
    if seen.limits is not None:
        given = seen.limits if len(scores) < 3 else seen.limits[..., None, :, :]  # the same for all heads
        np.maximum(limits[..., 0], given[..., 0], out=limits[..., 0])
        np.minimum(limits[..., 1], given[..., 1], out=limits[..., 1])
    return limits


def _summed_to(gradient: Array, shape: Shape) -> Array:
    """The gradient of what was broadcast from `shape`: the sum over its copies."""
    gradient = gradient if gradient.ndim > 2 else gradient[None]  # scores without heads, whose mask may have an axis
    added = gradient.ndim - len(shape)
    stretched = tuple(added + axis for axis, n in enumerate(shape) if n == 1)
    return np.asarray(gradient.sum(axis=(*range(added), *stretched))).reshape(shape)


def _room(shape: Shape, dtype: np.dtype[Any]) -> Array:
    """An array for a result. Arrays that are broadcast take no memory; what is computed of them may take too much."""
    check_memory(shape, dtype, "result", "scaled_dot_product_attention needs no array of Lq x Lk")
    return memory.result(shape, dtype)


def _transposed(x: Array) -> Array:
    return x.swapaxes(-1, -2)


# --- checks --------------------------------------------------------------------------------------------------------


def _query_and_key(query: ArrayLike, key: ArrayLike) -> tuple[Array, Array]:
    query, key = _array("query", query, "(..., Lq, D)"), _array("key", key, "(..., Lk, D)")
    _check_pair({"query": query, "key": key}, -1, -1, "query and key share their last axis, D")
    return query, key


def _weights_and_value(weights: ArrayLike, value: ArrayLike) -> tuple[Array, Array]:
    weights, value = _array("weights", weights, "(..., Lq, Lk)"), _array("value", value, "(..., Lk, Dv)")
    hint = "one value for each key: weights are (..., Lq, Lk), value is (..., Lk, Dv)"
    _check_pair({"weights": weights, "value": value}, -1, -2, hint)
    return weights, value


def _array(name: str, x: ArrayLike, form: str) -> Array:
    array = checks.from_sequence(name, x, f"pass {name}.filled(0), and hide keys by apply_mask")
    if array.ndim < 2:
        raise InvalidInputError(
            f"{name} has {array.ndim} axes", shapes={f"{name}.shape": array.shape}, hint=f"give {form}"
        )
    return checks.readable(name, array)


def _check_pair(pair: dict[str, Array], axis: int, other_axis: int, hint: str) -> None:
    """The two arrays agree in dtype, in their leading axes, and in the axis that is summed over."""
    (name, x), (other, y) = pair.items()
    shapes: dict[str, object] = {f"{n}.shape": a.shape for n, a in pair.items()}
    if x.dtype != y.dtype:
        dtypes: dict[str, object] = {f"{n}.dtype": a.dtype for n, a in pair.items()}
        cast = f"cast them to one: {other} = {other}.astype({name}.dtype)"
        raise InvalidInputError(f"{name} and {other} differ in dtype", shapes=dtypes, hint=cast)
    if x.ndim != y.ndim:
        raise InvalidInputError(f"{name} and {other} differ in rank", shapes=shapes, hint="add axes to one of them")
    if x.shape[:-2] != y.shape[:-2]:
        leading = "axes before the last two must be equal; numpy.broadcast_to repeats one without a copy"
        raise DimensionMismatchError(x.shape[:-2], y.shape[:-2], shapes=shapes, hint=leading)
    if x.shape[axis] != y.shape[other_axis]:
        raise DimensionMismatchError(x.shape[axis], y.shape[other_axis], shapes=shapes, hint=hint)


def _resolved(scores: Array, attn_mask: masks.Mask | ArrayLike | None, is_causal: bool) -> visibility.Visibility:
    heads, (Lq, Lk) = scores.shape[-3] if scores.ndim > 2 else 1, scores.shape[-2:]
    return masks.resolve(attn_mask, switch("is_causal", is_causal), scores.shape[:-3], heads, Lq, Lk, scores.dtype)


def _scale(scale: float | None, query: Array) -> float:
    number = checks.scale_of(scale, query.shape[-1])
    checks.check_range(query.dtype, number, None)
    return number


def _eps(eps: float, dtype: np.dtype[Any]) -> float:
    eps = real_number("eps", eps)
    if not 0 <= eps <= float(np.finfo(dtype).max):
        raise InvalidInputError(f"eps is {eps}", hint="give 0, or a small positive number")
    return eps
