"""Graph attention networks: GAT, whose scores are sums of a number of each end, and GATv2, whose scores see both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from ..arrays import Array
from ..errors import InvalidConfigError
from ..parameters import ParameterSet
from ..projection import flattened, is_finite, linear, linear_backward, linears, linears_backward, only_seen
from ..values import switch
from .edge_terms import edge_terms, edge_terms_back
from .edges import loop_policy
from .inputs import Inputs, check_slope_range, checked_filling, checked_slope
from .layer import GraphLayer
from .neighbors import Past
from .results import Back, Record

if TYPE_CHECKING:
    from ..plan.csr import Made

__all__ = ["GAT", "GATv2"]


class _Convolution(GraphLayer):
    """The common part of GAT and GATv2: LeakyReLU, self-loops, bias and residual."""

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        heads: int = 1,
        *,
        concat: bool = True,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
        add_self_loops: bool | str = True,
        edge_dim: int | None = None,
        fill_value: str | ArrayLike = "mean",
        bias: bool = True,
        residual: bool = False,
        aggregation: str = "sum",
        normalize: bool = True,
        seed: int | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__(in_channels, out_channels, heads, concat, dropout, edge_dim, bias, aggregation, seed)
        self.negative_slope, self.fill_value = checked_slope(negative_slope), checked_filling(fill_value)
        self.add_self_loops = loop_policy("add_self_loops", add_self_loops, may_be_bool=True)
        self.residual = switch("residual", residual, InvalidConfigError)
        self.normalize = switch("normalize", normalize, InvalidConfigError)
        self._start(self._shapes(), dtype)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError

    def _check_range(self, dtype: np.dtype[Any]) -> None:
        check_slope_range(self.negative_slope, dtype)

    def _last_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        if self.residual:
            shapes["res.weight"] = (self.width, self.in_channels[1])
        if self.bias:
            shapes["bias"] = (self.width,)
        return shapes

    def _settings(self) -> dict[str, Any]:
        names = ("negative_slope", "add_self_loops", "fill_value", "residual", "normalize")
        return super()._settings() | {name: getattr(self, name) for name in names}

    def _heads_of(self, x: Array) -> Array:
        return x.reshape(len(x), self.heads, self.out_channels)

    def _common(self, inputs: Inputs, p: ParameterSet) -> dict[str, Any]:
        return dict(
            slope=self.negative_slope, normalizes=self.normalize, dropout=inputs.dropout, seed=inputs.seed,
            edge_weight=inputs.edge_weight, aggregation=self.aggregation, offset=self._offset(p),
        )  # fmt: skip

    def _offset(self, p: ParameterSet) -> Array | None:
        """The numbers that the attention's output begins with, (1, H, C): the bias, where no heads are averaged."""
        return self._heads_of(p["bias"][None]) if self.bias and self.concat else None

    def _offset_back(self, made: Made) -> dict[str, Array]:
        return {"bias": made.offset.reshape(-1)} if self.bias and self.concat else {}

    def _finish(self, attended: Array, inputs: Inputs, p: ParameterSet) -> tuple[Array, None]:
        """The bias of averaged heads and the residual, added to `attended` in place."""
        if self.bias and not self.concat:
            attended += p["bias"]
        if self.residual and inputs.target is not None:
            attended += linear(inputs.target, p["res.weight"])
        return attended, None

    def _finish_back(self, grad: Array, record: Record) -> tuple[Array, Array | None, dict[str, Array]]:
        target, dtarget = record.inputs.target, None
        found = {"bias": grad.sum(axis=0)} if self.bias and not self.concat else {}
        if self.residual and target is not None:
            dtarget, found["res.weight"], _ = linear_backward(grad, target, record.parameters["res.weight"])
        elif self.residual:
            found["res.weight"] = np.zeros_like(record.parameters["res.weight"])
        return grad, dtarget, found


