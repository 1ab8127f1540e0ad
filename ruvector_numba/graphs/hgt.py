"""The heterogeneous graph transformer: nodes and edges of several types, one softmax over all edges into a node.

A source's key along a type of edges is its features times two matrices, that of its own type and that of the edges': so
times their product. All of it is attention over one graph, whose targets are the nodes of all types and whose sources
are, for each type of edges, the nodes that these begin at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .. import checks, layers
from ..arrays import Array
from ..errors import InvalidConfigError, InvalidInputError
from ..parameters import ParameterSet, Trainable
from ..projection import linear_backward, only_seen
from ..protocols import GraphAttention
from ..values import switch
from .hetero import (
    EdgeType,
    attributes_by_type,
    by_type,
    checked_metadata,
    joined_edges,
    known_types,
    nodes_by_type,
    parameter_key,
    weights_of_edges,
)
from .hgt_products import along, along_back, flat, gate_of, linear_back, linear_rows
from .inputs import check_owner, size
from .matrices import along_matrix
from .neighbors import Past
from .results import HeteroCache, HeteroGradients, HeteroRecord
from .starting import starting_parameters

__all__ = ["HGT", "HeteroCache", "HeteroGradients"]

Nodes = Mapping[str, ArrayLike]
Edges = Mapping[EdgeType, Any]
Attributes = Mapping[EdgeType, ArrayLike] | None


class HGT(Trainable, GraphAttention):
    """The heterogeneous graph transformer: the meaning, names and shapes of PyTorch Geometric's `HGTConv`.

    For an edge of type r from j, of node type s, to i, of node type t, with k, q, v = kqv_lin_s(x_j), kqv_lin_t(x_i),
    kqv_lin_s(x_j), and in a head of D = out_channels / heads channels:

    a = p_rel_r q . (k k_rel_r [+ lin_edge_r(edge_attr)]) / sqrt(D);  o_i is the sum of softmax(a)
    (v v_rel_r [+ lin_edge_r(edge_attr)]) over the edges of all types into i;  the output is out_lin_t(gelu(o_i)), and
    where it is as wide as x_i, g out_lin_t(gelu(o_i)) + (1 - g) x_i with g = sigmoid(skip_t).

    Parameters
    ----------
    in_channels : int, or dict of str to int by node type
    out_channels : int
        Channels of the output, of all heads together.
    metadata : (list of str, list of (str, str, str))
        The node types, and the edge types as (source type, relation, target type).
    heads : int, default 1
        Attention heads, which share `out_channels` evenly.
    edge_dim : int, or dict of (str, str, str) to int, optional
        Channels of the edge attributes, of all edge types or of those in the dictionary. `HGTConv` has none.
    seed : int, optional
        Seed of the initial parameters.
    dtype : float32 or float64, default float32
        Type of the initial parameters. What is computed has the dtype of the inputs.

    Raises
    ------
    InvalidConfigError
        If `metadata` does not describe types of nodes and edges, a number of channels or heads is none, `heads` does
        not divide `out_channels`, or a dictionary names a type that is not in `metadata`.
    InvalidInputError
        If `dtype` is neither float32 nor float64.
    OutOfMemoryError
        If this machine has no memory for so many parameters.

    References
    ----------
    Hu et al., "Heterogeneous Graph Transformer", 2020, without its relative temporal encoding.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> metadata = ["author", "paper"], [("author", "writes", "paper"), ("paper", "cites", "paper")]
    >>> layer = rv.HGT({"author": 3, "paper": 5}, 8, metadata, heads=2, seed=0)
    >>> x = {"author": np.ones((2, 3)), "paper": np.ones((4, 5))}
    >>> output = layer(x, {("author", "writes", "paper"): [[0, 1], [0, 3]], ("paper", "cites", "paper"): [[0], [3]]})
    >>> {kind: found.shape for kind, found in output.items()}
    {'paper': (4, 8)}
    """

    def __init__(
        self,
        in_channels: int | Mapping[str, int],
        out_channels: int,
        metadata: tuple[Any, Any],
        heads: int = 1,
        *,
        edge_dim: int | Mapping[EdgeType, int] | None = None,
        seed: int | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.node_types, self.edge_types = checked_metadata(metadata)
        self.in_channels = by_type("in_channels", in_channels, self.node_types)
        if len(self.in_channels) < len(self.node_types):
            missing = ", ".join(repr(kind) for kind in self.node_types if kind not in self.in_channels)
            raise InvalidConfigError(f"in_channels lacks {missing}", hint="give a number for each node type")
        self.out_channels, self.heads = size("out_channels", out_channels), size("heads", heads)
        if self.out_channels % self.heads:
            sizes = {"out_channels": self.out_channels, "heads": self.heads}
            raise InvalidConfigError("heads does not divide out_channels", shapes=sizes, hint="heads share them evenly")
        self.edge_dim = {} if edge_dim is None else by_type("edge_dim", edge_dim, self.edge_types)
        self._identity = layers.identity()
        self._parameters = starting_parameters(layers.generator(seed), self._shapes(), dtype, ones=("skip.", "p_rel."))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        F, D = self.out_channels, self.out_channels // self.heads
        shapes: dict[str, tuple[int, ...]] = {}
        for kind, n in self.in_channels.items():
            shapes |= {f"kqv_lin.lins.{kind}.weight": (3 * F, n), f"kqv_lin.lins.{kind}.bias": (3 * F,)}
        for kind in self.node_types:
            shapes |= {f"out_lin.lins.{kind}.weight": (F, F), f"out_lin.lins.{kind}.bias": (F,)}
        shapes |= {f"{name}.weight": (self.heads * len(self.edge_types), D, D) for name in ("k_rel", "v_rel")}
        shapes |= {f"skip.{parameter_key(kind)}": (1,) for kind in self.node_types}
        shapes |= {f"p_rel.{parameter_key(*kind)}": (1, self.heads) for kind in self.edge_types}
        return shapes | {f"lin_edge.{parameter_key(*kind)}.weight": (F, n) for kind, n in self.edge_dim.items()}

    def d_model(self) -> int:
        return self.out_channels

    def name(self) -> str:
        return "HGT"

    def num_graph_heads(self) -> int:
        return self.heads

    def supports_edge_features(self) -> bool:
        return bool(self.edge_dim)

    def supports_heterogeneous(self) -> bool:
        return True

    def supports_masking(self) -> bool:
        return False

    def __repr__(self) -> str:
        metadata, more = (self.node_types, self.edge_types), f", edge_dim={self.edge_dim}" if self.edge_dim else ""
        return f"HGT({self.in_channels}, {self.out_channels}, {metadata}, heads={self.heads}{more})"

    # --- forward ----------------------------------------------------------------------------------------------------
    def __call__(
        self,
        x_dict: Nodes,
        edge_index_dict: Edges,
        edge_attr_dict: Attributes = None,
        *,
        edge_weight: Attributes = None,
    ) -> dict[str, Array]:
        """As `forward`."""
        return self.forward(x_dict, edge_index_dict, edge_attr_dict, edge_weight=edge_weight)

    def forward(  # type: ignore[override]  # dictionaries of nodes and edges, not query, key and value
        self,
        x_dict: Nodes,
        edge_index_dict: Edges,
        edge_attr_dict: Attributes = None,
        *,
        edge_weight: Attributes = None,
    ) -> dict[str, Array]:
        """Attend to neighbours of all types. The class has an example.

        Parameters
        ----------
        x_dict : dict of str to array (N, in_channels of the type), float32 or float64
            Features of the nodes. A type may be missing if no edges are given of types that begin or end there.
        edge_index_dict : dict of (str, str, str) to CSRGraph, or array_like of integers (2, E)
            The edges of each type: sources, counted within their type, above targets. A type that is missing has no
            edges. They are joined to one graph when they are first given together, as in `GAT.forward`.
        edge_attr_dict : dict of (str, str, str) to array (E, edge_dim) or, for edge_dim 1, (E,), optional
            Features of the edges, of each type that has an edge_dim.
        edge_weight : dict of (str, str, str) to array (E,), optional
            Multiplies the coefficients after the softmax; 1 for the types that are missing.

        Returns
        -------
        dict of str to array (N, out_channels)
            For each node type that some edge type of `metadata` leads to, whether or not it has edges here.

        Raises
        ------
        InvalidInputError
            If features, attributes or weights are missing, no numbers, or of different dtypes, a type is unknown, or
            an array lies on a GPU.
        DimensionMismatchError
            If an array does not have a row for each node or each edge, or another number of channels.
        GraphStructureError
            If an edge has no node at one of its ends.
        """
        return self._run(x_dict, edge_index_dict, edge_attr_dict, edge_weight, keeps=False)[0]

    def forward_cached(
        self,
        x_dict: Nodes,
        edge_index_dict: Edges,
        edge_attr_dict: Attributes = None,
        training: bool = True,
        *,
        edge_weight: Attributes = None,
    ) -> tuple[dict[str, Array], HeteroCache]:
        """The output, and what `backward` needs.

        Parameters
        ----------
        x_dict, edge_index_dict, edge_attr_dict, edge_weight
            As in `forward`.
        training : bool, default True
            Ignored (HGT has no dropout); accepted so that all layers have the same signature.

        Returns
        -------
        output : dict of str to array (N, out_channels)
        cache : HeteroCache

        Raises
        ------
        InvalidInputError, DimensionMismatchError, GraphStructureError
            As in `forward`; InvalidInputError also for a `training` that is neither True nor False.
        """
        switch("training", training)
        return self._run(x_dict, edge_index_dict, edge_attr_dict, edge_weight, keeps=True)

    def _run(
        self, x_dict: Any, edge_index_dict: Any, edge_attr_dict: Any, edge_weight: Any, keeps: bool
    ) -> tuple[Any, HeteroCache]:
        from ..plan import csr as plan
        from ..plan import gelu

        nodes = nodes_by_type(x_dict, self.in_channels)
        joined = joined_edges(self.edge_types, edge_index_dict, nodes)
        p = self._parameters.as_type(next(iter(nodes.values())).dtype)
        attr, attr_shapes = attributes_by_type(edge_attr_dict, self.edge_dim, joined, p.dtype)
        weight, weighted = weights_of_edges(edge_weight, joined, p.dtype)
        H, D = self.heads, self.out_channels // self.heads
        weights = {node: self._weights(node, p) for node in nodes}
        key_value = np.empty((joined.graph.num_sources, 2, H, D), p.dtype)
        for kind, at in joined.sources.items():
            turned = self._turn(kind, p).swapaxes(-1, -2) @ weights[kind[0]][::2]
            linear_rows(nodes[kind[0]], turned[..., :-1], turned[..., -1], key_value[at])
        query = np.empty((joined.graph.num_targets, H, D), p.dtype)
        for node, at in joined.targets.items():
            linear_rows(nodes[node], weights[node][1, ..., :-1], weights[node][1, ..., -1], query[at])
        edge_rows = None  # what edges add to keys and to values
        if attr:
            edge_rows = np.zeros((joined.graph.num_edges, 2, H, D), p.dtype)
            for kind, x in attr.items():
                linear_rows(x, along(kind, p, *2 * [self._of_edges(kind, p)]), None, edge_rows[joined.edges[kind]])
        terms = plan.NeighborTerms(
            plan.DOT, key_value[:, 0], query, key_value[:, 1], scale=1 / math.sqrt(D), edge_weight=weight,
            edge=None if edge_rows is None else edge_rows[:, 0],
            edge_value=None if edge_rows is None else edge_rows[:, 1],
        )  # fmt: skip
        past = Past(joined.graph, terms, keeps)
        active = {node: gelu.forward(past.output[at]) for node, at in joined.targets.items()}
        output = {node: self._finish(node, a, nodes[node], p) for node, a in active.items()}
        return output, HeteroCache(HeteroRecord(self, nodes, joined, attr, attr_shapes, weighted, p, past, active))

    def _finish(self, kind: str, active: Array, x: Array, p: ParameterSet) -> Array:
        a, name = active.reshape(len(x), self.out_channels), f"out_lin.lins.{kind}"
        output = np.empty_like(a)
        linear_rows(a, p[f"{name}.weight"], p[f"{name}.bias"], output)
        if x.shape[1] == self.out_channels:
            gate = gate_of(kind, p)
            output *= gate
            output += (1 - gate) * x
        return output

    # --- weights ----------------------------------------------------------------------------------------------------
    def _weights(self, node: str, p: ParameterSet) -> Array:
        """(3, H, D, in + 1): of key, query and value of a type of nodes, each row's bias behind its weights."""
        weight, bias = p[f"kqv_lin.lins.{node}.weight"], p[f"kqv_lin.lins.{node}.bias"]
        return np.concatenate([weight, bias[:, None]], axis=1).reshape(3, self.heads, -1, weight.shape[1] + 1)

    def _turn(self, kind: EdgeType, p: ParameterSet) -> Array:
        """(2, H, D, D): what keys and values are multiplied by along a type of edges."""
        return along(kind, p, self._of_relation("k_rel", kind, p), self._of_relation("v_rel", kind, p))

    def _of_relation(self, name: str, kind: EdgeType, p: Mapping[str, Array]) -> Array:
        """(H, D, D), a view: HGTConv counts the edge types of the first head, then those of the next."""
        weight = p[f"{name}.weight"]
        return weight.reshape(self.heads, -1, *weight.shape[1:])[:, self.edge_types.index(kind)]

    def _of_edges(self, kind: EdgeType, p: Mapping[str, Array]) -> Array:
        """(H, D, edge_dim), a view"""
        return p[f"lin_edge.{parameter_key(*kind)}.weight"].reshape(self.heads, -1, self.edge_dim[kind])

    # --- backward ---------------------------------------------------------------------------------------------------
    def backward(self, grad_output: Nodes, cache: HeteroCache) -> HeteroGradients:
        """The gradients of a loss by all parameters and inputs, given those by the outputs. Exact.

        Parameters
        ----------
        grad_output : dict of str to array of the shape and dtype of the output
            A type that is missing counts as 0.
        cache : HeteroCache
            From this layer's `forward_cached`. The gradients are those of that call, with its parameters.

        Returns
        -------
        HeteroGradients

        Raises
        ------
        InvalidInputError
            If `cache` is none of this layer's, or `grad_output` holds an unknown type or another dtype.
        DimensionMismatchError
            If an array of `grad_output` has another shape than the output.

        Examples
        --------
        >>> import numpy as np, ruvector_numba as rv
        >>> layer = rv.HGT(3, 4, (["n"], [("n", "to", "n")]), heads=2, seed=0)
        >>> output, cache = layer.forward_cached({"n": np.ones((3, 3))}, {("n", "to", "n"): [[0, 1], [2, 2]]})
        >>> layer.backward(output, cache).node_features["n"].shape
        (3, 3)
        """
        if not isinstance(cache, HeteroCache):
            hint = "give what this layer's forward_cached returned"
            raise InvalidInputError(f"cache is a {type(cache).__name__}, not a HeteroCache", hint=hint)
        record = cache._record
        check_owner(self, record.layer)
        grads = {}
        for kind, g in known_types("grad_output", grad_output, list(record.joined.targets)).items():
            shape = len(record.nodes[kind]), record.layer.out_channels
            grads[kind] = checks.gradient(f"grad_output[{kind!r}]", g, shape, record.parameters.dtype)
        return record.layer._backward(grads, record)

    def _backward(self, grads: dict[str, Array], record: HeteroRecord) -> HeteroGradients:
        joined, p, nodes = record.joined, record.parameters, record.nodes
        gradients = {name: np.zeros_like(x) for name, x in p.items()}
        dnodes = {node: np.zeros(x.shape, x.dtype) for node, x in nodes.items()}
        dattended = np.zeros_like(record.past.output)
        for node, grad in grads.items():
            dattended[joined.targets[node]] = self._finish_back(node, grad, record, gradients, dnodes[node])
        back = record.past.backward(dattended)
        assert back.key is not None  # dot products have keys
        weights = {node: self._weights(node, p) for node in nodes}
        dweights = {node: np.zeros_like(weight) for node, weight in weights.items()}
        for node, at in joined.targets.items():
            dx, dweights[node][1] = linear_back(back.query[at], nodes[node], weights[node][1])
            dnodes[node] += dx
        for kind, at in joined.sources.items():
            node, turn, weight = kind[0], self._turn(kind, p), weights[kind[0]][::2]
            grad = np.stack([back.key[at], back.value[at]], axis=1)
            dx, dturned = linear_back(grad, nodes[node], turn.swapaxes(-1, -2) @ weight)
            dnodes[node] += dx
            dweights[node][::2] += turn @ dturned
            dturn = weight @ dturned.swapaxes(-1, -2)
            dkey, dvalue = along_back(kind, p, gradients, dturn, self._of_relation("k_rel", kind, p))
            self._of_relation("k_rel", kind, gradients)[...] = dkey
            self._of_relation("v_rel", kind, gradients)[...] = dvalue
        for node, dweight in dweights.items():
            name = f"kqv_lin.lins.{node}"
            gradients[f"{name}.weight"], gradients[f"{name}.bias"] = flat(dweight[..., :-1]), dweight[..., -1].ravel()
        dattr = {kind: self._attr_back(kind, back, record, gradients) for kind in record.attr}
        of_weights = {} if back.edge_weight is None else {k: back.edge_weight[joined.edges[k]] for k in record.weighted}
        return HeteroGradients(gradients, dnodes, dattr, of_weights)

    def _finish_back(
        self, kind: str, grad: Array, record: HeteroRecord, gradients: dict[str, Array], dx: Array
    ) -> Array:
        from ..plan import gelu

        p, x, name = record.parameters, record.nodes[kind], f"out_lin.lins.{kind}"
        attended, weight, bias = record.past.output[record.joined.targets[kind]], p[f"{name}.weight"], p[f"{name}.bias"]
        da, dweight, dbias = linear_backward(grad, record.active[kind].reshape(grad.shape), weight)
        if x.shape[1] == self.out_channels:
            gate = gate_of(kind, p)
            # the product of grad and what out_lin gave is that of its gradients and its parameters
            through_root = (grad * x).sum()
            if not np.isfinite(through_root):
                through_root = (grad * only_seen(x, grad)).sum()
            dgate = (dweight * weight).sum() + (dbias * bias).sum() - through_root
            gradients[f"skip.{parameter_key(kind)}"][0] = dgate * gate * (1 - gate)
            for y in (da, dweight, dbias):
                y *= gate
            dx += (1 - gate) * grad
        gradients[f"{name}.weight"], gradients[f"{name}.bias"] = dweight, dbias
        return gelu.backward(attended, da)

    def _attr_back(self, kind: EdgeType, back: Any, record: HeteroRecord, gradients: dict[str, Array]) -> Array:
        p, at, x = record.parameters, record.joined.edges[kind], record.attr[kind]
        weight = self._of_edges(kind, p)
        grad = np.stack([back.edge[at], back.edge_value[at]], axis=1).reshape(len(x), 2 * self.out_channels)
        maps = along(kind, p, weight, weight)
        dattr, dmaps, _ = linear_backward(grad, x, flat(maps))
        dkey, dvalue = along_back(kind, p, gradients, dmaps.reshape(maps.shape), weight)
        self._of_edges(kind, gradients)[...] = dkey + dvalue
        return dattr.reshape(record.attr_shapes[kind])

    # --- ruvector-attention's graph interface -----------------------------------------------------------------------
    def graph_forward(
        self, node_features: Any, edge_index: Any, edge_attr: ArrayLike | None = None
    ) -> tuple[Array, Array]:
        """The output and the coefficients of a layer of one node type and one edge type.

        Parameters
        ----------
        node_features : array (N, in_channels)
        edge_index : CSRGraph, or array_like of integers (2, E)
        edge_attr : array (E, edge_dim), optional

        Returns
        -------
        features : array (N, out_channels)
        coefficients : array (E, heads)
            In the order of `edge_index`.

        Raises
        ------
        InvalidInputError
            If the layer has several types of nodes or edges, and as `forward` does.
        DimensionMismatchError, GraphStructureError
            As `forward` does.
        """
        if len(self.node_types) > 1 or len(self.edge_types) > 1:
            hint = "call forward, or forward_cached and its cache's coefficients(), with dictionaries by type"
            kinds = {"node types": ", ".join(self.node_types), "edge types": ", ".join(map(str, self.edge_types))}
            raise InvalidInputError(
                "one array of nodes was given, the layer has several types", shapes=kinds, hint=hint
            )
        (node,), (edge,) = self.node_types, self.edge_types
        attr = None if edge_attr is None else {edge: edge_attr}
        output, cache = self.forward_cached({node: node_features}, {edge: edge_index}, attr)
        return output[node], cache.coefficients()[edge]

    def sparse_forward(self, node_features: Any, adjacency: Any) -> tuple[Array, Any]:
        """The output and the coefficients as a matrix, of a layer of one node type and one edge type.

        Parameters
        ----------
        node_features : array (N, in_channels)
        adjacency : scipy.sparse matrix (N, N)
            As in `GAT.sparse_forward`: node i, a row, attends to node j where an entry is stored; with ``edge_dim=1``
            its value is the edge's feature.

        Returns
        -------
        features : array (N, out_channels)
        coefficients : scipy.sparse.csr_array (N, N)
            With the entries of `adjacency`; the mean over heads.

        Raises
        ------
        InvalidInputError, DimensionMismatchError, GraphStructureError
            As `graph_forward` does; GraphStructureError also if `adjacency` is no sparse matrix of real numbers.
        """
        takes_values = self.edge_dim.get(self.edge_types[0]) == 1
        return along_matrix(self.graph_forward, node_features, adjacency, takes_values)

    # --- files ------------------------------------------------------------------------------------------------------
    def _file_header(self) -> dict[str, str]:
        settings = {
            "in_channels": self.in_channels, "out_channels": self.out_channels, "heads": self.heads,
            "metadata": [self.node_types, self.edge_types], "edge_dim": list(self.edge_dim.items()),
        }  # fmt: skip
        return {"kind": "HGT", "settings": json.dumps(settings)}

    @classmethod
    def _of_file_header(cls, header: dict[str, str]) -> HGT:
        settings = json.loads(header["settings"])
        settings["edge_dim"] = {tuple(kind): n for kind, n in settings["edge_dim"]}
        return cls(**settings)
