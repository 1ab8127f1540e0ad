"""What passes leave behind: the cache of a forward pass, the gradients of a backward pass."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from . import checks, gpu
from .arrays import Array
from .errors import InvalidInputError

__all__ = ["AttentionCache", "AttentionGradients", "InputGradients"]


class Record(Protocol):
    """What a pass remembers of itself, for its own backward."""

    def weights(self, rows: Any = None) -> Array: ...


def read_only(x: Any) -> Any:
    """A view of a result that gradients are computed from, which nobody may write into; arrays on a GPU as they are."""
    if isinstance(x, np.ndarray):
        x = x.view()
        x.flags.writeable = False
    return x


def _array(name: str, x: ArrayLike) -> Any:
    """Arrays on a GPU stay there."""
    return x if gpu.is_on_gpu(x) else checks.from_sequence(name, x)


def named_shapes(x: Any) -> str:
    """A dataclass of arrays as its repr shows it: by their shapes, without those that are None."""
    arrays = {field.name: getattr(x, field.name) for field in fields(x)}
    shapes = (f"{name} {tuple(array.shape)}" for name, array in arrays.items() if array is not None)
    return f"{type(x).__name__}({', '.join(shapes)})"


class AttentionCache:
    """What a forward pass leaves for the backward pass.

    It refers to query, key, value, mask and output and copies none: change none of them in place, and reuse no ``out=``
    buffer, before the backward pass. (Beside an output of half precision it keeps that in float32, and after
    `precision="bfloat16"` the rounded arrays.)

    One may also be built by hand from arrays, as in ruvector-attention. The backward pass of a layer then
    does the forward pass again, without dropout, from `query`, `key`, `value` and `mask`; the weights are what it
    computes, not those that were given, since averages over heads do not determine gradients.

    Parameters
    ----------
    query, key, value : array
        As the pass was given them.
    attention_weights : array, optional
        The weights that the forward pass gave.
    mask : optional
        As the pass was given it; a layer's, joined with its `key_padding_mask` if there was one.

    Attributes
    ----------
    query, key, value, mask
    output : array or None
        What the pass gave, read-only unless it was written to the caller's ``out=``; None in a cache built by hand, as
        `lse`.
    lse : array (..., H, Lq) or None
        The natural logarithm of the sum of exp(score) over the keys a query sees; -inf if it sees none.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> x = np.eye(3, dtype=np.float32)
    >>> cache = rv.attention_forward(x, x, x, is_causal=True)
    >>> cache
    AttentionCache(query (3, 3), key (3, 3), value (3, 3))
    >>> cache.output.shape, cache.lse.shape, cache.weights(rows=0)
    ((3, 3), (3,), array([[1., 0., 0.]], dtype=float32))

    One built by hand, for the backward pass of a layer:

    >>> layer = rv.MultiHeadAttention(rv.AttentionConfig(d_model=4, num_heads=2), seed=0)
    >>> x = np.ones((1, 3, 4), np.float32)
    >>> layer.backward(x, rv.AttentionCache(x, x, x)).query_weights.shape
    (4, 4)
    """

    __slots__ = ("_given_weights", "key", "lse", "mask", "output", "owner", "query", "record", "value")

    def __init__(
        self,
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        attention_weights: ArrayLike | None = None,
        mask: Any = None,
        *,
        output: Array | None = None,
        lse: Array | None = None,
        record: Record | None = None,
        owner: bytes | None = None,
    ) -> None:
        self.query, self.key, self.value = (
            _array(name, x) for name, x in (("query", query), ("key", key), ("value", value))
        )
        self._given_weights = (
            None if attention_weights is None else checks.from_sequence("attention_weights", attention_weights)
        )
        self.mask = mask
        self.output: Any = output  # None only if built by hand, which those who read it know
        self.lse: Any = lse
        self.record, self.owner = record, owner  # the layer that made it, by its identity

    def __repr__(self) -> str:
        shapes = f"query {self.query.shape}, key {self.key.shape}, value {self.value.shape}"
        return f"AttentionCache({shapes}{'' if self.record else ', built by hand'})"

    @property
    def attention_weights(self) -> Array:
        """All weights: those given, or computed now. See `weights`."""
        return self.weights()

    def weights(self, rows: Any = None) -> Array:
        """The attention weights, exact, computed now.

        Parameters
        ----------
        rows : slice, int, or sequence of int, optional
            Which queries; all by default, which needs memory for Lq x Lk weights.

        Returns
        -------
        array (..., H, number of rows, Lk), or of a layer (B, number of rows, Lk)
            Before dropout; they sum to 1, or are all 0 where nothing is seen. A layer's are averaged over its heads,
            and sum to a little less than 1, by its `eps`.

        Raises
        ------
        OutOfMemoryError
            If the weights are larger than this machine's memory.
        InvalidInputError
            If `rows` is not a selection of queries, or the cache was built by hand without weights.

        Examples
        --------
        >>> import numpy as np, ruvector_numba as rv
        >>> x = np.eye(4)
        >>> rv.attention_forward(x, x, x, is_causal=True).weights(rows=[0, -1]).shape
        (2, 4)
        """
        if self.record is not None:
            return self.record.weights(rows)
        if self._given_weights is None:
            raise InvalidInputError("this cache was built by hand, without weights", hint="give attention_weights")
        return self._given_weights[..., checks.row_indices(rows, self._given_weights.shape[-2]), :]


@dataclass(frozen=True, slots=True, eq=False)
class InputGradients:
    """The gradients of what attention was called with, each of its array's shape and dtype.

    Attributes
    ----------
    query, key, value : array
    bias : array or None
        Of the float mask, summed over what it was broadcast along; None if there was none.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> x, bias = np.ones((2, 5, 4)), np.zeros((5, 1))
    >>> cache = rv.attention_forward(x, x, x, bias)
    >>> gradients = rv.attention_backward(np.ones_like(x), cache)
    >>> gradients
    InputGradients(query (2, 5, 4), key (2, 5, 4), value (2, 5, 4), bias (5, 1))
    """

    query: Array
    key: Array
    value: Array
    bias: Array | None

    __repr__ = named_shapes


@dataclass(frozen=True, slots=True, eq=False)
class AttentionGradients:
    """The gradients that a layer's backward pass gives.

    Attributes
    ----------
    query_weights, key_weights, value_weights, output_weights : array or None
        Of w_q, w_k, w_v and w_o; None in a layer without parameters.
    query_bias, key_bias, value_bias, output_bias : array or None
        Of b_q, b_k, b_v and b_o; None in a layer without biases.
    query, key, value : array
        Of the inputs, of their shapes. Where one array was several of them, its gradient is the sum: that of x in
        ``layer(x)`` is ``g.query + g.key + g.value``.
    bias : array or None
        Of a float mask, if the layer was given one.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> layer = rv.MultiHeadAttention(rv.AttentionConfig(d_model=4, num_heads=2), seed=0)
    >>> output, cache = layer.forward_cached(np.ones((1, 3, 4), np.float32))
    >>> gradients = layer.backward(output, cache)
    >>> gradients.query.shape, gradients.output_bias.shape
    ((1, 3, 4), (4,))
    >>> list(gradients.parameters)
    ['w_q', 'w_k', 'w_v', 'w_o', 'b_q', 'b_k', 'b_v', 'b_o']
    """

    query_weights: Array | None = None
    key_weights: Array | None = None
    value_weights: Array | None = None
    output_weights: Array | None = None
    query_bias: Array | None = None
    key_bias: Array | None = None
    value_bias: Array | None = None
    output_bias: Array | None = None
    query: Array | None = None
    key: Array | None = None
    value: Array | None = None
    bias: Array | None = None

    __repr__ = named_shapes

    @property
    def parameters(self) -> dict[str, Array]:
        """The gradients of the parameters, by the parameters' names and in their order."""
        fields = {
            "w_q": self.query_weights, "w_k": self.key_weights, "w_v": self.value_weights, "w_o": self.output_weights,
            "b_q": self.query_bias, "b_k": self.key_bias, "b_v": self.value_bias, "b_o": self.output_bias,
        }  # fmt: skip
        return {name: x for name, x in fields.items() if x is not None}
