"""What happens to a score between q.k and the softmax, and to its gradient on the way back.

    s = scale * q.k  ->  softcap: cap * tanh(s / cap)  ->  + bias  - slope * |position - key|  ->  mask  ->  softmax

Optional terms are None and vanish when the kernel is compiled. Bias and mask arrays come as one block, additive[key,
query], in which -inf hides. A hidden score is -inf whatever it was: selected, never multiplied, so NaN stays hidden.
"""

import math
from typing import NamedTuple

import numpy as np

from .jit import apart, inline
from .jobs import Bytes, Indices
from .simd import (
    absolute,
    at_least,
    fma,
    nearest,
    polynomial,
    prefetch,
    splat,
    tile_load,
    tile_shown,
    times_power_of_two,
    where,
)
from .softmax import DOUBLE, SINGLE

INF = math.inf
AHEAD = 128  # keys, one chunk


class ByteMatrices(NamedTuple):
    """As `tiles.Matrices`, of bytes: a boolean mask."""

    data: Bytes
    at: Indices
    row: int
    col: int


class Dropout(NamedTuple):
    """A weight is kept where its 32 random bits are at least `threshold`, and then multiplied by `gain`."""

    seed: int
    threshold: int
    gain: float


_LARGEST = 21.0  # from there on tanh is 1 to the last bit of a double
# 2 log2(e) as two numbers whose sum is nearly exact. Rounding the product with |x| once would cost tanh its last two
# bits where it bends, and what a softcap gives is large.
_HIGH_SINGLE, _HIGH_DOUBLE = (2.885390043258667,), (2.8853900817779268,)
_LOW_SINGLE, _LOW_DOUBLE = (3.851926e-08,), (4.0710547481862066e-17,)


@apart
def tanh(x):
    """From u = e**-2|x| - 1, formed without the 1, so that small x lose 3 ulp at most: tanh(|x|) = -u / (u + 2)."""
    high, low = polynomial(x, _HIGH_SINGLE, _HIGH_DOUBLE), polynomial(x, _LOW_SINGLE, _LOW_DOUBLE)
    zero, one = splat(x, 0.0), splat(x, 1.0)
    y = at_least(zero - absolute(x), splat(x, -_LARGEST))
    whole = nearest(y * high)
    r = fma(y, low, fma(y, high, zero - whole))
    power = times_power_of_two(one, whole)
    u = fma(r * polynomial(r, SINGLE, DOUBLE), power, power - one)
    t = (zero - u) / (u + splat(x, 2.0))
    return where(x < zero, zero - t, t)


@apart
def capped(s, softcap):
    """cap * tanh(s / cap)"""
    return splat(s, softcap) * tanh(s / splat(s, softcap))


@inline
def cap_slope(s, softcap):
    """The derivative of the cap where it gave s: 1 - tanh**2"""
    t = s / splat(s, softcap)
    return splat(s, 1.0) - t * t


@apart
def slope_of(slopes, head):
    """The slope of a head, 0 where there are none."""
    if slopes is None:
        return 0.0
    return slopes[head]


@inline
def sloped(s, slope, position, key):
    """s - slope * |position - key|: ALiBi"""
    return s - splat(s, slope) * absolute(position - key)


@inline
def biased(s, additive):
    """s + additive, but -inf hides whatever s was"""
    return where(additive <= splat(s, -INF), additive, s + additive)


@inline
def biased_gradient(ds, additive):
    return where(additive <= splat(ds, -INF), splat(ds, 0.0), ds)


@inline
def visible(s, lo, hi, key):
    """The score, or -inf where the key is outside lo <= key < hi."""
    return where((key >= lo) & (key < hi), s, splat(s, -INF))


@inline
def visible_gradient(ds, lo, hi, key):
    return where((key >= lo) & (key < hi), ds, splat(ds, 0.0))


# --- bias and mask arrays -------------------------------------------------------------------------------------------
@inline
def lies_in_rows(m):
    """Are the columns of a matrix side by side? Of one that is absent too."""
    return m is None or m.col == 1


@apart
def bias_of(square, bias, head, row, rows, key):
    """As many queries and keys as the tile has rows and lanes, or 0 if there is no bias. Those of the next chunk are
    asked for: 1000 keys go 3 % faster."""
    if bias is None:
        return square
    at = bias.at[head] + row * bias.row + key
    for r in range(rows):
        prefetch(bias.data, at + r * bias.row + AHEAD)
    return tile_load(square, bias.data, at, bias.row, rows)


@apart
def masked(tile, mask, head, row, rows, key):
    """-inf where the mask says so"""
    if mask is None:
        return tile
    return tile_shown(tile, mask.data, mask.at[head] + row * mask.row + key, mask.row, rows, -INF)


@apart
def stage_bias(stage, lanes, bias, head, row, rows, key, keys):
    """stage[r, c] = bias[row + r, key + c], or 0 if there is none"""
    for r in range(rows):
        if bias is None:
            for c in range(lanes):
                stage[r * lanes + c] = 0
        else:
            source = bias.data + (bias.at[head] + (row + r) * bias.row + key * bias.col)
            for c in range(keys):
                stage[r * lanes + c] = source[c * bias.col]


@apart
def stage_mask(stage, lanes, mask, head, row, rows, key, keys):
    """stage[r, c] = -inf where mask[row + r, key + c] is False"""
    if mask is not None:
        for r in range(rows):
            source = mask.data + (mask.at[head] + (row + r) * mask.row + key * mask.col)
            for c in range(keys):
                stage[r * lanes + c] = stage[r * lanes + c] if source[c * mask.col] else -INF


# --- dropout --------------------------------------------------------------------------------------------------------
@inline
def mixed(x):
    """A 64-bit finaliser (splitmix64): every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@apart
def draw_dice(dice, width, dropout, head, q0):
    """Two words for each query of the block, from (seed, head, query) alone: no state, so any order gives the same."""
    if dropout is not None:
        for i in range(width):
            x = mixed(np.uint64(dropout.seed) + np.uint64(head) * np.uint64(0x9E3779B97F4A7C15))
            x = mixed(x + np.uint64(q0 + i) * np.uint64(0xD1B54A32D192ED03))
            dice[i], dice[width + i] = np.uint32(x & np.uint64(0xFFFFFFFF)), np.uint32(x >> np.uint64(32))


@apart
def dropped(p, dice, more_dice, key, threshold, gain):
    """p * gain where the 32 bits drawn for (query, key) are at least the threshold, else 0."""
    x = key * splat(key, 0x9E3779B1) ^ dice
    x = (x ^ (x >> splat(x, 16))) * splat(x, 0x7FEB352D) ^ more_dice
    x = (x ^ (x >> splat(x, 15))) * splat(x, 0x846CA68B)
    x = x ^ (x >> splat(x, 16))
    return where(x >= splat(x, threshold), p * splat(p, gain), splat(p, 0.0))
