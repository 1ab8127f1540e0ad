"""What the lanes of a warp make together."""

import functools

from . import instructions as gpu
from .jit import WARP, device

across = gpu.across


@functools.cache
def adding(lanes=WARP):
    """joined(x): the sum over so many neighbouring lanes, a power of 2, in each of them."""
    STEPS = lanes.bit_length() - 1

    @device
    def joined(x):
        for b in range(STEPS):
            x += across(x, 1 << b)
        return x

    return joined
