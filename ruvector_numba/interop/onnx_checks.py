"""Checks of what ONNX's operators are given: each names the operator's argument."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import checks, halves, mask_arrays, masks
from ..arrays import Array, Shape
from ..errors import DimensionMismatchError, InvalidConfigError, InvalidInputError, InvalidMaskError
from ..values import check_memory, shown, whole_number

OPSETS = range(23, 29)  # those whose text was read: 26 to 28 leave the operator of 25 as it is
FLOATS = ("float16", "bfloat16", "float32", "float64")
INSTALL = 'pip install ".[onnx]", in a clone of ruvector-numba'
PRECISIONS = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}  # numbers of onnx.TensorProto

# Types


def floats(name: str, x: ArrayLike | None) -> Array:
    if x is None:
        raise InvalidInputError(f"{name} is None", hint="Q, K and V are required")
    array = x if type(x) is np.ndarray else checks.from_sequence(name, x)
    if array.dtype.name not in FLOATS or not array.dtype.isnative:
        hint = f"cast it: {halves.cast(name, array.dtype, np.dtype(np.float32))}"
        if array.dtype == halves.BITS:
            hint = f"if it holds the bits of bfloat16 numbers: {name}.view(ml_dtypes.bfloat16)"
        raise InvalidInputError(f"{name} has dtype {array.dtype}, not {', '.join(FLOATS)}", hint=hint)
    return array


def _array(name: str, x: ArrayLike) -> Array:
    """As NumPy reads it, whole numbers too."""
    if type(x) is not np.ndarray:
        checks.from_sequence(name, x)  # says what cannot be read
    return np.asarray(x)


def check_types(arrays: dict[str, Array]) -> None:
    """The operator's T1 and T2: of queries and keys, and of values."""
    for names in (("Q", "K", "past_key"), ("V", "past_value")):
        dtypes = {f"{name}.dtype": arrays[name].dtype for name in names if name in arrays}
        if len(set(dtypes.values())) > 1:
            told = " and ".join(name.removesuffix(".dtype") for name in dtypes)
            raise InvalidInputError(f"{told} differ in dtype", shapes=dtypes, hint=f"cast them to that of {names[0]}")


# Shapes


def rank(arrays: dict[str, Array]) -> int:
    ranks = {arrays[name].ndim for name in "QKV"}
    if len(ranks) > 1 or not ranks <= {3, 4}:
        shapes = {f"{name}.shape": arrays[name].shape for name in "QKV"}
        hint = "all three are (B, H, L, D), or all are (B, L, H * D) with q_num_heads and kv_num_heads"
        raise InvalidInputError("Q, K and V have three axes, or four", shapes=shapes, hint=hint)
    return ranks.pop()


def heads(arrays: dict[str, Array], q_num_heads: int | None, kv_num_heads: int | None, opset: int) -> dict[str, int]:
    """How many heads each of Q, K and V has."""
    shapes: dict[str, object] = {f"{name}.shape": arrays[name].shape for name in "QKV"}
    counts = {"q_num_heads": q_num_heads, "kv_num_heads": kv_num_heads}
    there = {"q_num_heads": arrays["Q"].shape[1], "kv_num_heads": arrays["K"].shape[1]}
    for name, count in counts.items():
        if arrays["Q"].ndim == 3:
            if count is None:
                hint = "a last axis of heads * head size does not tell how many heads there are"
                raise InvalidConfigError(f"{name} must be given with three axes", shapes=shapes, hint=hint)
            there[name] = whole(name, count)
            if there[name] < 1:
                raise InvalidConfigError(f"{name} is {count}", hint="give the number of heads, 1 or more")
        # Opset 25 refuses them with four axes; the texts before it do not, but they must not contradict the shapes.
        elif count is not None and (opset >= 25 or whole(name, count) != there[name]):
            hint = f"leave {name} out: with four axes the second is the heads'"
            raise InvalidConfigError(f"{name} is for inputs of three axes", shapes=shapes, hint=hint)
    Hq, Hk = there.values()
    if Hq != Hk and (Hk == 0 or Hq % Hk):
        hint = "each key head serves equally many query heads"
        expected, actual = f"a multiple of kv_num_heads = {Hk}", f"q_num_heads = {Hq}"
        raise DimensionMismatchError(expected, actual, shapes=shapes, hint=hint)
    return {"Q": Hq, "K": Hk, "V": Hk}


