"""Linear projections of many rows, with heads split or joined on the way: out = left right + bias.

    left (I, K)   right (K, J)   out (I, J)   bias (J)       of any strides

A row is a pair (batch, position) and a column a pair (head, channel), each pair with strides of its own. So x W + b is
written where attention wants it, in (B, H, L, D), and read back from there; and the gradients, dx = dy W^T and
dW = x^T dy, are the same kernel on transposed views.

Element (i, j) is one sum over k in one order, chunk by chunk: it depends neither on threads nor on how many other rows
there are. That is why this is not BLAS, whose bits depend on both.
"""

from typing import NamedTuple

from .blocks import COLS, ROWS
from .jit import Elements, apart, inline, kernel
from .simd import lanes_of, load, store, tile_map, tile_row, tile_store, tile_zeros, transpose_square, width_of
from .softmax import plus
from .tiles import add_to, multiply_add

SUMMED = 256  # of K at a time: a longer chain would lose digits, and 256 x 64 float32 of `right` stay near the core


class Pairs(NamedTuple):
    """A matrix whose rows and columns are pairs: row i is (i // rows, i % rows), column j (j // cols, j % cols)."""

    data: Elements
    outer_row: int  # strides, in elements
    row: int
    outer_col: int
    col: int
    rows: int
    cols: int


class ProjectionJob(NamedTuple):
    left: Pairs  # (I, K), or (K, I) if its rows are the contiguous axis
    right: Pairs  # (K, J), or (J, K) likewise
    out: Pairs
    bias: Elements  # (J,)
    sums: Elements  # (parts, J): the sums of the columns of `right`, which for dW = x^T dy are db
    left_transposed: int
    right_transposed: int
    right_in_place: int  # read it where it lies: for so few rows that copying it would cost more than it gains
    wants_bias: int
    wants_sums: int
    I: int
    J: int
    K: int
    part: int  # of K, that one task sums
    out_step: int  # from what one part makes to what the next does
    task_rows: int
    task_cols: int
    scratch: Elements
    scratch_step: int


def scratch_elements(task_rows: int, task_cols: int, width: int, lanes: int) -> int:
    """What one slot needs: chunks of left and right, the block of out, a vector of ones, a row."""
    return task_rows * SUMMED + SUMMED * width + task_rows * task_cols + lanes + width


@inline
def row_at(m, i):
    return i // m.rows * m.outer_row + i % m.rows * m.row


@inline
def column_at(m, j):
    return j // m.cols * m.outer_col + j % m.cols * m.col


@apart
def move_lines(block, step, m, i0, n, j0, length, back):
    """block[i * step + j] = m[i0 + i, j0 + j], or `back`"""
    o, head, channel = 0, j0 // m.cols, j0 % m.cols
    while o < length:
        run = min(length - o, m.cols - channel)
        move_run(block + o, step, m, i0, n, head * m.outer_col + channel * m.col, run, back)
        o, head, channel = o + run, head + 1, 0


@apart
def move_run(block, step, m, i0, n, column, length, back):
    """`move_lines` for columns of one head, of which the first lies at `column`. Pairs are counted up: dividing cost
    5 % of a product."""
    lanes, outer, inner = lanes_of(block), i0 // m.rows, i0 % m.rows
    whole = length // lanes * lanes if m.col == 1 else 0
    for i in range(n):
        x, o = outer * m.outer_row + inner * m.row + column, i * step
        for t in range(0, whole, lanes):
            if back:
                store(load(block, o + t), m.data, x + t)
            else:
                store(load(m.data, x + t), block, o + t)
        for t in range(whole, length):
            if back:
                m.data[x + t * m.col] = block[o + t]
            else:
                block[o + t] = m.data[x + t * m.col]
        inner += 1
        if inner == m.rows:
            outer, inner = outer + 1, 0


