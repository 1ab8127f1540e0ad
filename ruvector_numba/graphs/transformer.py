"""The graph transformer: dot-product attention to neighbours between linear projections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from .. import checks
from ..arrays import Array
from ..errors import InvalidConfigError, InvalidInputError
from ..parameters import ParameterSet
from ..projection import is_finite, linears, linears_backward, only_seen
from ..values import shown, switch
from .edge_terms import edge_terms, edge_terms_back
from .inputs import Inputs
from .layer import GraphLayer
from .neighbors import Past
from .results import Back, Gated, Record

if TYPE_CHECKING:
    from ..plan.csr import Made

__all__ = ["GraphTransformer"]


class GraphTransformer(GraphLayer):
    """Dot-product attention to neighbours (Shi et al., 2021), as PyTorch Geometric's `TransformerConv`.

    s = scale * lin_query(x_i) . (lin_key(x_j) [+ lin_edge(edge_attr)]); the output is the sum of
    softmax(s) (lin_value(x_j) [+ lin_edge(edge_attr)]) over the edges into i, heads joined or averaged,
    + lin_skip(x_i).

    Parameters
    ----------
    in_channels : int or (int, int)
        Channels of the nodes; a pair for sources and targets.
    out_channels : int
        Channels of one head of the output.
    heads : int, default 1
        Attention heads.
    concat : bool, default True
        Whether heads are joined; if not, they are averaged.
    beta : bool, default False
        Whether a gate, sigmoid(lin_beta [o, r, o - r]), weighs lin_skip's r against the output of attention, o.
    dropout : float, default 0
        Probability, 0 to 1, to drop a coefficient; in training only.
    edge_dim : int, optional
        Channels of `edge_attr`; None for edges without attributes.
    bias : bool, default True
        Whether lin_key, lin_query, lin_value and lin_skip have a bias.
    root_weight : bool, default True
        Whether lin_skip(x_i) is added. Its parameters are there in any case, as those of `TransformerConv`.
    aggregation : {"sum", "mean", "max"}, default "sum"
        How a target joins its messages, coefficient times value: "mean" divides their sum by the number of edges, "max"
        takes the largest in each channel, and among equal ones the first edge's. A dropped edge brings 0 to "max".
    normalize : bool, default True
        Whether scores go through a softmax. If not, the coefficients are the scores.
    scale : float, optional
        Multiplies the scores; 1 / sqrt(out_channels) if None.
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
    >>> x = np.random.default_rng(0).standard_normal((4, 6), dtype=np.float32)
    >>> rv.GraphTransformer(6, 8, heads=2, seed=0)(x, [[0, 1, 2, 3], [1, 2, 3, 0]]).shape
    (4, 16)
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        heads: int = 1,
        *,
        concat: bool = True,
        beta: bool = False,
        dropout: float = 0.0,
        edge_dim: int | None = None,
        bias: bool = True,
        root_weight: bool = True,
        aggregation: str = "sum",
        normalize: bool = True,
        scale: float | None = None,
        seed: int | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__(in_channels, out_channels, heads, concat, dropout, edge_dim, bias, aggregation, seed)
        self.root_weight = switch("root_weight", root_weight, InvalidConfigError)
        self.beta = switch("beta", beta, InvalidConfigError) and self.root_weight  # there is nothing else to weigh
        self.normalize, self.scale = switch("normalize", normalize, InvalidConfigError), scale
        try:
            self._scale = checks.scale_of(scale, self.out_channels)
        except InvalidInputError:
            raise InvalidConfigError(f"scale is {shown(scale)}", hint="give a finite number, or None") from None
        self._start(self._shapes(), dtype)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        channels, (n_source, n_target) = self.heads * self.out_channels, self.in_channels
        shapes: dict[str, tuple[int, ...]] = {}
        sizes = [("lin_key", channels, n_source), ("lin_query", channels, n_target), ("lin_value", channels, n_source)]
        for name, n_out, n_in in [*sizes, ("lin_skip", self.width, n_target)]:
            shapes[f"{name}.weight"] = (n_out, n_in)
            shapes |= {f"{name}.bias": (n_out,)} if self.bias else {}
        if self.edge_dim is not None:
            shapes["lin_edge.weight"] = (channels, self.edge_dim)
        if self.beta:
            shapes["lin_beta.weight"] = (1, 3 * self.width)
        return shapes

    def _check_range(self, dtype: np.dtype[Any]) -> None:
        if self.scale is not None:
            checks.check_range(dtype, self._scale, None)

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {
            "beta": self.beta,
            "root_weight": self.root_weight,
            "normalize": self.normalize,
            "scale": self.scale,
        }

    @property
    def _begins_with_root(self) -> bool:
        """Whether the attention can be added to lin_skip's result as it is written."""
        return self.concat and self.root_weight and not self.beta

    def _attend(self, inputs: Inputs, p: ParameterSet, keeps: bool) -> tuple[Past, None]:
        from ..plan import csr as plan

        assert inputs.target is not None  # `needs_target`: the layer refuses a call without
        source, target = inputs.source, inputs.target
        of_source = "lin_key", "lin_value"
        of_target = ("lin_query", "lin_skip") if self._begins_with_root else ("lin_query",)
        key, value = linears(source, p, of_source, self.heads, side_by_side=True)
        query, *root = linears(target, p, of_target, self.heads)
        edge = edge_terms(inputs, p, self.heads)
        terms = plan.NeighborTerms(
            plan.DOT, key, query, value, **edge, edge_value=edge.get("edge"), scale=self._scale,
            normalizes=self.normalize, dropout=inputs.dropout, seed=inputs.seed, edge_weight=inputs.edge_weight,
            aggregation=self.aggregation, offset=root[0] if root else None,
        )  # fmt: skip
        return Past(inputs.graph, terms, keeps), None

    def _finish(self, attended: Array, inputs: Inputs, p: ParameterSet) -> tuple[Array, Gated | None]:
        if self._begins_with_root or not self.root_weight:
            return attended, None
        assert inputs.target is not None  # `needs_target`: the layer refuses a call without
        root = linears(inputs.target, p, ("lin_skip",), 1)[0, :, 0]
        if not self.beta:
            root += attended
            return root, None
        from ..plan import gate as plan

        output, gate = plan.forward(attended, root, p["lin_beta.weight"])
        return output, Gated(attended, root, gate)

    def _finish_back(self, grad: Array, record: Record) -> tuple[Array, Array | None, dict[str, Array]]:
        p, droot, dattended, found = record.parameters, grad, grad, dict[str, Array]()
        if not self.root_weight:
            return grad, None, {name: np.zeros_like(x) for name, x in p.items() if name.startswith("lin_skip.")}
        if record.gated is not None:
            from ..plan import gate as plan

            made = plan.backward(grad, *record.gated, p["lin_beta.weight"])
            if not is_finite(made[2]):
                seen = Gated(*(only_seen(x, grad) for x in record.gated))
                made = plan.backward(grad, *seen, p["lin_beta.weight"])
            dattended, droot, found["lin_beta.weight"] = made
        assert record.inputs.target is not None  # `needs_target`: the layer refuses a call without
        dtarget, of_root = linears_backward(droot, record.inputs.target, p, ("lin_skip",))
        return dattended, dtarget, found | of_root

    def _side_by_side(self, inputs: Inputs) -> tuple[str, ...]:
        return ("key", "value", "query") if not inputs.is_pair else ("key", "value")

    def _attend_back(self, made: Made, record: Record, so_far: Array | None) -> Back:
        inputs, p = record.inputs, record.parameters
        names, more = tuple(f"lin_{name}" for name in self._side_by_side(inputs)), dict[str, Array]()
        dsource, found = linears_backward(made.joined, inputs.source, p, names, None if inputs.is_pair else so_far)
        dtarget = dsource
        if inputs.is_pair:
            assert inputs.target is not None  # `needs_target`: the layer refuses a call without
            dtarget, more = linears_backward(made.query, inputs.target, p, ("lin_query",), so_far)
        dattr, of_edges = edge_terms_back(made)
        return Back(dsource, dtarget, dattr, found | more | of_edges)
