"""How projections on a GPU are cut into blocks of threads, and how they read and write (kernels/cuda/projection.py)."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from ..arrays import Shape
from ..kernels.cuda.jit import SIMULATED
from ..kernels.cuda.projection import COLS, Variant
from ..kernels.cuda.projection_halves import STEP
from .strides import Sides, sides

__all__ = ["Layout", "Plan", "plan"]

# Sums over rows are cut into parts of at least PART, only as many as have room in so many numbers: dW = x^T dy of a
# graph's 100,000 nodes is one small matrix, which would otherwise be one block's work.
PART, ROOM = 512, 1 << 22
MOST_PARTS = 65_535  # they lie along a grid's axis y, which ends there


class Layout(NamedTuple):
    """A matrix of pairs: (outer rows, rows, outer columns, columns); strides in elements."""

    shape: Shape
    strides: tuple[int, ...]
    aligned: int  # how many elements can be read at once where it begins: 1, 4 or 8


class Plan(NamedTuple):
    variant: Variant
    halves: bool  # through the tensor cores
    left: Sides
    right: Sides
    out: Sides
    left_by_rows: int
    right_by_rows: int
    I: int
    J: int
    K: int
    line: int
    part: int
    parts: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return -(-self.I // self.variant.threads) * -(-self.J // COLS), self.parts, 1

    @property
    def join(self) -> Variant:
        """One for all that is joined."""
        return Variant(self.variant.element, 64 if SIMULATED else 128, True, False, True, False, 1)

    @property
    def join_grid(self) -> tuple[int, int, int]:
        return max(1, -(-max(self.I * self.line, self.J) // self.join.threads)), 1, 1


@functools.lru_cache(512)
def plan(element: str, left: Layout, right: Layout, out: Layout, over_rows: bool) -> Plan:
    """The product of left (I, K) and right (K, J); `over_rows` says that K counts rows, as in dW = x^T dy."""
    I, J, K = (math.prod(shape) for shape in (out.shape[:2], out.shape[2:], left.shape[2:]))
    line, part = -(-J // 4) * 4, max(K, 1)
    if over_rows:
        count = min(MOST_PARTS, max(1, ROOM // max(1, I * line)))
        part = max(64 if SIMULATED else PART, -(-K // count))
        part = -(-part // STEP) * STEP
    count = max(1, -(-K // part))
    made = [sides(x.shape, x.strides, least=1) for x in (left, right, out)]
    by_rows = [int(x.strides[3] == 1 or x.strides[1] != 1) for x in (left, right)]
    wide = all(_lie_by(4, x, s, n) for x, s, n in zip((left, right), made, by_rows, strict=False))
    eights = all(_lie_by(8, x, s, n) for x, s, n in zip((left, right), made, by_rows, strict=False))
    paired = any(s.rows < x.shape[0] * x.shape[1] or s.cols < x.shape[2] * x.shape[3]
                 for x, s in zip((left, right), made, strict=False))  # fmt: skip
    threads = 64 if SIMULATED or I <= 64 else 128
    cut = count > 1 or not _lie_by(4, out, made[2], 1)
    resident = (3 if wide and not over_rows else 2) * 128 // threads  # as the registers allow
    variant = Variant(element, threads, wide, paired, cut, over_rows, resident)
    halves = element != "float32" and eights
    if halves:
        sides_by_rows = dict(left_rows=bool(by_rows[0]), right_rows=bool(by_rows[1]))
        variant = variant._replace(resident=2 * 128 // threads, **sides_by_rows)
    return Plan(variant, halves, made[0], made[1], made[2], by_rows[0], by_rows[1], I, J, K, line, part, count)


def _lie_by(n: int, x: Layout, sides: Sides, by_rows: int) -> bool:
    """Do neighbours lie side by side, in aligned fours or eights?"""
    near, count = (sides.col, sides.cols) if by_rows else (sides.row, sides.rows)
    axis = 3 if by_rows else 1
    others = [stride for a, stride in enumerate(x.strides) if a != axis and x.shape[a] > 1]
    return x.aligned >= n and near == 1 and count % n == 0 and all(stride % n == 0 for stride in others)
