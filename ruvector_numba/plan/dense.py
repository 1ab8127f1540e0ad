"""From the shapes of a call to jobs for the kernels. What depends on shapes, strides and terms alone is made once.

It looks at no element. It cuts queries into blocks and keys into tiles by the sizes of one head, so that a result has
the same bits on any number of threads and in any company of other heads and batches.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Shape
from ..dense_call import DenseCall
from ..halves import BITS
from ..halves import arithmetic as arithmetic_of
from ..kernels import blocks, decode, dense, dense_backward, jit, pairs
from ..kernels.scoring import ByteMatrices, Dropout
from ..kernels.simd import halves as target_halves
from ..kernels.simd import target
from ..kernels.softmax import LN2, LOG2E
from ..kernels.tiles import SUMMED, StoredMatrices
from . import halves, memory, team
from .dropout import threshold_and_gain
from .layouts import NOTHING, NOWHERE, Layout, as_matrices, contiguous, layout, padded, with_heads
from .strides import broadcast, sharing

FORWARD_KEYS = 128  # in a chunk: 128 x 64 scores are 32 KiB and stay near the core; 64 and 96 measured the same
BACKWARD_KEYS = 128
DECODE_KEYS = 1024  # reading falls idle where a chunk ends: 128 keys reach 86 % of the read bandwidth, 1024 97 %
MANY_QUERIES, MANY_BLOCKS = 256, 8  # from so many on, queries and blocks of them, keys and values may be copied first
FEW_QUERIES = 8  # from so few on, a product's lanes are keys and channels (kernels/decode.py), not queries
SPLIT_KEYS = 4096  # one block of queries over more keys than this is cut along the keys, and merged


class Problem(NamedTuple):
    """What a plan depends on, hashable."""

    dtype: np.dtype[Any]  # in which the inputs lie
    arithmetic: np.dtype[Any]
    rounds: bool  # results are of half precision
    query: Layout
    key: Layout
    value: Layout
    output: Layout
    scale: float
    softcap: float | None
    slopes: bool
    dropout: float
    eps: float
    first: int
    last: int
    offset: int
    limits: Shape | None
    bias: Layout | None
    mask: Layout | None
    copied: tuple[str, ...]  # which of key and value are copied first


def threads() -> int:
    return team.threads()


def _crowds(x: Layout, itemsize: int, queries: int) -> bool:
    """Are these keys or values copied first, so that they crowd no cache?

    A product goes down 128 rows of a few columns. If rows are a multiple of 1024 bytes apart, as heads of (B, L, H, D)
    often are, those are too many for their few sets of the first cache. Copied, 512 queries and more are 1.04 to 1.12
    times as fast, with gradients too; 256 as fast as before, and 128 would be slower, 0.87 to 0.96.
    """
    row = x.strides[-2]
    crowds = row % 1024 == 0 and abs(row) >= 2 * itemsize * x.shape[-1]
    pays = queries >= max(MANY_QUERIES, MANY_BLOCKS * target().width(itemsize))
    return crowds and pays and math.prod(x.shape) <= halves.KEPT and 0 not in x.strides


def problem(c: DenseCall, output: Array) -> Problem:
    seen = c.seen
    terms = (
        c.scale, c.softcap, c.slopes is not None, c.dropout, c.eps, seen.first, seen.last, seen.offset,
        None if seen.limits is None else seen.limits.shape, None if seen.bias is None else layout(seen.bias),
        None if seen.allowed is None else layout(seen.allowed),
    )  # fmt: skip
    layouts = [(x.shape, x.strides) for x in (c.query, c.key, c.value, output)]
    return _problem(c.query.dtype, c.dtype, tuple(layouts), terms)


@functools.lru_cache(1024)
def _problem(
    stored: np.dtype[Any], of_results: np.dtype[Any], layouts: tuple[tuple[Shape, Shape], ...], terms: tuple[Any, ...]
) -> Problem:
    """What `problem` gathered, spelled out: that is made once, and of each call only what tells it from others."""
    arithmetic, (query, key, value, output) = arithmetic_of(stored), (Layout(*x) for x in layouts)
    named = {"key": key, "value": value} if stored == arithmetic else {}
    copied = tuple(name for name, x in named.items() if _crowds(x, stored.itemsize, query.shape[-2]))
    key, value = (
        contiguous(x.shape, stored.itemsize) if name in copied else x for name, x in (("key", key), ("value", value))
    )
    return Problem(stored, arithmetic, of_results.itemsize == 2, query, key, value, output, *(*terms, copied))


def _outputs(p: Problem, output: Layout | None, exact: Layout | None) -> dict[str, Any]:
    """What the kernels write of an output: in the type that the inputs lie in, as it was computed, or both."""
    size = p.arithmetic.itemsize
    if p.dtype == p.arithmetic:  # they are the same
        there = exact if output is None else output
        assert there is not None
        return dict(output=as_matrices("output", there, size), exact=None, wants_output=1, wants_exact=0)
    return dict(
        output=NOWHERE if output is None else as_matrices("output", output, p.dtype.itemsize),
        exact=NOWHERE if exact is None else as_matrices("exact", exact, size),
        wants_output=int(output is not None), wants_exact=int(exact is not None),
    )  # fmt: skip


def is_packed(p: Problem) -> bool:
    """Are products those of pairs of bfloat16? Their rows hold whole pairs, in memory too."""
    if p.dtype != BITS or not target_halves().packed or p.query.shape[-1] % 2 or p.value.shape[-1] % 2:
        return False
    return all(is_in_pairs(x) for x in (p.query, p.key, p.value))


def is_in_pairs(x: Layout) -> bool:
    return x.strides[-1] == BITS.itemsize and x.strides[-2] % (2 * BITS.itemsize) == 0


def _widened(p: Problem, group: int) -> blocks.Widened | None:
    if p.dtype == p.arithmetic or is_packed(p):
        return None
    size = p.arithmetic.itemsize
    key, value = (contiguous(with_heads(x, 3).shape, size) for x in (p.key, p.value))
    return blocks.Widened(
        as_matrices("widened_key", key, size, group), as_matrices("widened_value", value, size, group)
    )


def _job(p: Problem, keys_per_block: int, rows: int, **more: Any) -> blocks.AttentionJob:
    """What all jobs of a problem share; `rows` is the scratch that one thread needs."""
    itemsize, query = p.dtype.itemsize, with_heads(p.query, 3)
    key, value = with_heads(p.key, 3), with_heads(p.value, 3)
    batch, (H, Lq, D), (Lk, Dv) = query.shape[:-3], query.shape[-3:], value.shape[-2:]
    group = H // max(1, key.shape[-3])
    natural = None if p.softcap is None and not p.slopes and p.bias is None else LOG2E
    scores, width = (*batch, H, Lq, Lk), target().width(p.arithmetic.itemsize)
    sizes = query.shape[-1], Dv, keys_per_block, p.arithmetic.itemsize
    more_elements = blocks.packed_elements(*sizes) if is_packed(p) else 0
    bias = None if p.bias is None else as_matrices("bias", broadcast(p.bias, scores), p.arithmetic.itemsize)
    mask = None if p.mask is None else ByteMatrices(*as_matrices("mask", broadcast(p.mask, scores), 1))
    fields = dict(
        query=as_matrices("query", query, itemsize), key=as_matrices("key", key, itemsize, group),
        value=as_matrices("value", value, itemsize, group), widened=_widened(p, group), sums=NOTHING,
        wants_sums=0, eps=p.eps, top="top" if p.eps else NOTHING, wants_top=int(p.eps != 0), natural=natural,
        softcap=p.softcap, slopes="slopes" if p.slopes else None, bias=bias, mask=mask,
        additive=None if bias is None and mask is None else 1, dropout=_dropout(p.dropout),
        gradients=None, rounded=None, bias_gradient=None,
        limits=np.array([0, Lk], np.int64) if p.limits is None else "limits",
        limits_batch=0 if p.limits is None else 2 * Lq, limits_row=0 if p.limits is None else 2,
        first=p.first, last=p.last, offset=p.offset,
        scale=p.scale * (LOG2E if natural is None else 1.0), Lq=Lq, Lk=Lk, D=D, Dv=Dv, H=H, group=group,
        blocks=-(-Lq // width), splits=1, split_keys=Lk, keys_per_block=keys_per_block,
        deep=1 if max(D, Dv) > SUMMED else None, packed=1 if is_packed(p) else None, scratch="scratch",
        scratch_step=rows * width + more_elements,
    )  # fmt: skip
    return blocks.AttentionJob(**{**fields, **more})


def _dropout(p: float) -> Dropout | None:
    return None if p == 0 else Dropout("seed", *threshold_and_gain(p))


class Plan(NamedTuple):
    """A job ready to be launched, and what it still has to be given."""

    launch: jit.Launch
    scratch: int  # bytes that all threads need
    splits: int
    unit: float  # what a score in the kernel's unit, such as `top`, is worth
    widens: bool  # it reads keys and values widened, as `staged` makes them

    def __call__(self, c: DenseCall, **arrays: Any) -> None:
        seen = c.seen
        self.launch(
            query=c.query, slopes=c.slopes, seed=c.seed, bias=seen.bias,
            mask=None if seen.allowed is None else seen.allowed.view(np.uint8),
            limits=None if seen.limits is None else _every_batch(seen.limits, c),
            scratch=memory.scratch(self.scratch), **arrays,
        )  # fmt: skip


def staged(c: DenseCall, p: Problem, plan: Plan) -> dict[str, Array]:
    """Keys and values: the call's own, widened ones beside them, or copies, both until the next call."""
    arrays = {"key": c.key, "value": c.value}
    if plan.widens:
        return arrays | {f"widened_{name}": halves.copied(x, name) for name, x in arrays.items()}
    for name in p.copied:
        arrays[name] = halves.copied(arrays[name], name)
    return arrays


