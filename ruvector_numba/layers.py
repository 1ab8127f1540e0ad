"""What the layers check and decide alike: their inputs, and who hides from whom.

In a layer a `mask` hides, as in ruvector-attention, in numpy.ma and in torch.nn.MultiheadAttention: True, or
a number above 0.5. In the functions `attn_mask` attends, as in torch's function. The parameter's name decides.
"""

from __future__ import annotations

import math
import secrets
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import ArrayLike

from . import generators, gpu, halves, mask_arrays, masks
from .arrays import Array, Shape
from .checks import KNOWN, floats, from_sequence
from .config import AttentionConfig
from .errors import DimensionMismatchError, InvalidConfigError, InvalidInputError, InvalidMaskError
from .results import AttentionCache
from .values import shown, switch, whole_number

__all__ = [
    "batch",
    "check_hidden",
    "checked_config",
    "dropout",
    "generator",
    "glorot_uniform",
    "hidden",
    "identity",
    "padded",
    "record_of",
    "sequences",
    "with_padding",
]


def checked_config(config: object) -> AttentionConfig:
    if not isinstance(config, AttentionConfig):
        hint = "give an AttentionConfig(d_model=..., num_heads=...)"
        raise InvalidConfigError(f"config is a {type(config).__name__}, not an AttentionConfig", hint=hint)
    config.validate()
    return config


def generator(seed: object) -> np.random.Generator:
    """What a layer draws from: its initial parameters, if it has some, and the seeds of its dropout."""
    hint = "give a whole number that is not negative, or None"
    number = None if seed is None else whole_number("seed", seed, 0, error=InvalidConfigError, hint=hint)
    return generators.generator(number)


def glorot_uniform(random: np.random.Generator, shape: Shape) -> Array:
    """Initial weights (Glorot and Bengio, 2010): the last two axes are what comes in and what goes out."""
    bound = math.sqrt(6 / (shape[-1] + shape[-2]))
    return random.uniform(-bound, bound, shape)


class _Drops(Protocol):
    """A configuration, or a layer that is its own."""

    @property
    def dropout(self) -> float: ...


def dropout(config: _Drops, training: bool, seed: int | None, random: np.random.Generator) -> tuple[float, int | None]:
    """The probability to drop a weight, and the seed that decides which."""
    if not switch("training", training):
        return 0.0, seed
    return config.dropout, int(random.integers(1 << 63)) if seed is None else seed


def identity() -> bytes:
    """A number that tells a layer, with its copies, from all others."""
    return secrets.token_bytes(16)


def record_of(cache: object, owner: bytes | None, *kinds: type) -> Any:
    """What the layer's forward pass remembered, of one of these kinds; None in a cache that was built by hand."""
    hint = "give what this layer's forward_cached returned, or AttentionCache(query, key, value)"
    if not isinstance(cache, AttentionCache):
        raise InvalidInputError(f"cache is a {type(cache).__name__}, not an AttentionCache", hint=hint)
    if cache.record is not None and not isinstance(cache.record, kinds):
        raise InvalidInputError("cache is that of another kind of attention", hint=hint)
    if cache.record is not None and cache.owner != owner:
        raise InvalidInputError("cache is that of another layer", hint=hint)
    return cache.record


