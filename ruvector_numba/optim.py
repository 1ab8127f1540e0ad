"""Training helpers: stochastic gradient descent, Adam, AdamW, clipping; each does what torch's of the same name does.

An optimizer works on named arrays and keeps what it remembers by name. So each layer needs its own, and `update`
refuses one that remembers another layer. With `step`, arrays of several layers may be joined under different names:

>>> import numpy as np, ruvector_numba as rv
>>> parameters, optimizer = {"x": np.array([3.0, -2.0])}, rv.optim.Adam(lr=0.1)
>>> for _ in range(300):
...     gradients, norm = rv.optim.clip_by_norm({"x": 2 * parameters["x"]}, max_norm=1.0)
...     parameters = optimizer.step(parameters, gradients)
>>> bool(np.abs(parameters["x"]).max() < 1e-3)
True

`update` does a step on a layer, in one swap of its parameters. Settings may be changed between steps
(``optimizer.lr *= 0.5``), and a name that is no setting is refused; optimizers can be pickled, with all they remember.
What is refused changes nothing.

Sources: the pages of `torch.optim.SGD`, `Adam`, `AdamW` and `torch.nn.utils.clip_grad_norm_`, version 2.13; Kingma and
Ba, Adam, 2015; Loshchilov and Hutter, Decoupled weight decay regularization, 2019.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .arrays import Array
from .checks import floats
from .errors import InvalidConfigError, InvalidInputError, TrainingError
from .parameters import ParameterSet, Trainable, check_finite, fitting_gradients, named_gradients
from .values import real_number, shown, switch

__all__ = ["SGD", "Adam", "AdamW", "clip_by_norm"]


def __dir__() -> list[str]:
    return __all__


LARGEST = sys.float_info.max


class _UnknownSetting(InvalidConfigError, AttributeError):
    """A setting that an optimizer does not have."""


@dataclass
class _Optimizer:
    """What optimizers share. One defines its settings, their `_check`, and `_descend` for one array."""

    state: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    # The layer that `state` is of. A copy and a pickle forget it, so that they go on with a copy of the layer.
    _layer: weakref.ref[Trainable] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check()

    def __setattr__(self, name: str, x: object) -> None:
        if name not in self.__dataclass_fields__:  # a misspelt setting would be set, and never read
            hint = "its settings are " + ", ".join(each.name for each in fields(self) if each.init)
            raise _UnknownSetting(f"{type(self).__name__} has no setting {name!r}", hint=hint)
        super().__setattr__(name, x)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_layer": None}

    def _check(self) -> None:
        raise NotImplementedError

    def _descend(self, p: Array, g: Array, state: Any) -> tuple[Array, Any]:
        """The new value of a parameter, and what to remember of it: an array, a tuple with arrays, or None."""
        raise NotImplementedError

    def step(self, parameters: Mapping[str, Array], gradients: object) -> dict[str, Array]:
        """The parameters after one step.

        Parameters
        ----------
        parameters : mapping of str to array
            float32 or float64; each keeps its dtype and is not written to.
        gradients : mapping of str to array, or an object whose `parameters` is one
            Each of the shape of its parameter. What is missing or None leaves its parameter as it is.

        Returns
        -------
        dict of str to array
            New arrays under all names of `parameters`.

        Raises
        ------
        TrainingError
            If a gradient is NaN or infinite, or has a wrong shape or dtype or an unknown name; if the step overflows;
            if the optimizer has been used on other parameters of this name.
        InvalidInputError
            If `parameters` is no mapping, or its arrays have other dtypes.
        InvalidConfigError
            If a setting was changed to one that is out of range.
        """
        values, self.state = self._advance(parameters, gradients)
        return values

    def update(self, layer: Trainable, gradients: object) -> None:
        """Do one step on a layer: readers in other threads see its parameters before or after, never between.

        Parameters
        ----------
        layer : Trainable
        gradients : mapping of str to array, or an object whose `parameters` is one, as what `backward` returns
            As in `step`.

        Raises
        ------
        InvalidInputError
            If `layer` is not one that can be trained.
        TrainingError
            As in `step`; also if the optimizer has momentum or moments of another layer. `step` cannot tell that of
            arrays of equal shapes.
        InvalidConfigError
            If a setting was changed to one that is out of range.

        Examples
        --------
        >>> import numpy as np, ruvector_numba as rv
        >>> layer, optimizer = rv.GAT(4, 8, seed=0), rv.optim.SGD(lr=0.1)
        >>> output, cache = layer.forward_cached(np.ones((3, 4), np.float32), [[0, 1], [2, 2]])
        >>> optimizer.update(layer, layer.backward(output, cache))
        """
        if not isinstance(layer, Trainable):
            hint = "give a layer of this package; for plain arrays there is step(parameters, gradients)"
            raise InvalidInputError(f"layer is a {type(layer).__name__}", hint=hint)

        def change(parameters: ParameterSet) -> ParameterSet:
            known = None if self._layer is None else self._layer()  # one that is gone may have a successor
            if known is not None and known is not layer and any(map(_arrays, self.state.values())):
                hint = "make one optimizer for each layer; for a copy of the layer, copy.deepcopy(optimizer)"
                raise TrainingError("the optimizer remembers another layer", hint=hint)
            values, state = self._advance(parameters, gradients)
            new = ParameterSet(values)
            self.state, self._layer = state, weakref.ref(layer)
            return new

        layer._change(change)

    def _advance(self, parameters: Mapping[str, Array], gradients: object) -> tuple[dict[str, Array], dict[str, Any]]:
        """The new values and the new state; nothing is written to, so that an error leaves all as it was."""
        self._check()
        if not isinstance(parameters, Mapping):
            raise InvalidInputError(f"parameters are a {type(parameters).__name__}", hint="give a mapping of arrays")
        old = {name: floats(f"parameter {name!r}", p, "x") for name, p in parameters.items()}
        new, state = {}, dict(self.state)
        for name, g in fitting_gradients(old, gradients).items():
            p, remembered = old[name], state.get(name)
            for x in _arrays(remembered):
                if x.shape != p.shape:
                    shapes = {"remembered": x.shape, "parameter.shape": p.shape}
                    hint = "make one optimizer for each layer"
                    raise TrainingError(f"the optimizer knows another {name!r}", shapes=shapes, hint=hint)
            with np.errstate(all="ignore"):
                new[name], state[name] = self._descend(p, g, remembered)
            if not all(np.isfinite(x).all() for x in (new[name], *_arrays(state[name]))):
                hint = "clip the gradients (clip_by_norm), or lower lr"
                raise TrainingError(f"the step of {name!r} is not finite in {p.dtype}", hint=hint)
        return {name: new[name] if name in new else p.copy() for name, p in old.items()}, state


def _arrays(state: Any) -> list[Array]:
    return [x for x in (state if isinstance(state, tuple) else (state,)) if isinstance(x, np.ndarray)]


@dataclass
class SGD(_Optimizer):
    """Stochastic gradient descent, with momentum if asked for.

    Parameters
    ----------
    lr : float
        The learning rate.
    momentum : float
        How much of the last step's direction is kept.
    dampening : float
        How much of the gradient is left out of the direction, after the first step.
    weight_decay : float
        This times the parameter is added to its gradient.
    nesterov : bool
        Look ahead along the direction; needs momentum, and no dampening.

    Raises
    ------
    InvalidConfigError
        If a setting is out of range.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> optimizer, parameters = rv.optim.SGD(lr=0.5, momentum=0.5), {"x": np.array([1.0])}
    >>> for _ in range(2):
    ...     parameters = optimizer.step(parameters, {"x": np.array([1.0])})
    >>> parameters
    {'x': array([-0.25])}
    """

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def _check(self) -> None:
        self.lr = _setting("lr", self.lr)
        self.momentum = _setting("momentum", self.momentum)
        self.dampening = _setting("dampening", self.dampening, least=-LARGEST, hint="give a finite number")
        self.weight_decay = _setting("weight_decay", self.weight_decay)
        self.nesterov = switch("nesterov", self.nesterov, InvalidConfigError)
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            both = {"momentum": self.momentum, "dampening": self.dampening}
            hint = "set momentum=0.9 and dampening=0, or nesterov=False"
            raise InvalidConfigError("nesterov needs momentum, and no dampening", shapes=both, hint=hint)

    def _descend(self, p: Array, g: Array, state: Any) -> tuple[Array, Any]:
        if self.weight_decay:
            g = g + self.weight_decay * p
        if not self.momentum:
            return np.asarray(p - self.lr * g), None
        direction = g.copy() if state is None else self.momentum * state.astype(p.dtype) + (1 - self.dampening) * g
        step = g + self.momentum * direction if self.nesterov else direction
        return np.asarray(p - self.lr * step), np.asarray(direction)


class Moments(NamedTuple):
    """What Adam remembers of one parameter."""

    steps: int
    mean: Array  # of the gradient, exponentially weighted
    square: Array  # of its square, likewise
    largest: Array | None  # that `square` ever was; for amsgrad


@dataclass
class Adam(_Optimizer):
    """Adam: steps of the size of lr, whatever the scale of the gradients.

    Parameters
    ----------
    lr : float
        The learning rate.
    betas : (float, float)
        How much of the means of gradient and squared gradient is kept.
    eps : float
        Added to the root of the mean square.
    weight_decay : float
        This times the parameter is added to its gradient.
    amsgrad : bool
        Divide by the root of the largest mean square so far.

    Raises
    ------
    InvalidConfigError
        If a setting is out of range.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> rv.optim.Adam(lr=0.5).step({"x": np.array([1.0, 1.0])}, {"x": np.array([1e-3, -7.0])})["x"].round(4)
    array([0.5, 1.5])
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False

    _decoupled: ClassVar[bool] = False

    def _check(self) -> None:
        self.lr = _setting("lr", self.lr)
        betas = tuple(self.betas) if isinstance(self.betas, Iterable) else ()
        if len(betas) != 2:
            raise InvalidConfigError(f"betas is {shown(self.betas)}", hint="give two numbers, such as (0.9, 0.999)")
        most, hint = math.nextafter(1, 0), "give a number of at least 0 and less than 1"
        beta1, beta2 = (_setting(f"betas[{i}]", beta, most=most, hint=hint) for i, beta in enumerate(betas))
        self.betas = beta1, beta2
        self.eps = _setting("eps", self.eps)
        self.weight_decay = _setting("weight_decay", self.weight_decay)
        self.amsgrad = switch("amsgrad", self.amsgrad, InvalidConfigError)

    def _descend(self, p: Array, g: Array, state: Any) -> tuple[Array, Any]:
        steps, mean, square, largest = state or Moments(0, np.zeros_like(p), np.zeros_like(p), None)
        mean, square = mean.astype(p.dtype), square.astype(p.dtype)
        steps, (beta1, beta2) = steps + 1, self.betas
        if self.weight_decay and self._decoupled:
            p = p * (1 - self.lr * self.weight_decay)
        elif self.weight_decay:
            g = g + self.weight_decay * p
        mean = beta1 * mean + (1 - beta1) * g
        square = beta2 * square + (1 - beta2) * g * g
        largest = None if not self.amsgrad else np.maximum(square, 0 if largest is None else largest, dtype=p.dtype)
        root = np.sqrt(square if largest is None else largest) / math.sqrt(1 - beta2**steps)
        p = p - self.lr / (1 - beta1**steps) * (mean / (root + self.eps))
        return np.asarray(p), Moments(steps, np.asarray(mean), np.asarray(square), largest)


