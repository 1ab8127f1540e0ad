"""Where the attention is in a graph of ONNX: as the operator Attention, or written out.

Written out it is ``MatMul(Softmax(f(MatMul(Q, K^T))), V)``, where f multiplies by numbers, caps with Tanh, adds what is
broadcast, and puts numbers in the place of scores with Where. Searching starts at each Softmax, backwards to the first
product and forwards to the second, and ends with an attention or with a reason why there is none. Casts from one type
of floats to another are passed over: all is computed in float32, or in float64 where anything is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from .. import dense, dense_past, masks
from ..arrays import Array, Shape
from ..errors import InvalidInputError
from ..results import AttentionCache
from . import onnx_checks as checks
from .onnx import _engine_type
from .onnx_backend import run_node
from .onnx_graph import Graph, attributes
from .onnx_masks import joined

__all__ = ["Site", "sites"]

FLOATS = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE}
UNDERFLOW = {np.float32: 120.0, np.float64: 800.0}  # exp of minus this is 0


class Left(Exception):
    """Why a softmax is left to ONNX Runtime; and after how many steps of the search that was seen."""

    def __init__(self, reason: str, steps: int = 0) -> None:
        super().__init__(reason)
        self.steps = steps


@dataclass
class Site:
    """An attention in a graph: the nodes it replaces, and the values it takes and gives."""

    name: str
    nodes: list[int]
    inputs: list[str]
    outputs: list[str]

    def like(self) -> dict[str, str]:
        """For each output an input that has its type."""
        raise NotImplementedError

    def run(self, known: Mapping[str, Array]) -> dict[str, Array]:
        raise NotImplementedError


def sites(graph: Graph) -> tuple[list[Site], dict[str, str]]:
    """All attentions of a graph, none of which share a node; and by name, why others are none."""
    found: list[Site] = []
    left: dict[str, str] = {}
    used: set[int] = set()
    for at, node in enumerate(graph.nodes):
        if not graph.is_a(at, "Attention", "Softmax"):
            continue
        name = node.name or node.output[0]
        try:
            site: Site = _operator(graph, at) if node.op_type == "Attention" else _written_out(graph, at)
            if not used.isdisjoint(site.nodes):
                raise Left("it shares a node with another attention")
        except Left as reason:
            left[name] = str(reason)
            continue
        found.append(site)
        used.update(site.nodes)
    return found, left


def _operator(graph: Graph, at: int) -> Operator:
    node = graph.nodes[at]
    if graph.opset not in checks.OPSETS:
        raise Left(f"the operator Attention of opset {graph.opset}")
    kind = graph.stranger(node.input[3], {*FLOATS, onnx.TensorProto.BOOL}) if len(node.input) > 3 else None
    if kind:
        raise Left(f"its attn_mask is of {kind}, to which the standard gives no meaning")
    outputs = [name for name in node.output if name]
    return Operator(node.name or node.output[0], [at], [x for x in node.input if x], outputs, node, graph.opset)


@dataclass
class Operator(Site):
    """A node of the operator."""

    node: onnx.NodeProto
    opset: int

    def like(self) -> dict[str, str]:
        Q, _, V = self.node.input[:3]
        return {name: V if at == 2 else Q for at, name in enumerate(self.node.output) if name}

    def run(self, known: Mapping[str, Array]) -> dict[str, Array]:
        results = run_node(self.node, known, self.opset)
        return {name: x for name, x in zip(self.node.output, results, strict=True) if name and x is not None}


@dataclass
class Operand:
    """A value and how its axes are to be turned: a Transpose that became a view."""

    name: str
    turn: Sequence[int] | None = None
    node: int | None = None

    def read(self, known: Mapping[str, Array]) -> Array:
        x = known[self.name]
        return x if self.turn is None else x.transpose(self.turn)


@dataclass
class Term:
    """factor * (value), added to the scores; or, where a condition is false, factor * constant in their place.

    Turned, it is where the condition is true.
    """

    name: str
    factor: float = 1.0
    constant: float | None = None
    inverted: bool = False

    def read(self, known: Mapping[str, Array], dtype: type) -> Array:
        """What is added, or where scores stay what they were."""
        x = known[self.name]
        if self.constant is not None:
            return ~x if self.inverted else x
        x = x.astype(dtype, copy=False)
        return x if self.factor == 1 else x * dtype(self.factor)


@dataclass
class Scores:
    """What was found on the way back from the softmax: terms in the order in which they come."""

    scale: float = 1.0
    cap: float | None = None
    factors: list[tuple[str, bool]] = field(default_factory=list)  # of the product, from the graph; of divisors True
    terms: list[Term] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    product: int = -1
    precision: str | None = None  # "float64" if they were cast to it
    axes: int = 2  # those that numbers have: a product of fewer axes gets theirs

    def scale_of(self, known: Mapping[str, Array]) -> float:
        scale = self.scale
        for name, divides in self.factors:
            number = float(known[name].reshape(()))
            scale = scale / number if divides and number else scale * (math.inf if divides else number)
        return scale

    def replaced(self, read: Sequence[Array], dtype: type) -> Iterator[tuple[float, list[Array]]]:
        """Each number that is put in the place of scores; where, and what is done to it later, as `read`."""
        for at, term in enumerate(self.terms):
            number = dtype(term.factor * (-math.inf if term.constant is None else term.constant))
            if math.isfinite(number):
                yield float(number), [np.full((1, 1), number), ~read[at], *read[at + 1 :]]


@dataclass
class WrittenOut(Site):
    """MatMul, ..., Softmax, MatMul."""

    query: Operand
    key: Operand  # as the product takes it: (..., D, Lk)
    value: Operand
    scores: Scores
    axis: int | None  # of the softmax, if counted from the left
    turn: Sequence[int] | None  # of the result

    def like(self) -> dict[str, str]:
        return dict.fromkeys(self.outputs, self.value.name)

    def run(self, known: Mapping[str, Array]) -> dict[str, Array]:
        inputs = [x.read(known) for x in (self.query, self.key, self.value)]
        dtype, given_type = _engine_type(inputs, None, self.scores.precision), inputs[2].dtype
        read = [term.read(known, dtype) for term in self.scores.terms]
        self._check_axes(inputs, read)
        query, key, value = _spread([x.astype(dtype, copy=False) for x in inputs], read, self.scores.axes)
        shape = (*query.shape[:-1], value.shape[-1])
        turn = range(len(shape)) if self.turn is None else self.turn
        made = np.empty([shape[axis] for axis in turn], dtype)
        out = made.transpose(np.argsort(turn))
        seen, scale = _joined(read, (*query.shape[:-1], key.shape[-1])), self.scores.scale_of(known)
        arguments: dict[str, Any] = dict(scale=scale, softcap=self.scores.cap, out=out)
        numbers = list(self.scores.replaced(read, dtype))
        if numbers and out.size:
            cache = dense.attention_forward(query, key.swapaxes(-1, -2), value, seen, **arguments)
            _put_in(cache, numbers, value, out)
        else:
            dense.scaled_dot_product_attention(query, key.swapaxes(-1, -2), value, seen, **arguments)
        return {self.outputs[0]: made.astype(given_type, copy=False)}

    def _check_axes(self, inputs: Sequence[Array], read: Sequence[Array]) -> None:
        shapes: dict[str, object] = {f"{n}.shape": x.shape for n, x in zip(self.inputs, (*inputs, *read), strict=False)}
        rank = max(self.scores.axes, *(x.ndim for x in (*inputs[:2], *read)))
        if min(x.ndim for x in inputs) < 2 or (self.axis is not None and rank != self.axis + 1):
            hint = "its shapes could not be inferred: give the model's inputs static ranks"
            reason = f"{self.name} is no attention over the last of two or more axes"
            raise InvalidInputError(reason, shapes=shapes, hint=hint)


def _spread(inputs: Sequence[Array], read: Sequence[Array], axes: int) -> list[Array]:
    """Query, key (..., D, Lk) and value of common leading axes, as MatMul and Add have them; nothing is copied.

    What is added may have more rows than there are queries, and more columns than keys.
    """
    query, key, value = inputs
    leading = np.broadcast_shapes((1,) * (axes - 2), *(x.shape[:-2] for x in (*inputs, *read)))
    rows = np.broadcast_shapes(query.shape[-2:-1], *(x.shape[-2:-1] for x in read))
    columns = np.broadcast_shapes(key.shape[-1:], *(x.shape[-1:] for x in read))
    ends = (*rows, query.shape[-1]), (key.shape[-2], *columns), value.shape[-2:]
    return [np.broadcast_to(x, (*leading, *end)) for x, end in zip(inputs, ends, strict=True)]


def _joined(read: Sequence[Array], scores: Shape) -> masks.Mask:
    """Biases are added, conditions must all hold."""
    biases, conditions = ([x for x in read if (x.dtype == bool) is is_bool] for is_bool in (False, True))
    parts = [*conditions, *([sum(biases[1:], biases[0])] if biases else [])]
    return joined(parts, scores)


def _put_in(first: AttentionCache, numbers: Sequence[tuple[float, list[Array]]], value: Array, out: Array) -> None:
    """Let the keys in whose score is a number that was put there: the attention over them is merged with the others'.

    Low numbers give them weights of 0, and nothing is to be done, except where a query has no other keys.
    """
    dtype, (Lk, _), least = out.dtype.type, value.shape[-2:], float(np.min(first.lse))
    caches = [first]
    for number, read in numbers:
        added = [float(x.max(initial=-math.inf)) for x in read[1:] if x.dtype != bool]
        if number + sum(added) + math.log(max(1, Lk)) < least - UNDERFLOW[dtype]:
            continue
        query, key = (np.broadcast_to(dtype(0), (*value.shape[:-2], n, 1)) for n in (out.shape[-2], Lk))
        caches.append(dense.attention_forward(query, key, value, _joined(read, (*query.shape[:-1], Lk))))
    if len(caches) > 1:
        pasts: list[Any] = [cache.record for cache in caches]
        shifts, logs = (
            np.stack(x) for x in zip(*((p.sums[..., 0] * p.unit, p.sums[..., 1]) for p in pasts), strict=True)
        )
        out[...] = dense_past.merged(np.stack([cache.output for cache in caches]), shifts, logs)[0]


def _written_out(graph: Graph, softmax: int) -> WrittenOut:
    """The attention around this softmax."""
    node = graph.nodes[softmax]
    scores = _back(graph, node.input[0])
    weights, between = _forth(graph, node.output[0])
    second = graph.taken_by(weights, "MatMul", "Einsum")
    if second is None:
        raise Left(f"the weights are not what MatMul multiplies values by: {graph.told(weights)}")
    product, output = graph.nodes[scores.product], graph.nodes[second].output[0]
    axis = _axis(graph, node, [*product.input, *(term.name for term in scores.terms)], scores.axes)
    query, key = _factors(graph, product)
    value, turn = _weighted(graph, graph.nodes[second], weights)
    for name in (*product.input, *graph.nodes[second].input):
        if (graph.rank(name) or 2) < 2:
            raise Left(f"{name} has fewer than two axes")
        if kind := graph.stranger(name, FLOATS):
            raise Left(f"{name} is of {kind}")
    nodes = [*scores.nodes, scores.product, softmax, *between, second]
    nodes += [x.node for x in (query, key, value) if x.node is not None]
    turned = graph.taken_by(output, "Transpose")
    perm = None if turned is None else attributes(graph.nodes[turned]).get("perm")
    if turned is not None and perm is not None:
        nodes.append(turned)
        output, turn = graph.nodes[turned].output[0], perm if turn is None else [turn[axis] for axis in perm]
    inputs = [query.name, key.name, value.name, *(term.name for term in scores.terms)]
    inputs += [name for name, _ in scores.factors]
    return WrittenOut(node.name or node.output[0], nodes, inputs, [output], query, key, value, scores, axis, turn)


def _axis(graph: Graph, node: onnx.NodeProto, parts: Sequence[str], axes: int) -> int | None:
    """The axis of a softmax if it is counted from the left; it must be the last of the scores, made of these parts.

    What is added has no more axes than the products, unless it is known; a run looks at the arrays again.
    """
    axis = attributes(node).get("axis", -1 if graph.opset >= 13 else 1)
    if axis == -1:
        return None
    rank = graph.rank(node.input[0]) or graph.rank(node.output[0])
    if rank is None and None not in (ranks := [graph.rank(name) for name in parts[:2]]):
        rank = max(rank for rank in (axes, *ranks, *map(graph.rank, parts[2:])) if rank is not None)
    if rank is None:
        raise Left(f"its axis is {axis}, and how many axes {node.input[0]} has is not known")
    if axis != rank - 1:
        raise Left(f"its axis is {axis}, not the last of {rank}")
    return int(axis)


def _operand(graph: Graph, name: str, order: Sequence[int] | None = None) -> Operand:
    """A value as a product takes it, its axes in this order."""
    at = graph.made_by(name, "Transpose")
    turn = None if at is None else attributes(graph.nodes[at]).get("perm")
    if at is None or turn is None:
        return Operand(name, order)
    return Operand(graph.nodes[at].input[0], turn if order is None else [turn[axis] for axis in order], at)


def _factors(graph: Graph, product: onnx.NodeProto) -> tuple[Operand, Operand]:
    """Queries (..., Lq, D) and keys (..., D, Lk), of which a product makes scores."""
    if product.op_type == "MatMul":
        return _operand(graph, product.input[0]), _operand(graph, product.input[1])
    (first, second), output = _letters(product)
    named = [(product.input[0], first), (product.input[1], second)]
    (query, rows), (key, columns) = named if output[-2] in first else reversed(named)
    summed = _single(product, set(first) & set(second) - set(output))
    return (
        _operand(graph, query, _order(product, rows, output[:-1] + summed)),
        _operand(graph, key, _order(product, columns, output[:-2] + summed + output[-1])),
    )


def _weighted(graph: Graph, product: onnx.NodeProto, weights: str) -> tuple[Operand, Sequence[int] | None]:
    """Values (..., Lk, Dv), and how the axes of what comes out are turned."""
    at = list(product.input).index(weights)
    if product.op_type == "MatMul":
        if at:
            raise Left(f"the weights are not what MatMul multiplies values by: {weights} is its second input")
        return _operand(graph, product.input[1]), None
    letters, output = _letters(product)
    rows, columns = letters[at], letters[1 - at]
    channels = _single(product, set(columns) - set(rows))
    order = _order(product, columns, rows[:-2] + rows[-1] + channels)
    return _operand(graph, product.input[1 - at], order), _order(product, rows[:-1] + channels, output)


def _letters(einsum: onnx.NodeProto) -> tuple[list[str], str]:
    """Of the axes of its two inputs, and of its output."""
    equation = attributes(einsum)["equation"].decode()
    inputs, _, output = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if len(parts) != 2 or not all(x.isalpha() and len(set(x)) == len(x) > 1 for x in (*parts, output)):
        raise Left(f"Einsum {equation} is no product of matrices")
    return parts, output


def _order(einsum: onnx.NodeProto, letters: str, wanted: str) -> list[int]:
    """Where each of the wanted axes is."""
    if sorted(letters) != sorted(wanted):
        raise _other_sum(einsum)
    return [letters.index(x) for x in wanted]


def _single(einsum: onnx.NodeProto, letters: set[str]) -> str:
    if len(letters) != 1:
        raise _other_sum(einsum)
    return letters.pop()


def _other_sum(einsum: onnx.NodeProto) -> Left:
    equation = attributes(einsum)["equation"].decode()
    return Left(f"Einsum {equation} is no product of queries and keys, or of weights and values")


def _forth(graph: Graph, name: str) -> tuple[str, list[int]]:
    """Past what does nothing to the weights outside of training, or puts 0 where a query sees no key."""
    passed = _guard(graph, name)
    at = graph.taken_by(name, "Dropout", "Identity", "Cast")
    if at is not None and _changes_nothing(graph.nodes[at]):
        passed = [at]
    if not passed:
        return name, []
    name, more = _forth(graph, graph.nodes[passed[-1]].output[0])
    return name, [*passed, *more]


def _changes_nothing(node: onnx.NodeProto) -> bool:
    if node.op_type == "Cast":
        return attributes(node)["to"] in FLOATS
    return len(node.input) <= 2 and not any(node.output[1:])


def _guard(graph: Graph, name: str) -> list[int]:
    """Where(IsNaN(p), 0, p), which torch writes behind a softmax under a mask: here rows without keys are 0 anyway."""
    takers = graph.takers[name]
    if len(takers) != 2 or name in graph.outputs or not graph.is_a(takers[0], "IsNaN"):
        return []
    test = graph.nodes[takers[0]].output[0]
    choice = graph.taken_by(test, "Where")
    if choice is None or choice != takers[1]:
        return []
    condition, instead, otherwise = graph.nodes[choice].input
    is_zero = graph.number(instead) == 0 and graph.axes(instead) <= 2  # more might be more than the weights have
    return takers if condition == test and otherwise == name and is_zero else []


def _back(graph: Graph, name: str, factor: float = 1.0, steps: int = 0) -> Scores:
    """From a score that is multiplied by `factor` later on back to the product of queries and keys."""
    at = graph.made_by(name, "MatMul", "Einsum", "Add", "Mul", "Div", "Tanh", "Where", "Cast")
    if at is None:
        raise Left(f"no product of queries and keys: {graph.told(name)}", steps)
    node = graph.nodes[at]
    if node.op_type in ("MatMul", "Einsum"):
        return Scores(scale=factor, product=at)
    back = {"Add": _back_from_add, "Where": _back_from_where, "Tanh": _back_from_tanh, "Cast": _back_from_cast}.get(
        node.op_type, _back_from_number
    )
    found = back(graph, node, factor, steps + 1)
    found.nodes.append(at)
    return found


def _back_from_add(graph: Graph, node: onnx.NodeProto, factor: float, steps: int) -> Scores:
    reasons = []
    for score, other in (node.input, reversed(node.input)):
        try:
            found = _back(graph, score, factor, steps)
        except Left as reason:
            reasons.append(reason)
        else:
            found.terms.append(Term(other, factor))
            return found
    raise max(reasons, key=lambda reason: reason.steps)  # of the way that went on for longer


def _back_from_cast(graph: Graph, node: onnx.NodeProto, factor: float, steps: int) -> Scores:
    to = attributes(node)["to"]
    if to not in FLOATS:
        raise Left(f"scores are cast to {onnx.TensorProto.DataType.Name(to)}", steps)
    found = _back(graph, node.input[0], factor, steps)
    if to == onnx.TensorProto.DOUBLE:
        found.precision = "float64"
    return found


def _back_from_number(graph: Graph, node: onnx.NodeProto, factor: float, steps: int) -> Scores:
    """Mul or Div by a number: a constant; or one that the graph makes, of a shape say, if nothing was added before."""
    divides = node.op_type == "Div"
    orders = [tuple(node.input)] if divides else [tuple(node.input), tuple(reversed(node.input))]
    for score, other in orders:
        number = graph.number(other)
        if number is not None and number > 0 and math.isfinite(number):
            found = _back(graph, score, factor / number if divides else factor * number, steps)
            found.axes = max(found.axes, graph.axes(other))
            return found
    for score, other in orders:
        if graph.number(other) is None and graph.is_single(other):
            found = _back(graph, score, factor, steps)
            if found.terms or found.cap is not None:
                raise Left(f"scores are masked, and then multiplied by {other}, which is no constant", steps)
            found.factors.append((other, divides))
            return found
    raise Left(f"{node.op_type} by what is no positive number: {', '.join(node.input)}", steps)


def _back_from_tanh(graph: Graph, node: onnx.NodeProto, factor: float, steps: int) -> Scores:
    """factor * tanh(x / factor) is a softcap."""
    found = _back(graph, node.input[0], 1.0, steps)
    if found.terms or found.cap is not None:
        raise Left("scores are masked before Tanh", steps)
    found.cap, found.scale = factor, found.scale * factor
    return found


def _back_from_where(graph: Graph, node: onnx.NodeProto, factor: float, steps: int) -> Scores:
    """Scores, or a number in their place."""
    condition, *choices = node.input
    for score, other, inverted in ((*choices, False), (*reversed(choices), True)):
        number = graph.number(other)
        if number is not None and number < math.inf:
            found = _back(graph, score, factor, steps)
            found.terms.append(Term(condition, factor, number, inverted))
            found.axes = max(found.axes, graph.axes(other))
            return found
    raise Left(f"Where without a constant number: {', '.join(choices)}", steps)
