"""SIMD values for Numba: pointers, vectors, register tiles. The only package that knows LLVM.

    Pointer   where elements lie; p[i], p[i] = x and p + n count in elements
    Vector    one register of elements; + - * / and the functions of `values`
    Mask      one truth value per lane; & and |
    Tile      rows x cols vectors: accumulators that live in registers
    Job       a kernel's arguments: a struct behind one pointer, read as attributes

To Numba all are ordinary values, so a kernel on them is plain Python: loops, and names from the paper. Addresses are
formed with `getelementptr` only (LLVM 22 miscompiles integer pointer arithmetic). Under NUMBA_BOUNDSCHECK=1 a pointer
carries the bounds of its array and every access is checked against them: slow, and the strongest test there is of the
promise to touch no byte outside an array.
"""

from .jobs import POINTER_SLOTS, call, draw, either, given, unless
from .kinds import ARITHMETIC, JobType, MaskType, PointerType, TileType, VectorType, bfloat16
from .target import CHECKED, Halves, Target, halves, target
from .tile import (
    row_sums,
    tile_column,
    tile_column_max,
    tile_column_sum,
    tile_exceeds,
    tile_lanes,
    tile_load,
    tile_map,
    tile_rank1,
    tile_row,
    tile_rows,
    tile_steps,
    tile_store,
    tile_zeros,
    transpose_square,
)
from .values import (
    absolute,
    as_bfloat16,
    as_indices,
    as_words,
    at_least,
    fma,
    given_words,
    lane_max,
    lane_sum,
    lanes_from,
    lanes_of,
    load,
    load_live,
    nearest,
    per_lane,
    polynomial,
    prefetch,
    splat,
    store,
    store_live,
    times_power_of_two,
    where,
    width_of,
    zipped,
    zipped_rows,
)

__all__ = [
    "ARITHMETIC",
    "CHECKED",
    "Halves",
    "JobType",
    "MaskType",
    "POINTER_SLOTS",
    "PointerType",
    "Target",
    "TileType",
    "VectorType",
    "absolute",
    "as_bfloat16",
    "as_indices",
    "as_words",
    "at_least",
    "bfloat16",
    "call",
    "draw",
    "either",
    "fma",
    "given",
    "given_words",
    "halves",
    "lane_max",
    "lane_sum",
    "lanes_from",
    "lanes_of",
    "load",
    "load_live",
    "nearest",
    "per_lane",
    "polynomial",
    "prefetch",
    "row_sums",
    "splat",
    "store",
    "store_live",
    "target",
    "tile_column",
    "tile_column_max",
    "tile_column_sum",
    "tile_exceeds",
    "tile_lanes",
    "tile_load",
    "tile_map",
    "tile_rank1",
    "tile_row",
    "tile_rows",
    "tile_steps",
    "tile_store",
    "tile_zeros",
    "times_power_of_two",
    "transpose_square",
    "unless",
    "where",
    "width_of",
    "zipped",
    "zipped_rows",
]
