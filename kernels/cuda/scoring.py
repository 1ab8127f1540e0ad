"""What happens to a score between q.k and the softmax, and to its gradient on the way back; one score at a time.

The terms and their order are those of the CPU's scoring.py. A variant says which of them there are; those that are not
there vanish when the kernel is compiled.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from numba import types

from . import instructions as gpu
from .jit import Bytes, Elements, Floats, Indices, device
from .tiles import widen

LOG2E, LN2 = math.log2(math.e), math.log(2)
INF = math.inf
exp2 = gpu.exp2


class Terms(NamedTuple):
    """Arrays and numbers of the terms; what a variant lacks is not looked at."""

    scale: float  # times log2(e) where no term needs natural units
    cap: float
    slopes: Floats  # (B * H)
    bias: Elements
    bias_at: Indices  # (B * H): where a head's matrix begins
    bias_row: int
    bias_col: int
    mask: Bytes
    mask_at: Indices
    mask_row: int
    mask_col: int
    offset: int  # ALiBi: query i stands at i + offset
    seed: int
    threshold: int  # a weight is kept where its 32 random bits are at least this, and then multiplied by `gain`
    gain: float


class Sight(NamedTuple):
    """Query i sees key j where first <= j - i < last and limits[i] lets it."""

    limits: Indices  # (B, Lq, 2): lo, hi
    limits_batch: int
    limits_row: int
    first: int
    last: int


@device
def sees_from(sight, batch, i):
    """The first key that query i sees"""
    return types.int32(max(i + sight.first, sight.limits[batch * sight.limits_batch + i * sight.limits_row]))


@device
def sees_to(sight, batch, i):
    """One past the last"""
    return types.int32(min(i + sight.last, sight.limits[batch * sight.limits_batch + i * sight.limits_row + 1]))


# --- softcap -------------------------------------------------------------------------------------------------------
ONE, TWO, QUARTER = (np.float32(x) for x in (1, 2, 1 / 4))
SERIES = tuple(np.float32(x) for x in (-1 / 3, 2 / 15, -17 / 315, 62 / 2835))  # of tanh: of x**3, x**5, x**7, x**9


@device
def tanh(x):
    """From e**2x, or where that would cancel from its series; the two meet within 1e-7 at 1/4."""
    y, size = x * x, abs(x)
    small = x * (ONE + y * (SERIES[0] + y * (SERIES[1] + y * (SERIES[2] + y * SERIES[3]))))
    large = ONE - TWO / (ONE + exp2(types.float32(2 * LOG2E) * size))
    return small if size < QUARTER else math.copysign(large, x)


# --- dropout -------------------------------------------------------------------------------------------------------
_LOW = 0xFFFFFFFF


@device
def mixed(x):
    """A 64-bit finaliser (splitmix64), as the CPU's."""
    x = (x ^ (x >> types.uint64(30))) * types.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> types.uint64(27))) * types.uint64(0x94D049BB133111EB)
    return x ^ (x >> types.uint64(31))


@device
def dice(seed, head, i):
    """64 random bits for a query, of which every key's 32 are made; the CPU's."""
    x = mixed(types.uint64(seed) + types.uint64(head) * types.uint64(0x9E3779B97F4A7C15))
    return mixed(x + types.uint64(i) * types.uint64(0xD1B54A32D192ED03))


@device
def kept(thrown, j, threshold):
    """Is the weight of key j kept? All in the low 32 bits."""
    low, high = types.int64(thrown & types.uint64(_LOW)), types.int64(thrown >> types.uint64(32))
    x = (types.int64(j) * 0x9E3779B1 & _LOW) ^ low
    x = ((x ^ (x >> 16)) * 0x7FEB352D & _LOW) ^ high
    x = (x ^ (x >> 15)) * 0x846CA68B & _LOW
    return (x ^ (x >> 16)) >= threshold


# --- one score -------------------------------------------------------------------------------------------------------
@functools.cache
def scoring(element, softcap, slopes, bias, mask):
    """score(terms, s, slope, head, i, j, there): in base 2, -inf where bias or mask hide. Is `there` such a
    pair?
    slope_of_cap(terms, s): the derivative of the softcap."""
    widened = widen(element)
    natural = softcap or slopes or bias

    @device
    def score(terms, s, slope, head, i, j, there):
        s = s * types.float32(terms.scale)
        if softcap:
            s = types.float32(terms.cap) * tanh(s / types.float32(terms.cap))
        if bias and there:
            x = widened(terms.bias[terms.bias_at[head] + i * terms.bias_row + j * terms.bias_col])
            s = types.float32(-INF) if x == -INF else s + x
        if slopes:
            s = s - slope * types.float32(abs(i + terms.offset - j))
        if natural:
            s = s * types.float32(LOG2E)
        if mask and there:
            if terms.mask[terms.mask_at[head] + i * terms.mask_row + j * terms.mask_col] == 0:
                s = types.float32(-INF)
        return s

    @device
    def slope_of_cap(terms, s):
        """1 - tanh**2, from q.k"""
        t = tanh(s * types.float32(terms.scale) / types.float32(terms.cap))
        return ONE - t * t

    return score, slope_of_cap


MOST_SCORES = 64  # of a lane: what `hidden_bits` has bits for


@device
def hidden_bits(s, n):
    """Bit i says that score i is hidden; at most MOST_SCORES of them."""
    bits = types.int64(0)
    for i in range(n):
        if s[i] == -INF:
            bits |= types.int64(1) << i
    return bits
