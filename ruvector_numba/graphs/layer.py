"""The base of the layers on graphs: nodes and edges checked, self-loops, and all that comes after the attention.

A layer says how its scores and values are made of the nodes (`_attend`), what it adds to the heads once they are joined
or averaged (`_finish`), and how gradients go back through both (`_finish_back`, `_attend_back`). The rest is here:
which graph, which edge attributes, dropout, and ruvector-attention's `graph_forward` and `sparse_forward`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .. import checks, gpu, layers
from ..arrays import Array
from ..errors import DimensionMismatchError, InvalidConfigError, InvalidInputError
from ..parameters import ParameterSet, Trainable
from ..protocols import GraphAttention
from ..values import shown, switch
from . import edges
from .edge_terms import edge_gradients
from .edge_values import checked_edges, edge_attributes
from .graph import CSRGraph
from .inputs import Inputs, check_not_swapped, check_owner, features, graph_of, is_pair, size
from .matrices import along_matrix
from .neighbors import Past, checked_aggregation, packed
from .results import Back, Gated, GraphCache, GraphGradients, Record
from .starting import starting_parameters

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..plan.csr import Made

__all__ = ["GraphCache", "GraphGradients", "GraphLayer"]

Nodes = ArrayLike | tuple[ArrayLike, ArrayLike | None]


class GraphLayer(Trainable, GraphAttention):
    """The base of `GAT`, `GATv2` and `GraphTransformer`; not a layer by itself."""

    fill_value: str | ArrayLike = "mean"
    add_self_loops: edges.LoopPolicy = "keep"
    needs_target = True  # whether scores are made of targets' features

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        heads: int,
        concat: bool,
        dropout: float,
        edge_dim: int | None,
        bias: bool,
        aggregation: str,
        seed: int | None,
    ) -> None:
        self.is_bipartite = isinstance(in_channels, tuple | list)
        widths = tuple(cast(Any, in_channels)) if self.is_bipartite else (in_channels, in_channels)
        if len(widths) != 2:
            raise InvalidConfigError(
                f"in_channels is {shown(in_channels)}", hint="give a number, or (sources, targets)"
            )
        self.in_channels = tuple(size("in_channels", n) for n in widths)
        self.out_channels, self.heads = size("out_channels", out_channels), size("heads", heads)
        self.edge_dim = None if edge_dim is None else size("edge_dim", edge_dim)
        self.concat, self.bias = switch("concat", concat, InvalidConfigError), switch("bias", bias, InvalidConfigError)
        self.aggregation = checked_aggregation(aggregation)
        try:
            self.dropout, _ = checks.dropout(dropout, 0)
        except InvalidInputError:
            raise InvalidConfigError(f"dropout is {shown(dropout)}", hint="give a probability, 0 to 1") from None
        self._random, self._identity = layers.generator(seed), layers.identity()

    def _start(self, shapes: dict[str, tuple[int, ...]], dtype: DTypeLike) -> None:
        self._parameters = starting_parameters(self._random, shapes, dtype)

    @property
    def width(self) -> int:
        """Channels of the output."""
        return self.out_channels * (self.heads if self.concat else 1)

    def d_model(self) -> int:
        return self.width

    def name(self) -> str:
        return type(self).__name__

    def num_graph_heads(self) -> int:
        return self.heads

    def supports_edge_features(self) -> bool:
        return self.edge_dim is not None

    def supports_heterogeneous(self) -> bool:
        return False

    def supports_masking(self) -> bool:
        return False

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        return f"{self.name()}({given})"

    def _settings(self) -> dict[str, Any]:
        """The arguments that make this layer."""
        in_channels = list(self.in_channels) if self.is_bipartite else self.in_channels[0]
        names = ("out_channels", "heads", "concat", "dropout", "edge_dim", "bias", "aggregation")
        return {"in_channels": in_channels} | {name: getattr(self, name) for name in names}

    # --- forward ----------------------------------------------------------------------------------------------------
    def __call__(
        self,
        x: Nodes,
        graph: Any,
        edge_attr: ArrayLike | None = None,
        *,
        edge_weight: ArrayLike | None = None,
        device: str | None = None,
    ) -> Array:
        """The output alone, as `forward`."""
        return self.forward(x, graph, edge_attr, edge_weight=edge_weight, device=device)

    def forward(  # type: ignore[override]  # a graph layer takes nodes and edges, not query, key and value
        self,
        x: Nodes,
        graph: Any,
        edge_attr: ArrayLike | None = None,
        *,
        edge_weight: ArrayLike | None = None,
        device: str | None = None,
    ) -> Array:
        """Attend to neighbours, without dropout.

        Parameters
        ----------
        x : array (N, in_channels), float32 or float64; or a pair
            Features of the nodes; for a bipartite graph those of sources and of targets, (x_source, x_target), where
            x_target may be None in `GAT`.
        graph : CSRGraph, or array_like of integers (2, E)
            The edges: source j above target i, which attends to j. A `CSRGraph` is checked and grouped only once. So is
            an array that is given again, to this or another layer: as long as it lives its graph is kept (the last 64,
            at most ``RUVECTOR_NUMBA_KEEP`` MB with all that was made of them), and each call looks whether it still
            says the same.
        edge_attr : array (E, edge_dim) or, for edge_dim 1, (E,), optional
            Features of edges, in the order of the edges as they were given.
        edge_weight : array (E,), optional
            Multiplies the coefficients after the softmax. Self-loops that the layer puts in have weight 1.
        device : {"cuda", "cpu"}, optional
            "cuda" moves arrays of NumPy to the GPU and the results back. Without it, arrays that lie on a GPU (float32,
            float16 or bfloat16) stay there, and so do the results; the graph is a `CSRGraph`.

        Returns
        -------
        array (Nt, heads * out_channels), or (Nt, out_channels) if heads are averaged
            In the dtype of `x`.

        Raises
        ------
        InvalidInputError
            If features, attributes or weights are missing, hold other than float32 or float64 numbers, or differ in
            dtype, the layer has no `edge_dim` and `edge_attr` is given, or the dtype cannot hold its `negative_slope`
            or `scale`.
        DimensionMismatchError
            If an array does not have a row for each node or each edge, or another number of channels.
        GraphStructureError
            If `graph` is no graph, or an edge has no node at one of its ends.

        Examples
        --------
        >>> import numpy as np, ruvector_numba as rv
        >>> x, edges = np.ones((3, 4), np.float32), [[0, 1], [2, 2]]
        >>> rv.GAT(4, 8, heads=2, concat=False, seed=0).forward(x, edges).shape
        (3, 8)
        """
        return self._run(x, graph, edge_attr, edge_weight, 0.0, 0, keeps=False, device=device)[0]

    def forward_cached(
        self,
        x: Nodes,
        graph: Any,
        edge_attr: ArrayLike | None = None,
        training: bool = True,
        *,
        edge_weight: ArrayLike | None = None,
        seed: int | None = None,
        device: str | None = None,
    ) -> tuple[Array, GraphCache]:
        """The output, and what `backward` needs; with dropout of the coefficients if `training`.

        Parameters
        ----------
        x, graph, edge_attr, edge_weight, device
            As in `forward`.
        training : bool, default True
            Whether coefficients are dropped, with the probability `dropout` of the layer.
        seed : int, optional
            Decides which are dropped; without it, the layer's own generator does.

        Returns
        -------
        output : array (Nt, heads * out_channels), or (Nt, out_channels) if heads are averaged
        cache : GraphCache

        Raises
        ------
        InvalidInputError, DimensionMismatchError, GraphStructureError
            As in `forward`; InvalidInputError also for a `seed` that is no whole number from 0 to 2**63 - 1.
        """
        dropout, seed = layers.dropout(self, training, seed, self._random)
        output, record = self._run(x, graph, edge_attr, edge_weight, dropout, seed, device=device)
        return output, GraphCache(record)

    def _run(
        self,
        x: Nodes,
        graph: Any,
        edge_attr: ArrayLike | None,
        edge_weight: ArrayLike | None,
        dropout: float,
        seed: int | None,
        keeps: bool = True,
        device: str | None = None,
    ) -> tuple[Array, Any]:
        check_not_swapped(x, graph)
        nodes = x if isinstance(x, tuple | list) else (x,)
        if gpu.concerns(device, *nodes, edge_attr, edge_weight):
            from ..gpu import graph_layers as gpu_graph_layers

            return gpu_graph_layers.run(self, x, graph, edge_attr, edge_weight, dropout, seed, device)
        inputs = self._inputs(x, graph, edge_attr, edge_weight, *checks.dropout(dropout, seed))
        parameters = self._parameters.as_type(inputs.source.dtype)
        past, projected = self._attend(inputs, parameters, keeps)
        output, gated = self._finish(self._join_heads(past.output), inputs, parameters)
        return output, Record(self, inputs, parameters, past, projected, gated)

    def _attend(self, inputs: Inputs, p: ParameterSet, keeps: bool) -> tuple[Past, Array | None]:
        """The pass over the edges, and the record's `projected`."""
        raise NotImplementedError

    def _join_heads(self, attended: Array) -> Array:
        """(N, width): heads (N, H, C) side by side, a view, or their mean."""
        return attended.reshape(len(attended), self.width) if self.concat else attended.mean(axis=1)

    def _join_heads_back(self, grad: Array) -> Array:
        """The gradient of each head, from that of what `_join_heads` gave."""
        if self.concat:
            return grad.reshape(len(grad), self.heads, self.out_channels)
        return np.repeat(grad[:, None, :] / grad.dtype.type(self.heads), self.heads, axis=1)

    def _finish(self, attended: Array, inputs: Inputs, p: ParameterSet) -> tuple[Array, Gated | None]:
        """The output, from what `_join_heads` gave, which may be written to; and the record's `gated`."""
        raise NotImplementedError

    # --- backward ---------------------------------------------------------------------------------------------------
    def backward(self, grad_output: ArrayLike, cache: GraphCache) -> GraphGradients:
        """The gradients of a loss by all parameters and inputs, given its gradient by the output. Exact.

        Parameters
        ----------
        grad_output : array of the shape and dtype of the output
        cache : GraphCache
            From this layer's `forward_cached`. The gradients are those of that call, with its parameters. A
            layer and its copies take each other's caches.

        Returns
        -------
        GraphGradients

        Raises
        ------
        InvalidInputError
            If `cache` is none of this layer's, or `grad_output` has another dtype than the output.
        DimensionMismatchError
            If `grad_output` has another shape than the output.

        Examples
        --------
        >>> import numpy as np, ruvector_numba as rv
        >>> layer = rv.GAT(4, 8, heads=2, seed=0)
        >>> output, cache = layer.forward_cached(np.ones((3, 4), np.float32), [[0, 1], [2, 2]])
        >>> layer.backward(output, cache).node_features.shape
        (3, 4)
        """
        if not isinstance(cache, GraphCache):
            hint = "give what this layer's forward_cached returned"
            raise InvalidInputError(f"cache is a {type(cache).__name__}, not a GraphCache", hint=hint)
        record: Any = cache._record
        check_owner(self, record.layer)
        if not isinstance(record, Record):
            from ..gpu import graph_layers as gpu_graph_layers

            return gpu_graph_layers.backward(grad_output, record)
        output = record.past.output
        grad = checks.gradient("grad_output", grad_output, (len(output), record.layer.width), output.dtype)
        return record.layer._backward(grad, record)

    def _backward(self, grad: Array, record: Record) -> GraphGradients:
        inputs = record.inputs
        grad, dtarget, found = self._finish_back(grad, record)
        made = record.past.backward(self._join_heads_back(grad), joined=self._side_by_side(inputs))
        back = self._attend_back(made, record, dtarget)
        found = found | back.parameters
        dtarget = np.zeros_like(inputs.target) if back.target is None and inputs.target is not None else back.target
        nodes: Any = (back.source, dtarget) if inputs.is_pair else back.source
        of_edges = edge_gradients(inputs, back.edge_attr, made.edge_weight, self.add_self_loops, self.fill_value)
        return GraphGradients({name: found[name] for name in record.parameters}, nodes, *of_edges)

    def _finish_back(self, grad: Array, record: Record) -> tuple[Array, Array | None, dict[str, Array]]:
        """The gradients of what `_finish` was given, of the targets that it added, and of its parameters by name."""
        raise NotImplementedError

    def _side_by_side(self, inputs: Inputs) -> tuple[str, ...]:
        """Which of the attention's gradients go back through one product, and so shall lie side by side."""
        return ()

    def _attend_back(self, made: Made, record: Record, so_far: Array | None) -> Back:
        """The gradients through the attention, from its own. That of the targets is added to `so_far`, in place."""
        raise NotImplementedError

    # --- ruvector-attention's graph interface -----------------------------------------------------------------------
    def graph_forward(
        self, node_features: Any, edge_index: Any, edge_attr: ArrayLike | None = None
    ) -> tuple[Array, Array]:
        """The output, and the coefficients of the caller's edges.

        Parameters
        ----------
        node_features, edge_index, edge_attr
            As x, graph and edge_attr of `forward`.

        Returns
        -------
        features : array (N, d_model)
        coefficients : array (E, heads)
            In the order of `edge_index`. Where the layer replaces self-loops, one that was given has the coefficient of
            the node's new one; those of nodes without one are left out, so sums over a node's edges may be below 1.

        Raises
        ------
        InvalidInputError, DimensionMismatchError, GraphStructureError
            As in `forward`; InvalidInputError also for arrays on a GPU.
        """
        if gpu.any_on_gpu(node_features):
            hint = "take node_features to the CPU, or use forward_cached and its cache's coefficients()"
            raise InvalidInputError("graph_forward is given arrays on the GPU", hint=hint)
        output, record = self._run(node_features, edge_index, edge_attr, None, 0.0, 0)
        inputs, all_edges = record.inputs, record.past.coefficients()  # with the self-loops that were put in
        if inputs.graph is inputs.given:
            return output, all_edges
        E, loops = inputs.given.num_edges, min(inputs.given.num_sources, inputs.given.num_targets)
        if self.add_self_loops == "add":
            return output, all_edges[:E]
        source, target = inputs.given.to_edge_index()
        is_loop = source == target
        coefficients = np.empty((E, self.heads), all_edges.dtype)
        coefficients[~is_loop] = all_edges[: len(all_edges) - loops]
        coefficients[is_loop] = all_edges[len(all_edges) - loops + source[is_loop]]
        return output, coefficients

    def sparse_forward(self, node_features: Any, adjacency: Any) -> tuple[Array, Any]:
        """The output, and the coefficients as a matrix.

        Parameters
        ----------
        node_features : array (N, in_channels)
        adjacency : scipy.sparse matrix (N, N)
            Node i, a row, attends to node j where an entry is stored. In a layer with ``edge_dim=1`` its value is the
            edge's feature, else it does not count.

        Returns
        -------
        features : array (N, d_model)
        coefficients : scipy.sparse.csr_array (N, N)
            With the entries of `adjacency`; the mean over heads.

        Raises
        ------
        InvalidInputError, DimensionMismatchError, GraphStructureError
            As in `graph_forward`; GraphStructureError also if `adjacency` is no sparse matrix, or holds complex numbers
            that are to be features.
        """
        return along_matrix(self.graph_forward, node_features, adjacency, self.edge_dim == 1)

    # --- files ------------------------------------------------------------------------------------------------------
    def _file_header(self) -> dict[str, str]:
        return {"kind": self.name(), "settings": json.dumps(self._settings(), default=_listed)}

    @classmethod
    def _of_file_header(cls, header: dict[str, str]) -> Self:
        if header["kind"] != cls.__name__:
            raise InvalidConfigError(f"the file is of a {header['kind'][:50]}")
        settings = json.loads(header["settings"])
        if isinstance(settings["in_channels"], list):
            settings["in_channels"] = tuple(settings["in_channels"])
        return cls(**settings)

    # --- checks -----------------------------------------------------------------------------------------------------
    def _inputs(self, x: Nodes, graph: Any, edge_attr: Any, edge_weight: Any, dropout: float, seed: int) -> Inputs:
        inputs = self._checked(x, graph, edge_attr, edge_weight, dropout, seed)
        attr, weight = (None if a is None else packed(a) for a in (inputs.edge_attr, inputs.edge_weight))
        given, policy = inputs.given, self.add_self_loops
        if inputs.graph is not given:
            if attr is not None:
                attr = given.edge_attr_with_self_loops(attr, policy, self.fill_value)
            if weight is not None:
                weight = given.edge_attr_with_self_loops(weight, policy, 1.0)
        return inputs._replace(edge_attr=attr, edge_weight=weight)

    def _checked(self, x: Nodes, graph: Any, edge_attr: Any, edge_weight: Any, dropout: float, seed: int) -> Inputs:
        """Edge arrays still belong to the caller's edges; self-loops are added later."""
        source, target, pair = self._nodes(x)
        self._check_range(source.dtype)
        given = graph_of(graph, source, target, pair)
        attr = self._attr(edge_attr, given, source.dtype)
        weight = checked_edges("edge_weight", edge_weight, (given.num_edges,), source.dtype)
        attr_shape = None if edge_attr is None else np.shape(edge_attr)
        whole = given.with_self_loops(self.add_self_loops)
        return Inputs(source, target, pair, given, whole, attr, weight, attr_shape, dropout, seed)

    def _check_range(self, dtype: np.dtype[Any]) -> None:
        """Refuse numbers among the layer's settings that arithmetic of this type cannot hold."""

    def _nodes(self, x: Any) -> tuple[Array, Array | None, bool]:
        pair = is_pair(x)
        if pair and len(x) != 2:
            raise InvalidInputError(f"x is a tuple of {len(x)}", hint="give (x_source, x_target)")
        source, target = x if pair else (x, x)
        if self.is_bipartite and not pair and self.in_channels[0] != self.in_channels[1]:
            hint = "the layer was built for sources and targets: give (x_source, x_target)"
            raise InvalidInputError("x is one array", hint=hint)
        if source is None:
            raise InvalidInputError("x_source is None" if pair else "x is None", hint="give an array (nodes, channels)")
        if target is None and self.needs_target:
            raise InvalidInputError("x_target is None", hint=f"{self.name()} needs features of the targets")
        names = ("x_source", "x_target") if pair else ("x", "x")
        arrays = [
            None if one is None else features(name, one) for name, one in zip(names, (source, target), strict=True)
        ]
        if not pair:
            arrays[1] = arrays[0]
        first = cast(Array, arrays[0])
        for name, array, width in zip(names, arrays, self.in_channels, strict=True):
            if array is not None and array.shape[1] != width:
                hint = f"the layer was built for {width} channels of {name}"
                raise DimensionMismatchError(width, array.shape[1], shapes={f"{name}.shape": array.shape}, hint=hint)
            if array is not None and array.dtype != first.dtype:
                dtypes = {"x_source.dtype": first.dtype, "x_target.dtype": array.dtype}
                raise InvalidInputError("x_source and x_target differ in dtype", shapes=dtypes, hint="cast them to one")
        return first, arrays[1], pair

    def _attr(self, edge_attr: Any, graph: CSRGraph, dtype: np.dtype[Any]) -> Array | None:
        if edge_attr is None:
            if self.edge_dim is not None and graph.num_edges:
                hint = f"give an array (E, {self.edge_dim}), one row for each edge"
                raise InvalidInputError(f"edge_attr is None, edge_dim is {self.edge_dim}", hint=hint)
            return None if self.edge_dim is None else np.zeros((0, self.edge_dim), dtype)
        if self.edge_dim is None:
            raise InvalidInputError("the layer has no edge_dim, edge_attr was given", hint="build it with edge_dim=...")
        return edge_attributes("edge_attr", edge_attr, graph.num_edges, self.edge_dim, dtype)


def _listed(fill_value: Any) -> Any:
    return np.asarray(fill_value).tolist()
