"""The heterogeneous graph transformer: nodes and edges of several types, one softmax over all edges into a node.

A source's key along a type of edges is its features times two matrices, that of its own type and that of the edges': so
times their product. All of it is attention over one graph, whose targets are the nodes of all types and whose sources
are, for each type of edges, the nodes that these begin at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .. import checks, gpu, layers
from ..checks import Array, from_sequence
from ..errors import DimensionMismatchError, GraphStructureError, InvalidConfigError, InvalidInputError
from ..parameters import ParameterSet, Trainable
from ..projection import linear_backward, product
from ..protocols import GraphAttention
from .graph import CSRGraph
from .hetero import EdgeType, Joined, by_type, checked_metadata, joined_edges, known_types, parameter_key
from .inputs import features, initial, size
from .neighbors import Past, edge_array

__all__ = ["HGT", "HeteroCache", "HeteroGradients"]

Nodes = Mapping[str, ArrayLike]
Edges = Mapping[EdgeType, Any]
Attributes = Mapping[EdgeType, ArrayLike] | None


class HeteroCache(NamedTuple):
    """What `HGT`'s forward pass leaves for its backward pass.

    It refers to the arrays of the call and copies none: they must not change before the backward pass.
    """

    layer: HGT
    nodes: dict[str, Array]
    joined: Joined
    attr: dict[EdgeType, Array]
    parameters: ParameterSet
    past: Past

    def __repr__(self) -> str:
        return f"HeteroCache({self.layer!r}, {self.joined.graph!r})"

    def coefficients(self) -> dict[EdgeType, Array]:
        """By edge type (E, H): how much each edge counts, in the caller's order; 1 in all over the edges of a node."""
        found = self.past.coefficients()
        return {kind: found[at] for kind, at in self.joined.edges.items()}