def by_heads(name: str, x: Array, heads: int) -> Array:
    """(B, heads, L, channels): a view."""
    if x.ndim == 4:
        if x.shape[1] != heads:
            raise DimensionMismatchError(heads, x.shape[1], shapes={f"{name}.shape": x.shape, "kv_num_heads": heads})
        return x
    count = "q_num_heads" if name == "Q" else "kv_num_heads"
    B, L, hidden = x.shape
    if hidden % heads:
        shapes = {f"{name}.shape": x.shape, count: heads}
        hint = f"the last axis of {name} is {count} times the head size"
        raise DimensionMismatchError(f"a multiple of {count} = {heads}", hidden, shapes=shapes, hint=hint)
    return x.reshape(B, L, heads, hidden // heads).swapaxes(1, 2)


def check_sizes(query: Array, key: Array, value: Array) -> None:
    """Q, K and V by heads, before the past is put in front."""
    shapes = {"Q by heads": query.shape, "K by heads": key.shape, "V by heads": value.shape}
    pairs = (
        (query, key, 0, "Q, K and V have one batch size, the first axis"),
        (key, value, 0, "Q, K and V have one batch size, the first axis"),
        (query, key, 3, "Q and K have one head size"),
        (key, value, 2, "K and V have one length: a value for each key"),
    )
    for a, b, axis, hint in pairs:
        if a.shape[axis] != b.shape[axis]:
            raise DimensionMismatchError(a.shape[axis], b.shape[axis], shapes=shapes, hint=hint)


def past(arrays: dict[str, Array], key: Array, value: Array) -> tuple[Array, Array] | None:
    there = [name for name in ("past_key", "past_value") if name in arrays]
    if not there:
        return None
    if len(there) == 1:
        hint = "the cache is both of them, or neither"
        raise InvalidInputError(f"{there[0]} is given alone", hint=hint)
    past = arrays["past_key"], arrays["past_value"]
    P = past[0].shape[2] if past[0].ndim == 4 else 0
    for name, x, new in (("past_key", past[0], key), ("past_value", past[1], value)):
        expected = (*new.shape[:2], P, new.shape[3])
        if x.shape != expected:
            shapes = {f"{name}.shape": x.shape, "expected": expected}
            hint = "a cache is (B, kv_num_heads, past length, head size), also where K and V have three axes"
            raise DimensionMismatchError(expected, x.shape, shapes=shapes, hint=hint)
    return past


# Masks


def reach(name: str, size: int, opset: int) -> int | None:
    number = whole(name, size)
    if number < -1:
        raise InvalidConfigError(f"{name} is {number}", hint="give 0 or more, or -1 for no limit")
    if number >= 0 and opset < 25:
        raise InvalidConfigError(f"{name} came with opset 25, and opset is {opset}", hint="pass opset=25")
    return None if number < 0 else min(number, 1 << 32)


def mask(attn_mask: ArrayLike | masks.Mask, scores: Shape, opset: int) -> Array:
    """The mask, with as many keys as there are."""
    if isinstance(attn_mask, masks.Mask):
        hint = (
            "the operator has is_causal=1 for Causal, left_window_size and right_window_size for Window, "
            "nonpad_kv_seqlen for Lengths; of others make an array: attn_mask.to_dense(Lq, Lk)"
        )
        raise InvalidMaskError(f"attn_mask is {attn_mask}, and the operator takes arrays", hint=hint)
    array = _array("attn_mask", attn_mask)
    if array.dtype != bool and array.dtype.name not in FLOATS:
        # The operator's list of types has integers, its text gives them no meaning.
        hint = "attn_mask.astype(bool) if non-zero means attend, attn_mask.astype(Q.dtype) if it is added"
        hint = mask_arrays.bits_hint() if array.dtype == halves.BITS else hint
        raise InvalidMaskError(f"attn_mask has dtype {array.dtype}", hint=hint)
    shapes = {"attn_mask.shape": array.shape, "scores": scores}
    if not 1 <= array.ndim <= 4:
        raise InvalidMaskError(f"attn_mask has {array.ndim} axes", shapes=shapes, hint="give one to four")
    short = scores[-1] - array.shape[-1]
    # From opset 24 on also a single key is a short mask, says the function body; in 23 it stood for all.
    if short > 0 and (array.shape[-1] != 1 or opset >= 24):
        widths = [(0, 0)] * (array.ndim - 1) + [(0, short)]
        array = np.pad(array, widths, constant_values=False if array.dtype == bool else -math.inf)
    if not all(n in (1, m) for n, m in zip(array.shape[::-1], scores[::-1], strict=False)):
        hint = "axes are matched from the right: one matrix for each batch row is (B, 1, Lq, P + Lk)"
        raise InvalidMaskError("attn_mask does not broadcast to (B, q_num_heads, Lq, P + Lk)", shapes=shapes, hint=hint)
    return array


def lengths(nonpad_kv_seqlen: ArrayLike, key: Shape, has_past: bool, opset: int) -> NDArray[np.int64]:
    if opset < 24:
        hint = "pass opset=24 or more"
        raise InvalidConfigError(f"nonpad_kv_seqlen came with opset 24, and opset is {opset}", hint=hint)
    if has_past:
        hint = "with past_key K and V are what is new; with nonpad_kv_seqlen they are the whole cache"
        raise InvalidInputError("nonpad_kv_seqlen and past_key are both given", hint=hint)
    B, Lk = key[0], key[2]
    array = _array("nonpad_kv_seqlen", nonpad_kv_seqlen)
    if array.dtype.kind not in "iu" or array.shape != (B,):
        told = {"nonpad_kv_seqlen": f"{array.dtype} {array.shape}", "expected": f"int64 {(B,)}"}
        raise InvalidInputError("nonpad_kv_seqlen is one whole number for each batch row", shapes=told)
    if B and not 0 <= array.min() <= array.max() <= Lk:
        told = {"nonpad_kv_seqlen": f"{array.min()} to {array.max()}", "keys": f"{Lk}"}
        raise InvalidInputError("nonpad_kv_seqlen counts keys that are not there", shapes=told)
    return array.astype(np.int64)


# Numbers


def no_others(operator: str, unknown: Mapping[str, object], known: Sequence[str]) -> None:
    """Refuse attributes that the operator does not have."""
    if unknown:
        raise InvalidConfigError(f"{operator} has no attribute {min(unknown)}", hint=f"it has {', '.join(known)}")


def whole(name: str, x: object) -> int:
    return whole_number(name, x, error=InvalidConfigError)


def one_of(name: str, x: object, allowed: Any) -> int:
    number = int(x) if isinstance(x, bool | np.bool_) else whole(name, x)  # is_causal may well be True
    if number not in allowed:
        hint = None
        if name == "opset":
            newer = number >= OPSETS.stop
            hint = (
                "of newer opsets the text has not been read" if newer else "Attention is in the standard since opset 23"
            )
        raise InvalidConfigError(f"{name} is {number}, not one of {', '.join(map(str, allowed))}", hint=hint)
    return number


def scale(scale: object, D: int) -> float:
    number = checks.scale_of(scale, D)
    if number < 0:
        raise InvalidConfigError(f"scale is {number}", hint="the operator multiplies Q and K by its square root")
    return number


def softcap(softcap: object) -> float | None:
    if isinstance(softcap, bool) or not isinstance(softcap, int | float | np.floating | np.integer):
        raise InvalidConfigError(f"softcap is {shown(softcap)}", hint="give one number; 0 for none")
    try:
        number = float(softcap)
    except OverflowError:  # a whole number beyond all floats
        number = math.inf if softcap > 0 else -math.inf
    if not 0 <= number < math.inf:
        raise InvalidConfigError(f"softcap is {number}", hint="give a positive number, or 0 for none")
    return number or None


def precision(softmax_precision: object) -> str | None:
    if softmax_precision is None:
        return None
    return PRECISIONS[one_of("softmax_precision", softmax_precision, PRECISIONS)]


def mode(qk_matmul_output_mode: object, scores: Shape, dtype: type[np.float32 | np.float64]) -> int | None:
    if qk_matmul_output_mode is None:
        return None
    check_memory(scores, np.dtype(dtype), "qk_matmul_output", hint="leave qk_matmul_output_mode out")
    return one_of("qk_matmul_output_mode", qk_matmul_output_mode, range(4))
