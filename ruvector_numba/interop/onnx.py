"""The ONNX standard's Attention operator as a function on arrays, computed by this package's kernels.

`attention` needs no ONNX. What reads ONNX's own objects loads the onnx package when it is first asked for:

    Backend             what onnx.backend.test and others run models of such nodes with
    flex_attention      the preview operator FlexAttention, where its subgraphs say what the kernels can do
    replace_attention   the attention of a whole model on these kernels, all else in ONNX Runtime
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import dense, functional, masks, visibility
from ..arrays import Array
from . import onnx_checks as checks
from .onnx_masks import joined

if TYPE_CHECKING:
    from .onnx_backend import Backend
    from .onnx_flex import flex_attention
    from .onnx_model import AttentionModel, replace_attention

__all__ = ["AttentionModel", "AttentionOutputs", "Backend", "attention", "flex_attention", "replace_attention"]

ATTRIBUTES = (
    "is_causal", "kv_num_heads", "q_num_heads", "qk_matmul_output_mode", "scale", "softcap", "softmax_precision",
    "left_window_size", "right_window_size",
)  # fmt: skip
ELSEWHERE = {
    "AttentionModel": "onnx_model",
    "Backend": "onnx_backend",
    "flex_attention": "onnx_flex",
    "replace_attention": "onnx_model",
}

if not TYPE_CHECKING:  # a type checker shall know what is not there

    def __getattr__(name):
        if name in ELSEWHERE:
            return getattr(importlib.import_module(f".{ELSEWHERE[name]}", __package__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Without onnx only what needs none: help() and inspect ask for all that is listed, and asking raises."""
    return __all__ if importlib.util.find_spec("onnx") else [name for name in __all__ if name not in ELSEWHERE]


class AttentionOutputs(NamedTuple):
    """The operator's outputs, in its order.

    Attributes
    ----------
    Y : array (B, Hq, Lq, Dv), or (B, Lq, Hq * Dv) for inputs of three axes
    present_key, present_value : array (B, Hk, Lk, D) and (B, Hk, Lk, Dv)
        Past and new keys and values; without a past, views of `K` and `V`.
    qk_matmul_output : array (B, Hq, Lq, Lk) or None
        None unless it was asked for.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> x = np.ones((1, 2, 3, 4), np.float32)
    >>> outputs = rv.interop.onnx.attention(x, x, x)
    >>> outputs.Y.shape, outputs.present_key.shape, outputs.qk_matmul_output
    ((1, 2, 3, 4), (1, 2, 3, 4), None)
    """

    Y: Array
    present_key: Array
    present_value: Array
    qk_matmul_output: Array | None


