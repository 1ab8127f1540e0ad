"""A block of queries in scratch: which keys it sees, in which order, and what of the score terms is kept beside it.

Masks are intervals: query i sees keys lo(i) <= j < hi(i), the intersection of a band (causal, window) and of limits
per query (lengths, segments). The keys of a block then fall into

    [ edge | interior | edge ]      interior: every query of the block sees every key. Wide tiles, nothing to hide.
                                    edge: column by column, one vector of queries at a time, each over its own keys

so that work is proportional to what is attended, and causal pays 16 x 16 triangles, not 64 x 64 ones.
"""

import math
from typing import NamedTuple

from .jit import apart, inline
from .jobs import Doubles, Elements, Indices, Words
from .scoring import ByteMatrices, Dropout, bias_of, lies_in_rows, masked, stage_bias, stage_mask
from .simd import (
    as_indices,
    as_words,
    given_words,
    lanes_of,
    per_lane,
    target,
    tile_column,
    tile_store,
    tile_transposed,
    transpose_square,
    width_of,
)
from .tiles import Matrices, StoredMatrices, whole_vectors

ROWS, COLS = target().rows, target().cols  # the wide tile, rows of keys by vectors of queries
TALL = 8  # rows of the narrow tile, one vector wide: enough chains of multiply-adds to hide their latency
INF = math.inf


class Gradients(NamedTuple):
    """What the backward pass is given and makes. A task is some heads of a group, some blocks, some tiles of keys."""

    output: StoredMatrices  # given: the gradient of the output
    lse: Doubles  # given: the gradient of the logsumexp, (B * H, Lq)
    query: Matrices  # made; key and value too, whose rows are padded to whole vectors
    key: Matrices
    value: Matrices
    to_query: int  # make the gradient of the queries; of keys and values
    to_key: int
    heads: int  # of one task
    blocks: int
    tiles: int


class Rounded(NamedTuple):
    """The gradients in the type of the inputs, where that is not the type they are summed in."""

    query: StoredMatrices
    key: StoredMatrices
    value: StoredMatrices


class Widened(NamedTuple):
    """Keys and values in the kernel's type, where reading them as they lie would cost too much: see halves.py."""

    key: Matrices
    value: Matrices


class BiasGradient(NamedTuple):
    """The gradient of a bias, of R rows and C columns that are queries or blocks of them, keys or tiles of them.

    Where an axis of the bias was broadcast a whole block or tile shares one slot, and NumPy adds up the few slots.
    """

    out: Matrices  # one for each distinct bias matrix
    begins: Indices  # matrix m belongs to the heads members[begins[m] : begins[m + 1]]
    members: Indices
    by_query: int
    by_key: int


class AttentionJob(NamedTuple):
    """What the dense kernels work on: sizes, arrays, terms; H heads in a batch."""

    query: StoredMatrices
    key: StoredMatrices
    value: StoredMatrices
    widened: Widened | None
    output: StoredMatrices  # with several splits, one for each
    exact: Matrices | None  # the output as it was computed, where that is another type
    wants_output: int
    wants_exact: int
    sums: Doubles  # (heads, splits, Lq, 2): a shift in the scores' unit, and log of the sum of exp(score - shift)
    wants_sums: int
    # What layers add to the sum: p = exp(s - top) / (eps + sum exp(s - top)), with the largest score for top. Nothing
    # optional: a test in each tile costs nothing, and functions and layers have their machine code in common.
    eps: float
    top: Elements  # (heads, splits, Lq): written by the forward pass, in the scores' unit
    wants_top: int
    natural: float | None  # log2(e) where terms need scores in natural units, else scores are in base 2
    softcap: float | None
    slopes: Elements | None  # (B * H)
    bias: Matrices | None
    mask: ByteMatrices | None
    additive: int | None  # anything, if there is a bias or a mask
    dropout: Dropout | None
    gradients: Gradients | None
    rounded: Rounded | None
    bias_gradient: BiasGradient | None
    limits: Indices  # (B, Lq, 2): lo, hi
    limits_batch: int
    limits_row: int
    first: int  # key j only if first <= j - i < last
    last: int
    offset: int  # ALiBi: query i stands at i + offset
    scale: float
    Lq: int
    Lk: int
    D: int
    Dv: int
    H: int
    group: int  # query heads that share a key head
    blocks: int  # blocks of queries in a head
    splits: int  # parts of the keys, of split_keys each, done apart and merged
    split_keys: int
    keys_per_block: int
    deep: int | None  # anything, if there are more channels than one chain should sum: see tiles.row_products
    packed: int | None  # anything, if bfloat16 is multiplied two by two: see packed.py
    scratch: Elements
    scratch_step: int


