"""How the masks of ONNX's operators reach the kernels: padding as a length, so that hidden keys cost nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .. import masks, visibility
from ..arrays import Array, Shape

__all__ = ["ABSORBING", "joined"]

ABSORBING = -1e30  # so low that adding it to a score gives the same number as putting it in the score's place


def joined(parts: Sequence[Array | masks.Mask], scores: Shape) -> masks.Mask:
    """All parts of a mask for scores of this shape; one of them may be a float array.

    What hides the same last keys from all queries, as padding does, becomes a length. For a bool array, or one of 0 and
    -inf, that says the same. Low finite numbers give hidden keys a weight of 0 as long as another key is seen; where
    the other parts leave a query nothing but such keys they are its scores, and the array stays what it was.
    """
    seen: masks.Mask = masks.Full()
    low: list[tuple[Array, NDArray[np.int64]]] = []
    for part in parts:
        found = None if isinstance(part, masks.Mask) else _padding(part, scores[-1])
        if found is None or isinstance(part, masks.Mask):
            seen = seen & part
        elif found[1]:
            seen = seen & _length(found[0])
        else:
            low.append((part, found[0]))
    for part, lengths in low:
        seen = seen & (_length(lengths) if _all_see_one_of(lengths, seen, scores) else part)
    return seen


def _padding(mask: Array, Lk: int) -> tuple[NDArray[np.int64], bool] | None:
    """How many of the first keys a mask leaves to all queries, for each batch row; and does it hide all the others?

    If not, it puts them at low numbers, and leaves each row a key at least. None for other masks.
    """
    shape = (1,) * (4 - mask.ndim) + mask.shape
    if len(shape) > 4 or shape[1] != 1 or shape[2] == 0 or shape[3] != Lk:
        return None
    whole = mask.reshape(shape)[:, 0]  # (B or 1, Lq or 1, Lk), the same for all heads
    rows = whole[:, 0]
    if not ((whole[:, -1] == rows).all() and (whole == rows[:, None]).all()):  # the last row tells of most that differ
        return None
    seen = rows if mask.dtype == bool else rows == 0
    lengths: NDArray[np.int64] = seen.sum(axis=1)
    if not np.array_equal(seen, np.arange(Lk) < lengths[:, None]):
        return None
    if mask.dtype == bool or (seen | np.isneginf(rows)).all():
        return lengths, True
    return (lengths, False) if lengths.all() and (seen | (rows <= ABSORBING)).all() else None


def _length(lengths: NDArray[np.int64]) -> masks.Lengths:
    return masks.Lengths(keys=lengths if len(lengths) != 1 else int(lengths[0]))


def _all_see_one_of(lengths: NDArray[np.int64], seen: masks.Mask, scores: Shape) -> bool:
    """Does each query that sees any key see one of the first `lengths`, of which there is one at least?

    Arrays are asked only for the first key, which whatever is causal lets all queries see.
    """
    parts = seen.parts if isinstance(seen, masks.All) else (seen,)
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    *batch, heads, Lq, Lk = (1,) * (3 - len(scores)) + tuple(scores)
    rules = masks.All(part for part in parts if isinstance(part, masks.Mask))
    found = rules._resolve(visibility.Sizes(tuple(batch), heads, Lq, Lk, np.dtype(np.float32)))
    at, limits = np.arange(Lq), (0, Lk) if found.limits is None else np.moveaxis(found.limits, -1, 0)
    lo, hi = np.maximum(at + found.first, limits[0]), np.minimum(at + found.last, limits[1])
    if not arrays:
        return bool(((hi <= lo) | (lo < lengths[:, None])).all())
    return bool((lo <= 0).all() and (hi > 0).all()) and all(bool(part[..., :1].all()) for part in arrays)
