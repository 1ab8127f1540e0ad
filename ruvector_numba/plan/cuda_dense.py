"""Which tiles the GPU's dense kernels take, and how the work is cut into blocks of threads.

Measured on an H200, bfloat16, 4096 queries and keys, in TFLOP/s of the products that are made:

    forward, D = 64     keys 64: tall 2 240, tall 1 198; keys 32: tall 2 203, tall 1 168; keys 128: tall 1 222
    forward, D = 128    keys 64: tall 1 249; keys 32: tall 1 193; keys 128: 174
    to_query, D = 64    keys 32, tall 2 320; keys 64, tall 1 251        D = 128    keys 32, tall 1 280
    to_key, D = 64      keys 64 254; keys 32 on three blocks 189, tall 2 186
    to_key, D = 128     keys 32 182 (it spills 250 bytes); keys 16 169; nothing held 108
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from ..kernels.cuda.blocks import Variant
from ..kernels.cuda.dense_backward import ROWS_OF_A_WARP
from ..kernels.cuda.jit import SIMULATED, WARP
from ..kernels.cuda.scoring import MOST_SCORES

FEW_ROWS = 64  # so many queries of one key head's group at most are packed into one block, and their keys cut
SPLIT_KEYS = 256  # at least so many in a part: 64 blocks of one warp for one sequence of 16384 keys
MOST_SPLITS = 128
WIDTHS = (32, 64, 128, 256)
MOST_ALONG_Y = 65_535  # blocks of threads in a grid; along z too, along x 2**31 - 1

Grid = tuple[int, int, int]

# keys in a tile, tall, blocks on a multiprocessor, left factors held in registers
_HALVES = {
    "forward": {32: (64, 2, 2, 2), 64: (64, 2, 2, 2), 128: (64, 1, 2, 2), 256: (32, 1, 1, 0)},
    "to_query": {32: (32, 2, 2, 2), 64: (32, 2, 2, 2), 128: (32, 1, 2, 2), 256: (16, 1, 1, 0)},
    "to_key": {32: (64, 1, 2, 2), 64: (64, 1, 2, 2), 128: (32, 1, 2, 2), 256: (16, 1, 1, 0)},
}
_FLOATS = {
    "forward": {32: (32, 1, 2, 0), 64: (32, 1, 2, 0), 128: (16, 1, 1, 0), 256: (16, 1, 1, 0)},
    "to_query": {32: (32, 1, 2, 0), 64: (32, 1, 2, 0), 128: (16, 1, 1, 0), 256: (8, 1, 1, 0)},
    "to_key": {32: (16, 1, 2, 0), 64: (16, 1, 2, 0), 128: (16, 1, 1, 0), 256: (8, 1, 1, 0)},
}


class HasTerms(NamedTuple):
    """Which terms a score has."""

    softcap: bool
    slopes: bool
    bias: bool
    mask: bool
    dropout: bool


def width(D: int) -> int | None:
    """The kernels' width for D channels; None if there is none."""
    return next((w for w in WIDTHS if w >= D), None)


@functools.lru_cache(256)
def variant(kernel: str, element: str, channels: int, terms: HasTerms) -> Variant:
    """The variant of a kernel: "forward", "to_query" or "to_key"."""
    table = _FLOATS if element == "float32" else _HALVES
    keys, tall, resident, hold = table[kernel][channels]
    if any(terms):  # they need registers of their own: what is larger spills some 300 bytes
        keys, tall = keys if kernel == "forward" else min(keys, 32), 1
    found = Variant(element, channels, keys, tall, 128, resident, hold, *terms)
    assert found.scores <= MOST_SCORES, found
    return simulated(found) if SIMULATED else found


def simulated(v: Variant) -> Variant:
    """One warp and small tiles: the simulator's threads are Python's."""
    smallest = 8 if v.element == "float32" else 16
    return v._replace(threads=32, keys=max(smallest, min(16, v.keys)), tall=1)


class Split(NamedTuple):
    heads: int  # packed into one block
    splits: int
    split_keys: int


def split(Lq: int, Lk: int, group: int) -> Split:
    """How the work of few queries is cut: it depends on the sizes of one head alone, never on the batch."""
    rows, least = Lq * group, 32 if SIMULATED else SPLIT_KEYS
    if rows > FEW_ROWS or Lk < 2 * least:
        return Split(1, 1, Lk)
    keys = max(least, -(-Lk // MOST_SPLITS // 64) * 64)
    return Split(group, -(-Lk // keys), keys)


def packed(v: Variant, rows: int) -> Variant:
    """The forward kernel for few rows: as many warps as they need, 16 rows in each."""
    return v._replace(packed=True, tall=1, threads=32 * -(-rows // 16), resident=1)


def merging(element: str, channels: int) -> Variant:
    """The kernel that joins the parts; two warps on the simulator, for they do not share their work as lanes do."""
    return Variant(element, channels, 0, 1, 64 if SIMULATED else 128)


def preparing(element: str, channels: int) -> Variant:
    """The kernel that finds shift, inverse and delta of each query."""
    return Variant(element, channels, 0, 1, 32 if SIMULATED else 128)


def in_pairs(element: str, terms: HasTerms) -> Variant:
    """The kernels that have an entry for each pair of a query and a key."""
    return Variant(element, 0, 0, 1, 32 if SIMULATED else 128, 1, 0, *terms)


def makes(channels: int) -> tuple[str, ...]:
    """The passes of `to_key`: two where the registers do not hold both gradients."""
    return ("both",) if channels < 256 else ("key", "value")


# --- grids ---------------------------------------------------------------------------------------------------------
def grid(rows: int, of_block: int, matrices: int, splits: int = 1) -> Grid:
    """Blocks of the rows of so many heads, as `head_of_block` of the kernels knows them: along y and, behind its end,
    along z, where the parts of the keys are too."""
    layers = max(1, -(-matrices // MOST_ALONG_Y))
    return -(-rows // of_block), -(-matrices // layers), layers * splits


def prepare_grid(v: Variant, Lq: int, matrices: int) -> Grid:
    return grid(Lq, v.threads // WARP * ROWS_OF_A_WARP, matrices)


def merge_grid(Lq: int, matrices: int) -> Grid:
    """A block for each query, of which there are at most FEW_ROWS where keys are cut."""
    return matrices, Lq, 1


def weights_grid(v: Variant, Lk: int, rows: int) -> Grid:
    """A thread for each key of so many rows of weights."""
    return -(-Lk // v.threads) * rows, 1, 1


def bias_grid(v: Variant, entries: int, matrices: int) -> Grid:
    """A warp for each entry of a matrix of the bias."""
    return -(-entries // (v.threads // WARP)) * matrices, 1, 1


__all__ = [
    "Grid", "HasTerms", "Split", "bias_grid", "grid", "in_pairs", "makes", "merge_grid", "merging", "packed",
    "prepare_grid", "preparing", "simulated", "split", "variant", "weights_grid", "width",
]  # fmt: skip
