"""Who may attend to whom, said by rule and not by a matrix of Lq x Lk.

A mask is one of the objects below, a bool array (True = attend), a float array (added to the scores; -inf hides), or
any of these joined with ``&``: a query sees a key where every part lets it. The rules cost only what is attended,
since they reach the kernels as intervals of keys:

>>> import numpy as np, ruvector_numba as rv
>>> mask = rv.masks.Window(left=1) & rv.masks.Causal() & rv.masks.Lengths(keys=3)
>>> print(mask.to_dense(4, 4).astype(int))
[[1 0 0 0]
 [1 1 0 0]
 [0 1 1 0]
 [0 0 1 0]]

When queries and keys differ in number, `align` says which corner of the matrix the diagonal goes through: query 0
sits at key 0 (``"top_left"``, as in torch), or the last query sits at the last key (``"bottom_right"``, as when new
queries meet a cache of old keys)::

    Causal("top_left")  Causal("bottom_right")        Causal("top_left")  Causal("bottom_right")
    Lq=2, Lk=5          Lq=2, Lk=5                    Lq=4, Lk=2          Lq=4, Lk=2
    1 0 0 0 0           1 1 1 1 0                     1 0                 0 0
    1 1 0 0 0           1 1 1 1 1                     1 1                 0 0
                                                      1 1                 1 0
                                                      1 1                 1 1
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import halves, mask_arrays
from . import mask_arguments as arguments
from .arrays import Array, Shape
from .errors import InvalidMaskError
from .values import check_memory
from .visibility import (
    CAUSAL,
    NONE,
    UNBOUNDED,
    Align,
    Sizes,
    Visibility,
    batch_or_ones,
    meet,
    offset_of,
    positions,
    runs,
)

__all__ = ["All", "Causal", "Full", "Lengths", "Mask", "Segments", "Window"]


def __dir__() -> list[str]:
    return __all__


def resolve(
    attn_mask: Mask | ArrayLike | None,
    is_causal: bool,
    batch: Shape,
    heads: int,
    Lq: int,
    Lk: int,
    dtype: np.dtype[Any],
) -> Visibility:
    """Whatever a caller passed as a mask, in the form the plan works with; `InvalidMaskError` if it does not fit scores
    (*batch, heads, Lq, Lk) of inputs of this dtype.
    """
    if attn_mask is None:
        return CAUSAL if is_causal else NONE
    mask_arrays.check_not_bool("attn_mask", attn_mask, "is_causal=True")
    sizes = Sizes(batch, heads, Lq, Lk, dtype)
    if isinstance(attn_mask, Mask):
        seen = attn_mask._resolve(sizes)
    else:
        seen = mask_arrays.resolved(mask_arrays.as_mask(attn_mask, may_be_bits=dtype == halves.BITS), sizes)
    return meet(seen, CAUSAL) if is_causal else seen


class Mask:
    """Base of the mask objects: immutable, compared by value, closed under ``&``.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> isinstance(rv.masks.Causal(), rv.masks.Mask), rv.masks.Causal() == rv.masks.Causal("top_left")
    (True, True)
    """

    __slots__ = ()
    __array_ufunc__ = None  # so that `array & mask` asks __rand__ below and does not loop over the array's elements

    def to_dense(self, Lq: int, Lk: int) -> NDArray[np.bool_]:
        """The mask as a bool array, True = attend.

        Parameters
        ----------
        Lq, Lk : int
            The number of queries and of keys.

        Returns
        -------
        ndarray of bool
            Shape (Lq, Lk), or (*batch, 1, Lq, Lk) where rows of the batch differ, or whatever an array of the
            composition adds in front. Passed as ``attn_mask`` it means what the object means, save that a float
            array keeps only which scores it hides (-inf).

        Raises
        ------
        InvalidMaskError
            If Lq or Lk is no whole number of 0 or more, or ids, lengths or arrays of the mask do not fit them.
        OutOfMemoryError
            If the array is larger than this machine's memory.
        """
        Lq, Lk = arguments.size("Lq", Lq), arguments.size("Lk", Lk)
        check_memory((Lq, Lk), np.dtype(bool), "mask", "pass the mask itself as attn_mask: no such array is formed")
        dense = self._dense(Lq, Lk)
        return np.array(np.broadcast_to(dense, np.broadcast_shapes(dense.shape, (Lq, Lk))), dtype=bool)

    def _dense(self, Lq: int, Lk: int) -> NDArray[np.bool_]:
        """A bool array that broadcasts to (*batch, heads, Lq, Lk)."""
        raise NotImplementedError

    def _resolve(self, sizes: Sizes) -> Visibility:
        raise NotImplementedError

    def __and__(self, other: Mask | ArrayLike | None) -> Mask:
        return _joined(self, other) if _can_join(other) else NotImplemented

    def __rand__(self, other: ArrayLike | None) -> Mask:
        return _joined(other, self) if _can_join(other) else NotImplemented

    # What these would make is no intervals: it takes an array, which the caller shall see.
    __or__ = __ror__ = arguments.no_operator("a.to_dense(Lq, Lk) | b.to_dense(Lq, Lk)")
    __xor__ = __rxor__ = arguments.no_operator("a.to_dense(Lq, Lk) ^ b.to_dense(Lq, Lk)")
    __sub__ = __rsub__ = arguments.no_operator("a.to_dense(Lq, Lk) & ~b.to_dense(Lq, Lk)")
    __invert__ = arguments.no_operator("~a.to_dense(Lq, Lk)")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._contents() == other._contents()

    def __hash__(self) -> int:
        return hash((type(self), self._contents()))

    def _contents(self) -> tuple[object, ...]:
        names = getattr(self, "__dataclass_fields__", ())  # the base has none
        return tuple(_comparable(getattr(self, name)) for name in names)


@dataclass(frozen=True, slots=True, eq=False)
class Full(Mask):
    """Every query sees every key: the neutral element of ``&``.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> rv.masks.Full() & rv.masks.Causal()
    Causal(align='top_left')
    """

    def _dense(self, Lq: int, Lk: int) -> NDArray[np.bool_]:
        return np.ones((Lq, Lk), dtype=bool)

    def _resolve(self, sizes: Sizes) -> Visibility:
        return NONE


@dataclass(frozen=True, slots=True, eq=False)
class Causal(Mask):
    """No query sees the future: query i sees keys up to i + offset.

    Parameters
    ----------
    align : {"top_left", "bottom_right"}
        offset is 0, or Lk - Lq.

    Raises
    ------
    InvalidMaskError
        If `align` is another word.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> print(rv.masks.Causal().to_dense(2, 5).astype(int))
    [[1 0 0 0 0]
     [1 1 0 0 0]]
    >>> print(rv.masks.Causal("bottom_right").to_dense(2, 5).astype(int))
    [[1 1 1 1 0]
     [1 1 1 1 1]]
    """

    align: Align = "top_left"

    def __post_init__(self) -> None:
        arguments.check_align("Causal", self.align)

    def _dense(self, Lq: int, Lk: int) -> NDArray[np.bool_]:
        return np.arange(Lk) <= positions(self.align, Lq, Lk)

    def _resolve(self, sizes: Sizes) -> Visibility:
        offset = offset_of(self.align, sizes.Lq, sizes.Lk)
        return Visibility(last=offset + 1, offset=offset) if offset else CAUSAL


@dataclass(frozen=True, slots=True, eq=False)
class Window(Mask):
    """A band along the diagonal: query i sees keys from i + offset - left to i + offset + right, both included.

    Parameters
    ----------
    left, right : int or None
        How far a query sees to either side; None is no limit, 0 reaches just its own position.
    align : {"top_left", "bottom_right"}
        offset is 0, or Lk - Lq.

    Raises
    ------
    InvalidMaskError
        If `left` or `right` is neither None nor a whole number of 0 or more, or `align` is another word.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> print(rv.masks.Window(left=1, right=1).to_dense(3, 5).astype(int))
    [[1 1 0 0 0]
     [1 1 1 0 0]
     [0 1 1 1 0]]
    >>> print(rv.masks.Window(left=1, right=1, align="bottom_right").to_dense(3, 5).astype(int))
    [[0 1 1 1 0]
     [0 0 1 1 1]
     [0 0 0 1 1]]

    ``Window(right=0)`` is ``Causal()``; ``Window(left=255) & Causal()`` is a sliding window of 256 keys.
    """

    left: int | None = None
    right: int | None = None
    align: Align = "top_left"

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            reach = getattr(self, name)
            if reach is not None:
                object.__setattr__(self, name, arguments.reach(f"Window.{name}", reach))
        arguments.check_align("Window", self.align)

    def _dense(self, Lq: int, Lk: int) -> NDArray[np.bool_]:
        distance = np.arange(Lk) - positions(self.align, Lq, Lk)
        left = UNBOUNDED if self.left is None else min(self.left, UNBOUNDED)
        right = UNBOUNDED if self.right is None else min(self.right, UNBOUNDED)
        return (-left <= distance) & (distance <= right)

    def _resolve(self, sizes: Sizes) -> Visibility:
        offset = offset_of(self.align, sizes.Lq, sizes.Lk)
        first = -UNBOUNDED if self.left is None else max(-UNBOUNDED, offset - self.left)
        last = UNBOUNDED if self.right is None else min(UNBOUNDED, offset + self.right + 1)
        return Visibility(first, last, offset)


@dataclass(frozen=True, slots=True, eq=False)
class Lengths(Mask):
    """Padding at the end: only the first `keys` keys exist, and only the first `queries` queries.

    A query beyond its length sees nothing, so its output is 0.

    Parameters
    ----------
    queries, keys : int, array_like of int, or None
        One length for all, or one per row of the batch (a shape that broadcasts to the batch axes); None is no limit.

    Raises
    ------
    InvalidMaskError
        If a length is no whole number or negative, or the two do not agree on the rows of the batch.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> print(rv.masks.Lengths(queries=2, keys=3).to_dense(3, 5).astype(int))
    [[1 1 1 0 0]
     [1 1 1 0 0]
     [0 0 0 0 0]]
    >>> print(rv.masks.Lengths(keys=[1, 3]).to_dense(1, 4)[:, 0, 0].astype(int))  # a batch of two
    [[1 0 0 0]
     [1 1 1 0]]
    """

    queries: ArrayLike | None = None  # kept as an int or a read-only int64 array
    keys: ArrayLike | None = None

    def __post_init__(self) -> None:
        for name in ("queries", "keys"):
            lengths = getattr(self, name)
            if lengths is not None:
                object.__setattr__(self, name, arguments.lengths(f"Lengths.{name}", lengths))
        rows = {name: np.asarray(getattr(self, name)).shape for name in ("queries", "keys")}  # of None it is ()
        arguments.check_rows("Lengths", **rows)

    def _dense(self, Lq: int, Lk: int) -> NDArray[np.bool_]:
        queries = arguments.within("Lengths.queries", self.queries, "Lq", Lq)
        keys = arguments.within("Lengths.keys", self.keys, "Lk", Lk)
        check_memory((*np.broadcast_shapes(queries.shape, keys.shape), Lq, Lk), np.dtype(bool), "mask")
        with_heads = (..., None, None, None) if queries.ndim or keys.ndim else (None, None)
        return (np.arange(Lq)[:, None] < queries[with_heads]) & (np.arange(Lk) < keys[with_heads])

    def _resolve(self, sizes: Sizes) -> Visibility:
        if self.queries is None and self.keys is None:
            return NONE
        queries = arguments.within("Lengths.queries", self.queries, "Lq", sizes.Lq)
        keys = arguments.within("Lengths.keys", self.keys, "Lk", sizes.Lk)
        for name, lengths in (("queries", queries), ("keys", keys)):
            arguments.check_batch(f"Lengths.{name}", lengths.shape, sizes)
        rows = batch_or_ones(np.broadcast_shapes(queries.shape, keys.shape), sizes)
        limits = np.zeros((*rows, sizes.Lq, 2), dtype=np.int64)
        limits[..., 1] = np.where(np.arange(sizes.Lq) < queries[..., None], keys[..., None], 0)
        return Visibility(limits=limits)


@dataclass(frozen=True, slots=True, eq=False)
class Segments(Mask):
    """Sequences packed into one: a query sees a key where their ids are equal.

    Ids that lie together in the keys (each in one run, as packing leaves them) become intervals and cost only what is
    attended; ids that are scattered become a bool array of Lq x Lk.

    Parameters
    ----------
    query_ids : array_like of int
        Shape (Lq,), or (*batch, Lq).
    key_ids : array_like of int, optional
        Shape (Lk,), or (*batch, Lk); `query_ids` if left out.

    Raises
    ------
    InvalidMaskError
        If the ids are no whole numbers or have no axis, or the two do not agree on the rows of the batch.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> print((rv.masks.Segments([0, 0, 1, 1, 1]) & rv.masks.Causal()).to_dense(5, 5).astype(int))
    [[1 0 0 0 0]
     [1 1 0 0 0]
     [0 0 1 0 0]
     [0 0 1 1 0]
     [0 0 1 1 1]]
    >>> print(rv.masks.Segments(query_ids=[1, 7], key_ids=[0, 0, 1, 1, 1]).to_dense(2, 5).astype(int))  # none has id 7
    [[0 0 1 1 1]
     [0 0 0 0 0]]
    """

    query_ids: ArrayLike  # kept as a read-only int64 array
    key_ids: ArrayLike | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "query_ids", arguments.ids("Segments.query_ids", self.query_ids))
        if self.key_ids is not None:
            object.__setattr__(self, "key_ids", arguments.ids("Segments.key_ids", self.key_ids))
            arguments.check_rows(
                "Segments", query_ids=np.shape(self.query_ids)[:-1], key_ids=np.shape(self.key_ids)[:-1]
            )

    def _dense(self, Lq: int, Lk: int) -> NDArray[np.bool_]:
        query_ids, key_ids = self._checked(Lq, Lk)
        rows = np.broadcast_shapes(query_ids.shape[:-1], key_ids.shape[:-1])
        check_memory((*rows, Lq, Lk), np.dtype(bool), "mask")
        same: NDArray[np.bool_] = query_ids[..., :, None] == key_ids[..., None, :]
        return same[..., None, :, :] if same.ndim > 2 else same

    def _resolve(self, sizes: Sizes) -> Visibility:
        query_ids, key_ids = self._checked(sizes.Lq, sizes.Lk)
        for name, ids in (("query_ids", query_ids), ("key_ids", key_ids)):
            arguments.check_batch(f"Segments.{name}", ids.shape[:-1], sizes)
        rows = batch_or_ones(np.broadcast_shapes(query_ids.shape[:-1], key_ids.shape[:-1]), sizes)
        query_ids = np.broadcast_to(query_ids, (*rows, sizes.Lq))
        key_ids = np.broadcast_to(key_ids, (*rows, sizes.Lk))
        limits = np.empty((*rows, sizes.Lq, 2), dtype=np.int64)
        for row in np.ndindex(rows):
            found = runs(query_ids[row], key_ids[row])
            if found is None:
                return Visibility(allowed=query_ids[..., None, :, None] == key_ids[..., None, None, :])
            limits[row] = found
        return Visibility(limits=limits)

    def _checked(self, Lq: int, Lk: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        query_ids = np.asarray(self.query_ids)
        key_ids = query_ids if self.key_ids is None else np.asarray(self.key_ids)
        for name, ids, L, size in (("query_ids", query_ids, "Lq", Lq), ("key_ids", key_ids, "Lk", Lk)):
            if ids.shape[-1] != size:
                each = "query" if L == "Lq" else "key"
                default = "key_ids is query_ids unless given; " * (L == "Lk" and self.key_ids is None)
                raise InvalidMaskError(
                    f"Segments.{name} has {ids.shape[-1]} ids for {L} = {size}",
                    shapes={f"Segments.{name}.shape": ids.shape, L: size},
                    hint=f"{default}give one id per {each}",
                )
        return query_ids, key_ids


@dataclass(frozen=True, slots=True, init=False, eq=False, repr=False)
class All(Mask):
    """What ``&`` makes: a query sees a key where every part lets it.

    Parameters
    ----------
    parts : iterable of Mask, array_like or None
        Any number of mask objects and bool arrays and at most one float array; None and ``Full()`` add nothing.
        Arrays are kept, not copied, until a call uses them.

    Raises
    ------
    InvalidMaskError
        If `parts` is a single mask, or a part is neither a mask nor a bool or float array, or two are float arrays.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> np.array([True, False, True]) & rv.masks.Causal()
    bool array (3,) & Causal(align='top_left')
    """

    parts: tuple[Mask | Array, ...]

    def __init__(self, parts: Iterable[Mask | ArrayLike | None] = ()) -> None:
        if isinstance(parts, Mask | str) or hasattr(parts, "__array__") or not isinstance(parts, Iterable):
            hint = "give a list, of one mask too: All([mask])"
            raise InvalidMaskError(f"All takes several masks, got a {type(parts).__name__}", hint=hint)
        flat: list[Mask | Array] = []
        for part in parts:
            if isinstance(part, All):
                flat.extend(part.parts)
            elif isinstance(part, Mask):
                flat.extend(() if isinstance(part, Full) else (part,))
            elif part is not None:
                flat.append(mask_arrays.as_mask(part, may_be_bits=True))  # the call tells
        floats = [part for part in flat if isinstance(part, np.ndarray) and part.dtype.kind != "b"]
        if len(floats) > 1:
            raise InvalidMaskError(
                f"{len(floats)} float arrays in one composition, where one is the limit",
                shapes={f"float mask {n}": array.shape for n, array in enumerate(floats, 1)},
                hint="add them yourself and pass the sum: mask & (a + b)",
            )
        object.__setattr__(self, "parts", tuple(flat))

    def __repr__(self) -> str:
        return " & ".join(map(_named, self.parts)) if self.parts else "All(())"

    def _dense(self, Lq: int, Lk: int) -> NDArray[np.bool_]:
        dense = np.ones((Lq, Lk), dtype=bool)
        for part in self.parts:
            other = part._dense(Lq, Lk) if isinstance(part, Mask) else mask_arrays.dense(part, Lq, Lk)
            try:
                dense = dense & other
            except ValueError:
                shapes = {"so far": dense.shape, _named(part): other.shape}
                raise InvalidMaskError("the parts of a composition do not broadcast", shapes=shapes) from None
        return dense

    def _resolve(self, sizes: Sizes) -> Visibility:
        seen = (
            part._resolve(sizes) if isinstance(part, Mask) else mask_arrays.resolved(part, sizes) for part in self.parts
        )
        return reduce(meet, seen, NONE)


# Intersections


def _joined(a: Mask | ArrayLike | None, b: Mask | ArrayLike | None) -> Mask:
    joined = All((a, b))
    if not joined.parts:
        return Full()
    only = joined.parts[0]
    return only if len(joined.parts) == 1 and isinstance(only, Mask) else joined


def _can_join(other: object) -> bool:
    arrays = (np.ndarray, np.generic, bool, list, tuple)
    return other is None or isinstance(other, (Mask, *arrays)) or hasattr(other, "__array__")


# Showing and comparing


def _named(part: Mask | Array) -> str:
    return repr(part) if isinstance(part, Mask) else f"{part.dtype} array {part.shape}"


def _comparable(value: object) -> object:
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, value.tobytes()
    return tuple(map(_comparable, value)) if isinstance(value, tuple) else value