class Block(NamedTuple):
    """Scratch of one block of queries, in rows of `width` elements. One query is one column."""

    query: Elements  # D rows: the queries transposed, times the scale; packed, D / 2 rows of words, unscaled
    output: Elements  # Dv rows: what is summed for each query; backward, D rows of dq
    scores: Elements  # one row a key of a chunk: scores, then probabilities
    additive: Elements  # bias and mask, -inf hides
    bound: Elements  # one row each, see softmax.py
    shift: Elements
    total: Elements  # of the past chunks; backward 1 / sum, but if packed what its rounding left: see `normalise`
    part: Elements  # of this chunk; the row after `total`
    lost: Elements  # what `total` lost by rounding; the row after `part`
    factor: Elements
    top: Elements  # with an epsilon: the largest score; backward, its probability
    near: Elements  # the query sees near <= key < far, counted from the chunk's first key
    far: Elements
    position: Elements  # ALiBi: where the query stands, counted likewise
    lo: Indices  # the same as lo <= key < hi, absolute
    hi: Indices
    first: Indices  # for each column of the block: the first and last key that it sees in the chunk
    last: Indices
    dice: Words  # two words of randomness a query
    stage: Elements  # lanes x lanes


class GradientBlock(NamedTuple):
    """What the backward pass keeps beside a `Block`."""

    output: Elements  # Dv rows: the gradient of the output, transposed
    scores: Elements  # one row a key of the tile: the gradient of the scores
    delta: Elements  # one row: sum over d of output * grad_output, less grad_lse
    query_rows: Elements  # the block's queries and output gradients as they lie, padded to whole vectors
    output_rows: Elements


_ROWS, _SMALL_PARTS = 10, 25  # after `additive`, rows of elements (bound to far); of all, at most 24 on every target


def scratch_rows(D: int, Dv: int, keys_per_block: int) -> int:
    """Rows of scratch that one slot needs, as `carve` lays them out."""
    return D + max(D, Dv) + 2 * keys_per_block + _SMALL_PARTS


def packed_elements(D: int, Dv: int, keys_per_block: int, itemsize: int) -> int:
    """Further elements that packed products need, as `packed.carve_packed` lays them out."""
    k_step, v_step = padded(D, itemsize), padded(Dv, itemsize)
    return keys_per_block // 2 * max(k_step, v_step) + target().width(itemsize) // 2 * (k_step + v_step)


