"""The steps of attention, one by one: for those who compose their own, and for those who want to see how it goes.

    s = scale * q k^T            s[i, j] = scale * sum over d of q[i, d] * k[j, d]                  `product`
    s = -inf where hidden                                                                           `mask`
    p = softmax(s)               p[i, j] = exp(s[i, j] - m[i]) / sum over j of exp(s[i, j] - m[i])  `softmax`
    o = p v                      o[i, d] = sum over j of p[i, j] * v[j, d]                          `product`

and back again, from do, the gradient of o:

    dp = do v^T       dv = p^T do                                                                   `product`
    ds = p * (dp - delta)        delta[i] = sum over j of p[i, j] * dp[i, j]                        `softmax_backward`
    ds = 0 where hidden                                                                             `mask`
    dq = scale * ds k            dk = scale * ds^T q                                                `product`

dense.py does all of this at once, tile by tile, and never holds the whole of s or p. Here each step reads and writes
matrices. A transposed matrix is the same memory with its two steps swapped, so one `product` serves six times.
"""

from typing import NamedTuple

from .blocks import COLS, INF, ROWS
from .jit import apart, inline, kernel
from .jobs import Elements, Indices
from .scoring import ByteMatrices
from .simd import lane_sum, lanes_of, load, splat, store, tile_multiply_add, tile_zeros, where, width_of, zeros_of
from .softmax import LOG2E, probability
from .tiles import Matrices, Matrix, add_to, all_finite, clear, padded_rows, transposed, whole_vectors

TASK_ROWS = 128  # of one task of a product, whose sums are then 32 KiB
TERMS = 128  # summed before they are added: one sum over all would lose digits, see tiles.add_columns_times_block
SOFT_ROWS = 16  # of one task of the others


class ProductJob(NamedTuple):
    """out[i, j] = sum over k < K of left[i, k] * right[k, j] * factor, in each of a stack of matrices."""

    left: Matrices
    right: Matrices
    out: Matrices  # contiguous, as all that is made here
    factor: Elements  # the same number TERMS times
    selects: int  # 1: where left is 0 nothing is added, whatever stands in right
    I: int
    J: int
    K: int
    row_blocks: int  # of TASK_ROWS
    column_blocks: int  # of COLS vectors
    scratch: Elements
    scratch_step: int


@kernel
def product(job: ProductJob, slot, task):
    # task -> TASK_ROWS rows and COLS vectors of columns of one matrix
    sums = job.scratch + slot * job.scratch_step
    width, tile = width_of(sums), tile_zeros(sums, ROWS, COLS)
    panel = sums + TASK_ROWS * width
    m, block = task // (job.row_blocks * job.column_blocks), task % (job.row_blocks * job.column_blocks)
    i0, j0 = block // job.column_blocks * TASK_ROWS, block % job.column_blocks * width
    rows, columns = min(TASK_ROWS, job.I - i0), min(width, job.J - j0)
    clear(Matrix(sums, width, 1), rows)
    for k0 in range(0, job.K, TERMS):
        n, left, right = min(TERMS, job.K - k0), part_of(job.left, m, i0, k0), part_of(job.right, m, k0, j0)
        # 1. panel[k, :] = right[k, :] * factor, and zeros to a whole width
        if right.row == 1:  # its transpose lies row by row
            transposed(panel, Matrix(right.data, right.col, right.row), columns, n, job.factor)
        else:
            padded_rows(panel, width, right, n, columns, job.factor)
        # 2. sums[i, :] += sum over k < n of left[i, k] * panel[k, :]
        if job.selects and not all_finite(Matrix(panel, width, 1), n, width):
            add_selected(sums, left, panel, rows, n)
        else:
            for i in range(0, rows, ROWS):
                x, live = left.data + i * left.row, min(ROWS, rows - i)
                add_to(
                    tile_multiply_add(tile, x, left.col, left.row, live, panel, width, n), sums, i * width, width, live
                )
    out = part_of(job.out, m, i0, j0)
    for i in range(rows):
        for j in range(columns):
            out.data[i * out.row + j] = sums[i * width + j]


@inline
def part_of(stack, m, row, col):
    """Matrix m of the stack, from this row and column on."""
    return Matrix(stack.data + (stack.at[m] + row * stack.row + col * stack.col), stack.row, stack.col)


@apart
def add_selected(sums, left, panel, rows, n):
    """As 2. above, but 0 times NaN or infinity adds nothing."""
    width = width_of(sums)
    for i in range(rows):
        for k in range(n):
            x = left.data[i * left.row + k * left.col]
            if not x == 0:
                for j in range(width):
                    sums[i * width + j] += x * panel[k * width + j]


