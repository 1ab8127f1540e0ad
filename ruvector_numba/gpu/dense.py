"""Dense attention on arrays that lie on a GPU: the same calls, the same meaning; see dense.py."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .. import checks, gpu, mask_arrays, masks
from ..arrays import Shape
from ..dense_call import DenseCall
from ..errors import DimensionMismatchError, InvalidInputError, InvalidMaskError
from ..plan.dropout import threshold_and_gain
from ..plan.strides import broadcast
from ..results import InputGradients
from .arrays import GpuArray, Space
from .layouts import aligned, cut, named, padded, room, starts, whole, zero

__all__ = ["GpuCall", "Past", "call", "forward", "run"]

WIDEST = 256
_LOG2E = math.log2(math.e)
_FAR = 1 << 30


class GpuCall(NamedTuple):
    """A checked call; arrays are as `DenseCall` has them, on the GPU."""

    checked: DenseCall  # of arrays that have shapes and nothing else
    query: GpuArray
    key: GpuArray
    value: GpuArray
    bias: GpuArray | None
    mask: GpuArray | None
    is_moved: bool = False  # results go back to NumPy: see `gpu.arrived`

    def space(self) -> Space:
        return Space(self.query.native)


def call(
    query: Any, key: Any, value: Any, attn_mask: Any = None, *, dtype: str | None = None, **options: Any
) -> GpuCall:
    """Check a call whose arrays lie on a GPU; `options` are those of `checks.call`."""
    q, k, v = (gpu.floats(name, x, dtype) for name, x in (("query", query), ("key", key), ("value", value)))
    if not q.element == k.element == v.element:
        dtypes = {"query.dtype": q.element, "key.dtype": k.element, "value.dtype": v.element}
        raise InvalidInputError("query, key and value differ in dtype", shapes=dtypes, hint="cast them to one")
    shadow, bias, mask = attn_mask, None, None
    if attn_mask is not None and not isinstance(attn_mask, masks.Mask):
        seen = gpu.view("attn_mask", attn_mask, dtype)
        is_bool = seen.element == "bool"
        if not is_bool and seen.element != q.element:
            dtypes = {"attn_mask.dtype": seen.element, "query.dtype": q.element}
            raise InvalidMaskError("a float mask has the dtype of query", shapes=dtypes, hint="cast it, or give bools")
        bias, mask = (None, seen) if is_bool else (seen, None)
        shadow = gpu.shadow(seen.shape, bool if is_bool else np.float32)
    c = checks.call(gpu.shadow(q.shape), gpu.shadow(k.shape), gpu.shadow(v.shape), shadow, **options)
    if isinstance(attn_mask, masks.Mask) and (c.seen.allowed is not None or c.seen.bias is not None):
        hint = "give it as attn_mask by itself, on the GPU, or write the rule with masks that hold no matrix"
        raise InvalidMaskError("a matrix joined to a mask lies on the CPU", hint=hint)
    for name, n in (("D", q.shape[-1]), ("Dv", v.shape[-1])):
        if n > WIDEST:
            shapes = {"query.shape": q.shape, "value.shape": v.shape}
            raise InvalidInputError(f"{name} is {n}: the GPU takes at most {WIDEST}", shapes=shapes, hint="use the CPU")
    return GpuCall(c, q, k, v, bias, mask)


# --- forward -----------------------------------------------------------------------------------------------------
class Past(NamedTuple):
    """A call and what came of it; see `dense_past.Past`."""

    call: GpuCall
    output: GpuArray  # as the kernels wrote it: rows of whole pieces
    lse: Any
    kept: GpuArray | None  # (2, B * H * Lq): the largest scores and the sums

    @property
    def on_gpu(self) -> bool:
        return True

    @property
    def result(self) -> Any:
        """The output as the caller gets it."""
        return self.home(cut(self.output, self.call.value.shape[-1]))

    def home(self, x: Any) -> Any:
        """An array as the caller gets it: where the call's arrays were."""
        return gpu.home(self.call.is_moved, x)

    def weights(self, rows: Any = None, averaged: bool = False) -> Any:
        """Of the queries `rows`, in float32; averaged over the heads if that is wanted."""
        c, space = self.call.checked, self.call.space()
        chosen = checks.row_indices(rows, c.query.shape[-2])
        heads = c.batch if averaged else c.query.shape[:-2]
        out = space.empty((*heads, len(chosen), c.key.shape[-2]), "float32")
        if math.prod(out.shape):
            from .dense_backward import weights

            weights(self, space, chosen, out, c.heads if averaged else 1)
        return self.home(out)

    def backward(self, grad_output: Any, grad_lse: Any = None, wants_bias: bool = True) -> InputGradients:
        c, shape = self.call, self.call.checked.output_shape
        if c.is_moved:
            grad_output, grad_lse = gpu.moved("grad_output", grad_output), gpu.moved("grad_lse", grad_lse)
        from .dense_backward import backward

        grad = gradient("grad_output", grad_output, shape, c.query.element)
        lse = None if grad_lse is None else gradient("grad_lse", grad_lse, shape[:-1], "float32")
        return backward(self, grad, lse, wants_bias and c.bias is not None)


