"""The weights of a model, apart from its graph: together they may be more than protobuf writes into one message."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..errors import InvalidInputError

__all__ = ["bytes_of", "light", "refuse_outside", "weights_of"]

SMALL = 1024  # elements: sizes and axes, which tell shapes, have fewer


def weights_of(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The initializers by their names, sparse ones as arrays, which ONNX Runtime makes of them anyway."""
    refuse_outside(model)
    there = {x.name: x for x in model.graph.initializer}
    return there | {x.values.name: _dense(x) for x in model.graph.sparse_initializer}


def refuse_outside(model: onnx.ModelProto) -> None:
    """Complain of data that lie in other files: a model in memory does not know its folder."""
    graph = model.graph
    tensors = [*graph.initializer, *(part for x in graph.sparse_initializer for part in (x.values, x.indices))]
    tensors += [a.t for node in graph.node for a in node.attribute if a.HasField("t")]
    for x in tensors:
        if x.data_location == onnx.TensorProto.EXTERNAL:
            hint = "give the path of the model, or load them: onnx.load_external_data_for_model(model, folder)"
            raise InvalidInputError(f"the model's data of {x.name or 'a constant'} are not loaded", hint=hint)


def light(model: onnx.ModelProto, weights: Mapping[str, onnx.TensorProto]) -> onnx.ModelProto:
    """The model with no more of its large weights than their types and shapes."""
    graph = onnx.GraphProto(
        name=model.graph.name, node=model.graph.node, input=model.graph.input, output=model.graph.output,
        value_info=model.graph.value_info,
    )  # fmt: skip
    graph.initializer.extend(x if math.prod(x.dims) <= SMALL else _outline(x) for x in weights.values())
    return helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions
    )


def bytes_of(weights: Iterable[onnx.TensorProto]) -> int:
    return sum(math.prod(x.dims) * np.dtype(helper.tensor_dtype_to_np_dtype(x.data_type)).itemsize for x in weights)


def _outline(tensor: onnx.TensorProto) -> onnx.TensorProto:
    outside = onnx.TensorProto.EXTERNAL
    return onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=outside)


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    """Indices are positions in the flat array, or one along each axis."""
    values, at, dims = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices), tuple(sparse.dims)
    array = np.zeros(dims, values.dtype)
    array.reshape(-1)[at if at.ndim == 1 else np.ravel_multi_index(tuple(at.T), dims)] = values
    return numpy_helper.from_array(array, sparse.values.name)