@dataclass
class AdamW(Adam):
    """Adam whose weight decay shrinks the parameters by themselves, untouched by the scale of the gradients.

    Parameters
    ----------
    lr, betas, eps, amsgrad
        As in `Adam`.
    weight_decay : float
        lr times this times the parameter is taken off the parameter.

    Raises
    ------
    InvalidConfigError
        If a setting is out of range.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> rv.optim.AdamW(lr=0.5, weight_decay=0.1).step({"x": np.array([1.0])}, {"x": np.array([0.0])})
    {'x': array([0.95])}
    """

    weight_decay: float = 0.01

    _decoupled: ClassVar[bool] = True


def clip_by_norm(gradients: object, max_norm: float) -> tuple[dict[str, Array], float]:
    """Gradients scaled down so that together they are no longer than `max_norm`; shorter ones are copied.

    As in `torch.nn.utils.clip_grad_norm_`, the factor is max_norm / (norm + 1e-6) and at most 1.

    Parameters
    ----------
    gradients : mapping of str to array, or an object whose `parameters` is one
        float32 or float64; not written to. Those that are None are left out.
    max_norm : float
        Not negative; infinity only measures.

    Returns
    -------
    clipped : dict of str to array
    norm : float
        The length before: the root of the sum of all squares, taken in float64.

    Raises
    ------
    TrainingError
        If a gradient is NaN or infinite or no array of floats, or the norm overflows float64.
    InvalidConfigError
        If `max_norm` is no number, NaN or negative.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> clipped, norm = rv.optim.clip_by_norm({"w": np.array([3.0, 0.0]), "b": np.array([4.0])}, max_norm=1.0)
    >>> norm, clipped["w"].round(3), clipped["b"].round(3)
    (5.0, array([0.6, 0. ]), array([0.8]))
    """
    limit = _setting("max_norm", max_norm, most=math.inf, hint="give a number that is not negative")
    named = named_gradients(gradients)
    for name, g in named.items():
        check_finite(name, g)
    with np.errstate(over="ignore"):
        norm = math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in named.values()))
    if norm == math.inf:
        raise TrainingError("the norm of the gradients is too large for float64", hint="leave this step out")
    factor = min(limit / (norm + 1e-6), 1.0)
    return {name: np.asarray(factor * g) for name, g in named.items()}, norm


def _setting(
    name: str,
    x: object,
    least: float = 0.0,
    most: float = LARGEST,
    hint: str = "give a finite number that is not negative",
) -> float:
    """A setting as a float, if it is a number in its range."""
    number = real_number(name, x, InvalidConfigError, hint)
    if not least <= number <= most:
        raise InvalidConfigError(f"{name} is {shown(x)}", hint=hint)
    return number
