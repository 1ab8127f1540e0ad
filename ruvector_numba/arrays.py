"""What every floor calls an array and a shape: a file that imports nothing of the library."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

__all__ = ["Array", "Shape"]

Array = NDArray[Any]
Shape = tuple[int, ...]
