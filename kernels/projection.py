"""Linear projections of many rows, with heads split or joined on the way: out = left right + bias, or +=.

    left (I, K)   right (K, J)   out (I, J)   bias (J)       of any strides

A row is a pair (batch, position) and a column a pair (head, channel), each pair with strides of its own. So x W + b is
written where attention wants it, in (B, H, L, D), and read back from there; and the gradients, dx = dy W^T and
dW = x^T dy, are the same kernel on transposed views.

Element (i, j) is one sum over k in one order, chunk by chunk: it depends neither on threads nor on how many other rows
there are. That is why this is not BLAS, whose bits depend on both.
"""

from typing import NamedTuple

from .blocks import COLS, ROWS
from .jit import apart, inline, kernel
from .jobs import Elements
from .simd import (
    lanes_of,
    load,
    prefetch,
    store,
    tile_lanes,
    tile_load,
    tile_map,
    tile_multiply_add,
    tile_row,
    tile_rows,
    tile_store,
    tile_zeros,
    transpose_square,
    width_of,
)
from .softmax import plus
from .tiles import Matrix, clear

SUMMED = 256  # of K at a time: a longer chain would lose digits, and what a tile is made of stays next to the core
NEAR, STRIP = 16, 8  # for few rows: so many rows of `right` at a time, and vectors of one that is multiplied to one row


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
    left_in_place: int  # read it where it lies: rows so short that a task's lie near the core anyway
    few: int  # rows are so few that `right`, which each of them needs once, is read where it lies: see `multiply_few`
    out_in_place: int  # tiles are written where they belong; else to a block that is moved there
    run: int  # columns that no tile goes beyond: with out_in_place those of a head, else all
    wants_bias: int
    wants_sums: int
    adds: int  # to what out is
    I: int
    J: int
    K: int
    part: int  # of K, that one task sums
    out_step: int  # from what one part makes to what the next does
    task_rows: int
    task_cols: int
    scratch: Elements
    scratch_step: int


class Desk(NamedTuple):
    """What a task works on: its rows, columns and part of the sums, and its scratch."""

    i0: int
    ni: int
    j0: int
    nj: int
    number: int  # of the part
    first: int  # of its k
    last: int
    left: Elements  # a chunk of left: rows SUMMED apart, or where columns are contiguous [rows / group][k][group]
    right: Elements  # a chunk of right, as wide as a tile
    start: Elements  # one row: what out begins with
    block: Elements  # out, if it is not written in place
    chunk: Elements  # for few rows: what this chunk adds to it
    ones: Elements  # a vector
    row: Elements  # one row of a tile


