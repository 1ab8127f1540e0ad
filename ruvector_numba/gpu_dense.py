"""Dense attention on arrays that lie on a GPU: the same calls, the same meaning; see dense.py."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from . import checks, gpu, masks
from .checks import Shape
from .errors import DimensionMismatchError, InvalidInputError, InvalidMaskError
from .gpu import GpuArray, Space
from .results import InputGradients

__all__ = ["Call", "Past", "call", "forward", "run"]

WIDEST = 256
_LOG2E = math.log2(math.e)
_FAR = 1 << 30


class Call(NamedTuple):
    """A checked call; arrays are as `checks.Call` has them, on the GPU."""

    checked: checks.Call  # of arrays that have shapes and nothing else
    query: GpuArray
    key: GpuArray
    value: GpuArray
    bias: GpuArray | None
    mask: GpuArray | None
    is_moved: bool = False  # from NumPy, whither results go back

    def space(self) -> Space:
        return Space(self.query.native)


def call(query: Any, key: Any, value: Any, attn_mask: Any, *terms: Any, dtype: str | None = None) -> Call:
    """Check a call whose arrays lie on a GPU; `terms` are those of `checks.call`."""
    q, k, v = (gpu.floats(name, x, dtype) for name, x in (("query", query), ("key", key), ("value", value)))
    if not q.element == k.element == v.element:
        dtypes = {"query.dtype": q.element, "key.dtype": k.element, "value.dtype": v.element}
        raise InvalidInputError("query, key and value differ in dtype", shapes=dtypes, hint="cast them to one")
    given, bias, mask = attn_mask, None, None
    if attn_mask is not None and not isinstance(attn_mask, masks.Mask):
        seen = gpu.view("attn_mask", attn_mask, dtype)
        is_bool = seen.element in ("bool", "uint8")
        if not is_bool and seen.element != q.element:
            dtypes = {"attn_mask.dtype": seen.element, "query.dtype": q.element}
            raise InvalidMaskError("a float mask has the dtype of query", shapes=dtypes, hint="cast it, or give bools")
        bias, mask = (None, seen) if is_bool else (seen, None)
        given = gpu.shadow(seen.shape, bool if is_bool else np.float32)
    c = checks.call(gpu.shadow(q.shape), gpu.shadow(k.shape), gpu.shadow(v.shape), given, *terms)
    if isinstance(attn_mask, masks.Mask) and (c.seen.allowed is not None or c.seen.bias is not None):
        hint = "give it as attn_mask by itself, on the GPU, or write the rule with masks that hold no matrix"
        raise InvalidMaskError("a matrix joined to a mask lies on the CPU", hint=hint)
    for name, n in (("D", q.shape[-1]), ("Dv", v.shape[-1])):
        if n > WIDEST:
            shapes = {"query.shape": q.shape, "value.shape": v.shape}
            raise InvalidInputError(f"{name} is {n}: the GPU takes at most {WIDEST}", shapes=shapes, hint="use the CPU")
    return Call(c, q, k, v, bias, mask)


# --- layouts -----------------------------------------------------------------------------------------------------
def _matrices(space: Space, x: GpuArray, repeat: int = 1) -> Any:
    """`Matrices` of rows that begin on 16 bytes, copied there first if they do not; each `repeat` times."""
    from .kernels.cuda.blocks import Matrices

    x = aligned(space, x)
    return Matrices(space.pointer(x), starts(space, x.shape[:-2], x.strides[:-2], repeat), x.strides[-2])


def starts(space: Space, shape: Shape, strides: tuple[int, ...], repeat: int = 1) -> Any:
    """The address of where each matrix of a stack begins, the last axis `repeat` times."""
    return space.constant((shape, strides, repeat), lambda: _starts(shape, strides, repeat))


def _starts(shape: Shape, strides: tuple[int, ...], repeat: int = 1) -> Any:
    at = np.zeros((), np.int64)
    for axis, (n, stride) in enumerate(zip(shape, strides, strict=True)):
        steps = np.arange(n, dtype=np.int64) * stride
        at = at[..., None] + (np.repeat(steps, repeat) if axis == len(shape) - 1 else steps)
    return np.ascontiguousarray(at.reshape(-1))


def _broadcast(x: GpuArray, shape: Shape) -> GpuArray:
    missing = len(shape) - len(x.shape)
    strides = (0,) * missing + tuple(0 if n == 1 else s for n, s in zip(x.shape, x.strides, strict=True))
    return x._replace(shape=shape, strides=strides)


def aligned(space: Space, x: GpuArray) -> GpuArray:
    """The array, or a copy with zeros behind each row's last element up to whole pieces of 16 bytes."""
    if x.aligned:
        return x
    from .kernels.cuda import copying

    made = space.keep(room(space, x.shape, x.element))
    heads, (rows, columns) = math.prod(x.shape[:-2]), x.shape[-2:]
    job = copying.CopyJob(
        space.pointer(x), starts(space, x.shape[:-2], x.strides[:-2]), x.strides[-2], x.strides[-1],
        space.pointer(made), rows, columns, made.shape[-1],
    )  # fmt: skip
    v = copying.Variant(x.element, 32 if isinstance(x.data, np.ndarray) else 256)
    copying.pack(v, job, (min(64, -(-rows * made.shape[-1] // v.threads)), heads, 1), space.stream)
    return made


def room(space: Space, shape: Shape, element: str) -> GpuArray:
    """An array with rows of whole pieces of 16 bytes."""
    piece = 16 // (4 if element == "float32" else 2)
    return space.empty((*shape[:-1], max(piece, -(-shape[-1] // piece) * piece)), element)


def cut(x: GpuArray, n: int) -> Any:
    """The caller's array of the first n channels."""
    return x.native if x.shape[-1] == n else x.native[..., :n]


# --- forward -----------------------------------------------------------------------------------------------------
class Past(NamedTuple):
    """A call and what came of it; see `dense.Past`."""

    call: Call
    output: GpuArray  # as the kernels wrote it: rows of whole pieces
    lse: Any
    kept: GpuArray | None  # (2, B * H * Lq): the largest scores and the sums

    @property
    def on_gpu(self) -> bool:
        return True

    @property
    def result(self) -> Any:
        """The output as the caller gets it."""
        return self.given(cut(self.output, self.call.value.shape[-1]))

    def given(self, x: Any) -> Any:
        """An array as the caller gets it: where the call's arrays were."""
        return gpu.default().download(x) if self.call.is_moved and x is not None else x

    def weights(self, rows: Any = None, averaged: bool = False) -> Any:
        """Of the queries `rows`, in float32; averaged over the heads if that is wanted."""
        c, space = self.call.checked, self.call.space()
        chosen = checks.rows(rows, c.query.shape[-2])
        heads = c.batch if averaged else c.query.shape[:-2]
        out = space.empty((*heads, len(chosen), c.key.shape[-2]), "float32")
        if gpu.size(out.shape):
            _weights(self, space, chosen, out, c.heads if averaged else 1)
        return self.given(out.native)

    def backward(self, grad_output: Any, grad_lse: Any = None, wants_bias: bool = True) -> InputGradients:
        c, shape = self.call, self.call.checked.output_shape
        if c.is_moved:
            grad_output, grad_lse = gpu.moved(grad_output), gpu.moved(grad_lse)
        given = gradient("grad_output", grad_output, shape, c.query.element)
        lse = None if grad_lse is None else gradient("grad_lse", grad_lse, shape[:-1], "float32")
        return _backward(self, given, lse, wants_bias and c.bias is not None)


def gradient(name: str, x: Any, shape: Shape, element: str) -> GpuArray:
    """Check the gradient of a result."""
    found = gpu.view(name, x)
    if found.element in ("uint16", "int16"):
        found = found._replace(element=element)
    if found.shape != shape:
        shapes = {f"{name}.shape": found.shape, "expected": shape}
        raise DimensionMismatchError(shape, found.shape, shapes=shapes, hint="the result's own shape")
    if found.element != element:
        raise InvalidInputError(f"{name} has dtype {found.element}, the call had {element}", hint="cast it")
    return found


def _terms(c: Call) -> Any:
    from .plan.cuda_dense import Terms

    return Terms(
        c.checked.softcap is not None, c.checked.slopes is not None, c.bias is not None, c.mask is not None,
        c.checked.dropout > 0,
    )  # fmt: skip


def _score_terms(c: Call, space: Space) -> tuple[Any, Any]:
    """The terms of the scores and who sees whom, as the kernels have them."""
    from .kernels.cuda.scoring import Sight, Terms

    a, seen, nothing = c.checked, c.checked.seen, space.pointer(None)
    Lq, Lk = a.query.shape[-2], a.key.shape[-2]
    scores = (*a.batch, a.heads, Lq, Lk)
    matrices: list[Any] = []
    for x in (c.bias, c.mask):
        if x is None:
            matrices += [nothing, nothing, 0, 0]
        else:
            whole = _broadcast(x, scores)
            at = starts(space, scores[:-2], whole.strides[:-2])
            matrices += [space.pointer(whole), at, *whole.strides[-2:]]
    natural = a.softcap is not None or a.slopes is not None or c.bias is not None
    slopes = nothing if a.slopes is None else space.upload(np.ascontiguousarray(a.slopes, np.float32).reshape(-1))
    threshold, gain = min(round(a.dropout * (1 << 32)), (1 << 32) - 1), 0.0 if a.dropout == 1 else 1 / (1 - a.dropout)
    terms = Terms(
        a.scale * (1.0 if natural else _LOG2E),
        a.softcap or 0.0,
        slopes,
        *matrices,
        seen.offset,
        a.seed,
        threshold,
        gain,
    )
    first, last = max(-_FAR, min(_FAR, seen.first)), max(-_FAR, min(_FAR, seen.last))
    if seen.limits is None:
        return terms, Sight(space.constant(("keys", Lk), lambda: np.array([0, Lk], np.int64)), 0, 0, first, last)
    limits = np.broadcast_to(seen.limits, (*a.batch, Lq, 2))
    return terms, Sight(space.upload(np.ascontiguousarray(limits, np.int64)), 2 * Lq, 2, first, last)


def run(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    out: Any,
    device: str | None,
    *terms: Any,
    dtype: str | None = None,
) -> Past:
    """`scaled_dot_product_attention` and `attention_forward` on a GPU; arrays of NumPy are moved there if wanted."""
    if device == "cuda":
        mask = attn_mask if isinstance(attn_mask, masks.Mask) else gpu.moved(attn_mask)
        c = call(gpu.moved(query), gpu.moved(key), gpu.moved(value), mask, *terms, dtype=dtype)
        if out is not None:
            raise InvalidInputError("out is given, and device='cuda'", hint="results come back as new arrays")
        return forward(c._replace(is_moved=not gpu.is_on_gpu(query)))
    return forward(call(query, key, value, attn_mask, *terms, dtype=dtype), out)


def _out(out: Any, c: Call) -> GpuArray:
    """Check the array that the output shall go to."""
    found = gpu.floats("out", out)
    shapes = {"out.shape": found.shape, "expected": c.checked.output_shape}
    if found.shape != c.checked.output_shape:
        raise DimensionMismatchError(c.checked.output_shape, found.shape, shapes=shapes, hint="(..., H, Lq, Dv)")
    if found.element != c.query.element or not found.aligned:
        hint = "it has query's dtype, its rows begin on 16 bytes: give a fresh array, or none"
        raise InvalidInputError("out cannot be written to", shapes={"out.dtype": found.element}, hint=hint)
    return found


def forward(c: Call, out: Any = None) -> Past:
    """The output of a checked call, and what its gradients need."""
    from .kernels.cuda import blocks, dense
    from .plan import cuda_dense as plan

    a, space, element = c.checked, c.space(), c.query.element
    heads, (Lq, D), (Lk, Dv) = math.prod(a.query.shape[:-2]), a.query.shape[-2:], a.value.shape[-2:]
    if not isinstance(out, GpuArray):
        out = room(space, a.output_shape, element) if out is None else _out(out, c)
    output: GpuArray = out
    lse = space.empty(a.query.shape[:-1], "float32")
    if not gpu.size(a.query.shape[:-1]):
        return Past(c, output, lse.native, None)
    if not Lk:
        zero(space, output, 0.0)
        zero(space, lse, -math.inf)
        return Past(c, output, lse.native, None)
    cutting = plan.split(Lq, Lk, a.group)
    channels = plan.width(max(D, Dv, 1))
    assert channels is not None
    v = plan.variant("forward", element, channels, _terms(c))
    kept = space.empty((2, heads * Lq), "float32")
    top, total = (space.pointer(gpu.part(kept, n * heads * Lq, heads * Lq)) for n in range(2))
    tops, totals, parts = top, total, space.pointer(None)
    if cutting.splits > 1:
        v = plan.packed(v, Lq * cutting.heads)
        tops, totals = (space.scratch(heads * cutting.splits * Lq) for _ in range(2))
        parts = space.scratch(heads * cutting.splits * Lq * output.shape[-1])
    terms, sight = _score_terms(c, space)
    job = blocks.AttentionJob(
        _matrices(space, c.query), _matrices(space, c.key, a.group), _matrices(space, c.value, a.group),
        _matrices(space, output), tops, totals, space.pointer(lse), parts, top, total,
        terms, sight, a.eps, Lq, Lk, whole(D, element), output.shape[-1], a.heads, cutting.heads, cutting.splits,
        cutting.split_keys,
    )  # fmt: skip
    grid = (-(-Lq * cutting.heads // v.rows), heads // cutting.heads, cutting.splits)
    dense.forward(v, job, grid, space.stream)
    if cutting.splits > 1:
        warps = blocks.Variant(element, channels, v.keys, 1, 32 if v.threads == 32 else 128)
        dense.merge(warps, job, (-(-Lq // (warps.threads // 32)), heads, 1), space.stream)
    return Past(c, output, lse.native, kept)


def whole(n: int, element: str) -> int:
    """n channels as rows hold them: whole pieces of 16 bytes."""
    piece = 16 // (4 if element == "float32" else 2)
    return max(piece, -(-n // piece) * piece)


def zero(space: Space, x: GpuArray, value: float) -> None:
    """Fill an array, which is contiguous, with 0 or, of float32, any number."""
    from .kernels.cuda import copying

    v = copying.Variant(x.element, 32 if isinstance(x.data, np.ndarray) else 256)
    n = gpu.size(x.shape)
    if n:
        copying.fill(
            v, copying.FillJob(space.pointer(x), n, value), (min(1024, -(-n // v.threads)), 1, 1), space.stream
        )


# --- backward ----------------------------------------------------------------------------------------------------
def _gradient_job(
    past: Past, space: Space, grad_output: GpuArray, grad_lse: GpuArray | None, made: tuple[GpuArray, ...]
) -> Any:
    from .kernels.cuda import blocks

    c, a = past.call, past.call.checked
    heads, (Lq, D), (Lk, _) = math.prod(a.query.shape[:-2]), a.query.shape[-2:], a.value.shape[-2:]
    dq, dk, dv = made
    assert past.kept is not None
    n = heads * Lq
    kept = [space.pointer(gpu.part(past.kept, i * n, n)) for i in range(2)]
    both = space.keep(space.empty((2, n), "float32"))
    made_first = [space.pointer(gpu.part(both, i * n, n)) for i in range(2)]
    terms, sight = _score_terms(c, space)
    if grad_lse is None:
        lse = space.scratch(heads * Lq)
        zero(space, GpuArray(lse, 0, (heads * Lq,), (1,), "float32", None), 0.0)
    else:
        lse = space.pointer(compact(space, grad_lse))
    return blocks.GradientJob(
        _matrices(space, c.query), _matrices(space, c.key, a.group), _matrices(space, c.value, a.group),
        _matrices(space, past.output), _matrices(space, grad_output), _matrices(space, dq), _matrices(space, dk),
        _matrices(space, dv), *kept, lse, *made_first, terms, sight, a.scale, Lq, Lk, whole(D, c.query.element),
        past.output.shape[-1], a.heads, 1, a.group,
    )  # fmt: skip


def compact(space: Space, x: GpuArray, inverted: bool = False) -> GpuArray:
    """The array, copied if its elements do not lie one behind the other, or to have its bools inverted."""
    if x.strides == gpu.contiguous_strides(x.shape) and not inverted:
        return x
    from .kernels.cuda import copying

    made = space.keep(space.empty(x.shape, x.element))
    rows = x._replace(shape=(*x.shape, 1), strides=(*x.strides, 1))
    job = copying.CopyJob(
        space.pointer(x), starts(space, rows.shape[:-2], rows.strides[:-2]), rows.strides[-2], 1,
        space.pointer(made), rows.shape[-2], 1, 1,
    )  # fmt: skip
    v = copying.Variant(x.element, 32 if isinstance(x.data, np.ndarray) else 256, inverted=inverted)
    if gpu.size(x.shape):
        copying.pack(v, job, (-(-rows.shape[-2] // v.threads), math.prod(rows.shape[:-2]), 1), space.stream)
    return made


def inverted(space: Space, x: GpuArray) -> GpuArray:
    """True where the array of bools is False."""
    return compact(space, x, inverted=True)


def _prepared(past: Past, space: Space, job: Any) -> int:
    """shift and delta of each query."""
    from .kernels.cuda import blocks, dense_backward
    from .plan import cuda_dense as plan

    c, heads = past.call, math.prod(past.call.checked.query.shape[:-2])
    channels = plan.width(max(job.D, job.Dv))
    assert channels is not None
    v = blocks.Variant(c.query.element, channels, 16, 1, 32 if isinstance(c.query.data, np.ndarray) else 128)
    rows = v.threads // 32 * dense_backward.ROWS_OF_A_WARP
    dense_backward.prepare(v, job, (-(-job.Lq // rows), heads, 1), space.stream)
    return channels


def _backward(past: Past, grad_output: GpuArray, grad_lse: GpuArray | None, wants_bias: bool) -> InputGradients:
    from .kernels.cuda import dense_backward
    from .plan import cuda_dense as plan

    c, a, space, element = past.call, past.call.checked, past.call.space(), past.call.query.element
    dq, dk, dv = (room(space, x.shape, element) for x in (c.query, c.key, c.value))
    bias = space.empty(c.bias.shape, "float32") if wants_bias and c.bias is not None else None
    if past.kept is None:
        for x in (dq, dk, dv, *(() if bias is None else (bias,))):
            zero(space, x, 0.0)
    else:
        job = _gradient_job(past, space, grad_output, grad_lse, (dq, dk, dv))
        channels = _prepared(past, space, job)
        heads = math.prod(a.query.shape[:-2])
        v = plan.variant("to_query", element, channels, _terms(c))
        dense_backward.to_query(v, job, (-(-job.Lq // v.rows), heads, 1), space.stream)
        for part in plan.makes(channels):
            v = plan.variant("to_key", element, channels, _terms(c))._replace(makes=part)
            dense_backward.to_key(v, job, (-(-job.Lk // v.rows), heads // a.group, 1), space.stream)
        if bias is not None:
            _bias_gradient(c, space, job, bias)
    query, key, value = (past.given(cut(x, y.shape[-1])) for x, y in ((dq, c.query), (dk, c.key), (dv, c.value)))
    return InputGradients(query, key, value, None if bias is None else past.given(bias.native))


def _bias_gradient(c: Call, space: Space, job: Any, bias: GpuArray) -> None:
    """The gradient of the float mask, in float32, each distinct matrix of it in one place."""
    from .kernels.cuda import blocks, pairs

    a = c.checked
    shape = (1,) * (len(a.batch) + 3 - len(bias.shape)) + bias.shape
    matrices = math.prod(shape[:-2])
    owner = np.broadcast_to(np.arange(matrices).reshape(shape[:-2]), (*a.batch, a.heads)).reshape(-1)
    members = np.argsort(owner, kind="stable").astype(np.int64)
    begins = np.searchsorted(owner[members], np.arange(matrices + 1)).astype(np.int64)
    v = blocks.Variant(
        c.query.element, 64, 16, 1, 32 if isinstance(c.query.data, np.ndarray) else 128, 1, 2, *_terms(c)
    )
    more = pairs.PairJob(
        job, space.pointer(bias), space.pointer(None), 0, 1, space.upload(begins), space.upload(members), *shape[-2:]
    )
    pairs.bias_gradient(v, more, (-(-shape[-2] * shape[-1] // (v.threads // 32)), matrices, 1), space.stream)


def _weights(past: Past, space: Space, chosen: Any, out: GpuArray, averaged: int) -> None:
    from .kernels.cuda import blocks, pairs

    c, a = past.call, past.call.checked
    if past.kept is None:
        return zero(space, out, 0.0)
    job = _gradient_job(past, space, past.output._replace(shape=a.output_shape), None, (c.query, c.key, c.value))
    _prepared(past, space, job)
    threads = 32 if isinstance(c.query.data, np.ndarray) else 128
    v = blocks.Variant(c.query.element, 64, 16, 1, threads, 1, 2, *_terms(c))
    nothing = space.pointer(None)
    more = pairs.PairJob(
        job, space.pointer(out), space.upload(chosen.astype(np.int64)), len(chosen), averaged, nothing, nothing, 0, 0
    )
    grid = (-(-job.Lk // threads), len(chosen), math.prod(a.query.shape[:-2]) // averaged)
    pairs.weights(v, more, grid, space.stream)
