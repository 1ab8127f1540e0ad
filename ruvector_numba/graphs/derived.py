"""Names of what is derived from a graph and kept with it; see `CSRGraph.derived`."""

from __future__ import annotations

from typing import Generic, TypeVar

__all__ = ["Derived"]

_T = TypeVar("_T")


class Derived(Generic[_T]):
    """A kind of thing that `CSRGraph.derived` keeps, of type _T; a constant of the module that makes such things."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"Derived({self.name!r})"
