"""What the plan knows of masks: a band, intervals of keys, an array of bools and one of floats; see masks.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arrays import Array, Shape

UNBOUNDED = 1 << 40  # beyond any index, and far from overflow when an index is added to it

Align = Literal["top_left", "bottom_right"]


@dataclass(frozen=True, slots=True, eq=False)
class Visibility:
    """All masks of one call, intersected: a band, an interval of keys per query, a bool array and a float array.

    Query i sees key j where all of these hold, and the float array, if any, is not -inf:

    Attributes
    ----------
    first, last : int
        ``first <= j - i < last``; -UNBOUNDED and UNBOUNDED where there is no limit.
    offset : int
        The key at which query 0 sits, for ALiBi: Lk - Lq if a part is aligned bottom_right, else 0.
    limits : int64 array (*batch or ones, Lq, 2), optional
        ``limits[..., i, 0] <= j < limits[..., i, 1]``; C-contiguous, and 0 <= lo <= hi <= Lk.
    allowed : bool array that broadcasts to (*batch, H, Lq, Lk), optional
        True where i may attend to j. The caller's own array, with its strides, where one was enough.
    bias : float array that broadcasts to (*batch, H, Lq, Lk), optional
        Added to the scores. The caller's own array, with its strides.
    """

    first: int = -UNBOUNDED
    last: int = UNBOUNDED
    offset: int = 0
    limits: NDArray[np.int64] | None = None
    allowed: NDArray[np.bool_] | None = None
    bias: Array | None = None


NONE = Visibility()
CAUSAL = Visibility(last=1)


class Sizes(NamedTuple):
    """The sizes a mask is resolved for."""

    batch: Shape
    heads: int
    Lq: int
    Lk: int
    dtype: np.dtype[Any]

    @property
    def scores(self) -> Shape:
        return (*self.batch, self.heads, self.Lq, self.Lk)


def meet(a: Visibility, b: Visibility) -> Visibility:
    if a is NONE or b is NONE or a is b:
        return b if a is NONE else a
    if b.bias is not None:
        a, b = b, a  # at most one of the two has a bias: `All` sees to it
    return Visibility(
        max(a.first, b.first),
        min(a.last, b.last),
        a.offset or b.offset,  # of the parts of one call, those that have an offset have the same
        _narrower(a.limits, b.limits),
        a.allowed if b.allowed is None else b.allowed if a.allowed is None else np.logical_and(a.allowed, b.allowed),
        a.bias,
    )


def _narrower(a: NDArray[np.int64] | None, b: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
    if a is None or b is None:
        return b if a is None else a
    limits = np.empty(np.broadcast_shapes(a.shape, b.shape), dtype=np.int64)
    lo, hi = limits[..., 0], limits[..., 1]
    np.maximum(a[..., 0], b[..., 0], out=lo)
    np.minimum(a[..., 1], b[..., 1], out=hi)
    np.maximum(lo, hi, out=hi)  # intervals that do not meet leave an empty one, not one of negative length
    return limits


def broadcasts(shape: Shape, target: Shape) -> bool:
    """Whether np.broadcast_to(array of `shape`, target) works."""
    return len(shape) <= len(target) and all(n in (1, m) for n, m in zip(shape[::-1], target[::-1], strict=False))


def batch_or_ones(rows: Shape, sizes: Sizes) -> Shape:
    return (1,) * (len(sizes.batch) - len(rows)) + rows


def offset_of(align: Align, Lq: int, Lk: int) -> int:
    return Lk - Lq if align == "bottom_right" else 0


def positions(align: Align, Lq: int, Lk: int) -> NDArray[np.int64]:
    """The key at which each query sits, as a column."""
    return np.arange(Lq, dtype=np.int64)[:, None] + offset_of(align, Lq, Lk)


def runs(query_ids: NDArray[np.int64], key_ids: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """(Lq, 2): the run of keys that has each query's id, (0, 0) if none has; None if an id is asked for that has two.

    An id no query has may be scattered, as padding is.
    """
    Lk = len(key_ids)
    if Lk == 0:
        return np.zeros((len(query_ids), 2), dtype=np.int64)
    starts = np.concatenate(([0], np.flatnonzero(key_ids[1:] != key_ids[:-1]) + 1))
    ends = np.append(starts[1:], Lk)
    order = np.argsort(key_ids[starts], kind="stable")
    ids = key_ids[starts][order]
    at, past = np.searchsorted(ids, query_ids, "left"), np.searchsorted(ids, query_ids, "right")
    if (past - at > 1).any():
        return None
    found = past > at
    run = order[np.where(found, at, 0)]
    return np.where(found[:, None], np.stack((starts[run], ends[run]), axis=-1), 0)
