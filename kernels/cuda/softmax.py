"""The online softmax (Milakov and Gimelshein, 2018) of a warp's rows of scores in base 2."""

import functools
import math

from numba import types

from . import instructions as gpu
from .jit import device
from .tiles import cell
from .warps import adding

INF = math.inf
across, exp2, larger = gpu.across, gpu.exp2, gpu.larger


@functools.cache
def softmax(slots, blocks, wide):
    """exponentials(s, o, top, total): s = 2**(s - top) of the new top, and o and total rescaled to it;
    join(total): the sums over the four lanes that share a row."""
    joined, float32 = adding(4), types.float32

    @device
    def exponentials(s, o, top, total):
        for r in range(slots):
            best = top[r]
            for b in range(blocks):
                n = cell(r, b, blocks)
                best = larger(best, larger(s[n], s[n + 1]))
            best = larger(best, across(best, 1))
            best = larger(best, across(best, 2))
            shift = best if best > -INF else float32(0)  # where nothing is seen: 2**(-inf - 0) = 0, not NaN
            factor, part = exp2(top[r] - shift), float32(0)
            top[r] = best
            for b in range(blocks):
                for e in range(2):
                    n = cell(r, b, blocks) + e
                    s[n] = exp2(s[n] - shift)
                    part += s[n]
            total[r] = total[r] * factor + part
            for c in range(wide):
                n = cell(r, c, wide)
                o[n] *= factor
                o[n + 1] *= factor

    @device
    def join(total):
        for r in range(slots):
            total[r] = joined(total[r])

    return exponentials, join
