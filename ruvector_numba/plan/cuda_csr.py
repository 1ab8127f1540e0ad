"""How attention over neighbours is dealt out on a GPU: lanes to channels, groups of lanes to nodes, parts to hubs."""

from __future__ import annotations

import functools
from typing import NamedTuple

from ..kernels.cuda.jit import SIMULATED, WARP, Flat
from ..kernels.cuda.walk import DOT, GIVEN, JOINT, SUM, Variant

__all__ = [
    "DOT",
    "GIVEN",
    "JOINT",
    "MOST",
    "PART",
    "SUM",
    "WIDEST",
    "Options",
    "adding",
    "blocks",
    "by_columns",
    "by_threads",
    "by_warps",
    "flat",
    "fold",
    "for_prepare",
    "for_targets",
    "grid",
    "rounds",
    "variant",
]

# A node of more than MOST edges is a hub, cut into parts of about PART: the last group to be done is not late by more.
MOST, PART = (9, 4) if SIMULATED else (256, 128)
BLOCKS = 3 if SIMULATED else 2048  # that leave a row of sums, at most
WIDEST = 512  # channels of a head: what the lanes of a warp have registers for


Grid = tuple[int, int, int]


class Options(NamedTuple):
    """Which terms there are: see `Variant` of the kernels."""

    edge: bool
    bias: bool
    edge_value: bool
    shares: bool
    maximum: bool
    normalizes: bool


@functools.lru_cache(256)
def variant(element: str, rule: int, H: int, width: int, wide: bool, options: Options) -> Variant:
    """For H heads whose rows have at most `width` channels; `wide` says that all rows lie in aligned fours."""
    lanes = min(32, _power(-(-max(width, 1) // 4)))
    fours = -(-max(width, 1) // (4 * lanes))
    heads = min(_power(max(H, 1)), 32 // lanes)
    threads = 32 if SIMULATED else 128
    is_plain = fours == 1 and not (options.edge or options.bias or options.edge_value or options.maximum)
    return Variant(element, rule, lanes, heads, fours, wide, threads, 4 if is_plain else 2, *options)  # by registers


def for_prepare(v: Variant) -> Variant:
    """What the kernel `prepare` looks at: one for all rules and terms."""
    terms = dict(edge=False, bias=False, edge_value=False, shares=False, maximum=False)
    return v._replace(rule=DOT, resident=4, **terms)


def for_targets(v: Variant) -> Variant:
    """What `backward_targets` looks at."""
    return v._replace(edge_value=False, shares=False, maximum=False, normalizes=True)


def rounds(v: Variant, items: int) -> int:
    """How many items a group does where what it sums is kept, so that there are few rows of sums."""
    return max(1, -(-items // (v.groups * BLOCKS)))


def blocks(v: Variant, items: int, each: int) -> int:
    return -(-items // (v.groups * each))


def adding(element: str) -> Flat:
    """The kernel that adds up rows of sums."""
    return Flat(element, 64 if SIMULATED else 1024)


def flat(element: str) -> Flat:
    """Kernels that give each thread a number, or each warp a node."""
    return Flat(element, 32 if SIMULATED else 256)


def fold(element: str) -> Flat:
    return Flat(element, 32 if SIMULATED else 128)


# --- grids -----------------------------------------------------------------------------------------------------------
def grid(v: Variant, items: int, each: int, H: int) -> Grid:
    """All items, so many for each group of lanes, and all heads."""
    return blocks(v, items, each), -(-H // v.heads), 1


def by_threads(v: Flat, numbers: int) -> Grid:
    """A thread for each number."""
    return max(1, -(-numbers // v.threads)), 1, 1


def by_warps(v: Flat, nodes: int) -> Grid:
    """A warp for each node."""
    return -(-nodes // (v.threads // WARP)), 1, 1


def by_columns(columns: int) -> Grid:
    """A block for as many columns as a warp has lanes."""
    return -(-columns // WARP), 1, 1


def _power(n: int) -> int:
    """The least power of 2 that is not less."""
    return 1 << (n - 1).bit_length()
