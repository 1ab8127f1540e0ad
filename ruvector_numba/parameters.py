"""The parameters of a layer: one immutable set of named arrays, and what every layer that has one can do with it.

A set never changes; a layer that learns gets another one, in one assignment. So a thread that reads while another
trains sees a whole set, the old or the new, and waits for nobody. Writers wait for each other.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from . import files, gpu
from .arrays import Array, Shape
from .checks import FLOATS, floats
from .errors import DimensionMismatchError, InvalidConfigError, InvalidInputError, TrainingError
from .values import real_number, shown

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ParameterSet", "Trainable"]

TO_CHANGE = "to change one, layer.set_parameters({{**layer.parameters, {!r}: x}})"

_writer = threading.RLock()  # one for all layers: a lock of its own would keep a layer from being pickled


def _renew_lock() -> None:
    """In a forked child: whoever held the lock is not there to let it go."""
    global _writer
    _writer = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class ParameterSet(Mapping[str, Array]):
    """Named arrays that never change: read-only views of one flat array, in the order of the mapping.

    Parameters
    ----------
    arrays : mapping of str to array_like
        Finite, of any shapes, all float32 or all float64; they are copied. Lists become float64.

    Raises
    ------
    InvalidInputError
        If a name is not a str, an array is neither float32 nor float64, or they differ in dtype.
    TrainingError
        If a number is NaN or infinite.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> layer = rv.ParameterSet({"w": np.ones((2, 3)), "b": np.zeros(3)})
    >>> layer
    ParameterSet(float64, 9 numbers: w (2, 3), b (3,))
    >>> layer["w"].shape, layer.flat.shape
    ((2, 3), (9,))
    >>> layer.with_flat(np.arange(9.0))["b"]
    array([6., 7., 8.])
    """

    __slots__ = ("_casts", "_flat", "_shapes", "_views", "copies")

    _flat: Array
    _shapes: dict[str, Shape]
    _views: dict[str, Array]
    _casts: dict[np.dtype[Any], ParameterSet]
    copies: dict[Any, Any]  # those on a GPU, which live as long as this does

    def __init__(self, arrays: Mapping[str, ArrayLike]) -> None:
        hint = 'give names and arrays: {"w": w, "b": b}'
        if not isinstance(arrays, Mapping):
            raise InvalidInputError(f"parameters are a {type(arrays).__name__}, not a mapping", hint=hint)
        for name in arrays:
            if not isinstance(name, str):
                raise InvalidInputError(f"parameter names must be str, got {name!r}", hint=hint)
        given = {name: floats(name, x, "x") for name, x in arrays.items()}
        dtypes = {f"{name}.dtype": x.dtype for name, x in given.items()}
        if len(set(dtypes.values())) > 1:
            raise InvalidInputError("parameters differ in dtype", shapes=dtypes, hint="cast them to one")
        flat = np.concatenate([x.ravel() for x in given.values()]) if given else np.empty(0, np.float32)
        self._adopt(flat, {name: x.shape for name, x in given.items()})

    def _adopt(self, flat: Array, shapes: dict[str, Shape]) -> None:
        """Take over `flat`, which nobody else may write to."""
        flat.flags.writeable = False
        self._flat, self._shapes, self._views, self._casts, self.copies = flat, shapes, {}, {}, {}
        start = 0
        for name, shape in shapes.items():
            end = start + math.prod(shape)
            self._views[name] = flat[start:end].reshape(shape)
            start = end
        if not np.isfinite(flat).all():
            name = next(name for name, x in self._views.items() if not np.isfinite(x).all())
            hint = f"give finite numbers that fit {flat.dtype}; in training, lower the learning rate or clip gradients"
            raise TrainingError(f"parameter {name!r} is not finite", hint=hint)

    @classmethod
    def _of(cls, flat: Array, shapes: dict[str, Shape]) -> ParameterSet:
        self = object.__new__(cls)
        self._adopt(flat, shapes)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return ParameterSet._of, (self._flat, self._shapes)

    # Views are handed out afresh: an array's own shape could be assigned to.
    def __getitem__(self, name: str) -> Array:
        return self._views[name].view()

    def __setitem__(self, name: str, x: object) -> NoReturn:
        raise InvalidInputError(f"{name!r} is in a set of parameters, which never changes", hint=TO_CHANGE.format(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __eq__(self, other: object) -> bool:
        """Whether names and their order, shapes, dtype and all numbers are the same."""
        if not isinstance(other, ParameterSet):
            return NotImplemented
        same = list(self._shapes.items()) == list(other._shapes.items()) and self.dtype == other.dtype
        return same and np.array_equal(self._flat, other._flat)

    __hash__ = None  # type: ignore[assignment]  # equal by value, as arrays are

    def __repr__(self) -> str:
        names = ", ".join(f"{name} {shape}" for name, shape in self._shapes.items())
        return f"ParameterSet({self.dtype}, {self._flat.size} numbers{': ' if names else ''}{names})"

    @property
    def flat(self) -> Array:
        """All numbers, in order, as a read-only array of one axis."""
        return self._flat.view()

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32 or float64."""
        return self._flat.dtype

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of each array, by name."""
        return dict(self._shapes)

    def with_flat(self, flat: ArrayLike) -> ParameterSet:
        """A set of the same names and shapes with other numbers.

        Parameters
        ----------
        flat : array_like (n,)
            float32 or float64, which the new set keeps; copied. A list becomes float64.

        Raises
        ------
        InvalidConfigError, InvalidInputError
            If there are more or fewer numbers than in this set; if `flat` has other than one axis, or another dtype.
        TrainingError
            If a number is NaN or infinite.
        """
        array = floats("flat", flat, "x")
        if array.ndim != 1:
            hint = "give all parameters in one axis: flat.ravel()"
            raise InvalidInputError(f"flat has {array.ndim} axes", shapes={"flat.shape": array.shape}, hint=hint)
        if array.size != self._flat.size:
            hint = "get_parameters() has the right length and order: " + ", ".join(self)
            raise InvalidConfigError(f"Expected {self._flat.size} parameters, got {array.size}", hint=hint)
        return self._of(array.copy(), self._shapes)

    def as_type(self, dtype: DTypeLike) -> ParameterSet:
        """This set in float32 or float64: itself if it is that already, else a copy that is made only once.

        Parameters
        ----------
        dtype : float32 or float64

        Raises
        ------
        InvalidInputError, TrainingError
            If `dtype` is another; if a number is too large for float32.
        """
        try:
            wanted = np.dtype(dtype)
        except TypeError as error:
            raise InvalidInputError(f"dtype is {dtype!r}: {error}", hint="give float32 or float64") from None
        if wanted not in FLOATS:
            raise InvalidInputError(f"dtype is {wanted}, not float32 or float64", hint="give one of these")
        if wanted == self.dtype:
            return self
        if wanted not in self._casts:
            with np.errstate(over="ignore"):
                cast = self._of(self._flat.astype(wanted), self._shapes)
            self._casts.setdefault(wanted, cast)
        return self._casts[wanted]


class Trainable:
    """What every layer with parameters can do. A layer sets `self._parameters`, a `ParameterSet`, when it is made.

    Whatever is refused changes nothing.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> class Line(rv.Trainable):
    ...     def __init__(self):
    ...         self._parameters = rv.ParameterSet({"slope": np.zeros(1), "height": np.zeros(1)})
    ...     def gradients(self, x, y):  # of the mean squared error
    ...         error = self.parameters["slope"] * x + self.parameters["height"] - y
    ...         return {"slope": [np.mean(2 * error * x)], "height": [np.mean(2 * error)]}
    >>> line, x = Line(), np.linspace(-1, 1, 20)
    >>> for _ in range(200):
    ...     line.zero_grad()
    ...     for part in x[:10], x[10:]:  # micro-batches
    ...         line.accumulate(line.gradients(part, 3 * part + 1))
    ...     line.update_parameters(line.mean_gradients(), learning_rate=0.1)
    >>> line.get_parameters().round(3), line.parameter_count()
    (array([3., 1.]), 2)
    """

    _parameters: ParameterSet
    _accumulated: tuple[int, Mapping[str, Array]] = (0, MappingProxyType({}))  # how many gradients, float64 sums

    def _change(self, change: Callable[[ParameterSet], ParameterSet]) -> None:
        """Swap the parameters for what `change` makes of them, with no other writer in between."""
        with _writer:
            self._parameters = change(self._parameters)

    @property
    def parameters(self) -> ParameterSet:
        """The parameters as they are now. The set stays what it is when the layer learns."""
        return self._parameters

    @parameters.setter
    def parameters(self, _: object) -> NoReturn:
        raise InvalidInputError("parameters cannot be assigned to", hint="layer.set_parameters(x) replaces them")

    def parameter_count(self) -> int:
        """How many numbers the parameters are."""
        return self._parameters.flat.size

    def get_parameters(self) -> Array:
        """A copy of all parameters, (parameter_count(),), in the order of `parameters`."""
        return self._parameters.flat.copy()

    def set_parameters(self, parameters: ArrayLike | Mapping[str, ArrayLike]) -> None:
        """Replace all parameters.

        Parameters
        ----------
        parameters : array_like (parameter_count(),) or mapping of str to array_like
            Flat, in the order of `get_parameters`, or every array by its name. float32 or float64; the layer's
            parameters have this dtype from then on. Copied.

        Raises
        ------
        InvalidConfigError, DimensionMismatchError
            If a flat array has the wrong length; if a named array has the wrong shape.
        InvalidInputError
            If a name is missing or unknown, or a dtype or the number of axes is wrong.
        TrainingError
            If a number is NaN or infinite.
        """
        if not isinstance(parameters, Mapping):
            new = self._parameters.with_flat(parameters)  # of shapes, which never change: no need to lock
        else:
            shapes = self._parameters.shapes
            if set(parameters) != set(shapes):
                names = {"given": ", ".join(map(str, parameters)), "expected": ", ".join(shapes)}
                known = next((name for name in shapes if name in parameters), "name")
                hint = "give each by its name; " + TO_CHANGE.format(known)
                raise InvalidInputError("the parameters have other names", shapes=names, hint=hint)
            new = ParameterSet({name: parameters[name] for name in shapes})
            for name, shape in shapes.items():
                if new[name].shape != shape:
                    wrong = {f"{name}.shape": new[name].shape, "expected": shape}
                    raise DimensionMismatchError(shape, new[name].shape, shapes=wrong, hint=f"reshape {name}")
        self._change(lambda _: new)

    def update_parameters(self, gradients: object, learning_rate: float) -> None:
        """One step of gradient descent: every parameter p becomes p - learning_rate * dp, in its own dtype.

        Parameters
        ----------
        gradients : mapping of str to array_like, or an object whose `parameters` is one, as what `backward` returns
            Cast to the dtype of the parameters. A name that is missing, or has None, leaves its parameter as it is.
        learning_rate : float

        Raises
        ------
        TrainingError
            If a gradient is NaN or infinite, has a wrong shape or dtype or an unknown name, if the learning rate is no
            finite number, or if a parameter would be infinite.
        """
        rate = _finite_number("learning_rate", learning_rate, "update_parameters(gradients, learning_rate)")

        def descend(parameters: ParameterSet) -> ParameterSet:
            named = fitting_gradients(parameters, gradients)
            with np.errstate(over="ignore", invalid="ignore"):
                return ParameterSet({n: p - rate * named[n] if n in named else p for n, p in parameters.items()})

        self._change(descend)

    def accumulate(self, gradients: object) -> None:
        """Add the gradients of one micro-batch to those since `zero_grad`. Sums are kept in float64.

        Parameters
        ----------
        gradients
            As in `update_parameters`.

        Raises
        ------
        TrainingError
            If `update_parameters` would refuse the gradients.
        """
        with _writer:
            count, sums = self._accumulated
            named = fitting_gradients(self._parameters, gradients)
            added = {n: np.asarray(sums.get(n, 0) + np.asarray(g, np.float64)) for n, g in named.items()}
            self._accumulated = (count + 1, {**sums, **added})

    def mean_gradients(self) -> dict[str, Array]:
        """The mean over all micro-batches since `zero_grad`.

        Returns
        -------
        dict of str to array
            In the dtype of the parameters. A micro-batch without a gradient for a name counts as 0; a name that none
            had is missing.

        Raises
        ------
        TrainingError
            If nothing was accumulated.
        """
        count, sums = self._accumulated
        if not count:
            raise TrainingError("no gradients were accumulated", hint="call accumulate(gradients) after zero_grad()")
        return {name: np.asarray(x / count, self._parameters.dtype) for name, x in sums.items()}

    def zero_grad(self) -> None:
        """Forget the accumulated gradients."""
        with _writer:
            self._accumulated = (0, {})

    def regularization_loss(self, l2_weight: float) -> float:
        """l2_weight times the sum of the squares of all parameters, summed in float64.

        Parameters
        ----------
        l2_weight : float

        Raises
        ------
        TrainingError
            If `l2_weight` is no finite number.
        """
        return _finite_number("l2_weight", l2_weight) * float(np.sum(np.square(self._parameters.flat, dtype=float)))

    def regularization_gradients(self, l2_weight: float) -> dict[str, Array]:
        """The gradient of `regularization_loss`, which raises the same: 2 * l2_weight * p of each p, by name.

        Parameters
        ----------
        l2_weight : float
        """
        weight = 2 * _finite_number("l2_weight", l2_weight)
        return {name: np.asarray(weight * p) for name, p in self._parameters.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the parameters to a safetensors file, with what the layer is in its header.

        Parameters
        ----------
        path : str or path
            A file that is there is replaced in one step, once the new one is whole.

        Raises
        ------
        InvalidInputError, InvalidConfigError
            If `path` is none, or cannot be written; if safetensors, of the extra `files`, is not installed.
        """
        files.write(path, self._parameters, self._file_header())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace all parameters by those in a file that `save` wrote, in the dtype they have there.

        Parameters
        ----------
        path : str or path

        Raises
        ------
        InvalidInputError, DimensionMismatchError
            If there is no such file, it is damaged or no safetensors file, or its names, shapes, dtypes or numbers are
            wrong.
        InvalidConfigError
            If the file is of another kind of layer or another configuration, or safetensors is not installed.
        """
        shapes = self._parameters.shapes
        arrays = files.read(path, shapes, lambda metadata: self._check_file_header(metadata, str(path)))
        new = ParameterSet(arrays)
        self._change(lambda _: new)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """The layer that `save` wrote to a file, with the settings that it had.

        Parameters
        ----------
        path : str or path

        Raises
        ------
        InvalidInputError, InvalidConfigError, DimensionMismatchError
            If the file is missing, damaged, or not one of this kind of layer, or safetensors is not installed.
        """
        layer = files.described(path, cls.__name__, cls._of_file_header)
        layer.load(path)
        return layer

    @classmethod
    def _of_file_header(cls, header: dict[str, str]) -> Self:
        """A layer with the settings in a file's header, which anybody may have written. It may raise anything."""
        raise NotImplementedError

    def _file_header(self) -> dict[str, str]:
        """What a file says about the layer. A class with a configuration adds it, as JSON."""
        return {"kind": type(self).__name__}

    def _check_file_header(self, metadata: dict[str, str], path: str) -> None:
        """Raise InvalidConfigError unless a file with this header is one for this layer."""
        for name, own in self._file_header().items():
            theirs = metadata.get(name)
            if theirs != own:
                both = {"in the file": "nothing" if theirs is None else theirs[:500], "in this object": own}
                hint = "from_file makes an object with the file's settings; load wants one that has them"
                raise InvalidConfigError(f"{path} does not fit this object: {name} differs", shapes=both, hint=hint)