def scratch_elements(task_rows: int, task_cols: int, width: int, lanes: int) -> int:
    """What `carve` lays out, in elements."""
    group = max(lanes, ROWS)
    lines = -(-task_rows // group) * group + width
    return lines * SUMMED + (2 * task_rows + 1) * task_cols + lanes + max(width, STRIP * lanes)


@inline
def group_of(like):
    """Rows of left that lie side by side where its columns are contiguous: whole vectors, and whole tiles."""
    return max(lanes_of(like), ROWS)


@apart
def carve(job, slot, task):
    row_tasks = (job.I + job.task_rows - 1) // job.task_rows
    tasks = row_tasks * ((job.J + job.task_cols - 1) // job.task_cols)
    number, task = task // tasks, task % tasks
    i0, j0 = task % row_tasks * job.task_rows, task // row_tasks * job.task_cols
    left = job.scratch + slot * job.scratch_step
    group = group_of(left)
    right = left + (job.task_rows + group - 1) // group * group * SUMMED
    start = right + SUMMED * width_of(left)
    block = start + job.task_cols
    chunk = block + job.task_rows * job.task_cols
    ones = chunk + job.task_rows * job.task_cols
    return Desk(
        i0, min(job.task_rows, job.I - i0), j0, min(job.task_cols, job.J - j0),
        number, number * job.part, min(job.K, (number + 1) * job.part),
        left, right, start, block, chunk, ones, ones + lanes_of(left),
    )  # fmt: skip


@inline
def row_at(m, i):
    return i // m.rows * m.outer_row + i % m.rows * m.row


@inline
def column_at(m, j):
    return j // m.cols * m.outer_col + j % m.cols * m.col


@apart
def move_lines(block, step, m, i0, n, j0, length, back):
    """block[i * step + j] = m[i0 + i, j0 + j], or `back`"""
    i, outer, inner = 0, i0 // m.rows, i0 % m.rows
    while i < n:
        some, row = min(n - i, m.rows - inner), outer * m.outer_row + inner * m.row
        o, head, channel = 0, j0 // m.cols, j0 % m.cols
        while o < length:
            run = min(length - o, m.cols - channel)
            move_run(block + (i * step + o), step, m, row + head * m.outer_col + channel * m.col, some, run, back)
            o, head, channel = o + run, head + 1, 0
        i, outer, inner = i + some, outer + 1, 0


@apart
def move_run(block, step, m, x, n, length, back):
    """`move_lines` for a run of rows and columns that are evenly apart; the first element lies at x"""
    lanes = lanes_of(block)
    whole = length // lanes * lanes if m.col == 1 else 0
    for i in range(n):
        here, o = x + i * m.row, i * step
        for t in range(0, whole, lanes):
            if back:
                store(load(block, o + t), m.data, here + t)
            else:
                store(load(m.data, here + t), block, o + t)
        for t in range(whole, length):
            if back:
                m.data[here + t * m.col] = block[o + t]
            else:
                block[o + t] = m.data[here + t * m.col]


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


@apart
def take_left(job, desk, k0, nk):
    """A chunk of left: where it lies, or copied. Returns also the steps to the next k, row and group of rows."""
    left, m = desk.left, job.left
    if job.left_in_place:
        return m.data + (desk.i0 * m.row + k0 * m.col), m.col, m.row, group_of(left) * m.row
    if not job.left_transposed:
        move_lines(left, SUMMED, m, desk.i0, desk.ni, k0, nk, False)
        return left, 1, SUMMED, group_of(left) * SUMMED
    group = group_of(left)
    for i in range(0, desk.ni, group):
        move_lines(left + i * SUMMED, group, m, k0, nk, desk.i0 + i, min(group, desk.ni - i), False)
    return left, group, 1, group * SUMMED


def fill_tiles(vectors: int) -> bool:
    """Do so many vectors fill the tiles that `panel_at` cuts them into? Tiles are COLS or two vectors wide."""
    return vectors >= 2 and (COLS % 2 == 1 or vectors % 2 == 0)


@inline
def panel_at(job, desk, j):
    """How many columns the panel at column j has, and how many it has room for. Four vectors are two times 2, not 3 and
    1, where three fit."""
    lanes = lanes_of(desk.left)
    live = min(desk.nj - j, job.run - (desk.j0 + j) % job.run)
    vectors = (live + lanes - 1) // lanes
    width = (COLS if vectors > 2 and vectors != COLS + 1 else 2) * lanes
    return min(live, width), width


@apart
def take_right(job, desk, j, live, width, k0, nk):
    """A chunk of right, or some rows of it, copied to a panel as wide as a tile."""
    if job.right_transposed:
        copy_transposed(desk.right, width, job.right, desk.j0 + j, live, k0, nk, desk.ones)
    else:
        move_lines(desk.right, width, job.right, k0, nk, desk.j0 + j, live, False)
    if live < width:
        pad(desk.right, width, nk, live)


@inline
def fetch(rows, step, n, width):
    """Ask for n rows of a tile of out: 100,000 rows are multiplied 8 % faster."""
    for r in range(n):
        prefetch(rows, r * step)
        prefetch(rows, r * step + width - 1)


@apart
def fetch_next(job, desk, j, live, k0, nk, t):
    """Ask for row t of what comes next while others are multiplied: of right the panel beside this one, or the first
    one of the next chunk, and of left that chunk. dW of 100,000 rows is made 4 to 15 % faster."""
    k, j = k0 + t, j + live
    if j >= desk.nj:
        k, j = k + nk, 0
        for i in range(0, desk.ni, lanes_of(desk.left)):
            prefetch(job.left.data, k * job.left.row + desk.i0 + i)
    at = k * job.right.row + desk.j0 + j
    prefetch(job.right.data, at)
    prefetch(job.right.data, at + live - 1)


@apart
def multiply_panel(tile, job, desk, left, j, live, k0, nk):
    """Columns j .. of out, as many as the tile has: += the chunk of left times that of right"""
    x, x_next, x_row, x_group = left
    y, width = desk.right, tile_lanes(tile)
    take_right(job, desk, j, live, width, k0, nk)
    if job.wants_sums and desk.i0 == 0:
        add_sums(tile, job.sums + (desk.number * job.J + desk.j0 + j), y, width, nk, live, desk.row)
    group, is_first, step, t = group_of(desk.left), k0 == desk.first and not job.adds, job.task_cols, 0
    out, rows, outer, inner = desk.block + j, desk.ni, 0, 0
    fetches = job.left_transposed and not job.right_transposed
    if job.out_in_place:
        step, rows, outer, inner = job.out.row, job.out.rows, desk.i0 // job.out.rows, desk.i0 % job.out.rows
        out = job.out.data + (desk.number * job.out_step + column_at(job.out, desk.j0 + j))
    source, again = (desk.start + j, 0) if is_first else (out, 1)
    for i in range(0, desk.ni, ROWS):
        at, n = outer * job.out.outer_row + inner * step, min(ROWS, desk.ni - i)
        if job.out_in_place:
            fetch(out + at, step, n, width)
        while fetches and t * desk.ni < i * nk:
            fetch_next(job, desk, j, live, k0, nk, t)
            t += 1
        begin = x + (i // group * x_group + i % group * x_row)
        sum = tile_multiply_add(tile, begin, x_next, x_row, n, y, width, nk)
        before = tile_load(tile, source, at * again, step * again, n)
        tile_store(tile_map(plus, sum, (before,)), out, at, step, n)
        inner += ROWS
        if inner >= rows:
            outer, inner = outer + 1, 0


@apart
def add_near(tile, job, desk, left, t, k, n):
    """desk.chunk += n columns of the chunk of left, from the t-th, times as many rows of right, from the k-th"""
    x, x_next, x_row, x_group = left
    rows, width, group, m = tile_rows(tile), tile_lanes(tile), group_of(desk.left), job.right
    for j in range(0, desk.nj, width):
        y, y_next, live = m.data + (k * m.row + column_at(m, desk.j0) + j), m.row, min(width, desk.nj - j)
        if live < width:
            take_right(job, desk, j, live, width, k, n)
            y, y_next = desk.right, width
        if job.wants_sums:
            add_sums(tile, job.sums + (desk.number * job.J + desk.j0 + j), y, y_next, n, live, desk.row)
        for i in range(0, desk.ni, rows):
            at, some = i * job.task_cols + j, min(rows, desk.ni - i)
            begin = x + (i // group * x_group + i % group * x_row + t * x_next)
            before = tile_load(tile, desk.chunk, at, job.task_cols, some)
            sum = tile_multiply_add(before, begin, x_next, x_row, some, y, y_next, n)
            tile_store(sum, desk.chunk, at, job.task_cols, some)


@apart
def multiply_few(tile, job, desk, left, k0, nk):
    """As `multiply_panel`, for all columns of few rows. Those of right come from memory to be used once: they are read
    as they lie, some whole rows at a time. By panels, as narrow as a tile, 1024 x 1024 channels took 2.6 times as long
    for one row, 1.5 times for four, and 1.1 times for sixteen."""
    lanes, begins = lanes_of(desk.left), k0 == desk.first and not job.adds
    clear(Matrix(desk.chunk, job.task_cols, 1), desk.ni)
    for t in range(0, nk, NEAR):
        add_near(tile, job, desk, left, t, k0 + t, min(NEAR, nk - t))
    for i in range(desk.ni):
        row = desk.block + i * job.task_cols
        for j in range(0, job.task_cols, lanes):
            before = load(desk.start, j) if begins else load(row, j)
            store(load(desk.chunk, i * job.task_cols + j) + before, row, j)


@kernel
def project(job: ProjectionJob, slot, task):
    # task -> some rows by some columns of out, of one part of K
    desk = carve(job, slot, task)
    lanes = lanes_of(desk.left)
    tile, narrow = tile_zeros(desk.left, ROWS, COLS), tile_zeros(desk.left, ROWS, 2)
    for j in range(lanes):
        desk.ones[j] = 1
    # 1. out begins as the bias, or as what it is
    for j in range(job.task_cols):
        desk.start[j] = job.bias[desk.j0 + j] if job.wants_bias and desk.number == 0 and j < desk.nj else 0
    if job.adds and not job.out_in_place:
        move_lines(desk.block, job.task_cols, job.out, desk.i0, desk.ni, desk.j0, desk.nj, False)
    for k0 in range(desk.first, desk.last, SUMMED):
        nk = min(SUMMED, desk.last - k0)
        # 2. a chunk of left; and panel by panel one of right, and their product
        left, j = take_left(job, desk, k0, nk), 0
        if job.few and desk.ni == 1:
            multiply_few(tile_zeros(desk.left, 1, STRIP), job, desk, left, k0, nk)
        elif job.few:
            multiply_few(narrow, job, desk, left, k0, nk)
        while not job.few and j < desk.nj:
            live, width = panel_at(job, desk, j)
            if width == COLS * lanes:
                multiply_panel(tile, job, desk, left, j, live, k0, nk)
            else:
                multiply_panel(narrow, job, desk, left, j, live, k0, nk)
            j += live
    # 3. to where it belongs
    if not job.out_in_place:
        o = job.out
        out = Pairs(o.data + desk.number * job.out_step, o.outer_row, o.row, o.outer_col, o.col, o.rows, o.cols)
        move_lines(desk.block, job.task_cols, out, desk.i0, desk.ni, desk.j0, desk.nj, True)
