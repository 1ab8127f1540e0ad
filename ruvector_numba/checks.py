"""Every check of a call: from what the user passed to arrays and numbers that the plan can trust, or a clear error."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import halves, masks
from .arrays import Array, Shape
from .dense_call import DenseCall
from .errors import DimensionMismatchError, InvalidInputError
from .values import as_array, check_not_masked, is_list, random_seed, real_number, shown, switch

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
KNOWN = ("float32 or float64", "float16, bfloat16, float32 or float64")  # and where half precision is taken
AXES = "axes are (..., heads, L, D): from (B, L, H, D) x.swapaxes(1, 2)"


def call(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    attn_mask: Any = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    seed: int | None = None,
    dtype: str | None = None,
) -> DenseCall:
    """Check the arguments of attention."""
    query, key = readable("query", query, True, dtype), readable("key", key, True, dtype)
    value = readable("value", value, True, dtype)
    if dtype is not None:  # ml_dtypes.bfloat16 and its bits are one type then
        key, value = key.view(query.dtype), value.view(query.dtype)
    enable_gqa = switch("enable_gqa", enable_gqa)
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2] or not query.dtype == key.dtype == value.dtype:
        _check_heads_and_dtypes(query, key, value, enable_gqa)
    (Lq, D), (Lk, Dk) = query.shape[-2:], key.shape[-2:]
    if D != Dk or Lk != value.shape[-2]:
        _refuse_sizes(query, key, value)
    heads, batch = query.shape[-3] if query.ndim > 2 else 1, query.shape[:-3]
    of_mask = query.dtype if dtype is None else halves.BITS
    seen = masks.resolve(attn_mask, switch("is_causal", is_causal), batch, heads, Lq, Lk, of_mask)
    is_scaled, scale = scale is not None, scale_of(scale, D)
    if softcap is not None:
        softcap = real_number("softcap", softcap)
        if not 0 < softcap < math.inf:
            raise InvalidInputError(f"softcap is {softcap}", hint="give a positive number, or None for no cap")
    of_results, of_bias = query.dtype, None if seen.bias is None else seen.bias.dtype
    if of_results.itemsize == 2:
        query, key, value = (halves.stored(x) for x in (query, key, value))
        seen = seen if seen.bias is None else replace(seen, bias=halves.widened(seen.bias))
    arithmetic = halves.arithmetic(query.dtype)
    if is_scaled or softcap is not None:
        check_range(arithmetic, scale, softcap)
    slopes = None if alibi_slopes is None else _slopes(alibi_slopes, batch, heads, arithmetic)
    probability, number = dropout(dropout_p, seed)
    return DenseCall(
        query, key, value, seen, scale=scale, softcap=softcap, slopes=slopes, dropout=probability, seed=number,
        dtype=of_results, bias_dtype=of_bias,
    )  # fmt: skip


def check_range(dtype: np.dtype[Any], scale: float, softcap: float | None) -> None:
    """Refuse numbers that become 0 or infinity where the kernels compute with them, and then NaN."""
    limits = np.finfo(dtype)
    if abs(scale) > float(limits.max) / 2:  # scores in base 2 have log2(e) in it
        raise InvalidInputError(f"scale is {scale}", hint=f"{dtype} ends at {limits.max:.2g}: scale the queries")
    if softcap is not None and not float(limits.tiny) <= softcap <= float(limits.max):
        hint = f"{dtype} goes from {limits.tiny:.2g} to {limits.max:.2g}; None is no cap"
        raise InvalidInputError(f"softcap is {softcap}", hint=hint)


def rounds_products(precision: object, c: DenseCall) -> bool:
    """Check `precision`: are the products to be those of bfloat16, though the arrays are float32?"""
    if precision is None:
        return False
    if not isinstance(precision, str) or precision != "bfloat16":  # of an array, != would be one of bools
        hint = 'give precision="bfloat16", or None for the precision of the arrays'
        raise InvalidInputError(f"precision is {shown(precision)}", hint=hint)
    if c.query.dtype != np.float32:
        hint = "it makes products of float32 arrays coarser and faster: leave it out"
        raise InvalidInputError(f"precision is {shown(precision)} and the arrays are {c.dtype}", hint=hint)
    return True


def floats(name: str, x: ArrayLike, said: str | None = None, may_be_half: bool = False) -> Array:
    """The argument as a float32 or float64 array; `said` is what a hint calls it, if not by its name.

    `may_be_half` where the caller takes half precision too, and has widened it already.
    """
    array = x if type(x) is np.ndarray else from_sequence(name, x, f"pass {said}.filled(0)" if said else None)
    if array.dtype not in FLOATS or not array.dtype.isnative:
        hint = f"cast it: {_to_float32(said or name, array.dtype)}"
        raise InvalidInputError(f"{name} has dtype {array.dtype}, not {KNOWN[may_be_half]}", hint=hint)
    return array


def _to_float32(name: str, dtype: np.dtype[Any]) -> str:
    """How to write an array as one of float32."""
    if dtype != halves.BITS:
        return f"{name}.astype(numpy.float32)"
    return f"{halves.cast(name, dtype, FLOATS[0])}, if it holds the bits of bfloat16 numbers"


def scale_of(scale: object, D: int) -> float:
    """What scores are multiplied by."""
    if scale is None:
        return 1 / math.sqrt(D) if D else 1.0
    number = real_number("scale", scale)
    if not math.isfinite(number):
        raise InvalidInputError(f"scale is {number}", hint="give a finite number, or None for 1 / sqrt(D)")
    return number


def dropout(dropout_p: object, seed: object) -> tuple[float, int]:
    """The probability to drop a weight, and the seed of the random generator: a fresh one if None, 0 if not needed."""
    number = dropout_p if type(dropout_p) is float else real_number("dropout_p", dropout_p)
    if not 0 <= number <= 1:
        raise InvalidInputError(f"dropout_p is {number}", hint="give a probability, 0 <= dropout_p <= 1")
    return number, 0 if seed is None and not number else random_seed(seed)


def readable(name: str, x: ArrayLike, may_be_half: bool = False, dtype: str | None = None) -> Array:
    """The argument as an array of at least two axes that the kernels can read."""
    if type(x) is not np.ndarray:
        x = from_sequence(name, x, f"pass {name}.filled(0) and hide keys by attn_mask or masks.Lengths")
    if dtype is not None:
        check_bits(name, x, dtype)
    elif not (x.dtype in FLOATS or (may_be_half and halves.is_given_half(x.dtype))) or not x.dtype.isnative:
        hint = f"cast it: {_to_float32(name, x.dtype)}"
        if x.dtype.kind == "c":
            hint = f"attention is real: take {name}.real, or stack real and imaginary parts"
        elif x.dtype.kind in "OSU" or x.dtype.name.startswith("void"):  # kind V are the types of ml_dtypes too
            hint = f"give numbers; of objects or text make an array of floats first: numpy.array({name}, float)"
        elif x.dtype == halves.BITS and may_be_half:
            hint = f'cast it, or pass dtype="bfloat16" if {name} holds the bits of bfloat16 numbers'
        raise InvalidInputError(f"{name} has dtype {x.dtype}, not {KNOWN[may_be_half]}", hint=hint)
    if x.ndim < 2:
        raise InvalidInputError(
            f"{name} has {x.ndim} axes", shapes={f"{name}.shape": x.shape}, hint="give (..., H, L, D), or (L, D)"
        )
    return x if x.flags.aligned else x.copy()


def check_bits(name: str, x: Array, dtype: object) -> None:
    """`dtype` says what the bits of a uint16 array mean."""
    if not isinstance(dtype, str) or dtype != "bfloat16":
        hint = 'dtype is for what NumPy has no type for: give "bfloat16" with uint16 arrays, or leave it out'
        raise InvalidInputError(f"dtype is {shown(dtype)}", hint=hint)
    if (x.dtype != halves.BITS and not halves.is_bfloat16(x.dtype)) or not x.dtype.isnative:
        hint = f"give the bits, {name}.view(numpy.uint16), or leave dtype out"
        raise InvalidInputError(f"{name} has dtype {x.dtype}, and dtype is {shown(dtype)}", hint=hint)


def from_sequence(name: str, x: ArrayLike, unmasked: str | None = None) -> Array:
    """Lists and other array-likes, as NumPy reads them; lists of whole numbers become float64, as in NumPy's maths.

    `unmasked` is what a hint says to do with an array of numpy.ma.
    """
    if x is None:
        raise InvalidInputError(f"{name} is None", hint="give an array")
    if hasattr(x, "tocsr"):
        raise InvalidInputError(f"{name} is a sparse matrix", hint=f"{name}.toarray() is an array")
    check_not_masked(name, x, unmasked)
    array = as_array(name, x)
    if array.dtype == object and array.ndim == 0 and is_list(x):  # NumPy's box around what is no array
        raise InvalidInputError(f"{name} is a {type(x).__name__}", hint="give an array")
    return array.astype(np.float64) if array.dtype.kind in "iu" and is_list(x) else array


def _check_heads_and_dtypes(query: Array, key: Array, value: Array, enable_gqa: bool) -> None:
    shapes = {"query.shape": query.shape, "key.shape": key.shape, "value.shape": value.shape}
    if not query.dtype == key.dtype == value.dtype:
        dtypes = {"query.dtype": query.dtype, "key.dtype": key.dtype, "value.dtype": value.dtype}
        odd = next((n for n, x in (("key", key), ("value", value)) if x.dtype != query.dtype), "key")
        hint = f"cast them to one: {odd} = {odd}.astype(query.dtype)"
        raise InvalidInputError("query, key and value differ in dtype", shapes=dtypes, hint=hint)
    if not query.ndim == key.ndim == value.ndim:
        raise InvalidInputError(
            "query, key and value differ in rank", shapes=shapes, hint="add axes: all are (..., H, L, D), or (L, D)"
        )
    if query.ndim < 3:
        return
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        hint = "batch axes must be equal; numpy.broadcast_to repeats one without a copy"
        batch = next(x.shape[:-3] for x in (key, value) if x.shape[:-3] != query.shape[:-3])
        raise DimensionMismatchError(query.shape[:-3], batch, shapes=shapes, hint=hint)
    if key.shape[-3] != value.shape[-3]:
        raise DimensionMismatchError(key.shape[-3], value.shape[-3], shapes=shapes, hint="one value head a key head")
    heads, key_heads = query.shape[-3], key.shape[-3]
    divides = key_heads > 0 and heads % key_heads == 0
    if heads != key_heads and not (enable_gqa and divides):
        hint = f"heads of query must be a multiple of heads of key; {AXES}"
        if divides and (heads, query.shape[-2]) == (key.shape[-2], key_heads):
            hint = AXES
        elif divides:
            hint = f"to share each key head among {heads // key_heads} query heads, pass enable_gqa=True"
        raise DimensionMismatchError(heads, key_heads, shapes=shapes, hint=hint)


def _refuse_sizes(query: Array, key: Array, value: Array) -> None:
    shapes = {"query.shape": query.shape, "key.shape": key.shape, "value.shape": value.shape}
    if query.shape[-1] != key.shape[-1]:
        hint = "query and key share their last axis, D"
        raise DimensionMismatchError(query.shape[-1], key.shape[-1], shapes=shapes, hint=hint)
    hint = "one value for each key: they share the axis before the last, Lk"
    raise DimensionMismatchError(key.shape[-2], value.shape[-2], shapes=shapes, hint=hint)


def _slopes(slopes: ArrayLike, batch: Shape, heads: int, dtype: np.dtype[Any]) -> Array:
    check_not_masked("alibi_slopes", slopes)
    found = as_array("alibi_slopes", slopes, hint="give one number for each head")
    if found.dtype.kind not in "iuf" and not halves.is_bfloat16(found.dtype):
        raise InvalidInputError(f"alibi_slopes has dtype {found.dtype}", hint="give one number for each head")
    with np.errstate(over="ignore"):  # infinite ones are refused below
        array = np.ascontiguousarray(found, dtype=dtype)
    fits = array.ndim >= 1 and array.shape[-1] == heads
    try:
        array = np.ascontiguousarray(np.broadcast_to(array, (*batch, heads))) if fits else array
    except ValueError:
        fits = False
    if not fits:
        shapes = {"alibi_slopes.shape": found.shape, "expected": (heads,)}
        raise InvalidInputError("alibi_slopes has the wrong shape", shapes=shapes, hint="one slope for each query head")
    if not np.isfinite(array).all():
        raise InvalidInputError("alibi_slopes is not finite", hint="give finite slopes; 0 for none")
    return array


def check_output(out: object, c: DenseCall) -> Array | None:
    """Check the array that a result is written to, if there is one."""
    if out is None:
        return None
    if not isinstance(out, np.ndarray):
        raise InvalidInputError(f"out is a {type(out).__name__}", hint="give a NumPy array, numpy.empty(shape, dtype)")
    if out.shape != c.output_shape:
        shapes = {"out.shape": out.shape, "expected": c.output_shape}
        raise DimensionMismatchError(c.output_shape, out.shape, shapes=shapes, hint="out is (..., H, Lq, Dv)")
    if out.dtype != c.dtype or not out.dtype.isnative:
        dtypes = {"out.dtype": out.dtype, "query.dtype": c.dtype}
        hint = f"give numpy.empty({c.output_shape}, query.dtype), of shape (..., Lq, Dv)"
        raise InvalidInputError("out has another dtype than query", shapes=dtypes, hint=hint)
    if not out.flags.writeable or not out.flags.aligned:
        raise InvalidInputError("out cannot be written to", hint="it is read-only or not aligned: give a fresh array")
    if out.size and any(n > 1 and stride == 0 for n, stride in zip(out.shape, out.strides, strict=True)):
        raise InvalidInputError("out overlaps itself", hint="it is a broadcast view: give a fresh array")
    inputs = [("query", c.query), ("key", c.key), ("value", c.value)]
    inputs += [("attn_mask", x) for x in (c.seen.allowed, c.seen.bias) if x is not None]
    inputs += [] if c.slopes is None else [("alibi_slopes", c.slopes)]
    for name, x in inputs:
        if _overlap(out, x):
            raise InvalidInputError(
                f"out overlaps {name}", hint="inputs are read while out is written: give another array"
            )
    return out


def _overlap(a: Array, b: Array) -> bool:
    if not np.may_share_memory(a, b):
        return False
    try:
        return bool(np.shares_memory(a, b, max_work=1000))  # type: ignore[arg-type]  # any number will do
    except np.exceptions.TooHardError:  # too entangled to tell
        return True


def gradient(name: str, x: ArrayLike, shape: Shape, dtype: np.dtype[Any]) -> Array:
    """Check the gradient of a result."""
    array = x if type(x) is np.ndarray else from_sequence(name, x)
    is_number = (array.dtype.kind in "fiu" and array.dtype.itemsize <= 8) or halves.is_bfloat16(array.dtype)
    if dtype == halves.BITS:
        array = halves.stored(array)
    if not is_number or (array.dtype != dtype and not is_list(x)):
        hint = f"cast it: {halves.cast(name, array.dtype, dtype)}"
        raise InvalidInputError(f"{name} has dtype {array.dtype}, the call had {dtype}", hint=hint)
    if array.shape != shape:
        raise DimensionMismatchError(
            shape, array.shape, shapes={f"{name}.shape": array.shape, "expected": shape}, hint="the result's own shape"
        )
    if array.dtype != dtype:
        array = halves.rounded(array, dtype)
    return array if array.flags.aligned else array.copy()


def row_indices(rows: Any, Lq: int) -> NDArray[np.int64]:
    """Which queries: None for all, a slice, one index or several, negative ones from the end; as an array."""
    if rows is None:
        return np.arange(Lq)
    hint = "give a slice, a whole number, or a list of them"
    try:
        if isinstance(rows, slice):
            return np.arange(Lq)[rows]
    except TypeError:
        raise InvalidInputError(f"rows is {shown(rows)}", hint=hint) from None
    found = as_array("rows", rows)
    if found.size == 0:
        return np.zeros(0, np.int64)
    if found.dtype.kind not in "iu" or found.ndim > 1:
        hint += "; where bools say which, numpy.flatnonzero(rows)" * (found.dtype.kind == "b")
        raise InvalidInputError(f"rows is {shown(rows)}", hint=hint)
    lowest, highest = int(found.min()), int(found.max())  # before the cast, in which large ones would wrap around
    if lowest < -Lq or highest >= Lq:
        raise InvalidInputError(f"rows go from {lowest} to {highest}", hint=f"there are {Lq} queries")
    return np.atleast_1d(found).astype(np.int64) % Lq


__all__ = [
    "call",
    "check_bits",
    "check_output",
    "check_range",
    "dropout",
    "floats",
    "from_sequence",
    "gradient",
    "readable",
    "rounds_products",
    "row_indices",
    "scale_of",
]
