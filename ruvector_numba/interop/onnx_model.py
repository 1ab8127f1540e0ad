"""A model of ONNX whose attention runs on this package's kernels, and all else in ONNX Runtime.

The graph is cut at its attentions. What lies between them become models of their own, each a session of ONNX Runtime,
which optimises it as usual.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..arrays import Array
from ..errors import InvalidInputError
from . import onnx_checks as checks

try:
    import onnx
    import onnx.inliner
    from onnx import helper, numpy_helper
except ModuleNotFoundError as error:
    words = f"reading a model of ONNX needs ONNX: {checks.INSTALL}"
    raise ModuleNotFoundError(words, name=error.name) from error

from .onnx_graph import Graph, captured
from .onnx_patterns import Site, sites
from .onnx_weights import bytes_of, light, weights_of

__all__ = ["AttentionModel", "replace_attention"]

LARGEST = 2_000_000_000  # bytes of weights; a message of protobuf ends at 2 GiB, what is larger goes through a file


def replace_attention(
    model: onnx.ModelProto | bytes | str | os.PathLike[str],
    *,
    session_options: Any = None,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
) -> AttentionModel:
    """Run the attention of a model on this package's kernels, and all else in ONNX Runtime.

    Found are nodes of the operator Attention, opsets 23 to 28, and attention that is written out, in models of any
    opset: MatMul or Einsum; then Mul or Div by a number, Tanh (a softcap), Add of a mask or bias, Where that puts a
    constant in the place of scores (-inf, -1e9, the lowest number or any other), in any order and number; then Softmax
    over the keys, and MatMul or Einsum; and Casts between types of floats anywhere. Functions of the model are inlined.
    Attention inside of subgraphs (If, Loop), of other operators or of other types than float16, float32 and float64
    stays where it is, as does the operator with a mask of whole numbers; `AttentionModel.left` says why.

    Parameters
    ----------
    model : onnx.ModelProto, bytes, or path of a file
    session_options : onnxruntime.SessionOptions, optional
        For the parts. By default threads of ONNX Runtime do not spin when they have nothing to do, since these kernels
        want the cores then.
    providers : sequence
        Of ONNX Runtime, for the parts.

    Returns
    -------
    AttentionModel

    Raises
    ------
    InvalidInputError
        If it is no model, has no attention that can be replaced, in which case the message has the reasons, lacks the
        type of a value at which it must be cut, or has data in files that were not loaded.

    Notes
    -----
    Results differ from those of ONNX Runtime alone in the last digits, and where a query sees no key at all, its scores
    being -inf: it gets 0, and not NaN. A query whose scores all are one low number gets the mean of the values, as
    there. Where(IsNaN(weights), 0, weights), which torch writes into its files for such queries, is taken for
    that: a NaN among the inputs stays NaN.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> from onnx import parser
    >>> model = parser.parse_model('''<ir_version: 8, opset_import: ["": 17]>
    ...     tiny (float[B, L, 8] x) => (float[B, L, 8] y) {
    ...     t = Transpose <perm = [0, 2, 1]> (x)
    ...     s = MatMul (x, t)
    ...     p = Softmax (s)
    ...     a = MatMul (p, x)
    ...     y = Add (a, x) }''')
    >>> fast = rv.interop.onnx.replace_attention(model)  # or the name of a file
    >>> fast.attentions, fast.run({"x": np.ones((2, 3, 8), np.float32)})["y"].shape
    (('p',), (2, 3, 8))
    """
    loaded = _loaded(model)
    weights = weights_of(loaded)
    proto = light(loaded, weights)  # what onnx does with models, it does not with those of over 2 GB
    if proto.functions:  # attention may lie in them
        proto = onnx.inliner.inline_local_functions(proto)
    graph = Graph(onnx.shape_inference.infer_shapes(proto, data_prop=True), weights)
    found, left = sites(graph)
    if not found:
        hint = "replaced are Attention of opsets 23 to 28, and MatMul, Softmax, MatMul; export without fusing them"
        told = {name: left[name] for name in list(left)[:10]} or {"Softmax": "there is none outside of subgraphs"}
        raise InvalidInputError("the model has no attention that can be replaced", shapes=told, hint=hint)
    return AttentionModel(proto, graph, found, left, session_options, providers)


@dataclass
class Level:
    """What may run when all attentions of earlier levels have: nodes in ONNX Runtime, then attentions."""

    nodes: list[int]
    sites: list[Site]
    session: Any = None
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()
    kept: frozenset[str] = frozenset()  # values that later levels or the caller need


class AttentionModel:
    """What `replace_attention` returns, which has an example.

    Attributes
    ----------
    inputs, outputs : tuple of str
        The model's.
    attentions : tuple of str
        Those that were replaced, by the names of their nodes, in the order they run in.
    left : dict of str to str
        Why other nodes Softmax or Attention are left to ONNX Runtime, by their names. The last of a classifier, which
        is no attention, is among them.
    """

    def __init__(
        self, model: onnx.ModelProto, graph: Graph, found: Sequence[Site], left: Mapping[str, str], options: Any,
        providers: Sequence[Any],
    ) -> None:  # fmt: skip
        self.inputs = tuple(x.name for x in model.graph.input if x.name not in graph.initializers)
        self.outputs = tuple(graph.outputs)
        levels = _levels(graph, found, self.inputs)
        self.attentions = tuple(site.name for level in levels for site in level.sites)
        self.left = dict(left)
        parts = _Parts(model, graph, {name: other for site in found for name, other in site.like().items()})
        needed = set(self.outputs)
        for_sites = needed.union(*(site.inputs for site in found))
        self._constants = {
            name: numpy_helper.to_array(graph.initializers[name]) for name in for_sites & set(graph.initializers)
        }
        for level in reversed(levels):
            level.kept = frozenset(needed)
            needed |= {name for site in level.sites for name in site.inputs}
            parts.cut(level, needed)
            needed |= set(level.inputs)
        for level in levels:
            level.session = parts.session(level, options, providers)
        self._levels = levels

    def run(self, inputs: Mapping[str, ArrayLike]) -> dict[str, Array]:
        """Run the model.

        Parameters
        ----------
        inputs : mapping of str to array
            By the names of the model's inputs.

        Returns
        -------
        dict of str to array
            By the names of the model's outputs, in their order.

        Raises
        ------
        InvalidInputError
            If an input is missing or unknown; what ONNX Runtime finds wrong with types and shapes, it raises itself.
        """
        if not isinstance(inputs, Mapping) or set(inputs) != set(self.inputs):
            got = ", ".join(map(str, inputs)) if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
            told = {"the model's inputs": ", ".join(self.inputs), "inputs": got}
            raise InvalidInputError("inputs are a mapping of the model's inputs to arrays", shapes=told)
        known = self._constants | {name: np.asarray(x) for name, x in inputs.items()}
        for level in self._levels:
            if level.session is not None:
                feeds = {name: known[name] for name in level.inputs}
                known.update(zip(level.outputs, level.session.run(list(level.outputs), feeds), strict=True))
            with np.errstate(over="ignore"):  # beyond a type lies infinity, as in ONNX Runtime, which does not warn
                for site in level.sites:
                    known.update(site.run(known))
            known = {name: x for name, x in known.items() if name in level.kept}
        return {name: known[name] for name in self.outputs}


def _levels(graph: Graph, found: Sequence[Site], inputs: Sequence[str]) -> list[Level]:
    """Each node as early as the attentions that it depends on allow."""
    inside = {at for site in found for at in site.nodes}
    last = {max(site.nodes): site for site in found}
    depth = dict.fromkeys((*inputs, *graph.initializers), 0)
    levels: list[Level] = [Level([], [])]
    for at, node in enumerate(graph.nodes):
        if at in last:
            site = last[at]
            d = max(depth[name] for name in site.inputs)
            levels[d].sites.append(site)
            depth.update(dict.fromkeys(site.outputs, d + 1))
            if d + 1 == len(levels):
                levels.append(Level([], []))
        elif at not in inside:
            d = max((depth.get(name, 0) for name in captured(node)), default=0)
            levels[d].nodes.append(at)
            depth.update(dict.fromkeys(node.output, d))
    return levels


class _Parts:
    """Cuts levels out of a model."""

    def __init__(self, model: onnx.ModelProto, graph: Graph, like: Mapping[str, str]) -> None:
        self.model, self.graph, self.like = model, graph, like
        self.told = {x.name for x in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
        # Values that depend on no input are made anew in each part: optimisers look for constants.
        self.constant = set(graph.initializers)
        for node in graph.nodes:
            if _is_function(node) and self.constant.issuperset(captured(node)):
                self.constant.update(name for name in node.output if name)

    def cut(self, level: Level, needed: set[str]) -> None:
        """Which nodes are in the part, and its inputs and outputs; `needed` is what anyone later asks for."""
        nodes = self.graph.nodes
        made = {name for at in level.nodes for name in nodes[at].output}
        level.outputs = sorted(made & needed)
        wanted, taken = list(level.outputs), set[int]()
        own, inputs = set(level.nodes), set[str]()
        while wanted:
            name = wanted.pop()
            at = self.graph.maker.get(name)
            if name in self.graph.initializers or at in taken:
                continue
            if at is not None and (at in own or name in self.constant):
                taken.add(at)
                wanted += captured(nodes[at])
            else:
                inputs.add(name)
        level.nodes, level.inputs = sorted(taken), sorted(inputs)

    def session(self, level: Level, options: Any, providers: Sequence[Any]) -> Any:
        """The part as a session of ONNX Runtime; None if there is nothing to do."""
        if not level.outputs:
            return None
        nodes = [self.graph.nodes[at] for at in level.nodes]
        names = sorted({name for node in nodes for name in captured(node)} & set(self.graph.initializers))
        weights = [self.graph.initializers[name] for name in names]
        ends = [[self._typed(name) for name in ends] for ends in (level.inputs, level.outputs)]
        graph = helper.make_graph(nodes, "part", *ends, weights)
        part = helper.make_model(
            graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version,
            functions=self.model.functions,
        )  # fmt: skip
        runtime = _onnxruntime()
        if options is None:
            options = runtime.SessionOptions()
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if bytes_of(weights) <= LARGEST:
            return runtime.InferenceSession(part.SerializeToString(), options, providers=list(providers))
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = os.path.join(folder, "part.onnx")
            onnx.save(part, path, save_as_external_data=True)
            return runtime.InferenceSession(path, options, providers=list(providers))

    def _typed(self, name: str) -> onnx.ValueInfoProto:
        typed = self.graph.types.get(name) or self.graph.types.get(self.like.get(name, ""))
        if typed is None or not typed.type.WhichOneof("value"):
            hint = "add it to the file: python -m onnxruntime.tools.symbolic_shape_infer --input ... --output ..."
            raise InvalidInputError(f"the model does not tell the type of {name}, where it is to be cut", hint=hint)
        if name in self.told:
            return typed
        # What only this package inferred is not passed on: ONNX Runtime then fuses what it fuses in the whole model.
        return helper.make_tensor_value_info(name, typed.type.tensor_type.elem_type, None)


def _is_function(node: onnx.NodeProto) -> bool:
    """Does it give the same each time? Not what draws numbers; of other people's operators nobody knows."""
    draws = node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Dropout", "Multinomial")
    has_graph = any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute)
    return node.domain in ("", "ai.onnx") and not draws and not has_graph


def _loaded(model: Any) -> onnx.ModelProto:
    """The model, of whatever kind it was given."""
    try:
        if isinstance(model, bytes):
            model = onnx.load_from_string(model)
        elif isinstance(model, str | os.PathLike):
            model = onnx.load(os.fspath(model))
    except OSError:  # no such file, say
        raise
    except Exception as error:  # of protobuf, which has several implementations
        raise InvalidInputError(f"not a model of ONNX: {error}", hint="give what onnx.save wrote") from error
    if not isinstance(model, onnx.ModelProto):
        raise InvalidInputError(f"model is a {type(model).__name__}", hint="give an onnx.ModelProto, bytes or a path")
    return model


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        words = f"replace_attention needs ONNX Runtime: {checks.INSTALL}"
        raise ModuleNotFoundError(words, name=error.name) from error
    return onnxruntime