class MaskJob(NamedTuple):
    """out = scores + bias where lo <= j < hi and allowed[i, j], and `hidden` elsewhere."""

    scores: Matrices
    out: Matrices
    bias: Matrices
    allowed: ByteMatrices
    limits: Indices  # lo, hi for each row of each matrix
    hidden: float  # -inf for scores, 0 for their gradients
    Lq: int
    Lk: int
    blocks: int  # of SOFT_ROWS


@kernel
def mask(job: MaskJob, slot, task):
    # task -> SOFT_ROWS rows of one matrix
    m, i0 = task // job.blocks, task % job.blocks * SOFT_ROWS
    for i in range(i0, min(job.Lq, i0 + SOFT_ROWS)):
        s, bias, allowed = part_of(job.scores, m, i, 0), part_of(job.bias, m, i, 0), part_of(job.allowed, m, i, 0)
        out, at = part_of(job.out, m, i, 0), 2 * (m * job.Lq + i)
        lo, hi = job.limits[at], job.limits[at + 1]
        for j in range(job.Lk):
            seen = lo <= j and j < hi and allowed.data[j * allowed.col] != 0
            out.data[j] = s.data[j * s.col] + bias.data[j * bias.col] if seen else job.hidden


class SoftmaxJob(NamedTuple):
    """p[i, j] = exp(s[i, j] - m[i]) / (l[i] + eps), row by row; backward, its gradient from that of the weights."""

    given: Matrices  # scores, or grad_weights
    weights: Matrices  # made, or given
    grad_scores: Matrices  # made, backward
    eps: float
    Lq: int
    Lk: int
    blocks: int  # of SOFT_ROWS
    scratch: Elements
    scratch_step: int


@kernel
def softmax(job: SoftmaxJob, slot, task):
    # task -> SOFT_ROWS rows of one matrix
    m, i0 = task // job.blocks, task % job.blocks * SOFT_ROWS
    e, n = job.scratch + slot * job.scratch_step, job.Lk
    lanes, end = lanes_of(e), whole_vectors(e, n)
    for i in range(i0, min(job.Lq, i0 + SOFT_ROWS)):
        s, p = part_of(job.given, m, i, 0), part_of(job.weights, m, i, 0)
        for j in range(end):
            e[j] = s.data[j * s.col] if j < n else -INF
        # 1. the largest score; 0 where there is none, as -inf - -inf would be NaN
        top = splat(load(e, 0), -INF)
        for j in range(0, end, lanes):
            top = where(load(e, j) > top, load(e, j), top)
        store(top, e, end)
        largest = -INF
        for lane in range(end, end + lanes):
            largest = max(largest, e[lane])
        shift, total = splat(top, 0 if largest == -INF else largest), zeros_of(e)
        # 2. e = exp(s - m) and its sum
        for j in range(0, end, lanes):
            x = probability(load(e, j), shift, LOG2E)
            store(x, e, j)
            total = total + x
        e[end] = lane_sum(total) + job.eps
        # 3. p = e / sum; exactly 0 where s is -inf, even if the sum is 0, of a row of nothing else, or NaN
        l = e[end]
        for j in range(n):
            p.data[j] = 0 if s.data[j * s.col] == -INF else e[j] / l


@kernel
def softmax_backward(job: SoftmaxJob, slot, task):
    # task -> SOFT_ROWS rows of one matrix; where p is 0 so is ds, whatever dp is
    m, i0 = task // job.blocks, task % job.blocks * SOFT_ROWS
    terms, n = job.scratch + slot * job.scratch_step, job.Lk
    for i in range(i0, min(job.Lq, i0 + SOFT_ROWS)):
        dp, p, ds = part_of(job.given, m, i, 0), part_of(job.weights, m, i, 0), part_of(job.grad_scores, m, i, 0)
        # 1. delta = sum of p * dp
        for j in range(n):
            x = p.data[j * p.col]
            terms[j] = 0 if x == 0 else x * dp.data[j * dp.col]
        for j in range(n, whole_vectors(terms, n)):
            terms[j] = 0
        total = zeros_of(terms)
        for j in range(0, n, lanes_of(terms)):
            total = total + load(terms, j)
        delta = lane_sum(total)
        # 2. ds = p * (dp - delta)
        for j in range(n):
            x = p.data[j * p.col]
            ds.data[j] = 0 if x == 0 else x * (dp.data[j * dp.col] - delta)
        if job.eps > 0:
            add_gradient_of_maximum(ds.data, p.data, p.col, n, job.eps * delta)


@apart
def add_gradient_of_maximum(ds, p, p_next, n, share):
    """The largest score also sets how much eps weighs beside exp(s - m); equal ones bear that together."""
    top, equal = p[0], 0
    for j in range(n):
        x = p[j * p_next]
        equal = 1 if x > top else equal + (x == top)
        top = max(top, x)
    for j in range(n):
        if p[j * p_next] == top and top > 0:
            ds[j] -= top * share / equal
