"""Dense attention on NumPy arrays."""

import math

import numpy as np

from .errors import DimensionMismatchError, InvalidInputError

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_EVERYWHERE = 1 << 40  # a band that hides nothing
_KEYS_PER_BLOCK = 128  # 128 x 64 scores are 32 KiB and stay near the core; 64 and 96 measured the same within 3 %


def _array(name: str, x) -> np.ndarray:
    a = np.asarray(x)
    if a.dtype not in _FLOATS or not a.dtype.isnative:
        raise InvalidInputError(f"{name} has dtype {a.dtype}\nHINT: cast it with {name}.astype(numpy.float32)")
    if a.ndim < 2:
        raise InvalidInputError(f"{name} has shape {a.shape}\nHINT: give (..., L, D), at least two axes")
    return a if a.flags.aligned else a.copy()


def _checked(query, key, value, enable_gqa: bool):
    query, key, value = _array("query", query), _array("key", key), _array("value", value)
    shapes = f"  query.shape: {query.shape}\n  key.shape  : {key.shape}\n  value.shape: {value.shape}"
    if not query.dtype == key.dtype == value.dtype:
        raise InvalidInputError(
            f"query, key, value have dtypes {query.dtype}, {key.dtype}, {value.dtype}\nHINT: cast them to one dtype"
        )
    if query.ndim != key.ndim or key.ndim != value.ndim or query.shape[:-3] != key.shape[:-3]:
        raise InvalidInputError(f"the ranks or leading axes differ\n{shapes}")
    if query.shape[-1] != key.shape[-1]:
        raise DimensionMismatchError(query.shape[-1], key.shape[-1], f"{shapes}\nHINT: query and key share D")
    if key.shape[:-1] != value.shape[:-1]:
        raise DimensionMismatchError(key.shape[:-1], value.shape[:-1], f"{shapes}\nHINT: one value for each key")
    if query.ndim > 2 and query.shape[-3] != key.shape[-3]:
        fits = key.shape[-3] > 0 and query.shape[-3] % key.shape[-3] == 0
        if not (enable_gqa and fits):
            hint = "heads of query must be a multiple of heads of key" if enable_gqa else "pass enable_gqa=True?"
            raise DimensionMismatchError(query.shape[-3], key.shape[-3], f"{shapes}\nHINT: {hint}")
    return query, key, value


def _stack(x: np.ndarray, repeat: int, keep: list):
    """The array as the kernels see it: where each matrix begins, and the steps of rows and columns."""
    from .kernels.jit import address
    from .kernels.tiles import Matrices

    at = np.zeros((), np.int64)
    for axis, (n, stride) in enumerate(zip(x.shape[:-2], x.strides[:-2], strict=True)):
        steps = np.arange(n, dtype=np.int64) * (stride // x.itemsize)
        if axis == x.ndim - 3:
            steps = np.repeat(steps, repeat)
        at = at[..., None] + steps
    at = np.ascontiguousarray(at.reshape(-1))
    keep += [x, at]
    return Matrices(address(x), address(at), x.strides[-2] // x.itemsize, x.strides[-1] // x.itemsize)


def scaled_dot_product_attention(query, key, value, *, is_causal=False, scale=None, enable_gqa=False) -> np.ndarray:
    """softmax(query key^T * scale) value, exactly, without forming the Lq x Lk weights.

    Parameters
    ----------
    query : array (..., H, Lq, D), float32 or float64, of any strides
    key : array (..., Hk, Lk, D)
    value : array (..., Hk, Lk, Dv)
    is_causal : bool
        Query i sees keys j <= i only, counted from the top left, as in torch.
    scale : float, optional
        1 / sqrt(D) by default.
    enable_gqa : bool
        Let H be a multiple of Hk; query head h then uses key head h // (H // Hk).

    Returns
    -------
    array (..., H, Lq, Dv). A query that sees no key gets zeros.

    Raises
    ------
    InvalidInputError, DimensionMismatchError

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> q = k = np.eye(2, dtype=np.float32)
    >>> rv.scaled_dot_product_attention(q, k, np.ones((2, 3), np.float32), is_causal=True)
    array([[1., 1., 1.],
           [1., 1., 1.]], dtype=float32)
    """
    query, key, value = _checked(query, key, value, enable_gqa)
    D, (Lk, Dv) = query.shape[-1], value.shape[-2:]
    if scale is None:
        scale = 1 / math.sqrt(D) if D else 1.0
    if not math.isfinite(scale):
        raise InvalidInputError(f"scale is {scale}\nHINT: give a finite number, or None for 1 / sqrt(D)")
    out = np.zeros((*query.shape[:-1], Dv), query.dtype)
    if out.size == 0 or Lk == 0:
        return out
    if D == 0:  # every score is 0
        query, key = (np.zeros((*x.shape[:-1], 1), x.dtype) for x in (query, key))
        D = 1
    _forward(query, key, value, out, is_causal, float(scale))
    return out


def _forward(query, key, value, out, is_causal: bool, scale: float) -> None:
    from .kernels import blocks, dense, jit
    from .kernels.simd import target
    from .kernels.softmax import LOG2E

    (Lq, D), (Lk, Dv) = query.shape[-2:], value.shape[-2:]
    heads = out.size // (Lq * Dv)
    group = query.shape[-3] // key.shape[-3] if query.ndim > 2 else 1
    width = target().width(query.itemsize)
    parts = -(-Lq // width)
    step = (D + max(D, Dv) + Dv + 4 * _KEYS_PER_BLOCK + blocks.ONE_ROW_EACH) * width
    scratch = jit.scratch(step * jit.slots(), query.dtype)
    limits = np.array([0, Lk], np.int64)
    keep: list = []
    job = blocks.AttentionJob(
        query=_stack(query, 1, keep), key=_stack(key, group, keep), value=_stack(value, group, keep),
        output=_stack(out, 1, keep), lse=None, grad_output=None, grad_lse=None, grad_query=None, grad_key=None,
        grad_value=None, natural=None, softcap=None, slopes=None, bias=None, mask=None, dropout=None,
        limits=jit.address(limits), limits_batch=0, limits_row=0, first=-_EVERYWHERE,
        last=1 if is_causal else _EVERYWHERE, offset=0, scale=scale * LOG2E, Lq=Lq, Lk=Lk, D=D, Dv=Dv, H=heads,
        heads=heads, group=group, query_parts=parts, queries_per_part=width, key_parts=1, keys_per_part=Lk,
        keys_per_block=_KEYS_PER_BLOCK, scratch=jit.address(scratch), scratch_step=step,
    )  # fmt: skip
    dense.forward(job, heads * parts, query.dtype, heads * Lq * Lk * (D + Dv))
