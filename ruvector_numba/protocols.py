"""What attention has to offer, as protocols: any class with these methods is one, whether it inherits or not.

`isinstance` asks whether the methods are there; a type checker compares their signatures too. A class that inherits
from a protocol gets the methods that have a default, and cannot be made into an object while it lacks one of the
others. Attention of one's own, here with the methods written out:

>>> import numpy as np, ruvector_numba as rv
>>> class Average:
...     '''A query attends alike to every key it sees.'''
...     def d_model(self):
...         return 8
...     def name(self):
...         return "Average"
...     def supports_masking(self):
...         return True
...     def forward(self, query, key, value, mask=None):
...         seen = np.ones((*query.shape[:2], key.shape[1]))
...         if mask is not None:
...             seen *= np.asarray(mask) <= 0.5
...         weights = seen / np.maximum(seen.sum(axis=-1, keepdims=True), 1)
...         return weights @ value, weights
>>> layer, x = Average(), np.ones((2, 3, 8))
>>> output, weights = layer.forward(x, x, x)
>>> output.shape, weights.shape
((2, 3, 8), (2, 3, 3))
>>> isinstance(layer, rv.Attention), isinstance(layer, rv.TrainableAttention)
(True, False)

and here inheriting what has a default:

>>> class Copy(rv.Attention):
...     d_model, name = lambda self: 8, lambda self: "Copy"
...     def forward(self, query, key, value, mask=None):
...         return value, np.broadcast_to(np.eye(key.shape[1]), (*key.shape[:2], key.shape[1]))
>>> Copy().supports_masking()
True

The methods are those of the traits of ruvector-attention; its ``clone_box`` is `copy.deepcopy`. Two traits declare
``sparse_forward`` with different arguments, and `isinstance` cannot tell them apart by it, only by the methods around
it. A class that is both a `GraphAttention` and a `SparseAttention` dispatches on the number of arguments, which
differs::

    def sparse_forward(self, *arguments):
        return self._on_graph(*arguments) if len(arguments) == 2 else self._on_sequences(*arguments)

with one ``typing.overload`` for each for the type checker; otherwise keep the two in two classes.

B is the batch, Lq and Lk the numbers of queries and of keys, N nodes, E edges; arrays are float32 or float64.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .arrays import Array

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["Attention", "GeometricAttention", "GraphAttention", "SparseAttention", "TrainableAttention"]


@runtime_checkable
class Attention(Protocol):
    """Attention of queries to keys and values: what every mechanism offers."""

    @abstractmethod
    def forward(self, query: Array, key: Array, value: Array, mask: Array | None = None) -> tuple[Array, Array]:
        """Attend.

        Parameters
        ----------
        query : ndarray (B, Lq, d_model)
        key, value : ndarray (B, Lk, d_model)
        mask : ndarray (B, Lq, Lk), optional
            A number above 0.5, or True, hides a key from a query.

        Returns
        -------
        output : ndarray (B, Lq, d_model)
        weights : ndarray (B, Lq, Lk)
            How much each query took from each key; if there are several heads, their mean.
        """
        ...

    @abstractmethod
    def d_model(self) -> int:
        """Channels of queries and of the output."""
        ...

    @abstractmethod
    def name(self) -> str:
        """The name of the mechanism, for people to read."""
        ...

    def supports_masking(self) -> bool:
        """Whether `forward` heeds a mask; True unless overridden."""
        return True


@runtime_checkable
class GraphAttention(Attention, Protocol):
    """Attention of nodes to their neighbours.

    It extends `Attention` because ruvector-attention's trait does. So ``isinstance(rv.GAT(3, 4), rv.Attention)`` is
    True, which says little: `forward` of a graph layer takes nodes and edges, not query, key and value.
    """

    @abstractmethod
    def graph_forward(
        self, node_features: Array, edge_index: NDArray[np.integer[Any]], edge_attr: Array | None = None
    ) -> tuple[Array, Array]:
        """Attend along the edges of a list.

        Parameters
        ----------
        node_features : ndarray (N, feature_dim)
        edge_index : integer ndarray (2, E)
            The source of each edge, which is attended to, above its target, which attends.
        edge_attr : ndarray (E, edge_dim), optional
            Features of the edges.

        Returns
        -------
        features : ndarray (N, d_model)
        coefficients : ndarray (E, num_graph_heads)
            In the order of `edge_index`.
        """
        ...

    @abstractmethod
    def sparse_forward(self, node_features: Array, adjacency: csr_array) -> tuple[Array, csr_array]:
        """Attend along the entries of a matrix.

        `SparseAttention.sparse_forward` shares the name and takes four arguments; the module's documentation says how
        one class can have both.

        Parameters
        ----------
        node_features : ndarray (N, feature_dim)
        adjacency : scipy.sparse.csr_array (N, N)
            Node i, a row, attends to node j where entry (i, j) is stored.

        Returns
        -------
        features : ndarray (N, d_model)
        coefficients : scipy.sparse.csr_array (N, N)
            With the entries of `adjacency`; the mean over heads.
        """
        ...

    @abstractmethod
    def num_graph_heads(self) -> int:
        """Heads that attend along edges."""
        ...

    def supports_edge_features(self) -> bool:
        """Whether `graph_forward` heeds `edge_attr`; False unless overridden."""
        return False

    def supports_heterogeneous(self) -> bool:
        """Whether nodes and edges may be of several types; False unless overridden."""
        return False


@runtime_checkable
class GeometricAttention(Attention, Protocol):
    """Attention of points in space. No mechanism of this package has it yet."""

    @abstractmethod
    def geometric_forward(self, query_pos: Array, key_pos: Array, features: Array) -> Array:
        """Attend from points to points.

        Parameters
        ----------
        query_pos : ndarray (Lq, geometric_dim)
        key_pos : ndarray (Lk, geometric_dim)
        features : ndarray (Lk, feature_dim)
            Of the points at `key_pos`.

        Returns
        -------
        features : ndarray (Lq, d_model)
        """
        ...

    @abstractmethod
    def distance_attention(self, positions: Array, features: Array, radius: float) -> Array:
        """Attend from each point to the points within `radius` of it.

        Parameters
        ----------
        positions : ndarray (N, geometric_dim)
        features : ndarray (N, feature_dim)
        radius : float

        Returns
        -------
        features : ndarray (N, d_model)
        """
        ...

    @abstractmethod
    def geometric_dim(self) -> int:
        """Coordinates of a point: 2 in the plane, 3 in space."""
        ...

    def is_rotation_equivariant(self) -> bool:
        """Whether rotating the points rotates the result; False unless overridden."""
        return False

    def is_translation_invariant(self) -> bool:
        """Whether moving all points alike changes nothing; True unless overridden."""
        return True


@runtime_checkable
class SparseAttention(Attention, Protocol):
    """Attention of each query to some keys only. No mechanism of this package has it yet."""

    @abstractmethod
    def sparse_forward(
        self, query: Array, key: Array, value: Array, connectivity_pattern: csr_array | Sequence[csr_array]
    ) -> tuple[Array, list[csr_array]]:
        """Attend where a pattern has entries.

        `GraphAttention.sparse_forward` shares the name and takes two arguments; the module's documentation says how
        one class can have both.

        Parameters
        ----------
        query : ndarray (B, Lq, d_model)
        key, value : ndarray (B, Lk, d_model)
        connectivity_pattern : scipy.sparse.csr_array (Lq, Lk), or a sequence of B
            Query i attends to key j where entry (i, j) is stored. One matrix serves the whole batch.

        Returns
        -------
        output : ndarray (B, Lq, d_model)
        weights : list of B scipy.sparse.csr_array (Lq, Lk)
            One per row of the batch, where ruvector-attention has one matrix for all; the mean over heads.
        """
        ...

    @abstractmethod
    def sparsity_ratio(self) -> float:
        """The share of pairs that do not attend: 0.0 is dense, 1.0 is nothing at all."""
        ...

    @abstractmethod
    def max_attended_positions(self) -> int | None:
        """The most keys a query attends to; None if there is no limit."""
        ...

    def supports_dynamic_sparsity(self) -> bool:
        """Whether the pattern may depend on the inputs; False unless overridden."""
        return False


@runtime_checkable
class TrainableAttention(Attention, Protocol):
    """Attention with parameters. A cache and gradients are of whatever type the mechanism gives and takes."""

    @abstractmethod
    def backward(self, grad_output: Array, cache: Any, /) -> Any:
        """The gradients of the parameters and of the inputs.

        Parameters
        ----------
        grad_output : ndarray (B, Lq, d_model)
        cache
            What a forward pass kept for this.

        Returns
        -------
        gradients
            As `update_parameters` takes them.
        """
        ...

    @abstractmethod
    def update_parameters(self, gradients: Any, learning_rate: float) -> None:
        """Take one step of gradient descent: subtract `learning_rate` times the gradient.

        Parameters
        ----------
        gradients
            As `backward` returns them.
        learning_rate : float
        """
        ...

    @abstractmethod
    def parameter_count(self) -> int:
        """How many numbers `get_parameters` gives."""
        ...

    @abstractmethod
    def get_parameters(self) -> Array:
        """All parameters in one array of one axis, a copy."""
        ...

    @abstractmethod
    def set_parameters(self, parameters: Array, /) -> None:
        """Replace all parameters.

        Parameters
        ----------
        parameters : ndarray (parameter_count(),)
            In the order of `get_parameters`.
        """
        ...

    @abstractmethod
    def zero_grad(self) -> None:
        """Forget accumulated gradients."""
        ...

    def regularization_loss(self, l2_weight: float) -> float:
        """`l2_weight` times the sum of the squared parameters.

        Parameters
        ----------
        l2_weight : float

        Returns
        -------
        float
        """
        parameters = np.asarray(self.get_parameters(), np.float64)
        return float(l2_weight * np.vdot(parameters, parameters))
