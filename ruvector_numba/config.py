"""The settings of attention, as frozen dataclasses with the fields and defaults of ruvector-attention.

Making a configuration checks nothing, so that a wrong one can be shown, stored and corrected; `validate` checks types
and values, and whatever is built from a configuration calls it first:

>>> import ruvector_numba as rv
>>> config = rv.AttentionConfig(d_model=768, num_heads=12, dropout=0)
>>> config.d_k, config.get_scale()
(64, 0.125)
>>> rv.AttentionConfig.from_json(config.to_json()) == config
True
>>> rv.AttentionConfig(d_model=768, num_heads=7).validate()
Traceback (most recent call last):
    ...
ruvector_numba.errors.InvalidConfigError: Invalid configuration: d_model (768) must be divisible by num_heads (7)
HINT: each head gets d_model / num_heads channels

Numbers of NumPy become Python's own, and whole numbers become floats where a float belongs, so equal settings compare
equal and print alike. `dataclasses.replace` makes a changed copy.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import numbers
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import numpy as np

from .errors import InvalidConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AttentionConfig", "GraphAttentionConfig", "SparseAttentionConfig"]

Aggregation = Literal["sum", "mean", "max"]
SparsityPattern = Literal["fixed", "strided", "local", "global"]

WORDS = {int: "a whole number", float: "a number", bool: "True or False"}


def _kind(hint: Any) -> tuple[Any, bool]:
    return (get_args(hint)[0], True) if isinstance(hint, UnionType) else (hint, False)


class _Config:
    """What the configurations share: plain numbers, the check of types, dictionaries and JSON."""

    _kinds: ClassVar[dict[str, tuple[Any, bool]]]  # of each field: its type, and whether None is allowed

    def __init_subclass__(cls) -> None:
        hints = get_type_hints(cls)
        cls._kinds = {name: _kind(hint) for name, hint in hints.items() if not name.startswith("_")}

    def __post_init__(self) -> None:
        for name, (kind, _) in self._kinds.items():
            object.__setattr__(self, name, _plain(kind, getattr(self, name)))

    def validate(self) -> None:
        """Check the type and the value of every field.

        Raises
        ------
        InvalidConfigError
            Naming the first field that is wrong.
        """
        for name, (kind, optional) in self._kinds.items():
            value = getattr(self, name)
            if not (value is None and optional):
                _check_type(name, kind, optional, value)

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, as `from_dict` takes them.

        Returns
        -------
        dict of str to object
            A `base` is a dictionary too.

        Examples
        --------
        >>> import ruvector_numba as rv
        >>> rv.SparseAttentionConfig(top_k=8).to_dict()["top_k"]
        8
        """
        values = {name: getattr(self, name) for name in self._kinds}
        return {name: value.to_dict() if isinstance(value, _Config) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The valid configuration with these fields; those left out have their defaults.

        Parameters
        ----------
        values : mapping of str to object
            As from `to_dict`; `base` may be a mapping or an `AttentionConfig`.

        Returns
        -------
        Self
            Of the class that this is called on.

        Raises
        ------
        InvalidConfigError
            Naming the field, if there is none of that name, or its type or value is wrong.

        Examples
        --------
        >>> import ruvector_numba as rv
        >>> rv.GraphAttentionConfig.from_dict({"base": {"d_model": 64}, "aggregation": "mean"}).base.d_model
        64
        """
        if not isinstance(values, Mapping):
            raise InvalidConfigError(
                f"{cls.__name__} is read from a dictionary of its fields, got {_told(values)}",
                hint="for text use from_json",
            )
        kinds = cls._kinds
        for name in values:
            if name not in kinds:
                close = difflib.get_close_matches(str(name), kinds, 1)
                hint = f"did you mean {close[0]}?" if close else "its fields are " + ", ".join(kinds)
                raise InvalidConfigError(f"{cls.__name__} has no field {_told(name)}", hint=hint)
        config = cls(**{name: _nested(kinds[name][0], value) for name, value in values.items()})
        config.validate()
        return config

    def to_json(self) -> str:
        """The configuration as JSON, as `from_json` takes it.

        Returns
        -------
        str

        Raises
        ------
        InvalidConfigError
            If the configuration is not valid: JSON has no NaN and no arbitrary objects.

        Examples
        --------
        >>> import ruvector_numba as rv
        >>> rv.AttentionConfig().to_json()[:32]
        '{"d_model": 512, "num_heads": 8,'
        """
        self.validate()
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The valid configuration that this JSON describes; fields left out have their defaults.

        Parameters
        ----------
        text : str or bytes
            As from `to_json`.

        Returns
        -------
        Self
            Of the class that this is called on.

        Raises
        ------
        InvalidConfigError
            If the text is not JSON, or `from_dict` refuses what it says.

        Examples
        --------
        >>> import ruvector_numba as rv
        >>> rv.AttentionConfig.from_json('{"d_model": 64, "max_seq_len": null}').max_seq_len is None
        True
        """
        try:
            values = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidConfigError(f"{cls.__name__} cannot be read, since this is not JSON: {error}") from None
        return cls.from_dict(values)


@dataclass(frozen=True)
class AttentionConfig(_Config):
    """The settings of scaled dot-product and of multi-head attention.

    They are not checked when a configuration is made, but by `validate` and by every layer that is made from it.

    Attributes
    ----------
    d_model : int, default 512
        Channels of queries, keys, values and the output; a multiple of `num_heads`.
    num_heads : int, default 8
        Attention heads, each with `d_k` channels.
    dropout : float, default 0.1
        Probability, 0 to 1, to drop a weight; in training only.
    use_bias : bool, default True
        Whether the linear projections add a bias.
    scale : float, optional
        What scores are multiplied by; None for 1 / sqrt(d_k).
    max_seq_len : int or None, default 512
        The longest sequence that is accepted; None for no limit.
    causal : bool, default False
        Whether query i sees keys 0 to i only.
    eps : float, default 1e-6
        Positive; added to the denominator of the softmax.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> rv.AttentionConfig(d_model=64, num_heads=4).d_k
    16
    """

    d_model: int = 512
    num_heads: int = 8
    dropout: float = 0.1
    use_bias: bool = True
    scale: float | None = None
    max_seq_len: int | None = 512
    causal: bool = False
    eps: float = 1e-6

    @functools.cached_property
    def d_k(self) -> int:
        """Channels per head.

        Raises
        ------
        InvalidConfigError
            If the configuration is not valid.
        """
        self.validate()
        return self.d_model // self.num_heads

    def get_scale(self) -> float:
        """What scores are multiplied by.

        Returns
        -------
        float
            `scale`, or 1 / sqrt(d_k) if that is None.

        Raises
        ------
        InvalidConfigError
            If the configuration is not valid.

        Examples
        --------
        >>> import ruvector_numba as rv
        >>> rv.AttentionConfig(d_model=512, num_heads=8).get_scale()
        0.125
        """
        d_k = self.d_k
        return 1 / math.sqrt(d_k) if self.scale is None else self.scale

    def validate(self) -> None:
        """Check the type and the value of every field.

        Raises
        ------
        InvalidConfigError
            If a field has a wrong type or is out of range, or `d_model` is no multiple of `num_heads`.
        """
        super().validate()
        _check_size("d_model", self.d_model)
        _check_size("num_heads", self.num_heads)
        if self.d_model % self.num_heads:
            raise InvalidConfigError(
                f"d_model ({self.d_model}) must be divisible by num_heads ({self.num_heads})",
                hint="each head gets d_model / num_heads channels",
            )
        if not 0 <= self.dropout <= 1:
            raise InvalidConfigError(f"dropout must be between 0.0 and 1.0, got {self.dropout}")
        if self.scale is not None and not math.isfinite(self.scale):
            raise InvalidConfigError(f"scale must be finite, got {self.scale}", hint="None means 1 / sqrt(d_k)")
        _check_size("max_seq_len", self.max_seq_len, hint="None means no limit")
        if not self.eps > 0:
            raise InvalidConfigError(f"eps must be positive, got {self.eps}")
        if self.eps == math.inf:
            raise InvalidConfigError(f"eps must be finite, got {self.eps}")


@dataclass(frozen=True)
class GraphAttentionConfig(_Config):
    """The settings of attention on graphs.

    Attributes
    ----------
    base : AttentionConfig
        What all attention shares.
    use_edge_features : bool, default False
        Whether edges have features that enter the scores; needs `edge_dim`.
    edge_dim : int, optional
        Channels of the features of an edge.
    aggregation : {"sum", "mean", "max"}, default "sum"
        How what the neighbours send is joined.
    normalize : bool, default True
        Whether the coefficients of a node's neighbours are normalised by a softmax.
    negative_slope : float, default 0.2
        Slope of the LeakyReLU below zero. A layer refuses inputs whose dtype cannot hold it.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> rv.GraphAttentionConfig(use_edge_features=True).validate()
    Traceback (most recent call last):
        ...
    ruvector_numba.errors.InvalidConfigError: Invalid configuration: use_edge_features is True and edge_dim is None
    HINT: set edge_dim to the channels of an edge's features
    """

    base: AttentionConfig = field(default_factory=AttentionConfig)
    use_edge_features: bool = False
    edge_dim: int | None = None
    aggregation: Aggregation = "sum"
    normalize: bool = True
    negative_slope: float = 0.2

    def validate(self) -> None:
        """Check the type and the value of every field.

        Raises
        ------
        InvalidConfigError
            If a field has a wrong type or is out of range, the base's included, or edge features have no `edge_dim`.
        """
        super().validate()
        self.base.validate()
        _check_size("edge_dim", self.edge_dim, hint="None means that edges have no features")
        if self.use_edge_features and self.edge_dim is None:
            raise InvalidConfigError(
                "use_edge_features is True and edge_dim is None",
                hint="set edge_dim to the channels of an edge's features",
            )
        if not math.isfinite(self.negative_slope):
            raise InvalidConfigError(f"negative_slope must be finite, got {self.negative_slope}")


@dataclass(frozen=True)
class SparseAttentionConfig(_Config):
    """The settings of attention by a sparse pattern, as in ruvector-attention. No mechanism uses them yet.

    Attributes
    ----------
    base : AttentionConfig
        What all attention shares.
    sparsity_pattern : {"fixed", "strided", "local", "global"}, default "local"
        Which pairs of query and key attend.
    block_size : int or None, default 64
        Side of the blocks of a block-sparse pattern.
    local_window : int or None, default 128
        Size of the window around a query.
    num_global_tokens : int, optional
        How many tokens see all and are seen by all.
    top_k : int, optional
        How many keys a query keeps, chosen by score.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> rv.SparseAttentionConfig(sparsity_pattern="local", local_window=16).validate()
    """

    base: AttentionConfig = field(default_factory=AttentionConfig)
    sparsity_pattern: SparsityPattern = "local"
    block_size: int | None = 64
    local_window: int | None = 128
    num_global_tokens: int | None = None
    top_k: int | None = None

    def validate(self) -> None:
        """Check the type and the value of every field.

        Raises
        ------
        InvalidConfigError
            If a field has a wrong type or is out of range, the base's included.
        """
        super().validate()
        self.base.validate()
        for name in ("block_size", "local_window", "num_global_tokens", "top_k"):
            _check_size(name, getattr(self, name), hint="None leaves it out")


def _plain(kind: Any, value: object) -> object:
    """A number as Python's own of the field's type; all else as it is, for `validate` to judge."""
    if isinstance(value, np.generic) or (type(value) is np.ndarray and value.ndim == 0):
        value = value.item()
    if isinstance(value, bool):
        return value
    if kind is int and isinstance(value, numbers.Integral):
        return int(value)
    if kind is float and isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf  # type: ignore[operator]
    return value


def _nested(kind: Any, value: Any) -> Any:
    is_config = isinstance(kind, type) and issubclass(kind, _Config)
    return kind.from_dict(value) if is_config and isinstance(value, Mapping) else value


def _check_type(name: str, kind: Any, optional: bool, value: object) -> None:
    if get_origin(kind) is Literal:
        fits, wanted = isinstance(value, str) and value in get_args(kind), "one of " + str(get_args(kind))[1:-1]
    elif kind in WORDS:
        fits, wanted = type(value) is kind, WORDS[kind]
    else:
        fits, wanted = isinstance(value, kind), f"an {kind.__name__}"
    if not fits:
        wanted += ", or None" if optional else ""
        raise InvalidConfigError(f"{name} must be {wanted}, got {_told(value)}")
    if kind is int and abs(value) >= 1 << 63:  # type: ignore[arg-type]
        raise InvalidConfigError(f"{name} does not fit 64 bits")


def _check_size(name: str, size: int | None, hint: str | None = None) -> None:
    if size is not None and size <= 0:
        raise InvalidConfigError(f"{name} must be greater than 0", shapes={name: size}, hint=hint)


def _told(value: object) -> str:
    return f"{reprlib.repr(value)} ({type(value).__name__})"
