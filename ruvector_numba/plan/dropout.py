"""How dropout is told to kernels, whichever draw 32 bits for each weight."""

from __future__ import annotations

__all__ = ["threshold_and_gain"]


def threshold_and_gain(p: float) -> tuple[int, float]:
    """Keep a weight where its bits are at least the first, and multiply it by the second then.

    The threshold has 32 bits as well: from p = 1 - 2**-33 on it would be one more, and 0 in kernels.
    """
    return min(round(p * 2**32), 2**32 - 1), 1 / (1 - p) if p < 1 else 0.0
