"""Named arrays in a safetensors file: numbers and a header of text, never code.

Source of the format: https://huggingface.co/docs/safetensors. Eight bytes give the length of the header, which is JSON:
for each array its dtype, shape and place, and under ``__metadata__`` texts by name. The arrays' bytes follow.
"""

from __future__ import annotations

import contextlib
import json
import math
import operator
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, TypeVar

import numpy as np

from . import generators
from .arrays import Array, Shape
from .errors import DimensionMismatchError, InvalidConfigError, InvalidInputError

T = TypeVar("T")

HEADER_LIMIT = 1 << 20  # bytes; those of a layer are some hundreds
ITEM_SIZES = {"F32": 4, "F64": 8}
OURS = "load takes what save wrote"


def write(path: str | os.PathLike[str], arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write contiguous arrays and texts, whole or not at all; follows links, and keeps what is no file.

    Raises
    ------
    InvalidInputError
        If `path` is none, cannot be written, or has the name of an archive of NumPy.
    InvalidConfigError
        If safetensors is not installed.
    """
    library, end = _library(), place(path)
    if end.lower().endswith(".npz"):
        hint = "name it .safetensors; an .npz is written by numpy.savez(path, **layer.parameters)"
        raise InvalidInputError(f"{path} would be a safetensors file under the name of an archive of NumPy", hint=hint)
    data = library.save(dict(arrays), metadata=dict(metadata))
    replace(end, lambda file: file.write(data))


def replace(path: str, fill: Callable[[BinaryIO], object]) -> None:
    """Write the file at this `place` in one step, once `fill` has written all of it; else leave it as it was."""
    draft = os.path.join(os.path.dirname(path), f".{secrets.token_hex(8)}.tmp")
    try:
        with open(draft, "xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        hint = "is the folder there, and may you write to it?"
        raise InvalidInputError(f"cannot write {path}: {error.strerror or error}", hint=hint) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(draft)  # gone already unless something failed


def read(
    path: str | os.PathLike[str], shapes: Mapping[str, Shape], check: Callable[[dict[str, str]], None]
) -> dict[str, Array]:
    """Read the arrays of these names and shapes, in this order; nothing is believed that was not checked.

    Parameters
    ----------
    path : path
        The file.
    shapes : mapping of str to tuple
        Exactly what arrays there must be. They bound what is read, whatever the file says.
    check : callable
        Gets the texts of the header, before any array is read; raises if they do not fit.

    Raises
    ------
    InvalidInputError
        If there is no such file, it is damaged or no safetensors file, or the names, dtypes or numbers are wrong.
    DimensionMismatchError
        If an array has another shape.
    InvalidConfigError
        If safetensors is not installed.
    """
    library = _library()
    with _opened(path) as file:
        start, header, metadata = _header(path, file)
        check(metadata)
        size = _check_entries(path, header, shapes)
        data = file.read(size + 1)
    _check_size(path, len(data), size)
    try:
        arrays = library.load(start + data)
    except Exception as error:  # whatever a library makes of what it cannot read
        raise _damaged(path, str(error)[:500]) from error
    for name, x in arrays.items():
        if not np.isfinite(x).all():
            raise InvalidInputError(f"{path}: {name} is not finite", hint="the layer was saved after it had diverged")
    return {name: arrays[name] for name in shapes}


def described(path: str | os.PathLike[str], kind: str, make: Callable[[dict[str, str]], T]) -> T:
    """The object of this kind that the header of a file describes.

    Whoever wrote the header chose what `make` gets to see, so whatever it raises says that the header is no good. An
    object that draws more numbers than there can be in the file is not the one that the file holds.

    Raises
    ------
    InvalidInputError
        As in `read`.
    InvalidConfigError
        If `make` cannot make the object.
    """
    with _opened(path) as file:
        start, header, texts = _header(path, file)
        size = os.fstat(file.fileno()).st_size - len(start)
    _check_size(path, size, _claimed(path, header))
    try:
        with generators.at_most(size // min(ITEM_SIZES.values())):
            return make(texts)
    except Exception as error:
        hint = f"give a file that {kind}.save wrote, with the arrays of these settings"
        raise InvalidConfigError(f"{path} describes no {kind}", hint=hint) from error


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    try:
        with open(place(path), "rb") as file:
            yield file
    except OSError as error:
        raise InvalidInputError(f"cannot read {path}: {error.strerror}", hint="is the path right?") from error


def _library() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        hint = 'pip install ".[files]", in a clone of ruvector-numba'
        raise InvalidConfigError("to save and load, the package safetensors is needed", hint=hint) from error
    return safetensors.numpy


def place(path: object, example: str = "layer.safetensors") -> str:
    """Where a path leads, links followed: a file, or nothing yet. A number would be taken for an open file."""
    if not isinstance(path, str | os.PathLike):
        raise InvalidInputError(f"path is a {type(path).__name__}", hint="give a str or a pathlib.Path")
    try:
        end = os.path.realpath(os.fsdecode(path))
    except ValueError as error:
        raise InvalidInputError(f"path is {os.fsdecode(path)!r}: {error}", hint="give the path of a file") from None
    if os.path.exists(end) and not os.path.isfile(end):
        raise InvalidInputError(f"{end} is not a file", hint=f"give the path of a file, such as {example}")
    return end


def _damaged(path: object, what: str) -> InvalidInputError:
    return InvalidInputError(f"{path} is damaged, or no safetensors file: {what}", hint=OURS)


def _header(path: object, file: BinaryIO) -> tuple[bytes, dict[str, Any], dict[str, str]]:
    """The bytes up to the arrays, and in them what is said of each array and the texts."""
    length = file.read(8)
    size = int.from_bytes(length, "little")
    if length.startswith(b"PK\x03\x04"):
        hint = "of an .npz that numpy.savez wrote: layer.set_parameters(numpy.load(path))"
        raise InvalidInputError(f"{path} is a zip archive, no safetensors file", hint=hint)
    if len(length) < 8 or size > HEADER_LIMIT:
        raise _damaged(path, "it has no header" if len(length) < 8 else f"its header would have {size} bytes")
    text = file.read(size)
    if len(text) < size:
        raise _damaged(path, "its header ends early")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    texts = header.pop("__metadata__", {})
    if not isinstance(texts, dict) or not all(isinstance(x, str) for x in texts.values()):
        raise _damaged(path, "its metadata are not texts by name")
    return length + text, header, texts


def _claimed(path: object, header: dict[str, Any]) -> int:
    """How many bytes the arrays take, by what a header says of their places."""
    try:
        return max((operator.index(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (KeyError, IndexError, TypeError):
        raise _damaged(path, "it does not say where its arrays are") from None


def _check_size(path: object, size: int, wanted: int) -> None:
    """Are there as many bytes behind the header as the arrays take?"""
    if size != wanted:
        missing = f"{wanted - size} bytes are missing at its end"
        raise _damaged(path, missing if size < wanted else "more follows its arrays")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) < len(pairs):
        double = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"{double[:100]!r} is there twice")
    return named


def _check_entries(path: object, header: dict[str, Any], shapes: Mapping[str, Shape]) -> int:
    """How many bytes the arrays take, if they are the ones wanted. Their places are the library's to check."""
    if set(header) != set(shapes):
        names = {"in the file": ", ".join(header)[:500] or "none", "expected": ", ".join(shapes) or "none"}
        raise InvalidInputError(f"{path} holds other arrays", shapes=names, hint=OURS)
    dtypes = set()
    for name, shape in shapes.items():
        entry = header[name]
        if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
            raise _damaged(path, f"what it says of {name} makes no sense")
        theirs = tuple(entry["shape"])
        if theirs != shape:
            both = {f"{name} in {path}": str(theirs)[:500], "expected": shape}
            raise DimensionMismatchError(shape, str(theirs)[:500], shapes=both, hint=OURS)
        dtypes.add(str(entry.get("dtype"))[:20])
    if len(dtypes) > 1 or not dtypes <= set(ITEM_SIZES):
        hint = "cast the arrays to one of them before they are saved"
        raise InvalidInputError(f"{path} is {' and '.join(sorted(dtypes))}, neither F32 nor F64", hint=hint)
    return sum(map(math.prod, shapes.values())) * (ITEM_SIZES[dtypes.pop()] if dtypes else 0)
