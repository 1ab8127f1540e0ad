"""The most that one thread can do: multiply-adds on values that stay in registers.

The innermost loop is that of every product in this package, `tile_multiply_add`, on the same few elements over and
over: no other kernel can be faster than this one.
"""

import math
import time
from typing import NamedTuple

import numpy as np

from .jit import Launch, kernel
from .jobs import Elements
from .simd import target, tile_load, tile_multiply_add, tile_store, tile_zeros, width_of

ROWS, COLS = target().rows, target().cols
_STEPS = 1 << 20  # take some 10 ms


class PeakJob(NamedTuple):
    half: Elements  # (1)
    ones: Elements  # (COLS * lanes)
    tile: Elements  # (ROWS, COLS * lanes): chains of multiply-adds, enough of them to hide the latency of one
    steps: int


@kernel
def peak(job: PeakJob, slot, task):
    # Every row gets the same, but begins with what LLVM cannot know: else one row would do for all.
    tile = tile_load(tile_zeros(job.tile, ROWS, COLS), job.tile, 0, width_of(job.tile), ROWS)
    tile = tile_multiply_add(tile, job.half, 0, 0, ROWS, job.ones, 0, job.steps)
    tile_store(tile, job.tile, 0, width_of(job.tile), ROWS)


def prepare(dtype: np.dtype, steps: int) -> tuple[Launch, np.ndarray]:
    """Something to call, and the tile of ones to which each call adds 1/2 so many times."""
    width = target().width(dtype.itemsize)
    tile = np.ones((ROWS, width), dtype)
    return peak.prepare(PeakJob(np.full(1, 0.5, dtype), np.ones(width, dtype), tile, steps), 1, dtype), tile


def measure(dtype: np.dtype, seconds: float) -> float:
    """GFLOP/s of one thread, the best of as many calls as fit into the time."""
    launch, tile = prepare(dtype, _STEPS)
    best, end = math.inf, time.perf_counter() + seconds
    while math.isinf(best) or time.perf_counter() < end:
        began = time.perf_counter()
        launch()
        best = min(best, time.perf_counter() - began)
    return 2 * tile.size * _STEPS / best / 1e9