@apart
def copy_transposed(out, step, m, i0, n, j0, length, ones):
    """out[j * step + i] = m[i0 + i, j0 + j]"""
    lanes = lanes_of(out)
    for i in range(0, n, lanes):
        at, one_row = row_at(m, i0 + i), (i0 + i) % m.rows + lanes <= m.rows and i + lanes <= n
        head, channel = j0 // m.cols, j0 % m.cols
        for j in range(0, length, lanes):
            if one_row and m.col == 1 and channel + lanes <= m.cols and j + lanes <= length:
                x = at + head * m.outer_col + channel
                transpose_square(out, j * step + i, step, m.data, x, m.row, ones, 0)
            else:
                for r in range(i, min(n, i + lanes)):
                    for c in range(j, min(length, j + lanes)):
                        out[c * step + r] = m.data[row_at(m, i0 + r) + column_at(m, j0 + c)]
            channel += lanes
            if channel >= m.cols:
                head, channel = head + channel // m.cols, channel % m.cols


@apart
def pad(panel, width, n, live):
    """Columns from `live` on are 0, so that what they are multiplied to is never NaN, nor slow as denormals are."""
    for k in range(n):
        for j in range(live, width):
            panel[k * width + j] = 0


@apart
def add_sums(tile, sums, panel, step, n, live, row):
    """sums[j] += sum over the n rows of the panel, all columns side by side: each waits for its last addition"""
    total = tile_row(tile, panel, 0)
    for k in range(1, n):
        total = tile_map(plus, total, (tile_row(tile, panel, k * step),))
    tile_store(total, row, 0, 0, 1)
    for j in range(live):
        sums[j] += row[j]


@kernel
def project(job: ProjectionJob, slot, task):
    # task -> some rows by some columns of out, of one part of K
    row_tasks = (job.I + job.task_rows - 1) // job.task_rows
    tasks = row_tasks * ((job.J + job.task_cols - 1) // job.task_cols)
    number, task = task // tasks, task % tasks
    i0, j0 = task % row_tasks * job.task_rows, task // row_tasks * job.task_cols
    ni, nj = min(job.task_rows, job.I - i0), min(job.task_cols, job.J - j0)
    left = job.scratch + slot * job.scratch_step
    width, lanes, step = width_of(left), lanes_of(left), job.task_cols
    panel = left + job.task_rows * SUMMED
    block = panel + SUMMED * width
    ones = block + job.task_rows * step
    row = ones + lanes
    tile = tile_zeros(left, ROWS, COLS)
    for i in range(lanes):
        ones[i] = 1
    # 1. out begins as the bias
    for j in range(step):
        block[j] = job.bias[j0 + j] if job.wants_bias and number == 0 and j < nj else 0
    for i in range(1, ni):  # by vectors: one by one this is 6 % of a task
        for j in range(0, step, lanes):
            store(load(block, j), block, i * step + j)
    last = min(job.K, (number + 1) * job.part)
    for k0 in range(number * job.part, last, SUMMED):
        nk = min(SUMMED, last - k0)
        # 2. a chunk of left, as it lies: by rows, or by columns
        if job.left_transposed:
            move_lines(left, job.task_rows, job.left, k0, nk, i0, ni, False)
        else:
            move_lines(left, SUMMED, job.left, i0, ni, k0, nk, False)
        left_k, left_i = (job.task_rows, 1) if job.left_transposed else (1, SUMMED)
        for j in range(0, nj, width):
            # 3. a chunk of right, as wide as a tile
            live, y, y_next = min(width, nj - j), panel, width
            if job.right_in_place and live == width:
                y, y_next = job.right.data + (k0 * job.right.row + j0 + j), job.right.row
            elif job.right_transposed:
                copy_transposed(panel, width, job.right, j0 + j, live, k0, nk, ones)
            else:
                move_lines(panel, width, job.right, k0, nk, j0 + j, live, False)
            if live < width:
                pad(panel, width, nk, live)
            if job.wants_sums and i0 == 0:
                add_sums(tile, job.sums + (number * job.J + j0 + j), y, y_next, nk, live, row)
            # 4. out[i, j] += sum over k of left[i, k] * right[k, j]
            for i in range(0, ni, ROWS):
                rows = min(ROWS, ni - i)
                done = multiply_add(tile, left + i * left_i, left_k, left_i, rows, y, y_next, nk)
                add_to(done, block, i * step + j, step, rows)
    # 5. to where it belongs
    o = job.out
    out = Pairs(o.data + number * job.out_step, o.outer_row, o.row, o.outer_col, o.col, o.rows, o.cols)
    move_lines(block, step, out, i0, ni, j0, nj, True)