def padded(D: int, itemsize: int) -> int:
    """D rounded up to whole vectors."""
    lanes = target().lanes(itemsize)
    return -(-D // lanes) * lanes


def gradient_rows(D: int, Dv: int, keys_per_block: int, itemsize: int) -> int:
    """Further rows that the backward pass needs, as `carve_gradients` lays them out."""
    return Dv + keys_per_block + 1 + padded(D, itemsize) + padded(Dv, itemsize)


@inline
def carve(job, slot):
    """The block's parts in this slot's scratch."""
    at = job.scratch + slot * job.scratch_step
    width, KB = width_of(at), job.keys_per_block
    output = at + job.D * width
    scores = output + max(job.D, job.Dv) * width
    additive = scores + KB * width
    row = additive + KB * width
    ints = as_indices(row + _ROWS * width)
    return Block(
        given_words(job.packed, at), output, scores, additive,
        row, row + width, row + 2 * width, row + 3 * width, row + 4 * width, row + 5 * width, row + 6 * width,
        row + 7 * width, row + 8 * width, row + 9 * width, ints, ints + width, ints + 2 * width,
        ints + (2 * width + COLS), as_words(ints + (2 * width + 2 * COLS)), row + (_ROWS + 10) * width,
    )  # fmt: skip


@inline
def carve_gradients(job, slot):
    """The parts that lie behind those of `carve`."""
    at = job.scratch + slot * job.scratch_step
    width, KB = width_of(at), job.keys_per_block
    output = at + (job.D + max(job.D, job.Dv) + 2 * KB + _SMALL_PARTS) * width
    scores = output + job.Dv * width
    delta = scores + KB * width
    query_rows = delta + width
    return GradientBlock(
        given_words(job.packed, output), scores, delta, query_rows, query_rows + whole_vectors(at, job.D) * width
    )  # fmt: skip


@apart
def find_keys(b, job, head, q0, nq, first_key, last_key):
    """lo and hi of each query, within first_key .. last_key.

    Returns the lowest lo and the highest hi, and between them near and far: every query sees the keys near .. far.
    """
    width = width_of(b.query)
    limits = job.limits + head // job.H * job.limits_batch
    lowest, highest, near, far = last_key, first_key, first_key, last_key
    for i in range(width):
        lo, hi = last_key, first_key
        if i < nq:
            at = (q0 + i) * job.limits_row
            lo = max(first_key, max(q0 + i + job.first, limits[at]))
            hi = min(last_key, min(q0 + i + job.last, limits[at + 1]))
            near, far = max(near, lo), min(far, hi)
            if lo < hi:
                lowest, highest = min(lowest, lo), max(highest, hi)
        b.lo[i], b.hi[i] = lo, hi
    return lowest, near, far, highest


@inline
def is_narrow(b, nq):
    """Do so few queries go column by column, even past keys that all of them see?

    Two of four columns do: the forward pass takes 30 % longer as a whole block, three columns 13 % less (Emerald
    Rapids). Two of three are 3 to 10 % faster as a whole block beside many keys, 2 to 6 % slower beside 256 and fewer
    (Zen 3).
    """
    return nq <= width_of(b.query) // 2


@inline
def is_whole(b, nq, k0, n, near, far):
    """Do wide tiles, with nothing to hide, take the queries past the keys k0 .. k0 + n?"""
    return near <= k0 and k0 + n <= far and not is_narrow(b, nq)


@inline
def interior(lowest, near, far, highest, narrow):
    """near and far, moved inwards to where tiles can begin and end; an empty interval if too little is left."""
    if near > lowest:
        near = (near + TALL - 1) // TALL * TALL
    if far < highest:
        far = far // TALL * TALL
    far = near + (far - near) // ROWS * ROWS  # wide tiles have no keys to hide, not even a remainder
    if far - near < ROWS or narrow:
        near, far = lowest, lowest
    return near, far


@inline
def chunk(k0, near, far, highest, KB):
    """Keys k0 .. k0 + n come next; True if they are in the interior."""
    end = near if k0 < near else (far if k0 < far else highest)
    return min(KB, end - k0), near <= k0 and k0 < far


@apart
def place_chunk(b, job, nq, q0, k0, n, whole):
    """near, far and position of each query, and first and last of each column, counted from key k0."""
    width, lanes = width_of(b.query), lanes_of(b.query)
    for i in range(width):
        b.position[i] = q0 + i + job.offset - k0
    if not whole:  # at most n: a tile's rows beyond the chunk repeat its last key, and must stay hidden
        for i in range(width):
            b.near[i], b.far[i] = max(-1, min(n, b.lo[i] - k0)), max(-1, min(n, b.hi[i] - k0))
    for column in range(COLS):
        first, last = 0 if whole else n, n if whole else 0
        if not whole:
            for i in range(column * lanes, min(nq, column * lanes + lanes)):
                lo, hi = max(0, b.lo[i] - k0), min(n, b.hi[i] - k0)
                if lo < hi:
                    first, last = min(first, lo), max(last, hi)
        last = max(first, last)
        if first < last:  # pairs of keys begin with even ones
            first = first // per_lane(b.query) * per_lane(b.query)
        b.first[column], b.last[column] = first, last


@apart
def sees(b, additive, k0, j, query):
    """Does the query of the block see key k0 + j? For the slow paths; the fast ones hide scores."""
    seen = b.lo[query] <= k0 + j and k0 + j < b.hi[query]
    if additive is not None:
        seen = seen and not additive[j * width_of(additive) + query] == -INF
    return seen


@apart
def queries_of(b, key, rows, nq):
    """Which columns of the block have queries that see one of the keys key .. key + rows of the chunk: first, last."""
    lanes = lanes_of(b.query)
    first, last = nq, 0
    for column in range(COLS):
        if b.first[column] < key + rows and b.last[column] > key:
            first, last = min(first, column * lanes), min(nq, column * lanes + lanes)
    return first, max(first, last)


@apart
def stage_additive(b, present, bias, mask, head, q0, nq, k0, n):
    """b.additive[j, query] = bias[query, k0 + j], or -inf where the mask says so; nothing if neither is present.

    Whole squares are turned in registers. By elements, as remainders and odd strides are, all takes 1.03 to 1.15 times
    as long.
    """
    if present is None:
        return
    width, lanes, square = width_of(b.query), lanes_of(b.query), tile_column(b.stage)
    for row in range(0, nq, lanes):
        for j in range(0, n, lanes):
            rows, keys = min(lanes, nq - row), min(lanes, n - j)
            if keys == lanes and lies_in_rows(bias) and lies_in_rows(mask):
                tile = bias_of(square, bias, head, q0 + row, rows, k0 + j)
                tile = masked(tile, mask, head, q0 + row, rows, k0 + j)
                tile_store(tile_transposed(tile), b.additive, j * width + row, width, lanes)
                continue
            stage_bias(b.stage, lanes, bias, head, q0 + row, rows, k0 + j, keys)
            stage_mask(b.stage, lanes, mask, head, q0 + row, rows, k0 + j, keys)
            transpose_square(b.additive, j * width + row, width, b.stage, 0, lanes, None, 0)