class GAT(_Convolution):
    """Graph attention (Veličković et al., 2018): the meaning, names and shapes of PyTorch Geometric's `GATConv`.

    h = x lin.weight^T;  s = LeakyReLU(att_src . h_j + att_dst . h_i [+ att_edge . lin_edge.weight edge_attr]);  the
    output is the sum of softmax(s) h_j over the edges into i, heads joined or averaged, [+ res.weight x_i] + bias.

    Parameters
    ----------
    in_channels : int or (int, int)
        Channels of the nodes; a pair for sources and targets, each projected in its own way.
    out_channels : int
        Channels of one head of the output.
    heads : int, default 1
        Attention heads.
    concat : bool, default True
        Whether heads are joined; if not, they are averaged.
    negative_slope : float, default 0.2
        Slope of the LeakyReLU below zero.
    dropout : float, default 0
        Probability, 0 to 1, to drop a coefficient; in training only.
    add_self_loops : bool, or {"replace", "add", "keep"}, default True
        True is "replace": existing loops are removed and each node gets one. See `CSRGraph.with_self_loops`.
    edge_dim : int, optional
        Channels of `edge_attr`; None for edges without attributes.
    fill_value : {"mean", "add"}, number or array, default "mean"
        Attributes of the self-loops that the layer adds. See `CSRGraph.edge_attr_with_self_loops`.
    bias : bool, default True
        Whether a bias is added to the output.
    residual : bool, default False
        Whether ``res.weight x_i`` is added to the output.
    aggregation : {"sum", "mean", "max"}, default "sum"
        How a target joins its messages, coefficient times h_j: "mean" divides their sum by the number of edges, "max"
        takes the largest in each channel, and among equal ones the first edge's. A dropped edge brings 0 to "max".
    normalize : bool, default True
        Whether scores go through a softmax. If not, the coefficients are the scores.
    seed : int, optional
        Seed of the initial parameters and of the dropout.
    dtype : float32 or float64, default float32
        Type of the initial parameters. What is computed has the dtype of the inputs.

    Raises
    ------
    InvalidConfigError
        If an option has a wrong type or value.
    InvalidInputError
        If `dtype` is neither float32 nor float64.
    OutOfMemoryError
        If this machine has no memory for so many parameters.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> graph = rv.CSRGraph.from_edge_index([[0, 1, 2, 3], [1, 2, 3, 0]])
    >>> x = np.random.default_rng(0).standard_normal((4, 6), dtype=np.float32)
    >>> layer = rv.GAT(6, 8, heads=2, seed=0)
    >>> output, cache = layer.forward_cached(x, graph)
    >>> output.shape, cache.coefficients().shape
    ((4, 16), (8, 2))
    >>> gradients = layer.backward(output, cache)
    >>> layer.update_parameters(gradients, learning_rate=0.01)
    """

    needs_target = False

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        H, C = self.heads, self.out_channels
        names = ("lin_src.weight", "lin_dst.weight") if self.is_bipartite else ("lin.weight",)
        shapes: dict[str, tuple[int, ...]] = {"att_src": (1, H, C), "att_dst": (1, H, C)}
        shapes |= {name: (H * C, n) for name, n in zip(names, self.in_channels, strict=False)}
        if self.edge_dim is not None:
            shapes |= {"att_edge": (1, H, C), "lin_edge.weight": (H * C, self.edge_dim)}
        return shapes | self._last_shapes()

    def _names(self) -> tuple[str, str]:
        return ("lin_src.weight", "lin_dst.weight") if self.is_bipartite else ("lin.weight", "lin.weight")

    def _attend(self, inputs: Inputs, p: ParameterSet, keeps: bool) -> tuple[Past, Array | None]:
        from ..plan import csr as plan

        source_name, target_name = self._names()
        h = self._heads_of(linear(inputs.source, p[source_name]))
        shared = not inputs.is_pair and source_name == target_name
        att = np.concatenate([p["att_src"], p["att_dst"]] if shared else [p["att_src"]])
        products = plan.fold(h, att)[..., None]  # att_src . h_j, and att_dst . h_i where the nodes are the same
        h_target = None
        if shared:
            query = products[1]
        elif inputs.target is None:
            query = np.zeros((inputs.graph.num_targets, self.heads, 1), h.dtype)
        else:
            h_target = self._heads_of(linear(inputs.target, p[target_name]))
            query = plan.fold(h_target, p["att_dst"])[0][..., None]
        edge = None
        if inputs.edge_attr is not None:  # att . (W a) = (att W) a: no array of edges is as wide as a node
            edge = linear(inputs.edge_attr, att_by_edge(p["att_edge"], p["lin_edge.weight"]))[..., None]
        terms = plan.NeighborTerms(plan.SUM, products[0], query, h, edge=edge, fold=att, **self._common(inputs, p))
        return Past(inputs.graph, terms, keeps), h_target

    def _attend_back(self, made: Made, record: Record, so_far: Array | None) -> Back:
        inputs, p = record.inputs, record.parameters
        source_name, target_name = self._names()
        assert made.att is not None  # `fold` has a gradient
        found = self._offset_back(made) | {"att_src": made.att[:1], "att_dst": made.att[1:]}
        # Where sources and targets are the same nodes, what their residual gave so far is part of the one gradient.
        dsource, found[source_name], _ = linear_backward(
            flattened(made.value), inputs.source, p[source_name], None if inputs.is_pair else so_far
        )
        dtarget = so_far if inputs.is_pair else dsource
        if record.projected is not None:
            assert inputs.target is not None  # which was projected
            found["att_dst"] = _weighed(made.query[..., 0], record.projected)[None]
            dh = flattened(made.query * p["att_dst"])
            dtarget, dweight, _ = linear_backward(dh, inputs.target, p[target_name], dtarget)
            found[target_name] = dweight + found[target_name] if target_name in found else dweight
        elif inputs.target is None:
            found["att_dst"] = np.zeros_like(p["att_dst"])
            found.setdefault(target_name, np.zeros_like(p[target_name]))
        dattr = None
        if inputs.edge_attr is not None:
            assert made.edge is not None
            by_edge = att_by_edge(p["att_edge"], p["lin_edge.weight"])
            dattr, dby_edge, _ = linear_backward(made.edge[..., 0], inputs.edge_attr, by_edge)
            datt, dweight = _att_by_edge_back(dby_edge, p["att_edge"], p["lin_edge.weight"])
            found |= {"att_edge": datt, "lin_edge.weight": dweight}
        return Back(dsource, dtarget, dattr, found)


