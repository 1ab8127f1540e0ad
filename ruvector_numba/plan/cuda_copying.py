"""How copies and fills on a GPU are cut into blocks of threads (kernels/cuda/copying.py)."""

from __future__ import annotations

from ..kernels.cuda.copying import Variant
from ..kernels.cuda.jit import SIMULATED

__all__ = ["fill_grid", "pack_blocks", "variant"]

MOST_BLOCKS, MOST_FOR_EACH = 1024, 64  # of threads, which go round: for all of an array, and for each of many matrices


def variant(element: str, inverted: bool = False) -> Variant:
    return Variant(element, 32 if SIMULATED else 256, inverted=inverted)


def pack_blocks(v: Variant, numbers: int) -> int:
    """Blocks for each matrix of so many numbers."""
    return max(1, min(MOST_FOR_EACH, -(-numbers // v.threads)))


def fill_grid(v: Variant, numbers: int) -> tuple[int, int, int]:
    return min(MOST_BLOCKS, -(-numbers // v.threads)), 1, 1