rounded, room = halves.rounded, halves.room


def _every_batch(limits: NDArray[np.int64], c: DenseCall) -> NDArray[np.int64]:
    shape = (*c.batch, c.query.shape[-2], 2)
    return np.ascontiguousarray(limits if limits.shape == shape else np.broadcast_to(limits, shape), np.int64)


def _plan(kernel: jit.Kernel, job: blocks.AttentionJob, tasks: int, p: Problem, products: int) -> Plan:
    heads = len(job.query.at)
    work = heads * job.Lq * job.Lk * (job.D + job.Dv) * products / 2
    unit = LN2 if job.natural is None else 1.0
    launch = kernel.prepare(job, tasks, p.dtype, work)
    return Plan(launch, team.scratch(job.scratch_step, p.arithmetic), job.splits, unit, job.widened is not None)


def is_few(p: Problem) -> bool:
    """Does the forward pass take the kernel for few queries?"""
    contiguous = p.key.strides[-1] == p.value.strides[-1] == p.dtype.itemsize
    return p.query.shape[-2] <= FEW_QUERIES and p.dropout == 0 and contiguous


@functools.lru_cache(512)
def forward(p: Problem, wants_sums: bool, by_tiles: bool = False) -> Plan:
    """Outputs and, if wanted, logsumexps; with several splits (heads, splits, ...) of both, to be merged.

    Few queries have a kernel of their own, unless `by_tiles`.
    """
    (Lq, D), (Lk, Dv), itemsize = p.query.shape[-2:], p.value.shape[-2:], p.arithmetic.itemsize
    few = is_few(p) and not by_tiles
    splits = -(-Lk // SPLIT_KEYS) if Lq <= target().width(itemsize) else 1
    heads, output = math.prod(p.query.shape[:-2]), with_heads(p.output, 3)
    if splits > 1:
        more = _outputs(p, None, contiguous((heads, splits, Lq, Dv), itemsize))
    elif p.rounds:
        more = _outputs(p, output, contiguous(output.shape, itemsize) if wants_sums else None)
    else:
        more = _outputs(p, None, output)
    more.update(splits=splits, split_keys=SPLIT_KEYS if splits > 1 else Lk)
    if wants_sums or splits > 1:
        more.update(sums="sums", wants_sums=1)
    if p.eps and splits > 1:  # it is one sum: eps is added when the parts are merged
        more.update(eps=0.0)
    if few:
        job = _job(p, DECODE_KEYS, 0, widened=None, packed=None, **more)
        step = decode.scratch_elements(Lq * job.group, D, Dv, DECODE_KEYS, itemsize)
        job = job._replace(scratch_step=step)
        return _plan(decode.forward, job, heads // job.group * splits, p, 2)
    job = _job(p, FORWARD_KEYS, blocks.scratch_rows(D, Dv, FORWARD_KEYS), **more)
    return _plan(dense.forward, job, heads * job.blocks * splits, p, 2)


def _backward_job(p: Problem, **more: Any) -> blocks.AttentionJob:
    """`p.output` is the output as it was computed."""
    (_, D), (_, Dv), itemsize = p.query.shape[-2:], p.value.shape[-2:], p.arithmetic.itemsize
    rows = blocks.scratch_rows(D, Dv, BACKWARD_KEYS) + blocks.gradient_rows(D, Dv, BACKWARD_KEYS, itemsize)
    return _job(p, BACKWARD_KEYS, rows, **_outputs(p, None, with_heads(p.output, 3)), sums="sums", **more)


def _gradients(p: Problem, grad_output: Layout, job: blocks.AttentionJob) -> blocks.Gradients:
    itemsize, group = p.arithmetic.itemsize, job.group
    shapes = [with_heads(x, 3).shape for x in (p.query, p.key, p.value)]
    dq = contiguous(shapes[0], itemsize)
    dk, dv = (contiguous(padded(shape, itemsize), itemsize) for shape in shapes[1:])
    return blocks.Gradients(
        output=as_matrices("grad_output", with_heads(grad_output, 3), p.dtype.itemsize), lse="grad_lse",
        query=as_matrices("grad_query", dq, itemsize), key=as_matrices("grad_key", dk, itemsize, group),
        value=as_matrices("grad_value", dv, itemsize, group), to_query=1, to_key=1, heads=group, blocks=job.blocks,
        tiles=-(-job.Lk // BACKWARD_KEYS),
    )  # fmt: skip


def _rounded(p: Problem, group: int) -> blocks.Rounded | None:
    if not p.rounds:
        return None
    size = p.dtype.itemsize
    query, key, value = (contiguous(with_heads(x, 3).shape, size) for x in (p.query, p.key, p.value))
    return blocks.Rounded(
        StoredMatrices(*as_matrices("rounded_query", query, size)),
        StoredMatrices(*as_matrices("rounded_key", key, size, group)),
        StoredMatrices(*as_matrices("rounded_value", value, size, group)),
    )


@functools.lru_cache(512)
def backward(p: Problem, grad_output: Layout, threads: int) -> list[Plan]:
    """The gradients of query, key and value: in one pass over whole key heads, or in two passes of smaller tasks.

    Both give the same bits, and the second does seven products instead of five: it pays when key heads do not fill the
    threads.
    """
    job = _backward_job(p)
    job = job._replace(rounded=_rounded(p, job.group))
    g = _gradients(p, grad_output, job)
    heads = len(job.query.at)
    key_heads = heads // job.group
    rounds = -(-key_heads // threads)
    if 5 * rounds * threads <= 7 * key_heads:
        return [_plan(dense_backward.backward, job._replace(gradients=g), key_heads, p, 5)]
    to_query = g._replace(to_key=0, heads=1, blocks=1)
    to_key = g._replace(to_query=0, tiles=1)
    return [
        _plan(dense_backward.backward, job._replace(gradients=to_query), heads * job.blocks, p, 3),
        _plan(dense_backward.backward, job._replace(gradients=to_key), key_heads * g.tiles, p, 4),
    ]


class BiasPlan(NamedTuple):
    plan: Plan
    shape: Shape  # of what the kernel makes: (distinct matrices, queries or blocks, keys or tiles)


@functools.lru_cache(128)
def bias_backward(p: Problem, grad_output: Layout) -> BiasPlan:
    """The gradient of the float mask, each distinct matrix of it in one place."""
    assert p.bias is not None
    job, itemsize = _backward_job(p), p.arithmetic.itemsize
    batch, H = with_heads(p.query, 3).shape[:-3], job.H
    shape = (1,) * (len(batch) + 3 - len(p.bias.shape)) + p.bias.shape
    matrices, members, begins = sharing(shape[:-2], (*batch, H))
    by_query, by_key = int(shape[-2] != 1 or job.Lq == 1), int(shape[-1] != 1 or job.Lk == 1)
    made = (
        matrices,
        job.Lq if by_query else job.blocks,
        job.Lk if by_key else -(-job.Lk // BACKWARD_KEYS),
    )
    out = as_matrices("grad_bias", contiguous(made, itemsize), itemsize)
    job = job._replace(
        gradients=_gradients(p, grad_output, job)._replace(query=NOWHERE, key=NOWHERE, value=NOWHERE),
        bias_gradient=blocks.BiasGradient(out, begins, members, by_query, by_key),
    )
    return BiasPlan(_plan(pairs.bias_backward, job, matrices * job.blocks, p, 2), made)


@functools.lru_cache(128)
def weights(p: Problem) -> Plan:
    """The weights of all queries of the problem, whose output is an array of them; eps, if any, is in the logsumexp."""
    (_, D), (_, Dv), output = p.query.shape[-2:], p.value.shape[-2:], with_heads(p.output, 3)
    made = _outputs(p, output, None) if p.rounds else _outputs(p, None, output)
    made.update(sums="sums", top=NOTHING, wants_top=0, dropout=None)  # weights are those before dropout
    job = _job(p, FORWARD_KEYS, blocks.scratch_rows(D, Dv, FORWARD_KEYS), **made)
    return _plan(pairs.weights, job, len(job.query.at) * job.blocks, p, 1)


__all__ = [
    "Problem",
    "backward",
    "bias_backward",
    "forward",
    "is_few",
    "is_in_pairs",
    "layout",
    "padded",
    "problem",
    "room",
    "rounded",
    "staged",
    "threads",
    "weights",
]