def gradient(name: str, x: Any, shape: Shape, element: str) -> GpuArray:
    """Check the gradient of a result."""
    found = gpu.view(name, x)
    if element == "bfloat16" and found.element == "uint16":  # its bits, as results are where there is no ml_dtypes
        found = found._replace(element=element)
    if found.shape != shape:
        shapes = {f"{name}.shape": found.shape, "expected": shape}
        raise DimensionMismatchError(shape, found.shape, shapes=shapes, hint="the result's own shape")
    if found.element != element:
        raise InvalidInputError(f"{name} has dtype {found.element}, the call had {element}", hint="cast it")
    return found


def terms_of(c: GpuCall) -> Any:
    from ..plan.cuda_dense import HasTerms

    return HasTerms(
        softcap=c.checked.softcap is not None, slopes=c.checked.slopes is not None, bias=c.bias is not None,
        mask=c.mask is not None, dropout=c.checked.dropout > 0,
    )  # fmt: skip


def score_terms(c: GpuCall, space: Space) -> tuple[Any, Any]:
    """The terms of the scores and who sees whom, as the kernels have them."""
    from ..kernels.cuda.scoring import Sight, Terms

    a, seen, nothing = c.checked, c.checked.seen, space.pointer(None)
    Lq, Lk = a.query.shape[-2], a.key.shape[-2]
    scores = (*a.batch, a.heads, Lq, Lk)
    matrices: dict[str, Any] = {}
    for name, x in (("bias", c.bias), ("mask", c.mask)):
        found = (nothing, nothing, 0, 0)
        if x is not None:
            whole = broadcast(x, scores)
            found = space.pointer(whole), starts(space, scores[:-2], whole.strides[:-2]), *whole.strides[-2:]
        matrices |= dict(zip((name, f"{name}_at", f"{name}_row", f"{name}_col"), found, strict=True))
    natural = a.softcap is not None or a.slopes is not None or c.bias is not None
    slopes = nothing if a.slopes is None else space.upload(np.ascontiguousarray(a.slopes, np.float32).reshape(-1))
    threshold, gain = threshold_and_gain(a.dropout)
    terms = Terms(
        scale=a.scale * (1.0 if natural else _LOG2E), cap=a.softcap or 0.0, slopes=slopes, offset=seen.offset,
        seed=a.seed, threshold=threshold, gain=gain, **matrices,
    )  # fmt: skip
    first, last = max(-_FAR, min(_FAR, seen.first)), max(-_FAR, min(_FAR, seen.last))
    if seen.limits is None:
        limits = space.constant(("keys", Lk), lambda: np.array([0, Lk], np.int64))
        return terms, Sight(limits=limits, limits_batch=0, limits_row=0, first=first, last=last)
    limits = space.upload(np.ascontiguousarray(np.broadcast_to(seen.limits, (*a.batch, Lq, 2)), np.int64))
    return terms, Sight(limits=limits, limits_batch=2 * Lq, limits_row=2, first=first, last=last)


def run(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    out: Any,
    device: str | None,
    dtype: str | None,
    options: dict[str, Any],
) -> Past:
    """`scaled_dot_product_attention` and `attention_forward` on a GPU; arrays of NumPy are moved there if wanted.

    `options` are all those of `checks.call`, always in the same order.
    """
    if device == "cuda":
        if out is not None:
            raise InvalidInputError("out is given, and device='cuda'", hint="results come back as new arrays")
        if not (attn_mask is None or isinstance(attn_mask, masks.Mask) or gpu.is_on_gpu(attn_mask)):
            attn_mask = gpu.moved("attn_mask", mask_arrays.as_mask(attn_mask, may_be_bits=dtype is not None))
        (q, k, v), is_moved = gpu.arrived(device, query=query, key=key, value=value)
        return forward(call(q, k, v, attn_mask, dtype=dtype, **options)._replace(is_moved=is_moved))
    dropout_p = options["dropout_p"]
    drops = type(dropout_p) is not float or dropout_p != 0
    if attn_mask is not None or out is not None or drops or options["alibi_slopes"] is not None:
        return forward(call(query, key, value, attn_mask, dtype=dtype, **options), out)
    return _again(query, key, value, dtype, options)


def _again(query: Any, key: Any, value: Any, dtype: str | None, options: dict[str, Any]) -> Past:
    """A call without further arrays: what was checked and made ready for such layouts before is not again."""
    arrays = [gpu.floats(name, x, dtype) for name, x in (("query", query), ("key", key), ("value", value))]
    layouts = tuple((x.shape, x.strides, x.element, x.aligned) for x in arrays)
    values = tuple(options.values())
    known = gpu.library(query).key, layouts, values, tuple(map(type, values))
    try:
        found = _ready.get(known)
    except TypeError:  # an option without a hash
        return forward(call(query, key, value, None, dtype=dtype, **options))
    if found is None:
        c = call(query, key, value, None, dtype=dtype, **options)
        ready = prepared(c, padded(c.checked.output_shape, c.query.element))
        none = GpuArray(None, 0, (), (), c.query.element, None)  # so that no array outlives its call
        if len(_ready) >= 1024:
            _ready.clear()
        found = _ready[known] = c._replace(query=none, key=none, value=none), ready
    c, ready = found
    return forward(c._replace(query=arrays[0], key=arrays[1], value=arrays[2]), ready=ready)


