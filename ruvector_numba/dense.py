"""Dense attention on NumPy arrays."""

import math

import numpy as np

from . import masks
from .errors import DimensionMismatchError, InvalidInputError

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_KEYS_PER_BLOCK = 128  # 128 x 64 scores are 32 KiB and stay near the core; 64 and 96 measured the same within 3 %


def _array(name: str, x) -> np.ndarray:
    a = np.asarray(x)
    if a.dtype not in _FLOATS or not a.dtype.isnative:
        raise InvalidInputError(f"{name} has dtype {a.dtype}", hint=f"cast it with {name}.astype(numpy.float32)")
    if a.ndim < 2:
        raise InvalidInputError(f"{name} has shape {a.shape}", hint="give (..., L, D), at least two axes")
    return a if a.flags.aligned else a.copy()


def _checked(query, key, value, enable_gqa: bool):
    query, key, value = _array("query", query), _array("key", key), _array("value", value)
    shapes = {"query.shape": query.shape, "key.shape": key.shape, "value.shape": value.shape}
    if not query.dtype == key.dtype == value.dtype:
        dtypes = {"query.dtype": query.dtype, "key.dtype": key.dtype, "value.dtype": value.dtype}
        raise InvalidInputError("query, key and value differ in dtype", shapes=dtypes, hint="cast them to one dtype")
    if query.ndim != key.ndim or key.ndim != value.ndim or query.shape[:-3] != key.shape[:-3]:
        raise InvalidInputError("the ranks or leading axes differ", shapes=shapes)
    if query.shape[-1] != key.shape[-1]:
        raise DimensionMismatchError(query.shape[-1], key.shape[-1], shapes=shapes, hint="query and key share D")
    if key.shape[:-1] != value.shape[:-1]:
        raise DimensionMismatchError(key.shape[:-1], value.shape[:-1], shapes=shapes, hint="one value for each key")
    if query.ndim > 2 and query.shape[-3] != key.shape[-3]:
        fits = key.shape[-3] > 0 and query.shape[-3] % key.shape[-3] == 0
        if not (enable_gqa and fits):
            hint = "heads of query must be a multiple of heads of key" if enable_gqa else "pass enable_gqa=True?"
            raise DimensionMismatchError(query.shape[-3], key.shape[-3], shapes=shapes, hint=hint)
    return query, key, value


def _checked_terms(scale, softcap, alibi_slopes, D: int, heads: int, dtype):
    """The scale, softcap and slopes of a call, or a clear error."""
    if scale is None:
        scale = 1 / math.sqrt(D) if D else 1.0
    if not math.isfinite(scale):
        raise InvalidInputError(f"scale is {scale}", hint="give a finite number, or None for 1 / sqrt(D)")
    if softcap is not None and not 0 < softcap < math.inf:
        raise InvalidInputError(f"softcap is {softcap}", hint="give a positive number, or None for no cap")
    if alibi_slopes is not None:
        alibi_slopes = np.ascontiguousarray(alibi_slopes, dtype)
        if alibi_slopes.shape != (heads,):
            shapes = {"alibi_slopes.shape": alibi_slopes.shape, "expected": (heads,)}
            raise InvalidInputError("alibi_slopes has the wrong length", shapes=shapes, hint="one slope for each head")
    return float(scale), softcap, alibi_slopes


