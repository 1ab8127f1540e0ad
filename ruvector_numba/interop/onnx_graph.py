"""A graph of ONNX, and what can be said of its values before it runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..checks import Array

__all__ = ["Graph", "attributes", "captured"]

EACH = ("Add", "Cast", "Div", "Dropout", "Identity", "Mul", "Neg", "Softmax", "Sqrt", "Sub", "Tanh", "Where")


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
        """The number of axes, if it was inferred, or if a Transpose tells."""
        there = self.types.get(name)
        tensor = there.type.tensor_type if there is not None else None
        if tensor is not None and tensor.HasField("shape"):
            return len(tensor.shape.dim)
        if name in self.initializers:
            return len(self.initializers[name].dims)
        at = self.maker.get(name)
        if at is None:
            return None
        if self.is_a(at, "Transpose"):
            perm = attributes(self.nodes[at]).get("perm")
            return self.rank(self.nodes[at].input[0]) if perm is None else len(perm)
        if not self.is_a(at, "MatMul", *EACH):
            return None
        inputs = self.nodes[at].input[: 1 if self.is_a(at, "Dropout") else None]  # which has numbers of its own
        ranks = [self.rank(x) for x in inputs]
        known = [rank for rank in ranks if rank is not None]
        return max(known) if len(known) == len(ranks) else None

    def is_single(self, name: str) -> bool:
        """Is it known to be one number, whatever that is, of one axis or none?"""
        there = self.types.get(name)
        tensor = there.type.tensor_type if there is not None else None
        sizes = [d.dim_value for d in tensor.shape.dim] if tensor is not None and tensor.HasField("shape") else None
        return sizes in ([], [1])

    def told(self, name: str) -> str:
        """Where a value comes from and who takes it, if it is not what was looked for."""
        at = self.maker.get(name)
        if at is None:
            return f"{name} is made by no node"
        if name in self.outputs:
            return f"{name} is an output of the model"
        takers = [self.nodes[n].op_type for n in self.takers[name]]
        return f"{name} is made by {self.nodes[at].op_type} and taken by {', '.join(takers) or 'nobody'}"

    def number(self, name: str) -> float | None:
        """The value, if it is one constant number."""
        array = self._constant(name)
        return float(array.reshape(())) if array is not None and array.size == 1 and array.ndim <= 4 else None

    def _constant(self, name: str) -> Array | None:
        if name in self.initializers:
            return numpy_helper.to_array(self.initializers[name])
        at = self.maker.get(name)
        if at is not None and self.is_a(at, "Cast", "Identity"):
            array, to = self._constant(self.nodes[at].input[0]), attributes(self.nodes[at]).get("to")
            with np.errstate(over="ignore", invalid="ignore"):
                return array if array is None or to is None else array.astype(helper.tensor_dtype_to_np_dtype(to))
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
