"""A graph of ONNX, and what can be said of its values before it runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..arrays import Array

__all__ = ["Graph", "attributes", "captured"]

SAME = ("Cast", "Dropout", "Identity", "Neg", "Relu", "Slice", "Softmax", "Split", "Sqrt", "Tanh")  # its axes
OTHERS = ("Gather", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
BROADCASTING = ("Add", "Div", "MatMul", "Mul", "Sub", "Where")


class Graph:
    """A graph with who makes and who takes each value. Nodes are known by their position.

    Its initializers are given: the model may have been made light.
    """

    def __init__(self, model: onnx.ModelProto, initializers: Mapping[str, onnx.TensorProto]) -> None:
        self.nodes = list(model.graph.node)
        self.opset = next((x.version for x in model.opset_import if x.domain in ("", "ai.onnx")), 0)
        self.outputs = [x.name for x in model.graph.output]
        self.types = {x.name: x for x in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
        self.initializers = dict(initializers)
        self.maker = {name: at for at, node in enumerate(self.nodes) for name in node.output if name}
        self.takers: dict[str, list[int]] = defaultdict(list)
        self._ranks: dict[str, int] | None = None
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
        """The number of axes, if it was inferred, or if the nodes before it tell: inference ends at unknown sizes."""
        if self._ranks is None:
            self._ranks = {name: len(x.dims) for name, x in self.initializers.items()}
            self._ranks |= {name: len(sizes) for name in self.types if (sizes := self._sizes(name)) is not None}
            for at, node in enumerate(self.nodes):
                after = self._rank_after(node) if self.is_a(at, *SAME, *BROADCASTING, *OTHERS) else None
                if after is not None:
                    self._ranks.update((name, after) for name in node.output if name not in self._ranks)
        return self._ranks.get(name)

    def _rank_after(self, node: onnx.NodeProto) -> int | None:
        """Of what a node makes."""
        if node.op_type == "Transpose" and (perm := attributes(node).get("perm")):
            return len(perm)
        if node.op_type == "Reshape":
            sizes = self._sizes(node.input[1])
            return sizes[0] if sizes and sizes[0] else None
        assert self._ranks is not None
        ranks = [
            self._ranks.get(name) for name in node.input[: None if node.op_type in (*BROADCASTING, "Gather") else 1]
        ]
        known = [rank for rank in ranks if rank is not None]
        if len(known) < len(ranks):
            return None
        if node.op_type == "Gather":
            return sum(known) - 1
        if node.op_type in ("Squeeze", "Unsqueeze"):
            axes = attributes(node).get("axes") if len(node.input) < 2 else self._constant(node.input[1])
            return None if axes is None else known[0] + np.size(axes) * (1 if node.op_type == "Unsqueeze" else -1)
        return max(known)

    def _sizes(self, name: str) -> list[int] | None:
        """Of the axes, if they were inferred; 0 where one is not known."""
        there = self.types.get(name)
        tensor = there.type.tensor_type if there is not None else None
        return [d.dim_value for d in tensor.shape.dim] if tensor is not None and tensor.HasField("shape") else None

    def is_single(self, name: str) -> bool:
        """Is it known to be one number, whatever that is, of one axis or none?"""
        return self._sizes(name) in ([], [1])

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

    def axes(self, name: str) -> int:
        """How many axes one constant number has."""
        array = self._constant(name)
        return 0 if array is None else array.ndim

    def stranger(self, name: str, kinds: Collection[int]) -> str | None:
        """The type of a value, if it is known and none of these."""
        there = self.types.get(name)
        kind = there.type.tensor_type.elem_type if there is not None else 0
        if name in self.initializers:
            kind = self.initializers[name].data_type
        return str(onnx.TensorProto.DataType.Name(kind)) if kind and kind not in kinds else None

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
            inner |= {x.values.name for x in graph.sparse_initializer}
            for child in graph.node:
                yield from (name for name in captured(child) if name not in inner)
                inner.update(child.output)


def _read(attribute: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: _read(a) for a in node.attribute}