def attention(
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    attn_mask: ArrayLike | None = None,
    past_key: ArrayLike | None = None,
    past_value: ArrayLike | None = None,
    nonpad_kv_seqlen: ArrayLike | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    left_window_size: int = -1,
    right_window_size: int = -1,
    opset: int = 25,
    **unknown: NoReturn,
) -> AttentionOutputs:
    """The operator Attention of ONNX, opsets 23 to 28: its arguments by their names, with its meaning.

    Parameters
    ----------
    Q : array (B, Hq, Lq, D), or (B, Lq, Hq * D); float16, bfloat16, float32 or float64
        Hq is a multiple of Hk; query head h uses key head h // (Hq // Hk). bfloat16 is that of the package ml_dtypes.
    K : array (B, Hk, Lk, D), or (B, Lk, Hk * D)
        Of the type of Q.
    V : array (B, Hk, Lk, Dv), or (B, Lk, Hk * Dv)
    attn_mask : bool array (True = attend) or float array (added to the scores), optional
        Broadcasts to (B, Hq, Lq, P + Lk), matched from the right: three axes are (Hq, Lq, P + Lk). One with fewer keys
        hides the others.
    past_key, past_value : array (B, Hk, P, D) and (B, Hk, P, Dv), optional
        The cache: what came before K and V. Both or neither.
    nonpad_kv_seqlen : int64 array (B,), optional
        How many of the keys of each batch row exist, where K and V are the whole cache; from opset 24 on.
    is_causal : 0 or 1
        Query i sees keys j <= i + offset: the offset is P with a past, ``nonpad_kv_seqlen[b] - Lq`` with that input,
        else 0.
    kv_num_heads, q_num_heads : int, optional
        Hk and Hq, where inputs have three axes.
    qk_matmul_output_mode : 0, 1, 2 or 3, optional
        Asks for the fourth output, an array of Lq x Lk numbers for each head: 0 the scaled products, 1 after the
        softcap, 2 with masks and biases, 3 the weights. None, as here, leaves it out; in a file it is the node's list
        of outputs that tells, and the mode is 0 unless given.
    scale : float, optional
        Not negative; 1 / sqrt(D) by default.
    softcap : float
        Scores become softcap * tanh(score / softcap); 0 for none.
    softmax_precision : 1, 10, 11 or 16, optional
        float32, float16, float64 or bfloat16, at least. All is computed in float32, or in float64 if one of the inputs
        or this asks for it; less would save nothing.
    left_window_size, right_window_size : int
        Query i sees keys from ``i + offset - left_window_size`` to ``i + offset + right_window_size``; -1 for no limit.
        From opset 25 on.
    opset : int
        Whose rules to apply.
    **unknown
        Refused: the attributes above are all that the operator has.

    Returns
    -------
    AttentionOutputs
        Y and qk_matmul_output have the type of Q.

    Raises
    ------
    InvalidInputError, DimensionMismatchError
        If the inputs have other axes or types than these, sizes of theirs that must agree do not, or one is given that
        cannot go with the others.
    InvalidMaskError
        If `attn_mask` does not fit the scores, or is neither bool nor of an input's type.
    InvalidConfigError
        If an attribute has a wrong type or value, or there is none of that name, in this opset.
    OutOfMemoryError
        If the result, or what `qk_matmul_output_mode` asks for, is larger than this machine's memory.

    Messages name the operator's argument.

    Notes
    -----
    The standard changed its texts without new opsets; the newest, of onnx 1.23, holds here for all of them. Up to 1.21
    modes 1 and 2 were each other's and the softcap came after the mask; up to 1.22 `is_causal` was top-left beside
    `nonpad_kv_seqlen`, and rows that see nothing, 0 here, were NaN.

    A hidden key or value reaches nothing even if it is NaN or infinite, where the standard's formula has NaN.

    References
    ----------
    .. [1] The operator Attention, https://onnx.ai/onnx/operators/onnx__Attention.html

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> Q, K, V = np.random.default_rng(0).standard_normal((3, 2, 10, 32), dtype=np.float32)
    >>> first = rv.interop.onnx.attention(Q, K, V, is_causal=1, q_num_heads=4, kv_num_heads=4)
    >>> first.Y.shape, first.present_key.shape
    ((2, 10, 32), (2, 4, 10, 8))
    >>> token = Q[:, :1]
    >>> more = rv.interop.onnx.attention(token, token, token, None, first.present_key, first.present_value,
    ...                                  is_causal=1, q_num_heads=4, kv_num_heads=4, qk_matmul_output_mode=3)
    >>> more.Y.shape, more.present_key.shape, more.qk_matmul_output.shape
    ((2, 1, 32), (2, 4, 11, 8), (2, 4, 1, 11))
    """
    checks.no_others("Attention", unknown, ATTRIBUTES)
    opset = checks.one_of("opset", opset, checks.OPSETS)
    inputs = {"Q": Q, "K": K, "V": V, "past_key": past_key, "past_value": past_value}
    arrays = {name: checks.floats(name, x) for name, x in inputs.items() if x is not None or name in "QKV"}
    checks.check_types(arrays)
    rank = checks.rank(arrays)
    heads = checks.heads(arrays, q_num_heads, kv_num_heads, opset)
    query, key, value = (checks.by_heads(name, arrays[name], heads[name]) for name in "QKV")
    past = checks.past(arrays, key, value)
    checks.check_sizes(query, key, value)
    P, Lq = past[0].shape[2] if past else 0, query.shape[2]
    scores_shape = (*query.shape[:3], P + key.shape[2])
    mask = None if attn_mask is None else checks.mask(attn_mask, scores_shape, opset)
    lengths = None if nonpad_kv_seqlen is None else checks.lengths(nonpad_kv_seqlen, key.shape, bool(past), opset)
    left = checks.reach("left_window_size", left_window_size, opset)
    right = checks.reach("right_window_size", right_window_size, opset)
    if checks.one_of("is_causal", is_causal, range(2)):
        right = 0  # whatever lies to the right of the query itself is the future
    scale, cap = checks.scale(scale, query.shape[3]), checks.softcap(softcap)
    dtype = _engine_type(arrays.values(), mask, checks.precision(softmax_precision))
    mode = checks.mode(qk_matmul_output_mode, scores_shape, dtype)
    lies = _stored_type((query, key, value), dtype)

    if past:
        key, value = np.concatenate((past[0], key), axis=2), np.concatenate((past[1], value), axis=2)
    parts: list[Array | masks.Mask] = [_band(P if lengths is None else lengths - Lq, left, right)]
    if lengths is not None:
        parts.append(masks.Lengths(keys=lengths))
    if mask is not None:
        parts.append(mask if mask.dtype == bool else mask.astype(dtype, copy=False))
    seen = joined(parts, scores_shape)
    query, key_there, value_there = (x.astype(lies, copy=False) for x in (query, key, value))
    output, stage = _Run(query, key_there, value_there, dtype, seen, parts, scale, cap)(rank == 3, mode)
    to = arrays["Q"].dtype
    with np.errstate(over="ignore"):  # beyond a type lies infinity
        output, stage = output.astype(to, copy=False), None if stage is None else stage.astype(to, copy=False)
    return AttentionOutputs(output, key, value, stage)


