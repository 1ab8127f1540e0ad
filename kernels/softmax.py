"""The softmax of a stream of scores: exp2, and a bound that is rarely raised.

    s (keys, queries)   scores, then probabilities      shift (queries)   a score near the largest so far, 0 before any
    l (queries)         sums of the probabilities       bound (queries)   shift + headroom: no score may be above it

A probability is 2**(s - shift). The shift need not be the maximum: probabilities may well be above 1. Only when a score
passes the bound does it become the shift, and the past is rescaled; with headroom that is rare (FlashAttention-4 has
the idea). Each query decides for itself, so that its bits never depend on its neighbours.
"""

import math

from .jit import apart, inline
from .simd import (
    at_least,
    nearest,
    polynomial,
    splat,
    tile_column_max,
    tile_map,
    tile_row,
    tile_store,
    times_power_of_two,
    where,
    width_of,
)

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
# Without headroom, data whose largest score comes late (query equal to key) cost 30 % at L=128. The shift itself stays
# at a score: s - shift is then exact where it matters, and would lose 4 bits if the headroom were within it.
HEADROOM = 16.0

# 2**r = 1 + r P(r) on [-1/2, 1/2], P for the least relative error of 2**r (Remez): 2.6e-9 in single precision, 2.1e-8
# once these are float32; 1.9e-17 in double. One term less would do 1.4e-7, all of one sign: on flat weights four times
# the error of the plain formula. P itself is off by 9e-8 and 4.6e-17, which costs tanh some 3 ulp where x is small.
SINGLE = (
    0.6931472149680279, 0.24022652782887738, 0.055503105510137972, 0.0096176929729930623, 0.0013406643902351759,
    0.00015594678161326619,
)  # fmt: skip
DOUBLE = (
    0.69314718055994530797, 0.2402265069591007114, 0.055504108664821733751, 0.009618129107628561243,
    0.0013333558146381738154, 0.00015403530393171834663, 0.000015252733864845099229, 1.321548700340765072e-6,
    1.0178047531180677829e-7, 7.0548148367630282563e-9, 4.4572393137403012724e-10, 2.5855238444590038444e-11,
)  # fmt: skip
_ONE_SINGLE, _ONE_DOUBLE = (1.0, *SINGLE), (1.0, *DOUBLE)  # 2**r itself, exactly 1 at 0
_LOWEST_SINGLE, _LOWEST_DOUBLE = (-127.0,), (-1023.0,)  # where the exponent's bits run out, and the result is 0


@inline
def exp2(x):
    """2**x for x <= HEADROOM: exactly 1 at 0, exactly 0 from the lowest exponent down (-inf too), NaN for NaN.

    Subnormal results are something between 0 and the least normal number, not 2**x: as weights they count for nothing.
    """
    x = at_least(x, polynomial(x, _LOWEST_SINGLE, _LOWEST_DOUBLE))
    whole = nearest(x)
    return times_power_of_two(polynomial(x - whole, _ONE_SINGLE, _ONE_DOUBLE), whole)


@inline
def probability(s, shift, unit):
    """2**(s - shift), of scores in base 2 (unit None) or e**(s - shift), of natural ones (unit is log2(e))."""
    if unit is None:
        return exp2(s - shift)
    return exp2((s - shift) * splat(s, unit))


@inline
def times(x, y):
    return x * y


@inline
def plus(x, y):
    return x + y


@inline
def scaled(x, factor):
    return x * splat(x, factor)


@inline
def headroom_of(packed, unit):
    """In the unit of the scores. 0 where probabilities are rounded to bfloat16: that of the largest score is 1 then,
    and stays so. With headroom it was off by 2**-9, and queries that attend to one key got gradients of 0.19 where 0.01
    is the largest."""
    if packed is not None:
        return 0.0
    return HEADROOM if unit is None else HEADROOM * LN2


@inline
def _raised(before, top, headroom):
    return where(top > before, top + splat(top, headroom), before)


@inline
def _chosen(shift, before, top):
    return where(top > before, top, shift)


@inline
def _fade(before, top, shift, chosen, unit):
    """What the past is worth under the new shift: exactly 1 for the queries that keep theirs, 0 if there was none."""
    one, past = splat(before, 1.0), before > splat(before, -math.inf)
    return where(top > before, where(past, probability(shift, chosen, unit), splat(before, 0.0)), one)


@inline
def _scale_rows(like, x, n, factor):
    """x[row, :] *= factor for n rows, as wide as the tile `like`"""
    width = width_of(x)
    for row in range(n):
        tile_store(tile_map(times, tile_row(like, x, row * width), (factor,)), x, row * width, width, 1)


@inline
def _rounding(total, part, sum, lost):
    return lost + ((total - sum) + part)


@apart
def add_to_total(like, l, is_long):
    """l[0] += l[1], and of a long row what that loses goes into l[2]: over 100,000 keys the sum had 9 times the error
    of NumPy's. Of a row of 128 keys it would be 1 % of the time."""
    width = width_of(l)
    total, part = tile_row(like, l, 0), tile_row(like, l, width)
    sum = tile_map(plus, total, (part,))
    if is_long:
        lost = tile_row(like, l, 2 * width)
        tile_store(tile_map(_rounding, total, (part, sum, lost)), l, 2 * width, width, 1)
    tile_store(sum, l, 0, width, 1)


@apart
def raise_bound(tile, like, bound, shift, l, s, seen, out, Dv, headroom, unit):
    """Queries with a score in the tile above their bound get a new one; what they have summed so far is rescaled.

    That is the three rows of l (past chunks, this chunk, what their sum lost), the `seen` rows of s that wait for their
    product with the values, and the Dv rows of out.
    """
    width = width_of(l)
    before = tile_row(like, bound, 0)
    top, old = tile_column_max(tile, before), tile_row(like, shift, 0)
    new = tile_map(_chosen, old, (before, top))
    factor = tile_map(_fade, before, (top, old, new, unit))
    tile_store(new, shift, 0, width, 1)
    tile_store(tile_map(_raised, before, (top, headroom)), bound, 0, width, 1)
    _scale_rows(like, l, 3, factor)
    _scale_rows(like, s, seen, factor)
    _scale_rows(like, out, Dv, factor)
