"""Parameters to and from the layers of PyTorch Geometric, as mappings of names to arrays. Needs no torch.

A layer on graphs has the names, shapes and layout of its counterpart in PyTorch Geometric, so both ways only copy
numbers, and a round trip is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..arrays import Array
from ..errors import AttentionError, DimensionMismatchError, InvalidConfigError, InvalidInputError
from ..graphs.gat import GATv2
from ..graphs.hetero import parameter_key
from ..graphs.hgt import HGT
from ..parameters import Trainable
from .states import _array

__all__ = ["load_pyg_state", "to_pyg_state"]


# Which argument of a layer decides whether it has parameters that begin so.
SETTINGS = {
    "att_edge": "edge_dim",
    "lin": "in_channels",
    "lin_beta": "beta",
    "lin_dst": "in_channels",
    "lin_edge": "edge_dim",
    "lin_r": "share_weights",
    "lin_src": "in_channels",
    "res": "residual",
}


def load_pyg_state(layer: Trainable, arrays: Mapping[str, Any]) -> None:
    """Give a layer on graphs the parameters of its counterpart in PyTorch Geometric.

    The state says nothing of dropout, slope, self-loops or aggregation: build `layer` with the same. Its dtype becomes
    that of the state.

    Parameters
    ----------
    layer : GAT, GATv2, GraphTransformer or HGT
    arrays : mapping of str to array_like or tensor, all float32 or all float64
        What ``state_dict()`` of a ``GATConv``, ``GATv2Conv``, ``TransformerConv`` or ``HGTConv`` returns: the names and
        shapes of ``layer.parameters``. A `GATv2` that shares weights keeps ``lin_l`` alone; the ``lin_r`` of the state
        may be missing, as it is in ``named_parameters()``. An `HGT` with edge_dim has ``lin_edge`` too, which no
        ``HGTConv`` has.

    Raises
    ------
    InvalidInputError
        If a name is missing or unknown, or an array is neither float32 nor float64, or they differ in dtype, or
        a tensor is on the device meta.
    InvalidConfigError
        If `layer` shares weights that differ in the state, or is an `HGT` with its edge types in another order than the
        `HGTConv`, as far as the order of the names in the state shows that.
    DimensionMismatchError
        If an array has the wrong shape.
    TrainingError
        If a number is NaN or infinite. After any of these errors `layer` is as it was.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> state = {  # GATConv(3, 4, heads=2, bias=False).state_dict()
    ...     "att_src": np.ones((1, 2, 4)), "att_dst": np.ones((1, 2, 4)), "lin.weight": np.ones((8, 3))
    ... }
    >>> layer = rv.GAT(3, 4, heads=2, bias=False)
    >>> rv.interop.load_pyg_state(layer, state)
    >>> layer(np.ones((2, 3)), [[0], [1]]).tolist()[0]
    [3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    >>> {name: x.shape for name, x in rv.interop.to_pyg_state(layer).items()}
    {'att_src': (1, 2, 4), 'att_dst': (1, 2, 4), 'lin.weight': (8, 3)}

    Back into torch::

        conv.load_state_dict({name: torch.from_numpy(x) for name, x in rv.interop.to_pyg_state(layer).items()})
    """
    _check_layer(layer)
    if not isinstance(arrays, Mapping):
        hint = "give a mapping of names to arrays: conv.state_dict()"
        raise InvalidInputError(f"arrays is a {type(arrays).__name__}", hint=hint)
    shapes, twins = layer.parameters.shapes, _twins(layer)
    _check_names(arrays, shapes, twins)
    found = {name: _numbers(name, arrays[name]) for name in (*shapes, *twins) if name in arrays}
    for name, array in found.items():
        shape = shapes[twins.get(name, name)]
        if array.shape != shape:
            hint = f"build the layer as the one of the state; it is {layer!r}"
            told = {f"{name}.shape": array.shape, "expected": shape}
            raise DimensionMismatchError(shape, array.shape, shapes=told, hint=hint)
    if len({x.dtype for x in found.values()}) > 1:
        dtypes = {f"{name}.dtype": x.dtype for name, x in found.items()}
        raise InvalidInputError("the state's arrays differ in dtype", shapes=dtypes, hint="cast them to one")
    for twin, name in twins.items():
        if twin in found and not np.array_equal(found[twin], found[name], equal_nan=True):
            hint = "build it with share_weights=False"
            raise InvalidConfigError(f"{twin} differs from {name}, the layer shares them", hint=hint)
    _check_order(layer, arrays)
    layer.set_parameters({name: found[name] for name in shapes})


def to_pyg_state(layer: Trainable) -> dict[str, Array]:
    """The parameters of a layer on graphs as the ``state_dict()`` of its counterpart in PyTorch Geometric.

    Parameters
    ----------
    layer : GAT, GATv2, GraphTransformer or HGT

    Returns
    -------
    dict of str to array
        See `load_pyg_state`; copies, in the dtype of the layer.

    Raises
    ------
    InvalidInputError
        If `layer` is another kind of layer.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> {name: x.shape for name, x in rv.interop.to_pyg_state(rv.GAT(3, 4, heads=2)).items()}
    {'att_src': (1, 2, 4), 'att_dst': (1, 2, 4), 'lin.weight': (8, 3), 'bias': (8,)}
    """
    _check_layer(layer)
    p = layer.parameters  # read once: another thread may be training
    sources = {name: name for name in p} | _twins(layer)
    return {name: p[source].copy() for name, source in sources.items()}


def _twins(layer: Trainable) -> dict[str, str]:
    """The names that a state has twice and the layer once."""
    if not (isinstance(layer, GATv2) and layer.share_weights):
        return {}
    return {name.replace("lin_l", "lin_r"): name for name in layer.parameters if name.startswith("lin_l.")}


def _numbers(name: str, x: Any) -> Array:
    try:
        return _array(name, x)
    except AttentionError:
        raise
    except ValueError:  # torch's UninitializedParameter
        hint = "a layer built with in_channels=-1 gets its parameters when it is first called"
        raise InvalidInputError(f"{name} has no numbers yet", hint=hint) from None


# Checks


def _check_layer(layer: object) -> None:
    if not (isinstance(layer, Trainable) and hasattr(layer, "supports_heterogeneous")):
        hint = "give a GAT, GATv2, GraphTransformer or HGT of ruvector_numba first, then the state"
        raise InvalidInputError(f"layer is a {type(layer).__name__}", hint=hint)


def _check_names(state: Mapping[str, Any], expected: Iterable[str], twins: Iterable[str]) -> None:
    missing = [name for name in expected if name not in state]
    unknown = [str(name) for name in state if name not in {*expected, *twins}]
    if not missing and not unknown:
        return
    told = {"missing": _listed(missing), "unknown": _listed(unknown)}
    first = next(iter(expected))
    prefixes = {name.removesuffix(first) for name in unknown if name.endswith(f".{first}")}
    if missing and prefixes:
        fitting = [p for p in sorted(prefixes) if all(p + name in state for name in expected)]
        prefix = (fitting or sorted(prefixes))[0]
        hint = f"one layer of a model: {{name.removeprefix({prefix!r}): x for name, x in state.items() if "
        hint += f"name.startswith({prefix!r})}}"
        raise InvalidInputError(
            "the names in the state have a prefix", shapes={"prefixes": _listed(sorted(prefixes))} | told, hint=hint
        )
    settings = {_setting(name, {*missing, *unknown}) for name in (*missing, *unknown)}
    hint = "give the state of the layer's counterpart: a GATConv, GATv2Conv, TransformerConv or HGTConv"
    if None not in settings:
        hint = f"build the layer with the state's {', '.join(sorted(map(str, settings)))}"
    raise InvalidInputError("the names in the state are not the layer's", shapes=told, hint=hint)


def _check_order(layer: Trainable, state: Mapping[str, Any]) -> None:
    """Raise if an HGTConv stacked its edge types in another order than the layer: k_rel and v_rel do not name them.

    ``state_dict()`` has `p_rel` in that order. Not so a state whose names are all sorted, as safetensors leaves them:
    ``state_dict()`` never is, and nothing in it says any more what the order was.
    """
    if not isinstance(layer, HGT) or list(state) == sorted(state):
        return
    kinds = {f"p_rel.{parameter_key(*kind)}": kind for kind in layer.edge_types}
    theirs = [kinds[name] for name in state if name in kinds]
    if theirs != layer.edge_types:
        orders = {"in the state": theirs, "layer.edge_types": layer.edge_types}
        hint = "build the HGT with the state's order; or, if it was not the HGTConv that had it, "
        hint += "give {name: state[name] for name in layer.parameters}"
        raise InvalidConfigError("the state has the edge types in another order", shapes=orders, hint=hint)


def _setting(name: str, off: set[str]) -> str | None:
    """The argument that would have made the difference in this name."""
    is_bias = name == "bias" or name.endswith(".bias")
    if is_bias and name.removesuffix("bias") + "weight" not in off:
        return "bias"
    return SETTINGS.get(name.split(".", maxsplit=1)[0])


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more or "none"
