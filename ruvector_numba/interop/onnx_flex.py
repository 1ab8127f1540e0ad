"""FlexAttention, the preview operator of ONNX, where its subgraphs say what the kernels can do.

A subgraph is read, not run: its input is an array that is never formed. What does not depend on it (positions, masks,
biases) is computed by the reference implementation of the onnx package; what does must be one of the steps that the
kernels know. Whatever else is refused by its name.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import ArrayLike

from .. import dense, masks
from ..arrays import Array, Shape
from ..errors import InvalidConfigError, InvalidInputError
from ..visibility import broadcasts
from . import onnx_checks as checks
from .onnx import _engine_type
from .onnx_masks import ABSORBING, joined

try:
    import onnx
    from onnx import helper, numpy_helper
    from onnx.reference import ReferenceEvaluator
except ModuleNotFoundError as error:
    words = f"reading subgraphs needs ONNX: {checks.INSTALL}"
    raise ModuleNotFoundError(words, name=error.name) from error

__all__ = ["flex_attention"]


def flex_attention(
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    *,
    scale: float | None = None,
    score_mod: onnx.GraphProto | None = None,
    prob_mod: onnx.GraphProto | None = None,
    softmax_precision: int | None = None,
    opset: int = 26,
    **unknown: NoReturn,
) -> Array:
    """The operator FlexAttention of ONNX's preview domain, version 1.

    Parameters
    ----------
    Q : array (B, Hq, Lq, D), float16, bfloat16, float32 or float64
        Hq is a multiple of Hk.
    K : array (B, Hk, Lk, D)
    V : array (B, Hk, Lk, Dv)
    scale : float, optional
        1 / sqrt(D) by default.
    score_mod : onnx.GraphProto, optional
        From the scores (B, Hq, Lq, Lk) to scores. It may multiply them by a number; take their tanh (a softcap); add to
        them what does not depend on them (a bias, ALiBi, relative positions); hide some with Where, by -inf or a number
        of -1e30 or less. Arrays it makes for that are formed, as large as it makes them.
    prob_mod : onnx.GraphProto, optional
        From the weights to weights. It may multiply them by a number, or by one for each query, (..., Lq, 1).
    softmax_precision : 1, 10, 11 or 16, optional
        As in `attention`.
    opset : int
        Of the operators in the subgraphs.
    **unknown
        Refused: the attributes above are all that the operator has.

    Returns
    -------
    array (B, Hq, Lq, Dv)
        A query all of whose scores are -inf gets 0, where the operator's formula has NaN.

    Raises
    ------
    InvalidInputError, DimensionMismatchError
        If Q, K and V have other axes or types than these, or sizes of theirs that must agree do not.
    InvalidConfigError
        If an attribute has a wrong type or value, there is none of that name, or a subgraph does something else; its
        operator is named.
    InvalidMaskError
        If what a subgraph adds or hides does not broadcast to the scores.

    References
    ----------
    .. [1] The operator FlexAttention, https://onnx.ai/onnx/operators/onnx_aionnxpreview_FlexAttention.html

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> from onnx import parser
    >>> softcap = parser.parse_graph('''
    ...     softcap (float[B, H, L, S] s) => (float[B, H, L, S] t) <float cap = {30.0}>
    ...     { a = Div(s, cap)  b = Tanh(a)  t = Mul(b, cap) }''')
    >>> x = np.ones((1, 2, 3, 8), np.float32)
    >>> rv.interop.onnx.flex_attention(x, x, x, score_mod=softcap).shape
    (1, 2, 3, 8)
    """
    checks.no_others("FlexAttention", unknown, ("scale", "score_mod", "prob_mod", "softmax_precision"))
    arrays = {name: checks.floats(name, x) for name, x in (("Q", Q), ("K", K), ("V", V))}
    if len({x.dtype for x in arrays.values()}) > 1:
        dtypes = {f"{name}.dtype": x.dtype for name, x in arrays.items()}
        raise InvalidInputError("Q, K and V differ in dtype", shapes=dtypes, hint="cast them to one")
    if checks.rank(arrays) != 4:
        shapes = {f"{name}.shape": x.shape for name, x in arrays.items()}
        raise InvalidInputError("Q, K and V have four axes", shapes=shapes, hint="(B, heads, L, channels)")
    heads = checks.heads(arrays, None, None, 25)
    query, key, value = (checks.by_heads(name, x, heads[name]) for name, x in arrays.items())
    checks.check_sizes(query, key, value)
    dtype = _engine_type(arrays.values(), None, checks.precision(softmax_precision))
    shape = (*query.shape[:3], key.shape[2])
    scores = _Reader("score_mod", shape, opset, dtype).read(score_mod, Scores())
    weights = _Reader("prob_mod", shape, opset, dtype).read(prob_mod, Weights())
    query, key, value = (x.astype(dtype, copy=False) for x in (query, key, value))
    total = checks.scale(scale, query.shape[3]) * scores.factor
    output = dense.scaled_dot_product_attention(
        query, key, value, scores.mask(dtype, shape), scale=total, enable_gqa=True, softcap=scores.cap
    )
    if weights.factor is not None:
        output = output * weights.factor.astype(dtype)
    return output.astype(arrays["Q"].dtype, copy=False)


class _Refusal(Exception):
    """A step that the kernels do not know; the reader says of which operator."""


class Scores(NamedTuple):
    """cap * tanh(factor * s / cap) + bias, hidden where not seen; without a cap factor * s + bias. s is the input."""

    factor: float = 1.0
    cap: float | None = None
    bias: Array | None = None
    seen: Array | None = None

    def mask(self, dtype: type, shape: Shape) -> masks.Mask:
        """Bias and visibility, as the engine takes them."""
        parts = [x for x in (None if self.bias is None else self.bias.astype(dtype), self.seen) if x is not None]
        return joined(parts, shape)

    def times(self, x: Array) -> Scores:
        """A capped score is capped at so much more; tanh is odd."""
        c = _number(x, "multiplied by an array")
        if c == 0 or not np.isfinite(c) or (c < 0 and self._hides):
            raise _Refusal(f"multiplied by {c}" + " after a mask" * self._hides)
        bias = None if self.bias is None else self.bias * c
        return self._replace(factor=self.factor * c, cap=None if self.cap is None else self.cap * abs(c), bias=bias)

    @property
    def _hides(self) -> bool:
        return self.seen is not None or (self.bias is not None and not np.isfinite(self.bias).all())

    def plus(self, x: Array) -> Scores:
        return self._replace(bias=x if self.bias is None else self.bias + x)

    def tanh(self) -> Scores:
        if self.cap is not None or self.bias is not None or self.seen is not None:
            raise _Refusal("taken the tanh of, after a softcap, bias or mask")
        return self._replace(cap=1.0)

    def where(self, keep: Array, x: Array) -> Scores:
        """Where `keep` is false, `x` in place of the score."""
        if np.isneginf(x).all():
            return self._replace(seen=keep if self.seen is None else self.seen & keep)
        if np.isfinite(x).all() and (x <= ABSORBING).all() and not self._hides:
            return self.plus(np.where(keep, np.zeros((), x.dtype), x))
        raise _Refusal(f"replaced by something else than -inf, or once a number below {ABSORBING:.0e},")


class Weights(NamedTuple):
    """factor * p. p is the input."""

    factor: Array | None = None

    def times(self, x: Array) -> Weights:
        if x.ndim and x.shape[-1] != 1:
            raise _Refusal("multiplied by a number for each key")
        return Weights(x if self.factor is None else self.factor * x)

    def plus(self, x: Array) -> Weights:
        raise _Refusal("added to")

    def tanh(self) -> Weights:
        raise _Refusal("taken the tanh of")

    def where(self, keep: Array, x: Array) -> Weights:
        raise _Refusal("replaced")


def _number(x: Array, otherwise: str) -> float:
    if x.size != 1:
        raise _Refusal(otherwise)
    return float(x.reshape(()))


class _Reader:
    """Follows one value through a subgraph."""

    def __init__(self, attribute: str, shape: Shape, opset: int, dtype: type) -> None:
        self.attribute, self.shape, self.opset, self.dtype = attribute, shape, opset, dtype

    def read(self, graph: onnx.GraphProto | None, value: Any) -> Any:
        """What the subgraph makes of `value`, Scores or Weights."""
        if graph is None:
            return value
        if not isinstance(graph, onnx.GraphProto):
            raise InvalidConfigError(f"{self.attribute} is a {type(graph).__name__}", hint="give an onnx.GraphProto")
        if len(graph.input) != 1 or len(graph.output) != 1:
            told = {"inputs": len(graph.input), "outputs": len(graph.output)}
            raise InvalidConfigError(f"{self.attribute} has one input and one output", shapes=told)
        known = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
        known[graph.input[0].name] = value
        for node in graph.node:
            self._step(node, known)
        result = known.get(graph.output[0].name)
        if type(result) is not type(value):
            raise InvalidConfigError(f"{self.attribute} gives what does not depend on its input")
        return result

    def _step(self, node: onnx.NodeProto, known: dict[str, Any]) -> None:
        missing = [name for name in node.input if name and name not in known]
        if missing:
            hint = "a subgraph stands alone here: make the value an initializer of it"
            raise InvalidConfigError(f"{self.attribute} uses {missing[0]} from outside", hint=hint)
        inputs = [known[name] if name else None for name in node.input]
        if any(isinstance(x, Scores | Weights) for x in inputs):
            try:
                known[node.output[0]] = self._applied(node, inputs)
            except _Refusal as refusal:
                hint = "see flex_attention for what may be done; for the rest use the onnx reference or torch"
                words = f"in {self.attribute}, operator {node.op_type}: its input cannot be {refusal} here"
                raise InvalidConfigError(words, hint=hint) from None
        else:
            known.update(zip(node.output, self._computed(node, inputs), strict=True))

    def _computed(self, node: onnx.NodeProto, inputs: list[Any]) -> list[Any]:
        """What does not depend on the subgraph's input."""
        feeds = {name: x for name, x in zip(node.input, inputs, strict=True) if name}
        try:
            return [np.asarray(x) for x in ReferenceEvaluator(node, opsets={"": self.opset}).run(None, feeds)]
        except Exception as error:
            raise InvalidConfigError(f"{self.attribute} cannot be computed at {node.op_type}: {error}") from error

    def _applied(self, node: onnx.NodeProto, inputs: list[Any]) -> Any:
        """A step of the value itself."""
        kind, at = node.op_type, [isinstance(x, Scores | Weights) for x in inputs]
        value = inputs[at.index(True)]
        others = [x for x in inputs if not isinstance(x, Scores | Weights)]
        if node.domain not in ("", "ai.onnx"):
            raise _Refusal("given to an operator of another domain")
        if kind == "Shape":
            ends = {a.name: a.i for a in node.attribute}
            return np.array(self.shape[ends.get("start", 0) : ends.get("end")], np.int64)
        for x in others:
            if not broadcasts(np.shape(x), self.shape):
                raise _Refusal(f"combined with an array of the shape {np.shape(x)}")
        if sum(at) > 1:
            raise _Refusal("combined with itself")
        if kind == "Identity" or (kind == "Cast" and self._keeps(node)):
            return value
        if kind == "Tanh":
            return value.tanh()
        if kind == "Neg":
            return value.times(np.array(-1.0))
        if kind == "Mul":
            return value.times(others[0])
        if kind == "Div" and at[0]:
            return value.times(np.divide(1.0, others[0], dtype=np.float64))
        if kind == "Add":
            return value.plus(others[0])
        if kind == "Sub":
            return value.plus(-others[0]) if at[0] else value.times(np.array(-1.0)).plus(others[0])
        if kind == "Where" and not at[0]:
            keep, x = others
            return value.where(keep if at[1] else ~keep, x)
        raise _Refusal("used so")

    def _keeps(self, node: onnx.NodeProto) -> bool:
        """Is this the cast to what the scores are anyway, or to more?"""
        to = next(a.i for a in node.attribute if a.name == "to")
        return np.dtype(helper.tensor_dtype_to_np_dtype(to)) in (np.dtype(self.dtype), np.dtype(np.float64))