_ready: dict[Any, tuple[GpuCall, Any]] = {}


def _out(out: Any, c: GpuCall) -> GpuArray:
    """Check the array that the output shall go to."""
    found = gpu.floats("out", out)
    shapes = {"out.shape": found.shape, "expected": c.checked.output_shape}
    if found.shape != c.checked.output_shape:
        raise DimensionMismatchError(c.checked.output_shape, found.shape, shapes=shapes, hint="(..., H, Lq, Dv)")
    if found.element != c.query.element or not found.aligned:
        hint = "it has query's dtype, its rows begin on 16 bytes: give a fresh array, or none"
        raise InvalidInputError("out cannot be written to", shapes={"out.dtype": found.element}, hint=hint)
    return found


class Ready(NamedTuple):
    """All of a forward pass that depends on layouts and terms alone."""

    attend: Any  # the launches
    merge: Any | None  # of the parts that the keys of few queries are cut into
    parts: int  # how many (head, part, query)s these are
    kept: tuple[Any, ...]  # the arrays that the jobs point to
    all_aligned: bool  # no array has to be copied first


def prepared(c: GpuCall, output: GpuArray) -> Ready | None:
    """Make a checked call ready, but for where its arrays lie; None if there is nothing to do."""
    from ..kernels.cuda import blocks, dense
    from ..plan import cuda_dense as plan

    a, element, space = c.checked, c.query.element, c.space()
    heads, (Lq, D), (Lk, Dv) = math.prod(a.query.shape[:-2]), a.query.shape[-2:], a.value.shape[-2:]
    if not heads * Lq * Lk:
        return None
    all_aligned = c.query.aligned and c.key.aligned and c.value.aligned
    cutting = plan.split(Lq, Lk, a.group)
    channels = plan.width(max(D, Dv, 1))
    assert channels is not None
    v = plan.variant("forward", element, channels, terms_of(c))
    if cutting.splits > 1:
        v = plan.packed(v, Lq * cutting.heads)
    terms, sight = score_terms(c, space)
    matrices = heads // cutting.heads
    job = blocks.AttentionJob(
        query=named(space, "query", c.query), key=named(space, "key", c.key, a.group),
        value=named(space, "value", c.value, a.group), output=named(space, "output", output),
        top="top", total="total", lse="lse", parts="parts", merged_top="merged_top", merged_total="merged_total",
        terms=terms, sight=sight, epsilon=a.eps, Lq=Lq, Lk=Lk, D=whole(D, element), Dv=output.shape[-1], H=a.heads,
        matrices=matrices, heads=cutting.heads, splits=cutting.splits, split_keys=cutting.split_keys,
    )  # fmt: skip
    grid = plan.grid(Lq * cutting.heads, v.rows, matrices, cutting.splits)
    attend = dense.forward.prepare(v, job, grid)
    if cutting.splits == 1:
        return Ready(attend, None, 0, space.kept, all_aligned)
    merge = dense.merge.prepare(plan.merging(element, channels), job, plan.merge_grid(Lq, heads))
    return Ready(attend, merge, heads * cutting.splits * Lq, space.kept, all_aligned)


def forward(c: GpuCall, out: Any = None, ready: Ready | None = None) -> Past:
    """The output of a checked call, and what its gradients need."""
    a, space, n = c.checked, c.space(), math.prod(c.checked.query.shape[:-1])
    if not isinstance(out, GpuArray):
        out = room(space, a.output_shape, c.query.element) if out is None else _out(out, c)
    output: GpuArray = out
    lse = space.empty(a.query.shape[:-1], "float32")
    ready = prepared(c, output) if ready is None else ready
    if ready is None:
        if n:
            zero(space, output, 0.0)
            zero(space, lse, -math.inf)
        return Past(c, output, lse.native, None)
    q, k, v = (c.query, c.key, c.value) if ready.all_aligned else (aligned(space, x) for x in (c.query, c.key, c.value))
    at = dict(query=space.pointer(q), key=space.pointer(k), value=space.pointer(v))
    at["output"], at["lse"] = space.pointer(output), space.pointer(lse)
    # What is kept, and behind it what parts of the keys leave: to ask for memory takes as long as to start a kernel.
    m = whole(ready.parts, "float32") if ready.merge is not None else 0
    first = whole(2 * n, "float32")
    made = space.empty((first + (2 + output.shape[-1]) * m,), "float32")
    kept = gpu.part(made, 0, 2 * n)
    at["top"], at["total"], at["parts"] = (space.pointer(made, first + part * m) for part in range(3))
    at["merged_top"], at["merged_total"] = space.pointer(made), space.pointer(made, n)
    if ready.merge is None:
        at["top"], at["total"] = at["merged_top"], at["merged_total"]
    ready.attend(space.stream, **at)
    if ready.merge is not None:
        ready.merge(space.stream, **at)
    return Past(c, output, lse.native, kept)