def batch(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, widths: tuple[int, int, int | None], max_seq_len: int | None
) -> tuple[Array, Array, Array]:
    """query (B, Lq, d), key (B, Lk, d) and value (B, Lk, d) of these widths (None: any), of one dtype."""
    given = {"query": query, "key": key, "value": value}
    for name, x in given.items():  # layer(x, mask)
        if isinstance(x, masks.Mask):
            raise InvalidInputError(f"{name} is a mask, {shown(x)}", hint="did you mean mask=...?")
    hint = "pass {}.filled(0) and hide keys by mask or key_padding_mask"
    arrays = {name: from_sequence(name, x, hint.format(name)) for name, x in given.items()}
    if arrays["query"].dtype != bool:
        _check_no_bools(arrays)
    is_mixed = len({x.dtype for x in arrays.values()}) > 1
    if is_mixed and any(halves.is_half(halves.stored(x).dtype) for x in arrays.values()):
        _refuse_types(arrays)  # and not the half one, which would be as good as the others
    arrays = {name: floats(name, x, may_be_half=True) for name, x in arrays.items()}
    shapes = {f"{name}.shape": x.shape for name, x in arrays.items()}
    for name, x in arrays.items():
        if x.ndim != 3:
            raise InvalidInputError(f"{name} has {x.ndim} axes", shapes=shapes, hint=_axes_hint("x", x.ndim))
    if len({x.dtype for x in arrays.values()}) > 1:
        _refuse_types(arrays)
    if len({x.shape[0] for x in arrays.values()}) > 1:
        hint = "the first axis is the batch; numpy.broadcast_to repeats one without a copy"
        raise InvalidInputError("Batch sizes must match across Q, K, V", shapes=shapes, hint=hint)
    if arrays["key"].shape[1] != arrays["value"].shape[1]:
        hint = "one value for each key"
        raise InvalidInputError("Key and value sequence lengths must match", shapes=shapes, hint=hint)
    for (name, x), width in zip(arrays.items(), widths, strict=True):
        if width is not None and x.shape[2] != width:
            hint = f"the layer was built for {width} channels of {name}"
            raise DimensionMismatchError(width, x.shape[2], shapes=shapes, hint=hint)
        if max_seq_len is not None and x.shape[1] > max_seq_len:
            hint = "configure a larger max_seq_len, or None for no limit"
            reason = f"{name} has {x.shape[1]} positions, max_seq_len is {max_seq_len}"
            raise InvalidInputError(reason, shapes=shapes, hint=hint)
    query, key, value = (x if x.flags.aligned else x.copy() for x in arrays.values())
    return query, key, value


def sequences(name: str, x: ArrayLike, width: int) -> Array:
    """One array (B, L, width)."""
    array = floats(name, x, may_be_half=True)
    if array.ndim != 3:
        hint, shapes = _axes_hint(name, array.ndim), {f"{name}.shape": array.shape}
        raise InvalidInputError(f"{name} has {array.ndim} axes", shapes=shapes, hint=hint)
    if array.shape[2] != width:
        hint = f"the layer was built for {width} channels"
        raise DimensionMismatchError(width, array.shape[2], shapes={f"{name}.shape": array.shape}, hint=hint)
    return array if array.flags.aligned else array.copy()


def _check_no_bools(arrays: dict[str, Array]) -> None:
    """Refuse the array of a mask that stands where an input is expected: layer(x, mask)."""
    for name, x in arrays.items():
        if x.dtype == bool:
            what = f"{name} has dtype bool, not {KNOWN[True]}"
            raise InvalidInputError(what, shapes={f"{name}.shape": x.shape}, hint="did you mean mask=...?")


def _axes_hint(name: str, axes: int) -> str:
    hint = "give (batch, length, channels); "
    return hint + (f"for one sequence, {name}[None]" if axes < 3 else "heads are joined, (batch, length, heads * D)")


def _refuse_types(arrays: dict[str, Array]) -> NoReturn:
    dtypes = {f"{name}.dtype": x.dtype for name, x in arrays.items()}
    raise InvalidInputError("query, key and value differ in dtype", shapes=dtypes, hint="cast them to one")


def hidden(mask: Any, scores: tuple[int, int, int, int], per_head: bool) -> masks.Mask | Array | None:
    """What the engine is told of a layer's `mask`, for scores (B, H, Lq, Lk)."""
    if mask is None or isinstance(mask, masks.Mask):
        return mask
    mask_arrays.check_not_bool("mask", mask, "causal=True in the configuration")
    array = from_sequence("mask", mask, "pass mask.filled(True) to hide what is masked in it, or filled(False)")
    check_hidden(array.shape, array.dtype, scores, per_head)
    return _attending("mask", array if array.ndim != 3 else array[:, None])


