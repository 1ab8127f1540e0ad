"""What the dense kernels share: their jobs, the rows that a block of threads owns, and the scores of a tile."""

import functools
import math
from typing import NamedTuple

from numba import cuda, types

from . import instructions as gpu
from .jit import WARP, Elements, Floats, Indices, device
from .scoring import Sight, Terms, dice, kept, scoring, sees_from, sees_to
from .tiles import cell

INF = math.inf
FAR = 1 << 30
across = gpu.across


class Matrices(NamedTuple):
    """Matrix m begins at data[at[m]]; its rows lie `row` apart, the elements of a row side by side."""

    data: Elements
    at: Indices  # one for each query head, for keys and values too
    row: int


class AttentionJob(NamedTuple):
    """What the forward kernel works on."""

    query: Matrices
    key: Matrices
    value: Matrices
    output: Matrices
    top: Floats  # (B * H, splits, Lq): the largest score in base 2, and
    total: Floats  # the sum of 2**(score - top), eps included: what the backward pass needs
    lse: Floats  # (B * H, Lq): natural
    parts: Floats  # (B * H, splits, Lq, Dv): the outputs of parts of the keys, not divided
    merged_top: Floats  # (B * H, Lq), as the next: what `merge` makes of top and total
    merged_total: Floats
    terms: Terms
    sight: Sight
    epsilon: float
    Lq: int
    Lk: int
    D: int
    Dv: int
    H: int
    matrices: int  # B * H, or what is left of them where heads are packed
    heads: int  # packed into one block
    splits: int
    split_keys: int


class GradientJob(NamedTuple):
    """What the backward kernels work on."""

    query: Matrices
    key: Matrices
    value: Matrices
    output: Matrices
    grad_output: Matrices
    grad_query: Matrices
    grad_key: Matrices  # one for each query head, as key: those that share a key head lead to the same
    grad_value: Matrices
    top: Floats  # (B * H, Lq), as total: of the forward pass
    total: Floats
    grad_lse: Floats  # (B * H, Lq)
    shift: Floats  # (B * H, Lq), as the next two: made first, p = 2**(score - shift) * inverse
    inverse: Floats
    delta: Floats  # sum over d of output * grad_output, less grad_lse
    terms: Terms
    sight: Sight
    slope: float  # of a score by q.k: the scale
    Lq: int
    Lk: int
    D: int
    Dv: int
    H: int
    matrices: int  # B * H
    key_matrices: int  # B * Hk
    heads: int  # 1
    group: int


class Variant(NamedTuple):
    """What is known when a kernel is compiled. Both D and Dv are at most `width`."""

    element: str
    width: int
    keys: int  # in a tile
    tall: int  # a warp owns 16 * tall rows
    threads: int
    resident: int = 1  # blocks that shall fit on one multiprocessor: bounds the registers
    hold: int = 2  # how many left factors stay in registers: first queries or keys, then output gradients or values
    softcap: bool = False
    slopes: bool = False
    bias: bool = False
    mask: bool = False
    dropout: bool = False
    packed: bool = False  # several heads in a block, and the keys in parts
    makes: str = "both"  # the backward pass over keys: "key", "value" or both

    @property
    def rows(self):
        """Of a block."""
        return self.threads // WARP * 16 * self.tall

    @property
    def scores(self):
        """Of a lane, in a tile."""
        return self.tall * self.keys // 2