class _Run(NamedTuple):
    """A checked call: (B, Hq, Lq, D), (B, Hk, Lk, D), (B, Hk, Lk, Dv), as the engine reads them; computed in dtype."""

    query: Array
    key: Array
    value: Array
    dtype: type[np.float32 | np.float64]
    seen: masks.Mask
    parts: Sequence[Array | masks.Mask]  # of `seen`, with the numbers of a mask
    scale: float
    softcap: float | None

    def __call__(self, packed: bool, mode: int | None) -> tuple[Array, Array | None]:
        """Y, as (B, Lq, Hq * Dv) if packed, and what the mode asks for."""
        B, H, Lq, Dv = *self.query.shape[:3], self.value.shape[-1]
        made = np.empty((B, Lq, H, Dv) if packed else (B, H, Lq, Dv), self.query.dtype)
        out = made.swapaxes(1, 2) if packed else made  # written in place: the heads lie side by side
        terms: dict[str, Any] = dict(scale=self.scale, softcap=self.softcap, enable_gqa=True, out=out)
        dense.scaled_dot_product_attention(self.query, self.key, self.value, self.seen, **terms)
        return made.reshape(B, Lq, H * Dv) if packed else made, None if mode is None else self._stage(mode)

    def _stage(self, mode: int) -> Array:
        """The scores up to a step, for all queries and keys. Nothing of Y comes from here.

        In mode 0 the softcap is not there: text and function body of the operator say so, its Python reference differs.
        """
        (B, H, Lq, D), (_, Hk, Lk, _) = self.query.shape, self.key.shape
        query, key = (x.astype(self.dtype, copy=False) for x in (self.query, self.key))
        query = query.reshape(B, Hk, H // max(1, Hk), Lq, D)
        key = np.broadcast_to(key[:, :, None], (*query.shape[:3], Lk, D))
        scores = functional.attention_scores(query, key, self.scale).reshape(B, H, Lq, Lk)
        if mode and self.softcap is not None:
            scores = self.softcap * np.tanh(scores / self.softcap)
        if mode >= 2:
            scores = functional.apply_mask(scores, masks.All(self.parts) if mode == 2 else self.seen)
        return functional.softmax(scores) if mode == 3 else scores


def _engine_type(arrays: Iterable[Array], mask: Array | None, precision: str | None) -> type[np.float32 | np.float64]:
    """What the call is computed in, float16 and bfloat16 in float32."""
    names = {x.dtype.name for x in arrays} | {precision if mask is None else mask.dtype.name, precision}
    return np.float64 if "float64" in names else np.float32


def _stored_type(arrays: Iterable[Array], dtype: type[np.float32 | np.float64]) -> Any:
    """In which type the engine reads arrays: half precision as it lies if all are alike, else what is computed in."""
    kinds = {x.dtype for x in arrays}
    return kinds.pop() if len(kinds) == 1 and {x.itemsize for x in kinds} == {2} and dtype == np.float32 else dtype


@dataclass(frozen=True, slots=True, eq=False)
class _Band(masks.Mask):
    """Query i of batch row b, standing at key i + offset[b], sees keys from `left` before it to `right` after it.

    As masks.Window, whose offset follows from the lengths; here it is said, and each row may have its own.
    """

    offset: NDArray[np.int64]  # (B, 1), or () for one offset
    left: int | None
    right: int | None

    def _limits(self, Lq: int, Lk: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        at = np.arange(Lq) + self.offset
        lo = np.zeros_like(at) if self.left is None else at - self.left
        hi = np.full_like(at, Lk) if self.right is None else at + self.right + 1
        lo = np.clip(lo, 0, Lk)
        return lo, np.clip(hi, lo, Lk)

    def _dense(self, Lq: int, Lk: int) -> NDArray[np.bool_]:
        lo, hi = (x[..., None, :, None] for x in self._limits(Lq, Lk))
        return (lo <= np.arange(Lk)) & (np.arange(Lk) < hi)

    def _resolve(self, sizes: visibility.Sizes) -> visibility.Visibility:
        if self.offset.ndim:
            return visibility.Visibility(limits=np.stack(self._limits(sizes.Lq, sizes.Lk), axis=-1))
        offset = int(self.offset)
        first = -visibility.UNBOUNDED if self.left is None else offset - self.left
        return visibility.Visibility(first, visibility.UNBOUNDED if self.right is None else offset + self.right + 1)


def _band(offset: int | NDArray[np.int64], left: int | None, right: int | None) -> masks.Mask:
    if left is None and right is None:
        return masks.Full()
    return _Band(np.asarray(offset, np.int64)[..., None] if np.ndim(offset) else np.asarray(offset), left, right)