def with_padding(
    mask: Any, key_padding_mask: Any, seen: masks.Mask | Array | None, scores: tuple[int, int, int, int]
) -> Any:
    """A layer's `mask` and `key_padding_mask`, of which `padded` made `seen`, in one, as `mask` takes it: what a cache
    keeps."""
    if seen is None:
        return mask
    if mask is None and not isinstance(seen, masks.Mask):
        hides = key_padding_mask if gpu.is_on_gpu(key_padding_mask) else np.asarray(key_padding_mask)
        return hides.reshape(scores[0], 1, scores[3])
    return masks.All([hidden(mask, scores, per_head=True), seen])


def check_hidden(shape: Shape, dtype: np.dtype[Any], scores: tuple[int, int, int, int], per_head: bool) -> None:
    """Raise unless a `mask` of this shape and dtype fits scores (B, H, Lq, Lk)."""
    B, H, Lq, Lk = scores
    wanted = {"(Lq, Lk)": (Lq, Lk), "(B, Lq, Lk)": (B, Lq, Lk)} | ({"(B, heads, Lq, Lk)": scores} if per_head else {})
    shapes = {"mask.shape": shape, **wanted}
    if dtype.kind not in "biuf":
        raise InvalidMaskError(f"mask has dtype {dtype}", shapes=shapes, hint="give True or 1 where a key is hidden")
    full = {2: (Lq, Lk), 3: (B, Lq, Lk), **({4: scores} if per_head else {})}.get(len(shape))
    if full is None or any(n not in (1, size) for n, size in zip(shape, full, strict=True)):
        reason = f"Mask shape {shape} doesn't match scores shape {full or (B, Lq, Lk)}"
        hint = "axes may be 1 where all share one mask"
        if shape == (B, Lk):
            rows = "key_padding_mask=" if per_head else "mask[:, None]"
            hint += f"; one row of keys for each sequence is {rows}"
        raise InvalidMaskError(reason, shapes=shapes, hint=hint)


def padded(key_padding_mask: ArrayLike | None, B: int, Lk: int) -> masks.Mask | Array | None:
    """What the engine is told of a `key_padding_mask` (B, Lk): lengths, where the hidden keys are the last ones."""
    if key_padding_mask is None:
        return None
    filled = "pass key_padding_mask.filled(True) to hide what is masked in it, or filled(False)"
    array = from_sequence("key_padding_mask", key_padding_mask, filled)
    shapes = {"key_padding_mask.shape": array.shape, "(B, Lk)": (B, Lk)}
    if array.dtype.kind not in "biuf":
        hint = "give True or 1 where a key is padding"
        raise InvalidMaskError(f"key_padding_mask has dtype {array.dtype}", shapes=shapes, hint=hint)
    if array.shape != (B, Lk):
        raise InvalidMaskError("key_padding_mask has the wrong shape", shapes=shapes, hint="one row for each sequence")
    seen = _attending("key_padding_mask", array)
    lengths = seen.sum(axis=1)
    if (seen == (np.arange(Lk) < lengths[:, None])).all():
        return masks.Lengths(keys=lengths)
    return seen[:, None, None, :]


def _attending(name: str, array: Array) -> Array:
    """True where the layer's mask does not hide."""
    if array.dtype.kind == "b":
        return ~array
    if array.size and not array.min() >= 0:  # NaN neither
        hint = "numbers above 0.5 hide; a mask that is added to scores goes in as rv.masks.All([mask])"
        if name == "key_padding_mask":
            hint = "numbers above 0.5 hide; torch's float form, of 0 and -inf, is key_padding_mask == -numpy.inf here"
        raise InvalidMaskError(f"{name} has negative numbers or NaN", hint=hint)
    return ~(array > 0.5)