def fitting_gradients(parameters: Mapping[str, Array], gradients: object) -> dict[str, Array]:
    """The gradients that there are, by name, finite, of the shapes and dtypes of `parameters`; or a TrainingError."""
    named = named_gradients(gradients)
    for name, g in named.items():
        if name not in parameters:
            names = {"gradients": ", ".join(map(str, named)), "parameters": ", ".join(parameters)}
            raise TrainingError(f"there is no parameter {name!r}", shapes=names, hint="are they from another layer?")
        p = parameters[name]
        if g.shape != p.shape:
            shapes, hint = {"gradient.shape": g.shape, "parameter.shape": p.shape}, "they have one shape"
            raise TrainingError(f"the gradient of {name!r} has the wrong shape", shapes=shapes, hint=hint)
        with np.errstate(over="ignore"):
            named[name] = g = g.astype(p.dtype, copy=False)
        check_finite(name, g)
    return named


def named_gradients(gradients: object) -> dict[str, Array]:
    """The gradients that there are, by name, float32 or float64; or a TrainingError."""
    named = gradients if isinstance(gradients, Mapping) else getattr(gradients, "parameters", None)
    if not isinstance(named, Mapping):
        hint = "give what backward() returned, or a mapping of names to arrays"
        raise TrainingError(f"gradients are a {type(gradients).__name__}", hint=hint)
    try:
        there = {name: gpu.to_numpy(g) for name, g in named.items() if g is not None}
        return {name: floats(f"the gradient of {name!r}", g, "x") for name, g in there.items()}
    except InvalidInputError as error:
        raise TrainingError(error.details, hint=error.hint) from None


def check_finite(name: str, g: Array) -> None:
    """Raise TrainingError if a gradient is NaN or infinite."""
    bad = g.size - np.count_nonzero(np.isfinite(g))
    if bad:
        raise TrainingError(
            f"the gradient of {name!r} is not finite in {bad} of {g.size} places",
            hint="leave this step out; lower the learning rate if it happens often",
        )


def _finite_number(name: str, x: object, call: str | None = None) -> float:
    """`call` shows the order of the arguments, where two may be taken for each other."""
    hint = "give a finite number" + (f": {call}" if call else "")
    number = real_number(name, x, TrainingError, hint)
    if not math.isfinite(number):
        raise TrainingError(f"{name} is {shown(x)}", hint=hint)
    return number