def _weighed(d: Array, h: Array) -> Array:
    """(H, C): the sum over nodes of d[n, head] h[n, head]"""
    made = np.einsum("nh,nhc->hc", d, h)
    return made if is_finite(made) else np.einsum("nh,nhc->hc", d, only_seen(h, d))


def att_by_edge(att: Array, weight: Array) -> Array:
    """(H, edge_dim): att[h] . weight of the head"""
    return np.einsum("hc,hcd->hd", att[0], weight.reshape(*att[0].shape, -1))


def _att_by_edge_back(grad: Array, att: Array, weight: Array) -> tuple[Array, Array]:
    heads = weight.reshape(*att[0].shape, -1)
    datt = np.einsum("hd,hcd->hc", grad, heads)[None]
    return datt, np.einsum("hd,hc->hcd", grad, att[0]).reshape(weight.shape)


class GATv2(_Convolution):
    """Graph attention whose ranking of neighbours depends on the node (Brody et al., 2022), as `GATv2Conv`.

    s = att . LeakyReLU(lin_l(x_j) + lin_r(x_i) [+ lin_edge(edge_attr)]), and what goes along an edge is lin_l(x_j).

    Parameters
    ----------
    in_channels : int or (int, int)
        Channels of the nodes; a pair for sources and targets, each projected in its own way.
    out_channels : int
        Channels of one head of the output.
    heads : int, default 1
        Attention heads.
    concat : bool, default True
        Whether heads are joined; if not, they are averaged.
    negative_slope : float, default 0.2
        Slope of the LeakyReLU below zero.
    dropout : float, default 0
        Probability, 0 to 1, to drop a coefficient; in training only.
    add_self_loops : bool, or {"replace", "add", "keep"}, default True
        True is "replace": existing loops are removed and each node gets one. See `CSRGraph.with_self_loops`.
    edge_dim : int, optional
        Channels of `edge_attr`; None for edges without attributes.
    fill_value : {"mean", "add"}, number or array, default "mean"
        Attributes of the self-loops that the layer adds. See `CSRGraph.edge_attr_with_self_loops`.
    bias : bool, default True
        Whether ``lin_l`` and ``lin_r`` have a bias and one is added to the output.
    residual : bool, default False
        Whether ``res.weight x_i`` is added to the output.
    aggregation : {"sum", "mean", "max"}, default "sum"
        How a target joins its messages, coefficient times lin_l(x_j): "mean" divides their sum by the number of edges,
        "max" takes the largest in each channel, and among equal ones the first edge's. A dropped edge brings 0 to
        "max".
    normalize : bool, default True
        Whether scores go through a softmax. If not, the coefficients are the scores.
    share_weights : bool, default False
        Whether ``lin_r`` is ``lin_l``.
    seed : int, optional
        Seed of the initial parameters and of the dropout.
    dtype : float32 or float64, default float32
        Type of the initial parameters. What is computed has the dtype of the inputs.

    Raises
    ------
    InvalidConfigError
        If an option has a wrong type or value, or `share_weights` is set and sources and targets differ in width.
    InvalidInputError
        If `dtype` is neither float32 nor float64.
    OutOfMemoryError
        If this machine has no memory for so many parameters.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> x = np.random.default_rng(0).standard_normal((4, 6), dtype=np.float32)
    >>> rv.GATv2(6, 8, heads=2, seed=0)(x, [[0, 1, 2, 3], [1, 2, 3, 0]]).shape
    (4, 16)
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        heads: int = 1,
        *,
        concat: bool = True,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
        add_self_loops: bool | str = True,
        edge_dim: int | None = None,
        fill_value: str | ArrayLike = "mean",
        bias: bool = True,
        residual: bool = False,
        aggregation: str = "sum",
        normalize: bool = True,
        share_weights: bool = False,
        seed: int | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        # before the base asks for the parameters' shapes, which depend on it
        self.share_weights = switch("share_weights", share_weights, InvalidConfigError)
        super().__init__(
            in_channels, out_channels, heads, concat=concat, negative_slope=negative_slope, dropout=dropout,
            add_self_loops=add_self_loops, edge_dim=edge_dim, fill_value=fill_value, bias=bias, residual=residual,
            aggregation=aggregation, normalize=normalize, seed=seed, dtype=dtype,
        )  # fmt: skip
        if self.share_weights and self.in_channels[0] != self.in_channels[1]:
            widths = {"in_channels": self.in_channels}
            hint = "give both the same number of channels, or share_weights=False"
            raise InvalidConfigError("share_weights needs one width", shapes=widths, hint=hint)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        H, C = self.heads, self.out_channels
        shapes: dict[str, tuple[int, ...]] = {"att": (1, H, C)}
        for name, n in zip(("lin_l", "lin_r"), self.in_channels, strict=True):
            if name == "lin_l" or not self.share_weights:
                shapes[f"{name}.weight"] = (H * C, n)
                shapes |= {f"{name}.bias": (H * C,)} if self.bias else {}
        if self.edge_dim is not None:
            shapes["lin_edge.weight"] = (H * C, self.edge_dim)
        return shapes | self._last_shapes()

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"share_weights": self.share_weights}

    def _attend(self, inputs: Inputs, p: ParameterSet, keeps: bool) -> tuple[Past, None]:
        from ..plan import csr as plan

        assert inputs.target is not None  # `needs_target`: the layer refuses a call without
        source, target, H = inputs.source, inputs.target, self.heads
        if self.share_weights:
            left = linears(source, p, ("lin_l",), H)[0]
            right = left if not inputs.is_pair else linears(target, p, ("lin_l",), H)[0]
        elif not inputs.is_pair:
            left, right = linears(source, p, ("lin_l", "lin_r"), H)
        else:
            left, right = linears(source, p, ("lin_l",), H)[0], linears(target, p, ("lin_r",), H)[0]
        edge = edge_terms(inputs, p, self.heads)
        terms = plan.NeighborTerms(plan.JOINT, left, right, left, **edge, att=p["att"][0], **self._common(inputs, p))
        return Past(inputs.graph, terms, keeps), None

    def _side_by_side(self, inputs: Inputs) -> tuple[str, ...]:
        return () if inputs.is_pair or self.share_weights else ("value", "query")

    def _attend_back(self, made: Made, record: Record, so_far: Array | None) -> Back:
        inputs, p = record.inputs, record.parameters
        assert inputs.target is not None and made.att is not None  # `needs_target`, and scores are made with `att`
        if inputs.is_pair:
            dsource, found = linears_backward(made.value, inputs.source, p, ("lin_l",))
            right = "lin_l" if self.share_weights else "lin_r"
            dtarget, more = linears_backward(made.query, inputs.target, p, (right,), so_far)
            found = {name: found[name] + more[name] for name in more} if self.share_weights else found | more
        elif self.share_weights:
            made.value[...] += made.query
            dsource, found = linears_backward(made.value, inputs.source, p, ("lin_l",), so_far)
            dtarget = dsource
        else:
            dsource, found = linears_backward(made.joined, inputs.source, p, ("lin_l", "lin_r"), so_far)
            dtarget = dsource
        dattr, of_edges = edge_terms_back(made)
        return Back(dsource, dtarget, dattr, self._offset_back(made) | found | of_edges | {"att": made.att[None]})
