"""Every kind of error: its sentence, its shapes, its hint, what else it is, and that it survives pickling."""

import copy
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ruvector_numba import errors

KINDS = [
    (errors.DimensionMismatchError, (64, 32), "Dimension mismatch: expected 64, got 32", ValueError),
    (errors.InvalidConfigError, ("d_model is 0",), "Invalid configuration: d_model is 0", ValueError),
    (errors.MatrixOperationError, ("inverse",), "Matrix operation failed: inverse", ArithmeticError),
    (errors.InvalidMaskError, ("too wide",), "Invalid attention mask: too wide", ValueError),
    (errors.NumericalInstabilityError, ("lse is NaN",), "Numerical instability: lse is NaN", ArithmeticError),
    (errors.OutOfMemoryError, (1 << 40,), "Out of memory: failed to allocate 1099511627776 bytes", MemoryError),
    (errors.InvalidInputError, ("rank 1",), "Invalid input dimensions: rank 1", ValueError),
    (errors.GraphStructureError, ("node 9 of 5",), "Graph structure error: node 9 of 5", ValueError),
    (errors.SparseMatrixError, ("indptr falls",), "Sparse matrix error: indptr falls", ValueError),
    (errors.TrainingError, ("no cache",), "Training error: no cache", RuntimeError),
]
FIELDS = {
    errors.DimensionMismatchError: ("expected", "actual"),
    errors.MatrixOperationError: ("operation",),
    errors.NumericalInstabilityError: ("details",),
    errors.OutOfMemoryError: ("size",),
    errors.InvalidInputError: ("details",),
}
SHAPES = {"query.shape": (2, 8), "key.shape": (2, 4)}
kinds = pytest.mark.parametrize(("kind", "arguments", "sentence", "builtin"), KINDS)


def test_there_are_ten_kinds():
    assert {kind for kind, *_ in KINDS} == set(errors.AttentionError.__subclasses__())
    assert {kind.__name__ for kind, *_ in KINDS} | {"AttentionError"} == set(errors.__all__)


@kinds
def test_sentence_and_kind(kind, arguments, sentence, builtin):
    error = kind(*arguments)
    assert str(error) == sentence
    assert isinstance(error, errors.AttentionError) and isinstance(error, builtin)
    assert error.args == arguments and error.shapes is None and error.hint is None
    for field, value in zip(FIELDS.get(kind, ("reason",)), arguments, strict=True):
        assert getattr(error, field) == value


@kinds
def test_arguments_by_name(kind, arguments, sentence, builtin):
    fields = FIELDS.get(kind, ("reason",))
    assert str(kind(**dict(zip(fields, arguments, strict=True)))) == sentence


@kinds
def test_shapes_are_aligned_and_the_hint_is_last(kind, arguments, sentence, builtin):
    error = kind(*arguments, shapes=SHAPES, hint="do this")
    assert str(error) == f"{sentence}\n  query.shape: (2, 8)\n  key.shape  : (2, 4)\nHINT: do this"
    assert error.shapes == SHAPES and error.hint == "do this"


@kinds
def test_shapes_or_hint_alone(kind, arguments, sentence, builtin):
    assert str(kind(*arguments, shapes={"Lk": 3})) == f"{sentence}\n  Lk: 3"
    assert str(kind(*arguments, shapes={})) == sentence
    assert str(kind(*arguments, hint="do this")) == f"{sentence}\nHINT: do this"


@kinds
@pytest.mark.parametrize("travel", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
def test_survives_pickling_and_copying(kind, arguments, sentence, builtin, travel):
    error = kind(*arguments, shapes=SHAPES, hint="do this")
    arrived = travel(error)
    assert type(arrived) is kind and str(arrived) == str(error)
    assert arrived.args == error.args and vars(arrived) == vars(error)


@kinds
def test_shapes_and_hint_are_named(kind, arguments, sentence, builtin):
    with pytest.raises(TypeError):
        kind(*arguments, SHAPES, "do this")


@kinds
def test_is_caught_by_either_name(kind, arguments, sentence, builtin):
    for name in (errors.AttentionError, builtin):
        with pytest.raises(name) as caught:
            raise kind(*arguments)
        assert str(caught.value) == sentence


def test_shapes_are_copied():
    shapes = {"query.shape": (2, 8)}
    error = errors.InvalidInputError("rank", shapes=shapes)
    shapes["key.shape"] = (1,)
    assert error.shapes == {"query.shape": (2, 8)}


def test_base_takes_a_sentence():
    error = errors.AttentionError("something", shapes={"a": 1}, hint="try")
    assert str(error) == "something\n  a: 1\nHINT: try"
    assert str(errors.AttentionError()) == ""


@settings(deadline=None)
@given(st.text(), st.dictionaries(st.text("abcdefgh.", min_size=1), st.integers()))
def test_any_text_is_printed_as_it_is(reason, shapes):
    """Braces and percent signs too."""
    first, *rest = (
        str(errors.InvalidMaskError(reason, shapes=shapes)).removeprefix("Invalid attention mask: ").split("\n")
    )
    assert "\n".join([first, *rest]).startswith(reason)
    colons = {line.index(": ") for line in rest[len(rest) - len(shapes) :]}
    assert len(colons) <= 1
