"""How the gate of a graph transformer is cut into blocks of threads on a GPU (kernels/cuda/gate.py)."""

from __future__ import annotations

from ..kernels.cuda.jit import SIMULATED, WARP, Flat

__all__ = ["grid", "variant"]


def variant(element: str) -> Flat:
    return Flat(element, 32 if SIMULATED else 128)


def grid(v: Flat, rows: int) -> tuple[int, int, int]:
    """A warp for a row."""
    return -(-rows // (v.threads // WARP)), 1, 1