def _stack(x: np.ndarray, repeat: int, keep: list, stack=None):
    """The array as the kernels see it: where each matrix begins, and the steps of rows and columns."""
    from .kernels.jit import address
    from .kernels.tiles import Matrices

    stack = stack or Matrices
    at = np.zeros((), np.int64)
    for axis, (n, stride) in enumerate(zip(x.shape[:-2], x.strides[:-2], strict=True)):
        steps = np.arange(n, dtype=np.int64) * (stride // x.itemsize)
        if axis == x.ndim - 3:
            steps = np.repeat(steps, repeat)
        at = at[..., None] + steps
    at = np.ascontiguousarray(at.reshape(-1))
    keep += [x, at]
    return stack(address(x), address(at), x.strides[-2] // x.itemsize, x.strides[-1] // x.itemsize)


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, *, is_causal=False, scale=None, enable_gqa=False, softcap=None, alibi_slopes=None
) -> np.ndarray:
    """softmax(query key^T * scale) value, exactly, without forming the Lq x Lk weights.

    Parameters
    ----------
    query : array (..., H, Lq, D), float32 or float64, of any strides
    key : array (..., Hk, Lk, D)
    value : array (..., Hk, Lk, Dv)
    attn_mask : bool array, float array, or mask of `ruvector_numba.masks`, optional
        Arrays broadcast to (..., H, Lq, Lk). True attends; a float is added to the score, and -inf hides.
    is_causal : bool
        Query i sees keys j <= i only, counted from the top left, as in torch.
    scale : float, optional
        1 / sqrt(D) by default.
    enable_gqa : bool
        Let H be a multiple of Hk; query head h then uses key head h // (H // Hk).
    softcap : float, optional
        Scores become softcap * tanh(score / softcap), before anything is added to them.
    alibi_slopes : array (H,), optional
        slope * |i + offset - j| is subtracted; the offset is 0, or Lk - Lq under a mask aligned bottom_right.

    Returns
    -------
    array (..., H, Lq, Dv). A query that sees no key gets zeros.

    Raises
    ------
    InvalidInputError, InvalidMaskError, DimensionMismatchError

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> q = k = np.eye(2, dtype=np.float32)
    >>> rv.scaled_dot_product_attention(q, k, np.ones((2, 3), np.float32), is_causal=True)
    array([[1., 1., 1.],
           [1., 1., 1.]], dtype=float32)
    """
    query, key, value = _checked(query, key, value, enable_gqa)
    (Lq, D), (Lk, Dv) = query.shape[-2:], value.shape[-2:]
    heads = query.shape[-3] if query.ndim > 2 else 1
    scale, softcap, slopes = _checked_terms(scale, softcap, alibi_slopes, D, heads, query.dtype)
    seen = masks.resolve(attn_mask, is_causal, query.shape[:-3], heads, Lq, Lk, query.dtype)
    out = np.zeros((*query.shape[:-1], Dv), query.dtype)
    if out.size == 0 or Lk == 0:
        return out
    if D == 0:  # every score is 0
        query, key = (np.zeros((*x.shape[:-1], 1), x.dtype) for x in (query, key))
    _forward(query, key, value, out, seen, scale, softcap, slopes)
    return out


def _limits(seen: masks.Visibility, batch: tuple, Lq: int, Lk: int):
    """lo, hi of each query as the kernels read it: the array, and its steps from batch to batch and row to row."""
    if seen.limits is None:
        return np.array([0, Lk], np.int64), 0, 0
    limits = np.ascontiguousarray(np.broadcast_to(seen.limits, (*batch, Lq, 2)), np.int64)
    return limits, 2 * Lq, 2


def _forward(query, key, value, out, seen, scale, softcap, slopes) -> None:
    from .kernels import blocks, dense, jit
    from .kernels.scoring import ByteMatrices
    from .kernels.simd import target
    from .kernels.softmax import LOG2E

    (Lq, D), (Lk, Dv), batch = query.shape[-2:], value.shape[-2:], query.shape[:-3]
    H = query.shape[-3] if query.ndim > 2 else 1
    group = H // key.shape[-3] if query.ndim > 2 else 1
    heads, width = H * math.prod(batch), target().width(query.itemsize)
    count = -(-Lq // width)
    step = blocks.scratch_rows(D, Dv, _KEYS_PER_BLOCK) * width
    scratch = jit.scratch(step * jit.slots(), query.dtype)
    limits, limits_batch, limits_row = _limits(seen, batch, Lq, Lk)
    natural = None if softcap is None and slopes is None and seen.bias is None else LOG2E
    keep: list = []
    bias = mask = None
    if seen.bias is not None:
        bias = _stack(np.broadcast_to(seen.bias, (*batch, H, Lq, Lk)), 1, keep)
    if seen.allowed is not None:
        allowed = np.broadcast_to(seen.allowed, (*batch, H, Lq, Lk)).view(np.uint8)
        mask = _stack(allowed, 1, keep, ByteMatrices)
    if slopes is not None:
        slopes = np.tile(slopes, heads // H)
    job = blocks.AttentionJob(
        query=_stack(query, 1, keep), key=_stack(key, group, keep), value=_stack(value, group, keep),
        output=_stack(out, 1, keep), natural=natural, softcap=None if softcap is None else float(softcap),
        slopes=None if slopes is None else jit.address(slopes), bias=bias, mask=mask,
        additive=None if bias is None and mask is None else 1, dropout=None,
        limits=jit.address(limits), limits_batch=limits_batch, limits_row=limits_row, first=seen.first,
        last=seen.last, offset=seen.offset, scale=scale * (LOG2E if natural is None else 1.0), Lq=Lq, Lk=Lk, D=D,
        Dv=Dv, H=H, blocks=count, keys_per_block=_KEYS_PER_BLOCK, scratch=jit.address(scratch), scratch_step=step,
    )  # fmt: skip
    dense.forward(job, heads * count, query.dtype, heads * Lq * Lk * (D + Dv))
