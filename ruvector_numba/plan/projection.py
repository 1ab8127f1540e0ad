"""From the layouts of a projection's matrices to a job for its kernel (kernels/projection.py)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array, Shape
from ..kernels import projection as kernels
from ..kernels.projection import Pairs
from ..kernels.simd import target
from . import team
from .layouts import Layout, Ready
from .strides import sides

# Of out, what one task makes: each reads its rows of `left` and columns of `right` once, so large tasks read less. With
# 384 x 384 for 192 x 384, and `left` where it lies, layers of 512 and 768 are multiplied 1.03 to 1.07 times as fast
# (Zen 3; 576 x 384 and 384 x 768 gain nothing more, and dW loses a fifth). Small ones where large ones would not fill
# the threads.
TASKS = ((384, 384), (192, 384), (192, 192), (96, 128), (48, 64))
# Sums as long as LONG are cut into parts that tasks do side by side: dW = x^T dy of a graph's 100,000 nodes is one
# small matrix, and was one task. Only as many as have room in so many elements: a large matrix has tasks enough.
LONG, PART, ROOM = 1 << 14, 1 << 12, 1 << 20
# `left` is read where it lies if its rows are as short as SHORT, or columns to multiply them to as many as WIDE. Else
# it is copied: few columns wait for memory at each new row (100,000 rows, 64 columns: 5 %).
SHORT, WIDE = 128, 128
# Up to so many rows, `right` is read where it lies: by as few tasks as fill the threads, of so many columns at least,
# for memory gives long runs faster (1 x 768 by 768 x 768 takes 1.1 times as long by four tasks as by two).
FEW_ROWS, FEW_COLS = 16, 256


def parts(left: Array, out: Array) -> int:
    """Into how many parts the sums are cut: by shapes alone, as it shows in the last bits."""
    K = left.shape[2] * left.shape[3]
    return 1 if K < LONG else max(1, min(-(-K // PART), ROOM // out.size))


def product(left: Array, right: Array, out: Array, wants_bias: bool, wants_sums: bool, adds: bool) -> Ready:
    """out = left right, or +=, of pairs for rows and pairs for columns; or each part of the sums a matrix of out."""
    parts, one = (len(out), out[0]) if out.ndim == 5 else (1, out)
    layouts = left.shape, left.strides, right.shape, right.strides, one.shape, one.strides
    return _plan(out.dtype, *layouts, parts, wants_bias, wants_sums, adds, team.threads())


@functools.lru_cache(512)
def _plan(
    dtype: np.dtype[Any],
    left_shape: Shape,
    left_strides: Shape,
    right_shape: Shape,
    right_strides: Shape,
    out_shape: Shape,
    out_strides: Shape,
    parts: int,
    wants_bias: bool,
    wants_sums: bool,
    adds: bool,
    threads: int,  # the sizes of tasks change no bit
) -> Ready:
    itemsize = dtype.itemsize
    width, lanes = target().width(itemsize), target().lanes(itemsize)
    out = Pairs("out", *sides(out_shape, out_strides, itemsize))
    left, left_transposed = _lines("left", Layout(left_shape, left_strides), itemsize)
    right, right_transposed = _lines("right", Layout(right_shape, right_strides), itemsize)
    I, J, K = (a * b for a, b in (out_shape[:2], out_shape[2:], left_shape[2:]))
    few = _is_few(right, I, J, K, lanes) and not right_transposed
    if few:
        cut = Tasks(I, _few_cols(J, right.cols, threads, kernels.STRIP * lanes), 0)
    else:
        cut = _tasks(I, J, _run(out, I, J, -(-K // (kernels.SUMMED * parts)), lanes), 4 * threads / parts, width, lanes)
    plain = not left_transposed and left.col == 1 and (left.rows, left.cols) == (I, K)
    scratch = kernels.scratch_elements(cut.rows, cut.cols, width, lanes)
    job = kernels.ProjectionJob(
        left=left, right=right, out=out, bias="bias", sums="sums",
        left_transposed=left_transposed, right_transposed=right_transposed,
        left_in_place=int(plain and (K <= SHORT or J >= WIDE)), few=int(few),
        out_in_place=int(cut.run > 0), run=cut.run or J,
        wants_bias=int(wants_bias), wants_sums=int(wants_sums), adds=int(adds), I=I, J=J, K=K,
        part=_evenly(max(K, 1), -(-max(K, 1) // parts), kernels.SUMMED), out_step=I * J,
        task_rows=cut.rows, task_cols=cut.cols, scratch="scratch", scratch_step=scratch,
    )  # fmt: skip
    launch = kernels.project.prepare(job, cut.number(I, J) * parts, dtype, I * J * K)
    return Ready(launch, team.scratch(scratch, dtype))


class Tasks(NamedTuple):
    """How out is cut: rows and columns of one task, and columns that no tile goes beyond; 0 for all, via a block."""

    rows: int
    cols: int
    run: int

    def number(self, I: int, J: int) -> int:
        return -(-I // self.rows) * -(-J // self.cols)


def _tasks(I: int, J: int, run: int, wanted: float, width: int, lanes: int) -> Tasks:
    """The largest of which there are as many as wanted, else the smallest."""
    for most in TASKS:
        rows, cols = _evenly(I, most[0], target().rows), _evenly(J, most[1], width if run in (0, J) else run)
        if Tasks(rows, cols, run).number(I, J) >= wanted:
            break
    rest = ((J - 1) % cols + 1) // lanes  # vectors that are left for the last task
    return Tasks(rows, cols, run if kernels.fill_tiles(rest) else 0)


def _is_few(right: Pairs, I: int, J: int, K: int, lanes: int) -> bool:
    """Are rows so few that `right`, which each of them needs once, is read where it lies? Whatever the number of
    threads, for sums of columns are made by other pieces then: their last bits differ."""
    fits = right.cols == J or right.cols % (kernels.STRIP * lanes) == 0
    return I <= FEW_ROWS and right.col == 1 and right.rows == K and fits


def _run(out: Pairs, I: int, J: int, chunks: int, lanes: int) -> int:
    """How many columns of out lie side by side, if tiles can be written there: they fill these, and a tile's rows are
    evenly apart. Else 0.

    A graph's 100,000 rows of 64 or 128 are multiplied 1.2 to 1.3 times as fast so: they are written while others are
    computed. To sums of several chunks the next one comes back: where heads are few vectors wide, which makes narrow
    tiles, a block near the core is 2 to 4 % faster.
    """
    run = min(out.cols, J)
    fits = out.col == 1 and run % lanes == 0 and kernels.fill_tiles(run // lanes) and (chunks == 1 or run == J)
    return run if fits and (out.rows >= I or out.rows % target().rows == 0) else 0


def _few_cols(J: int, run: int, threads: int, unit: int) -> int:
    """Columns of one task where rows are few. Of several matrices side by side, no task goes beyond one."""
    if run == J:
        return _evenly(J, max(FEW_COLS, -(-J // threads)), unit)
    cols = _evenly(run, max(FEW_COLS, -(-J // (2 * threads))), unit)
    return cols if run % cols == 0 else run


def _evenly(n: int, most: int, unit: int) -> int:
    """The size of parts of n, as few and as even as can be, whole units each."""
    part = -(-n // -(-n // most))
    return -(-part // unit) * unit


def _lines(name: str, layout: Layout, itemsize: int) -> tuple[Pairs, int]:
    """The matrix, or its transpose if its rows are the axis that lies contiguous; 1 if so."""
    if layout.strides[3] != itemsize and layout.strides[1] == itemsize:
        swapped = Layout(*((x[2], x[3], x[0], x[1]) for x in layout))
        return Pairs(name, *sides(*swapped, itemsize)), 1
    return Pairs(name, *sides(*layout, itemsize)), 0