@device
def dealt(rows, of_block):
    """Of which matrix of so many rows a block of threads has some, and which of its blocks it is. All lie along x,
    matrix by matrix: a grid's other axes end at 65,535."""
    n, count = types.int32(cuda.blockIdx.x), types.int32((rows + of_block - 1) // of_block)
    return types.int32(n // count), types.int32(n % count)


@device
def head_of_block(count, splits):
    """Which of so many heads a block of threads works on. They lie along y and, as that ends at 65,535, along z, beside
    parts of the keys; some may then be worked on twice, with the same result. `dealt` would need more registers."""
    n = types.int32(cuda.blockIdx.y) + types.int32(cuda.gridDim.y) * (
        types.int32(cuda.blockIdx.z) // types.int32(splits)
    )
    return types.int32(min(types.int32(n), types.int32(count - 1)))


@device
def span(low, near, far, high, shared):
    """The lowest lo, the highest lo, the lowest hi and the highest hi of all rows of the block of threads."""
    for distance in (4, 8, 16):
        low, near = min(low, across(low, distance)), max(near, across(near, distance))
        far, high = min(far, across(far, distance)), max(high, across(high, distance))
    warp = cuda.threadIdx.x >> 5
    if cuda.threadIdx.x & 31 == 0:
        shared[4 * warp], shared[4 * warp + 1] = low, near
        shared[4 * warp + 2], shared[4 * warp + 3] = far, high
    cuda.syncthreads()
    for w in range(cuda.blockDim.x >> 5):
        low, near = min(low, shared[4 * w]), max(near, shared[4 * w + 1])
        far, high = min(far, shared[4 * w + 2]), max(high, shared[4 * w + 3])
    return low, near, far, high


@functools.cache
def placing(packed, slots):
    """place(job, head0, row0, at, lo, hi, shared): where the queries of this lane's row slots begin, -1 if there are
    none, and which keys they see; and for the whole block, whose first head is head0, `span`.
    owner(job, head0, row): the head and the query of a row."""
    int32 = types.int32

    @device
    def owner(job, head0, row):
        if packed:
            return int32(head0 + row // int32(job.Lq)), row % int32(job.Lq)
        return head0, row

    @device
    def place(job, head0, row0, at, lo, hi, shared):
        first, last = int32(0), int32(job.Lk)
        if packed:
            first = int32(cuda.blockIdx.z % job.splits * job.split_keys)
            last = int32(min(job.Lk, first + job.split_keys))
        low, near, far, high = int32(FAR), int32(0), int32(FAR), int32(0)
        for r in range(slots):
            at[r], lo[r], hi[r] = -1, 0, 0
            if row0 + 8 * r < job.Lq * job.heads:
                head, i = owner(job, head0, int32(row0 + 8 * r))
                at[r] = job.query.at[head] + i * job.query.row
                lo[r] = max(first, sees_from(job.sight, head // job.H, i))
                hi[r] = min(last, sees_to(job.sight, head // job.H, i))
                near, far = max(near, lo[r]), min(far, hi[r])
                if lo[r] < hi[r]:
                    low, high = min(low, lo[r]), max(high, hi[r])
        return span(low, near, far, high, shared)

    return place, owner


@functools.cache
def scoring_tile(v):
    """finish(job, s, at, lo, hi, head0, row0, k0, edge): from q.k to scores in base 2, hidden ones -inf, of the keys
    from k0; thin(job, s, head0, row0, k0): dropout of what became of them."""
    SLOTS, BLOCKS, SLOPES = 2 * v.tall, v.keys // 8, v.slopes
    score, _ = scoring(v.element, v.softcap, v.slopes, v.bias, v.mask)
    _, owner = placing(v.packed, SLOTS)
    int32, float32 = types.int32, types.float32

    @device
    def finish(job, s, at, lo, hi, head0, row0, k0, edge):
        key = int32(k0 + 2 * (cuda.threadIdx.x & 3))
        for r in range(SLOTS):
            head, i = owner(job, head0, int32(row0 + 8 * r))
            there = at[r] >= 0
            slope = float32(0)
            if SLOPES and there:
                slope = job.terms.slopes[head]
            for b in range(BLOCKS):
                for e in range(2):
                    n, j = cell(r, b, BLOCKS) + e, int32(key + 8 * b + e)
                    s[n] = score(job.terms, s[n], slope, head, i, j, there and j < job.Lk)
        if edge:  # a loop of its own, which most tiles skip: a test inside the other costs every score
            for r in range(SLOTS):
                for b in range(BLOCKS):
                    for e in range(2):
                        n, j = cell(r, b, BLOCKS) + e, int32(key + 8 * b + e)
                        if j < lo[r] or j >= hi[r]:
                            s[n] = float32(-INF)

    @device
    def thin(job, s, head0, row0, k0):
        key = int32(k0 + 2 * (cuda.threadIdx.x & 3))
        for r in range(SLOTS):
            head, i = owner(job, head0, int32(row0 + 8 * r))
            thrown = dice(job.terms.seed, head, i)
            for b in range(BLOCKS):
                for e in range(2):
                    n, j = cell(r, b, BLOCKS) + e, int32(key + 8 * b + e)
                    s[n] = s[n] * float32(job.terms.gain) if kept(thrown, j, job.terms.threshold) else float32(0)

    return finish, thin
