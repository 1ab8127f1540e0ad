"""Where the attention is in a graph of ONNX: as the operator Attention, or written out.

Written out it is ``MatMul(Softmax(f(MatMul(Q, K^T))), V)``, where f multiplies by numbers, adds what is broadcast, and
hides with Where. Searching starts at each Softmax, backwards to the first product and forwards to the second.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .. import dense, masks
from ..checks import Array
from . import onnx_checks as given
from .onnx import ABSORBING, _engine_type, tightened
from .onnx_backend import run_node

__all__ = ["Graph", "Site", "sites"]


class Graph:
    """A graph with who makes and who takes each value. Nodes are known by their position."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.opset = next((x.version for x in model.opset_import if x.domain in ("", "ai.onnx")), 0)
        self.outputs = [x.name for x in model.graph.output]
        self.types = {x.name: x for x in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
        self.initializers = {x.name: x for x in model.graph.initializer}
        self.maker = {name: at for at, node in enumerate(self.nodes) for name in node.output if name}
        self.takers: dict[str, list[int]] = defaultdict(list)
        for at, node in enumerate(self.nodes):
            for name in captured(node):
                self.takers[name].append(at)

    def made_by(self, name: str, *kinds: str) -> int | None:
        """The node of one of these kinds that makes this value, if one node takes it and nobody else."""
        at = self.maker.get(name)
        alone = len(self.takers[name]) == 1 and name not in self.outputs
        return at if at is not None and alone and self.is_a(at, *kinds) else None

    def taken_by(self, name: str, *kinds: str) -> int | None:
        """The only node that takes this value, if it is of one of these kinds."""
        takers = self.takers[name]
        alone = len(takers) == 1 and name not in self.outputs
        return takers[0] if alone and self.is_a(takers[0], *kinds) else None

    def is_a(self, at: int, *kinds: str) -> bool:
        node = self.nodes[at]
        return node.op_type in kinds and node.domain in ("", "ai.onnx")

    def rank(self, name: str) -> int | None:
        """The number of axes, if it was inferred."""
        there = self.types.get(name)
        tensor = there.type.tensor_type if there is not None else None
        return len(tensor.shape.dim) if tensor is not None and tensor.HasField("shape") else None

    def number(self, name: str) -> float | None:
        """The value, if it is one constant number."""
        array = self._constant(name)
        return float(array.reshape(())) if array is not None and array.size == 1 and array.ndim <= 4 else None

    def _constant(self, name: str) -> Array | None:
        if name in self.initializers:
            return numpy_helper.to_array(self.initializers[name])
        at = self.maker.get(name)
        if at is None or not self.is_a(at, "Constant"):
            return None
        values = [a for a in self.nodes[at].attribute if a.name in ("value", "value_float", "value_int")]
        return np.asarray(_read(values[0])) if values else None


def captured(node: onnx.NodeProto) -> Iterator[str]:
    """The values that a node takes, those that its subgraphs take from outside included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *((attribute.g,) if attribute.type == onnx.AttributeProto.GRAPH else ())):
            inner = {x.name for x in (*graph.input, *graph.initializer)}
            for child in graph.node:
                yield from (name for name in captured(child) if name not in inner)
                inner.update(child.output)


def _read(attribute: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: _read(a) for a in node.attribute}


@dataclass
class Site:
    """An attention in a graph: the nodes it replaces, and the values it takes and gives."""

    name: str
    nodes: list[int]
    inputs: list[str]
    outputs: list[str]

    def like(self) -> dict[str, str]:
        """For each output an input that has its type."""
        return dict.fromkeys(self.outputs, self.inputs[0])

    def run(self, known: Mapping[str, Array]) -> dict[str, Array]:
        raise NotImplementedError


def sites(graph: Graph) -> list[Site]:
    """All attentions of a graph, none of which share a node."""
    found: list[Site] = []
    used: set[int] = set()
    for at, node in enumerate(graph.nodes):
        site: Site | None = None
        if graph.is_a(at, "Attention") and graph.opset in given.OPSETS:
            outputs = [name for name in node.output if name]
            site = Operator(node.name or node.output[0], [at], [x for x in node.input if x], outputs, node, graph.opset)
        elif graph.is_a(at, "Softmax"):
            site = _written_out(graph, at)
        if site is not None and used.isdisjoint(site.nodes):
            found.append(site)
            used.update(site.nodes)
    return found


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
    """factor * (value), added to the scores; or, of a condition, `hidden` where it is false (or true, if turned)."""

    name: str
    factor: float = 1.0
    hidden: float | None = None
    inverted: bool = False

    def mask(self, known: Mapping[str, Array], dtype: type) -> Array:
        x = known[self.name]
        if self.hidden is None:
            return x.astype(dtype, copy=False) if self.factor == 1 else (x * self.factor).astype(dtype, copy=False)
        keep = ~x if self.inverted else x
        return keep if math.isinf(self.hidden) else np.where(keep, dtype(0), dtype(self.factor * self.hidden))


@dataclass
class Scores:
    """What was found on the way back from the softmax."""

    scale: float = 1.0
    terms: list[Term] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    product: int = -1


@dataclass
class WrittenOut(Site):
    """MatMul, ..., Softmax, MatMul."""

    query: Operand
    key: Operand  # as the product takes it: (..., D, Lk)
    value: Operand
    scores: Scores
    turn: Sequence[int] | None  # of the result

    def run(self, known: Mapping[str, Array]) -> dict[str, Array]:
        inputs = [x.read(known) for x in (self.query, self.key, self.value)]
        dtype, given_type = _engine_type(inputs, None, None), inputs[0].dtype
        terms = [term.mask(known, dtype) for term in self.scores.terms]
        leading = np.broadcast_shapes(*(x.shape[:-2] for x in (*inputs, *terms)))  # as MatMul and Add do
        query, key, value = (
            np.broadcast_to(x.astype(dtype, copy=False), (*leading, *x.shape[-2:])) for x in inputs
        )  # no copies
        shape = (*query.shape[:-1], value.shape[-1])
        turn = range(len(shape)) if self.turn is None else self.turn
        made = np.empty([shape[axis] for axis in turn], dtype)
        dense.scaled_dot_product_attention(
            query, key.swapaxes(-1, -2), value, _joined(terms, key.shape[-1]), scale=self.scores.scale,
            out=made.transpose(np.argsort(turn)),
        )  # fmt: skip
        return {self.outputs[0]: made.astype(given_type, copy=False)}


def _joined(terms: Sequence[Array], Lk: int) -> masks.Mask:
    """Biases are added, conditions must all hold."""
    biases, conditions = ([x for x in terms if (x.dtype == bool) is is_bool] for is_bool in (False, True))
    parts = [*conditions, *([sum(biases[1:], biases[0])] if biases else [])]
    return reduce(operator.and_, (tightened(x, Lk) for x in parts), masks.Full())


def _written_out(graph: Graph, softmax: int) -> WrittenOut | None:
    """The attention around this softmax, if it is one."""
    node = graph.nodes[softmax]
    axis = attributes(node).get("axis", -1 if graph.opset >= 13 else 1)
    rank = graph.rank(node.input[0]) or graph.rank(node.output[0])
    if axis != -1 and (rank is None or axis != rank - 1):
        return None
    scores = _back(graph, node.input[0])
    weights, between = _forth(graph, node.output[0])
    second = graph.taken_by(weights, "MatMul")
    if scores is None or second is None or graph.nodes[second].input[0] != weights:
        return None
    product, output = graph.nodes[scores.product], graph.nodes[second].output[0]
    query, key = (_operand(graph, name) for name in product.input)
    value = _operand(graph, graph.nodes[second].input[1])
    nodes = [*scores.nodes, scores.product, softmax, *between, second]
    nodes += [x.node for x in (query, key, value) if x.node is not None]
    turned, turn = graph.taken_by(output, "Transpose"), None
    if turned is not None:
        turn = attributes(graph.nodes[turned]).get("perm")
        if turn is not None:
            nodes.append(turned)
            output = graph.nodes[turned].output[0]
    inputs = [query.name, key.name, value.name, *(term.name for term in scores.terms)]
    return WrittenOut(node.name or node.output[0], nodes, inputs, [output], query, key, value, scores, turn)


def _operand(graph: Graph, name: str) -> Operand:
    at = graph.made_by(name, "Transpose")
    turn = None if at is None else attributes(graph.nodes[at]).get("perm")
    return Operand(name) if at is None or turn is None else Operand(graph.nodes[at].input[0], turn, at)


def _forth(graph: Graph, name: str) -> tuple[str, list[int]]:
    """Past what does nothing to the weights outside of training, or puts 0 where a query sees no key."""
    passed = _guard(graph, name)
    at = graph.taken_by(name, "Dropout", "Identity")
    if at is not None and len(graph.nodes[at].input) <= 2 and not any(graph.nodes[at].output[1:]):
        passed = [at]
    if not passed:
        return name, []
    name, more = _forth(graph, graph.nodes[passed[-1]].output[0])
    return name, [*passed, *more]


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
    return takers if condition == test and otherwise == name and graph.number(instead) == 0 else []


def _back(graph: Graph, name: str, factor: float = 1.0, may_add: bool = True) -> Scores | None:
    """From a score that is multiplied by `factor` later on back to the product of queries and keys."""
    at = graph.made_by(name, "MatMul", "Add", "Mul", "Div", "Where")
    if at is None:
        return None
    node = graph.nodes[at]
    if node.op_type == "MatMul":
        return Scores(scale=factor, product=at)
    if node.op_type == "Where":
        found = _back_from_where(graph, node, factor)
    elif node.op_type == "Add":
        found = _back_from_add(graph, node, factor) if may_add else None
    else:
        found = _back_from_number(graph, node, factor, may_add)
    if found is not None:
        found.nodes.append(at)
    return found


def _back_from_add(graph: Graph, node: onnx.NodeProto, factor: float) -> Scores | None:
    for score, other in (node.input, reversed(node.input)):
        found = _back(graph, score, factor)
        if found is not None:
            found.terms.append(Term(other, factor))
            return found
    return None


def _back_from_number(graph: Graph, node: onnx.NodeProto, factor: float, may_add: bool) -> Scores | None:
    """Mul or Div by a constant."""
    for score, other in (node.input, reversed(node.input)):
        number = graph.number(other)
        if number is not None and number > 0 and math.isfinite(number):
            return _back(graph, score, factor * number if node.op_type == "Mul" else factor / number, may_add)
        if node.op_type == "Div":
            return None
    return None


def _back_from_where(graph: Graph, node: onnx.NodeProto, factor: float) -> Scores | None:
    """Scores, or a constant that hides them.

    A constant of -1e30 or less may be added instead: the score is lost in its rounding. Not so if a mask before it had
    made the score -inf, therefore nothing is added there.
    """
    condition, *choices = node.input
    for score, other, inverted in ((*choices, False), (*reversed(choices), True)):
        number = graph.number(other)
        if number is not None and number <= ABSORBING:
            found = _back(graph, score, factor, may_add=math.isinf(number))
            if found is not None and (math.isinf(number) or not found.terms):
                found.terms.append(Term(condition, factor, number, inverted))
                return found
    return None
