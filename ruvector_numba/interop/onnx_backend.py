"""A backend as the onnx package defines them, for models of the operators that this package has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..arrays import Array
from ..errors import InvalidConfigError, InvalidInputError
from . import onnx_checks as checks
from .onnx import attention

try:
    import onnx
    from onnx import helper, numpy_helper
    from onnx.backend import base
except ModuleNotFoundError as error:
    words = f"a backend for ONNX's models needs ONNX: {checks.INSTALL}"
    raise ModuleNotFoundError(words, name=error.name) from error

from .onnx_flex import flex_attention
from .onnx_weights import refuse_outside

__all__ = ["Backend", "Representation", "run_node"]

PREVIEW = "ai.onnx.preview"
OPERATORS: dict[tuple[str, str], Callable[..., Any]] = {
    ("", "Attention"): attention,
    (PREVIEW, "FlexAttention"): flex_attention,
}


class Backend(base.Backend):  # type: ignore[misc]  # onnx comes without types here
    """Runs models made of the operators Attention (opsets 23 to 28) and FlexAttention (preview 1), on the CPU.

    An operator that is not among them is reported before anything runs, in the way that the standard's test runner
    counts as not implemented; a model that is mostly something else is for `replace_attention`.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> from onnx import helper
    >>> node = helper.make_node("Attention", ["Q", "K", "V"], ["Y"], is_causal=1)
    >>> x = np.ones((1, 2, 3, 4), np.float32)
    >>> rv.interop.onnx.Backend.run_node(node, [x, x, x])[0].shape
    (1, 2, 3, 4)

    The standard's own tests, against this backend::

        from onnx.backend.test import BackendTest
        tests = BackendTest(rv.interop.onnx.Backend, __name__)
        globals().update(tests.include("test_attention").test_cases)
    """

    @classmethod
    def is_compatible(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> bool:
        """Whether `prepare` takes the model.

        Parameters
        ----------
        model : onnx.ModelProto
        device : str, default "CPU"
        **kwargs
            Ignored.

        Returns
        -------
        bool
            True if all its operators are known and the device is the CPU.
        """
        return cls.supports_device(device) and not _unknown(model)

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> Representation:
        """Check a model, and return what runs it.

        Parameters
        ----------
        model : onnx.ModelProto
        device : str, default "CPU"
        **kwargs
            As `onnx.backend.base.Backend.prepare` takes them.

        Returns
        -------
        Representation
            Its ``run(inputs)`` runs the model on arrays, a list or a mapping of names.

        Raises
        ------
        onnx.backend.test.runner.BackendIsNotSupposedToImplementIt
            If it has an operator that is not implemented, or one of another opset.
        InvalidInputError
            If the device is not the CPU, or data of the model lie in files that were not loaded.
        """
        _check_device(device)
        refuse_outside(model)
        super().prepare(model, device, **kwargs)
        unknown = _unknown(model)
        if unknown:
            raise _not_implemented(unknown)
        return Representation(model)

    @classmethod
    def run_node(
        cls, node: onnx.NodeProto, inputs: Any, device: str = "CPU", outputs_info: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Run one node. The class has an example.

        Parameters
        ----------
        node : onnx.NodeProto
        inputs : list or tuple of arrays, or mapping of str to array
            The node's inputs, in their order or by their names.
        device : str, default "CPU"
        outputs_info
            Ignored.
        **kwargs
            `opset_version`, the newest by default, is of the standard's own domain; others are ignored.

        Returns
        -------
        named tuple of arrays
            In the order of the node's outputs.

        Raises
        ------
        onnx.backend.test.runner.BackendIsNotSupposedToImplementIt
            If the operator is not implemented, or is one of another opset.
        InvalidInputError, InvalidConfigError
            If the device is not the CPU, or an input or `opset_version` is missing or wrong; if the node has an
            attribute that its operator lacks.
        """
        _check_device(device)
        opset = checks.whole("opset_version", kwargs.get("opset_version", onnx.defs.onnx_opset_version()))
        if not _is_known(node, {"": opset, PREVIEW: 1}):
            raise _not_implemented([f"{node.op_type} of {node.domain or 'ai.onnx'}, opset {opset}"])
        named = [name for name in node.input if name]
        return _outputs(node, run_node(node, dict(zip(named, _listed(inputs, named), strict=True)), opset))

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Whether this is the CPU, "CPU" or "CPU:0", the one device that there is.

        Parameters
        ----------
        device : str

        Returns
        -------
        bool
        """
        return device.split(":", maxsplit=1)[0] == "CPU"


class Representation(base.BackendRep):  # type: ignore[misc]
    """A model that `Backend` has checked."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph, self.opset = model.graph, _versions(model.opset_import)[""]
        self.constants = {x.name: numpy_helper.to_array(x) for x in model.graph.initializer}
        self.inputs = [x.name for x in model.graph.input if x.name not in self.constants]

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Run the model.

        Parameters
        ----------
        inputs : list or tuple of arrays, or mapping of str to array
            In the order of the model's inputs, or by their names.
        **kwargs
            Ignored.

        Returns
        -------
        named tuple of arrays
            In the order of the model's outputs.

        Raises
        ------
        InvalidInputError
            If an input is missing or unknown; and what the operators raise.
        """
        known: dict[str, Array] = dict(self.constants)
        known.update(zip(self.inputs, _listed(inputs, self.inputs), strict=True))
        for node in self.graph.node:
            there = {name: x for name, x in zip(node.output, run_node(node, known, self.opset), strict=True) if name}
            known.update(there)
        names = [x.name for x in self.graph.output]
        result: tuple[Any, ...] = base.namedtupledict("Outputs", names)(*(known[name] for name in names))
        return result


def run_node(node: onnx.NodeProto, known: Mapping[str, Array], opset: int) -> list[Array | None]:
    """The outputs of a node whose operator is known, in its order; None for those that it leaves out."""
    operator = OPERATORS[_domain(node), node.op_type]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    parameters = inspect.signature(operator).parameters.values()
    allowed = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"opset"}
    unknown = sorted(set(attributes) - allowed)
    if unknown:
        hint = f"the operator has {', '.join(sorted(allowed))}"
        raise InvalidConfigError(f"{node.op_type} has no attribute {unknown[0]}", hint=hint)
    inputs = [known[name] if name else None for name in node.input]
    limit = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    if not 3 <= len(inputs) <= limit or len(node.output) > 4:
        raise InvalidInputError(f"{node.op_type} has {len(inputs)} inputs and {len(node.output)} outputs")
    if operator is flex_attention:
        return [operator(*inputs, **attributes, opset=opset)]
    mode = attributes.pop("qk_matmul_output_mode", 0)
    wants_stage = len(node.output) == 4 and bool(node.output[3])
    results = operator(*inputs, **attributes, opset=opset, qk_matmul_output_mode=mode if wants_stage else None)
    return [x if name else None for name, x in zip(node.output, results, strict=False)]


def _domain(node: onnx.NodeProto) -> str:
    return "" if node.domain == "ai.onnx" else str(node.domain)


def _versions(imports: Sequence[Any]) -> dict[str, int]:
    return {"": 0} | {"" if x.domain == "ai.onnx" else x.domain: x.version for x in imports}


def _is_known(node: onnx.NodeProto, versions: Mapping[str, int]) -> bool:
    if (_domain(node), node.op_type) not in OPERATORS:
        return False
    return versions.get(PREVIEW) == 1 if _domain(node) else versions[""] in checks.OPSETS


def _unknown(model: onnx.ModelProto) -> list[str]:
    versions = _versions(model.opset_import)
    found = {
        f"{n.op_type} of {n.domain or 'ai.onnx'}, opset {versions.get(_domain(n))}"
        for n in model.graph.node
        if not _is_known(n, versions)
    }
    return sorted(found)


def _not_implemented(unknown: Sequence[str]) -> Exception:
    """The error that the standard's test runner asks for; loading it loads the tests."""
    from onnx.backend.test.runner import BackendIsNotSupposedToImplementIt

    return BackendIsNotSupposedToImplementIt(
        f"not implemented by ruvector_numba: {'; '.join(unknown)}\n"
        "HINT: rv.interop.onnx.replace_attention runs the attention of a model here, and all else in ONNX Runtime"
    )