@dataclass(frozen=True, slots=True, eq=False)
class HeteroGradients:
    """The gradients that `HGT`'s backward pass gives.

    Attributes
    ----------
    parameters : dict of str to array
    node_features : dict of str to array, for all node types that were given
    edge_attr : dict of (str, str, str) to array, for all edge types whose attributes were given
    """

    parameters: dict[str, Array]
    node_features: dict[str, Array]
    edge_attr: dict[EdgeType, Array]


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
        Of all heads together.
    metadata : (list of str, list of (str, str, str))
        The node types, and the edge types as (source type, relation, target type).
    heads : int
    edge_dim : int, or dict of (str, str, str) to int, optional
        Channels of the edge attributes, of all edge types or of those in the dictionary. `HGTConv` has none.
    seed : int, optional
        Of the initial parameters.
    dtype : float32 or float64
        Of the initial parameters. What is computed has the dtype of the inputs.

    Raises
    ------
    InvalidConfigError

    Source: Hu et al., "Heterogeneous Graph Transformer", 2020, without its relative temporal encoding.

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
        dice = layers.dice(seed)
        ones = "skip.", "p_rel."
        arrays = {n: np.ones(s) if n.startswith(ones) else initial(dice, n, s) for n, s in self._shapes().items()}
        self._parameters = ParameterSet(arrays).as_type(dtype)

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
    def __call__(self, x_dict: Nodes, edge_index_dict: Edges, edge_attr_dict: Attributes = None) -> dict[str, Array]:
        """As `forward`."""
        return self.forward(x_dict, edge_index_dict, edge_attr_dict)

    def forward(  # type: ignore[override]  # dictionaries of nodes and edges, not query, key and value
        self, x_dict: Nodes, edge_index_dict: Edges, edge_attr_dict: Attributes = None
    ) -> dict[str, Array]:
        """Attend to neighbours of all types.

        Parameters
        ----------
        x_dict : dict of str to array (N, in_channels of the type), float32 or float64
            Features of the nodes. A type may be missing if no edges are given of types that begin or end there.
        edge_index_dict : dict of (str, str, str) to CSRGraph, or array_like of integers (2, E)
            The edges of each type: sources, counted within their type, above targets. A type that is missing has no
            edges. If all are `CSRGraph`, they are joined at the first call only.
        edge_attr_dict : dict of (str, str, str) to array (E, edge_dim), optional
            Features of the edges, of each type that has an edge_dim.

        Returns
        -------
        dict of str to array (N, out_channels)
            For each node type that some edge type of `metadata` leads to, whether or not it has edges here.

        Raises
        ------
        InvalidInputError, DimensionMismatchError, GraphStructureError
        """
        return self._run(x_dict, edge_index_dict, edge_attr_dict, keeps=False)[0]

    def forward_cached(
        self, x_dict: Nodes, edge_index_dict: Edges, edge_attr_dict: Attributes = None
    ) -> tuple[dict[str, Array], HeteroCache]:
        """The output, and what `backward` needs. All else as in `forward`."""
        return self._run(x_dict, edge_index_dict, edge_attr_dict, keeps=True)

    def _run(self, x_dict: Any, edge_index_dict: Any, edge_attr_dict: Any, keeps: bool) -> tuple[Any, HeteroCache]:
        from ..plan import csr as plan

        nodes = self._nodes(x_dict)
        joined = joined_edges(self.edge_types, edge_index_dict, nodes)
        p = self._parameters.as_type(next(iter(nodes.values())).dtype)
        attr = self._attr(edge_attr_dict, joined, p.dtype)
        heads, both = (self.heads, self.out_channels // self.heads), None
        weights = {node: self._weights(node, p) for node in nodes}
        key_value = np.empty((joined.graph.num_sources, 2, *heads), p.dtype)
        for kind, at in joined.sources.items():
            turned = self._turn(kind, p).swapaxes(-1, -2) @ weights[kind[0]][::2]
            _linear(nodes[kind[0]], turned[..., :-1], turned[..., -1], key_value[at])
        query = np.empty((joined.graph.num_targets, *heads), p.dtype)
        for node, at in joined.targets.items():
            _linear(nodes[node], weights[node][1, ..., :-1], weights[node][1, ..., -1], query[at])
        if attr:
            both = np.zeros((joined.graph.num_edges, 2, *heads), p.dtype)
            for kind, x in attr.items():
                _linear(x, _along(kind, p, *2 * [self._of_edges(kind, p)]), None, both[joined.edges[kind]])
        terms = plan.Terms(
            plan.DOT, key_value[:, 0], query, key_value[:, 1], scale=1 / math.sqrt(heads[1]),
            edge=None if both is None else both[:, 0], edge_value=None if both is None else both[:, 1],
        )  # fmt: skip
        past = Past(joined.graph, terms, keeps)
        output = {node: self._finish(node, past.output[at], nodes[node], p) for node, at in joined.targets.items()}
        return output, HeteroCache(self, nodes, joined, attr, p, past)

    def _finish(self, kind: str, attended: Array, x: Array, p: ParameterSet) -> Array:
        a, name = attended.reshape(len(x), self.out_channels), f"out_lin.lins.{kind}"
        output = np.empty_like(a)
        _linear(a * _normal(a), p[f"{name}.weight"], p[f"{name}.bias"], output)
        if x.shape[1] == self.out_channels:
            gate = _gate(kind, p)
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
        return _along(kind, p, self._of_relation("k_rel", kind, p), self._of_relation("v_rel", kind, p))

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
            Of `forward_cached`: the gradients are those of what was computed then, with the parameters of then.

        Raises
        ------
        InvalidInputError, DimensionMismatchError
        """
        if not isinstance(cache, HeteroCache):
            hint = "give what this layer's forward_cached returned"
            raise InvalidInputError(f"cache is a {type(cache).__name__}, not a HeteroCache", hint=hint)
        grads = {}
        for kind, g in known_types("grad_output", grad_output, list(cache.joined.targets)).items():
            shape = len(cache.nodes[kind]), cache.layer.out_channels
            grads[kind] = checks.gradient(f"grad_output[{kind!r}]", g, shape, cache.parameters.dtype)
        return cache.layer._backward(grads, cache)

    def _backward(self, grads: dict[str, Array], cache: HeteroCache) -> HeteroGradients:
        joined, p, nodes = cache.joined, cache.parameters, cache.nodes
        found = {name: np.zeros_like(x) for name, x in p.items()}
        dnodes = {node: np.zeros(x.shape, x.dtype) for node, x in nodes.items()}
        dattended = np.zeros_like(cache.past.output)
        for node, grad in grads.items():
            dattended[joined.targets[node]] = self._finish_back(node, grad, cache, found, dnodes[node])
        made = cache.past.backward(dattended)
        weights = {node: self._weights(node, p) for node in nodes}
        dweights = {node: np.zeros_like(weight) for node, weight in weights.items()}
        for node, at in joined.targets.items():
            dx, dweights[node][1] = _linear_back(made.query[at], nodes[node], weights[node][1])
            dnodes[node] += dx
        for kind, at in joined.sources.items():
            node, turn, weight = kind[0], self._turn(kind, p), weights[kind[0]][::2]
            grad = np.stack([np.asarray(made.key)[at], made.value[at]], axis=1)
            dx, dturned = _linear_back(grad, nodes[node], turn.swapaxes(-1, -2) @ weight)
            dnodes[node] += dx
            dweights[node][::2] += turn @ dturned
            dkey, dvalue = _along_back(
                kind, p, found, weight @ dturned.swapaxes(-1, -2), self._of_relation("k_rel", kind, p)
            )
            self._of_relation("k_rel", kind, found)[...], self._of_relation("v_rel", kind, found)[...] = dkey, dvalue
        for node, dweight in dweights.items():
            name = f"kqv_lin.lins.{node}"
            found[f"{name}.weight"], found[f"{name}.bias"] = _flat(dweight[..., :-1]), dweight[..., -1].ravel()
        return HeteroGradients(found, dnodes, {kind: self._attr_back(kind, made, cache, found) for kind in cache.attr})

    def _finish_back(self, kind: str, grad: Array, cache: HeteroCache, found: dict[str, Array], dx: Array) -> Array:
        p, x, name = cache.parameters, cache.nodes[kind], f"out_lin.lins.{kind}"
        attended = cache.past.output[cache.joined.targets[kind]]
        a, weight, bias = attended.reshape(grad.shape), p[f"{name}.weight"], p[f"{name}.bias"]
        below = _normal(a)
        da, dweight, dbias = linear_backward(grad, a * below, weight)
        if x.shape[1] == self.out_channels:
            gate = _gate(kind, p)
            # the product of grad and what out_lin gave is that of its gradients and its parameters
            dgate = (dweight * weight).sum() + (dbias * bias).sum() - (grad * x).sum()
            found[f"skip.{parameter_key(kind)}"][0] = dgate * gate * (1 - gate)
            for y in (da, dweight, dbias):
                y *= gate
            dx += (1 - gate) * grad
        found[f"{name}.weight"], found[f"{name}.bias"] = dweight, dbias
        return (da * (below + a * np.exp(-0.5 * a * a) * (1 / math.sqrt(2 * math.pi)))).reshape(attended.shape)

    def _attr_back(self, kind: EdgeType, made: Any, cache: HeteroCache, found: dict[str, Array]) -> Array:
        p, at, x, weight = (
            cache.parameters,
            cache.joined.edges[kind],
            cache.attr[kind],
            self._of_edges(kind, cache.parameters),
        )
        grad = np.stack([made.edge[at], made.edge_value[at]], axis=1).reshape(len(x), 2 * self.out_channels)
        both = _along(kind, p, weight, weight)
        dattr, dboth, _ = linear_backward(grad, x, _flat(both))
        self._of_edges(kind, found)[...] = _along_back(kind, p, found, dboth.reshape(both.shape), weight).sum(axis=0)
        return dattr

    # --- the plan's -------------------------------------------------------------------------------------------------
    def graph_forward(
        self, node_features: Any, edge_index: Any, edge_attr: ArrayLike | None = None
    ) -> tuple[Array, Array]:
        """The output and the coefficients (E, heads) of a layer of one node type and one edge type.

        Raises InvalidInputError if it has more, else as `forward` does.
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
        """`graph_forward` along the entries of a scipy.sparse matrix (N, N), whose rows are targets.

        With ``edge_dim=1`` they are the edges' features. The coefficients, averaged over heads, are a csr_array.
        """
        if not hasattr(adjacency, "tocsr"):
            hint = "scipy.sparse.csr_array makes one; for an edge_index there is graph_forward"
            raise GraphStructureError(f"adjacency is a {type(adjacency).__name__}, not a sparse matrix", hint=hint)
        matrix = adjacency.tocsr()
        graph, attr = CSRGraph.from_scipy(matrix), None
        if self.edge_dim.get(self.edge_types[0]) == 1:
            attr = np.asarray(matrix.data, from_sequence("node_features", node_features).dtype)[:, None]
        output, found = self.graph_forward(node_features, graph, attr)
        return output, graph.to_scipy(found.mean(axis=1))

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

    # --- checks -----------------------------------------------------------------------------------------------------
    def _nodes(self, x_dict: Any) -> dict[str, Array]:
        nodes = {}
        for kind, x in known_types("x_dict", x_dict, self.node_types).items():
            name, width = f"x_dict[{kind!r}]", self.in_channels[kind]
            if gpu.is_on_gpu(x):
                raise InvalidInputError(f"{name} lies on a GPU, where HGT does not run", hint="take it to the CPU")
            nodes[kind] = array = features(name, x)
            if array.shape[1] != width:
                hint = f"the layer was built for {width} channels of {kind!r}"
                raise DimensionMismatchError(width, array.shape[1], shapes={f"{name}.shape": array.shape}, hint=hint)
        if not nodes:
            raise InvalidInputError("x_dict is empty", hint="give the features of each type of nodes")
        if len({x.dtype for x in nodes.values()}) > 1:
            dtypes = {f"x_dict[{kind!r}].dtype": x.dtype for kind, x in nodes.items()}
            raise InvalidInputError("the types of nodes differ in dtype", shapes=dtypes, hint="cast them to one")
        return nodes

    def _attr(self, edge_attr_dict: Any, joined: Joined, dtype: np.dtype[Any]) -> dict[EdgeType, Array]:
        given = {} if edge_attr_dict is None else known_types("edge_attr_dict", edge_attr_dict, list(joined.edges))
        attr: dict[EdgeType, Array] = {}
        for kind, at in joined.edges.items():
            name, width, E = f"edge_attr_dict[{kind!r}]", self.edge_dim.get(kind), at.stop - at.start
            if kind not in given and width is not None and E:
                raise InvalidInputError(f"{name} is missing", hint=f"give an array (E, {width}), one row for each edge")
            if kind in given and width is None:
                raise InvalidInputError(
                    f"{name} was given, these edges have no edge_dim", hint="build it with edge_dim"
                )
            if kind in given:
                attr[kind] = np.asarray(edge_array(name, given[kind], (E, width or 0), dtype))
        return attr


# --- arithmetic ------------------------------------------------------------------------------------------------------
def _flat(weights: Array) -> Array:
    return weights.reshape(-1, weights.shape[-1])


def _linear(x: Array, weights: Array, bias: Array | None, out: Array) -> None:
    """All that the rows of `weights` make of x, into `out`."""
    weight, flat_bias = _flat(weights), None if bias is None else bias.ravel()
    product(x[None, :, None], weight.T[None, :, None], out.reshape(1, len(x), 1, len(weight)), flat_bias)


def _linear_back(grad: Array, x: Array, weights: Array) -> tuple[Array, Array]:
    """The gradients of x and of `weights`, in which the biases come last."""
    weight = _flat(weights[..., :-1])
    dx, dweight, dbias = linear_backward(grad.reshape(len(x), len(weight)), x, weight)
    return dx, np.concatenate([dweight, dbias[:, None]], axis=1).reshape(weights.shape)


def _along(kind: EdgeType, p: ParameterSet, key: Array, value: Array) -> Array:
    """(2, H, ...): for keys, with the priority of the edge type, and for values."""
    return np.stack([_priority(kind, p) * key, value])


def _along_back(kind: EdgeType, p: ParameterSet, found: dict[str, Array], grad: Array, key: Array) -> Array:
    """The gradients of key and value; that of the priority is added to `found`."""
    found[f"p_rel.{parameter_key(*kind)}"][0] += (grad[0] * key).sum(axis=(-1, -2))
    return np.stack([_priority(kind, p) * grad[0], grad[1]])


def _priority(kind: EdgeType, p: ParameterSet) -> Array:
    return p[f"p_rel.{parameter_key(*kind)}"].reshape(-1, 1, 1)


def _gate(kind: str, p: ParameterSet) -> Any:
    return 1 / (1 + np.exp(-p[f"skip.{parameter_key(kind)}"][0]))


def _normal(x: Array) -> Array:
    """The share of the normal distribution below x: gelu is x times it."""
    import scipy.special

    return np.asarray(scipy.special.ndtr(x))
