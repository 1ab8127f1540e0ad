"""What can go wrong, in the ten kinds of ruvector-attention.

Every kind is an `AttentionError` and the built-in exception it resembles, so both ``except AttentionError`` and
``except ValueError`` work. A message has up to three parts: the sentence of its kind, the shapes aligned under
each other, and a hint that says what to do.

>>> import ruvector_numba as rv
>>> print(rv.InvalidInputError("query and key differ in D", shapes={"query.shape": (2, 8), "key.shape": (2, 4)},
...                         hint="project one of them"))
Invalid input dimensions: query and key differ in D
  query.shape: (2, 8)
  key.shape  : (2, 4)
HINT: project one of them
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

__all__ = [
    "AttentionError",
    "DimensionMismatchError",
    "GraphStructureError",
    "InvalidConfigError",
    "InvalidInputError",
    "InvalidMaskError",
    "MatrixOperationError",
    "NumericalInstabilityError",
    "OutOfMemoryError",
    "SparseMatrixError",
    "TrainingError",
]

Shapes = Mapping[str, object] | None


class AttentionError(Exception):
    """Base of every error this package raises on purpose.

    Parameters
    ----------
    *arguments
        What the sentence of the kind is made from; also ``.args``, which makes the errors picklable.
    shapes : mapping of str to object, optional
        Names and shapes (or any other values), printed one per line.
    hint : str, optional
        What the caller can do about it.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> try:
    ...     rv.set_num_threads(0)
    ... except rv.AttentionError as error:  # or ValueError
    ...     print(type(error).__name__, error.args)
    InvalidInputError ('the number of threads is 0',)
    """

    sentence: ClassVar[str] = "{}"

    def __init__(self, *arguments: object, shapes: Shapes = None, hint: str | None = None) -> None:
        super().__init__(*arguments)
        self.shapes = None if shapes is None else dict(shapes)
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.sentence.format(*self.args) if self.args else ""]
        width = max(map(len, self.shapes), default=0) if self.shapes else 0
        lines += [f"  {name:<{width}}: {value}" for name, value in (self.shapes or {}).items()]
        if self.hint is not None:
            lines.append(f"HINT: {self.hint}")
        return "\n".join(lines)


class DimensionMismatchError(AttentionError, ValueError):
    """Two sizes that must agree do not.

    Parameters
    ----------
    expected, actual : object
        The two sizes or shapes.
    shapes, hint
        As in `AttentionError`.
    """

    sentence = "Dimension mismatch: expected {}, got {}"

    def __init__(self, expected: object, actual: object, *, shapes: Shapes = None, hint: str | None = None) -> None:
        super().__init__(expected, actual, shapes=shapes, hint=hint)
        self.expected = expected
        self.actual = actual


class InvalidConfigError(AttentionError, ValueError):
    """A setting is out of range, or two settings contradict each other.

    Parameters
    ----------
    reason : str
    shapes, hint
        As in `AttentionError`.
    """

    sentence = "Invalid configuration: {}"

    def __init__(self, reason: str, *, shapes: Shapes = None, hint: str | None = None) -> None:
        super().__init__(reason, shapes=shapes, hint=hint)
        self.reason = reason


class MatrixOperationError(AttentionError, ArithmeticError):
    """An operation on matrices could not be carried out. One of the ten kinds, which nothing here raises.

    Parameters
    ----------
    operation : str
    shapes, hint
        As in `AttentionError`.
    """

    sentence = "Matrix operation failed: {}"

    def __init__(self, operation: str, *, shapes: Shapes = None, hint: str | None = None) -> None:
        super().__init__(operation, shapes=shapes, hint=hint)
        self.operation = operation


class InvalidMaskError(AttentionError, ValueError):
    """A mask has the wrong shape, dtype or values.

    Parameters
    ----------
    reason : str
    shapes, hint
        As in `AttentionError`.
    """

    sentence = "Invalid attention mask: {}"

    def __init__(self, reason: str, *, shapes: Shapes = None, hint: str | None = None) -> None:
        super().__init__(reason, shapes=shapes, hint=hint)
        self.reason = reason


class NumericalInstabilityError(AttentionError, ArithmeticError):
    """A result is not finite where it has to be. Nothing here raises it: NaN and infinity are data.

    Parameters
    ----------
    details : str
    shapes, hint
        As in `AttentionError`.
    """

    sentence = "Numerical instability: {}"

    def __init__(self, details: str, *, shapes: Shapes = None, hint: str | None = None) -> None:
        super().__init__(details, shapes=shapes, hint=hint)
        self.details = details


class OutOfMemoryError(AttentionError, MemoryError):
    """`size` bytes were needed at once and are not to be had.

    Parameters
    ----------
    size : int
        In bytes.
    shapes, hint
        As in `AttentionError`.
    """

    sentence = "Out of memory: failed to allocate {} bytes"

    def __init__(self, size: int, *, shapes: Shapes = None, hint: str | None = None) -> None:
        super().__init__(size, shapes=shapes, hint=hint)
        self.size = size


class InvalidInputError(AttentionError, ValueError):
    """An argument is not what it has to be: the rank, dtype or contents of an array, or a number or word.

    Its sentence is that of ruvector-attention, and speaks of dimensions whatever is wrong.

    Parameters
    ----------
    details : str
    shapes, hint
        As in `AttentionError`.
    """

    sentence = "Invalid input dimensions: {}"

    def __init__(self, details: str, *, shapes: Shapes = None, hint: str | None = None) -> None:
        super().__init__(details, shapes=shapes, hint=hint)
        self.details = details


class GraphStructureError(AttentionError, ValueError):
    """A graph is not one: an index out of range, edges that do not fit the nodes.

    Parameters
    ----------
    reason : str
    shapes, hint
        As in `AttentionError`.
    """

    sentence = "Graph structure error: {}"

    def __init__(self, reason: str, *, shapes: Shapes = None, hint: str | None = None) -> None:
        super().__init__(reason, shapes=shapes, hint=hint)
        self.reason = reason


class SparseMatrixError(AttentionError, ValueError):
    """A sparse pattern or matrix is malformed. Nothing here raises it: graphs have GraphStructureError.

    Parameters
    ----------
    reason : str
    shapes, hint
        As in `AttentionError`.
    """

    sentence = "Sparse matrix error: {}"

    def __init__(self, reason: str, *, shapes: Shapes = None, hint: str | None = None) -> None:
        super().__init__(reason, shapes=shapes, hint=hint)
        self.reason = reason


class TrainingError(AttentionError, RuntimeError):
    """A training step was asked for in the wrong order or state.

    Parameters
    ----------
    reason : str
    shapes, hint
        As in `AttentionError`.
    """

    sentence = "Training error: {}"

    def __init__(self, reason: str, *, shapes: Shapes = None, hint: str | None = None) -> None:
        super().__init__(reason, shapes=shapes, hint=hint)
        self.reason = reason