def _outputs(node: onnx.NodeProto, results: Sequence[Array | None]) -> tuple[Any, ...]:
    there = [(name, x) for name, x in zip(node.output, results, strict=True) if name]
    outputs: tuple[Any, ...] = base.namedtupledict("Outputs", [name for name, _ in there])(*(x for _, x in there))
    return outputs


def _listed(inputs: Any, names: Sequence[str]) -> list[Array]:
    """The inputs as arrays in the order of their names."""
    if isinstance(inputs, Mapping):
        missing, unknown = [n for n in names if n not in inputs], [str(n) for n in inputs if n not in names]
        if missing or unknown:
            told = {"missing": ", ".join(missing) or "none", "unknown": ", ".join(unknown) or "none"}
            raise InvalidInputError("the inputs are not the model's", shapes=told)
        inputs = [inputs[name] for name in names]
    if not isinstance(inputs, list | tuple):
        raise InvalidInputError(f"inputs is a {type(inputs).__name__}", hint="give a list of arrays, or a mapping")
    if len(inputs) != len(names):
        raise InvalidInputError(f"{len(inputs)} inputs for {len(names)}", shapes={"inputs": ", ".join(names)})
    return [x if isinstance(x, np.ndarray) else np.asarray(x) for x in inputs]


def _check_device(device: str) -> None:
    if not Backend.supports_device(device):
        raise InvalidInputError(f"device is {device}", hint="this backend runs on the CPU")
