"""Parameters to and from ``torch.nn.MultiheadAttention``, as mappings of names to arrays. Needs no torch.

torch keeps weights as (out, in) and stacks those of query, key and value where their sizes allow; here they are (in,
out), each by itself. Both ways only copy numbers, so a round trip is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..arrays import Array, Shape
from ..checks import FLOATS, from_sequence
from ..errors import DimensionMismatchError, InvalidConfigError, InvalidInputError
from ..multi_head import MultiHeadAttention

__all__ = ["load_torch_state", "to_torch_state"]


SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def load_torch_state(mha: MultiHeadAttention, state: Mapping[str, Any]) -> None:
    """Give a layer the parameters of a ``torch.nn.MultiheadAttention``.

    The state says nothing of heads, dropout or scale: build `mha` with the same ``num_heads``. Its dtype becomes that
    of the state.

    Parameters
    ----------
    mha : MultiHeadAttention
        With the state's ``d_model`` (torch's ``embed_dim``), ``use_bias``, ``kdim`` and ``vdim``.
    state : mapping of str to array_like or tensor, all float32 or all float64
        What torch's ``state_dict()`` returns: ``in_proj_weight`` (3 * d_model, d_model), or, if kdim or vdim differs
        from d_model, ``q_proj_weight`` (d_model, d_model), ``k_proj_weight`` (d_model, kdim) and ``v_proj_weight``
        (d_model, vdim); ``out_proj.weight`` (d_model, d_model); with biases ``in_proj_bias`` (3 * d_model,) and
        ``out_proj.bias`` (d_model,).

    Raises
    ------
    InvalidConfigError
        If the state is of a layer that `mha` is not: with biases, kdim or vdim, or ``add_bias_kv``.
    InvalidInputError
        If a name is missing or unknown, or an array is neither float32 nor float64, or they differ in dtype, or
        a tensor is on the device meta.
    DimensionMismatchError
        If an array has the wrong shape.
    TrainingError
        If a number is NaN or infinite. After any of these errors `mha` is as it was.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> state = {"in_proj_weight": np.ones((24, 8)), "out_proj.weight": np.eye(8)}  # torch_layer.state_dict()
    >>> layer = rv.MultiHeadAttention(rv.AttentionConfig(d_model=8, num_heads=2, use_bias=False))
    >>> rv.interop.load_torch_state(layer, state)
    >>> layer(np.ones((1, 3, 8))).shape
    (1, 3, 8)
    >>> {name: x.shape for name, x in rv.interop.to_torch_state(layer).items()}
    {'in_proj_weight': (24, 8), 'out_proj.weight': (8, 8)}

    Back into torch::

        torch_layer.load_state_dict({name: torch.from_numpy(x) for name, x in rv.interop.to_torch_state(layer).items()})
    """
    _check_layer(mha)
    if not isinstance(state, Mapping):
        hint = "give a mapping of names to arrays: layer.state_dict()"
        raise InvalidInputError(f"state is a {type(state).__name__}", hint=hint)
    expected = _torch_shapes(mha)
    _check_names(mha, state, expected)
    arrays = {name: _array(name, state[name]) for name in expected}
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            shapes = {f"{name}.shape": arrays[name].shape, "expected": shape}
            raise DimensionMismatchError(shape, arrays[name].shape, shapes=shapes, hint=_sizes_hint(mha))
    if len({x.dtype for x in arrays.values()}) > 1:
        dtypes = {f"{name}.dtype": x.dtype for name, x in arrays.items()}
        raise InvalidInputError("the state's arrays differ in dtype", shapes=dtypes, hint="cast them to one")
    mha.set_parameters(_from_torch(arrays))


def to_torch_state(mha: MultiHeadAttention) -> dict[str, Array]:
    """The parameters of a layer as ``torch.nn.MultiheadAttention`` names and lays them out.

    Parameters
    ----------
    mha : MultiHeadAttention

    Returns
    -------
    dict of str to array
        See `load_torch_state`; copies, in the dtype of the layer and torch's order. The torch layer they fit is
        ``MultiheadAttention(d_model, num_heads, bias=use_bias, kdim=kdim, vdim=vdim)``.

    Raises
    ------
    InvalidInputError
        If `mha` is another kind of layer.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> layer = rv.MultiHeadAttention(rv.AttentionConfig(d_model=8, num_heads=2))
    >>> {name: x.shape for name, x in rv.interop.to_torch_state(layer).items()}
    {'in_proj_weight': (24, 8), 'in_proj_bias': (24,), 'out_proj.weight': (8, 8), 'out_proj.bias': (8,)}
    """
    _check_layer(mha)
    p = mha.parameters  # read once: another thread may be training
    weights = [p[name].T for name in ("w_q", "w_k", "w_v")]
    stacked = "in_proj_weight" in _torch_shapes(mha)
    state = {"in_proj_weight": np.concatenate(weights)} if stacked else dict(zip(SEPARATE, weights, strict=True))
    out = {"out_proj.weight": p["w_o"].T}
    if "b_q" in p:
        state["in_proj_bias"] = np.concatenate([p["b_q"], p["b_k"], p["b_v"]])
        out["out_proj.bias"] = p["b_o"]
    return {name: np.array(x, order="C") for name, x in (state | out).items()}


def _from_torch(state: Mapping[str, Array]) -> dict[str, Array]:
    stacked = "in_proj_weight" in state
    weights = np.split(state["in_proj_weight"], 3) if stacked else [state[name] for name in SEPARATE]
    weights.append(state["out_proj.weight"])
    parameters = {name: w.T for name, w in zip(("w_q", "w_k", "w_v", "w_o"), weights, strict=True)}
    if "in_proj_bias" in state:
        biases = [*np.split(state["in_proj_bias"], 3), state["out_proj.bias"]]
        parameters.update(zip(("b_q", "b_k", "b_v", "b_o"), biases, strict=True))
    return parameters


def _torch_shapes(mha: MultiHeadAttention) -> dict[str, Shape]:
    """The names and shapes of the torch layer that `mha` corresponds to, in torch's order."""
    d_model, kdim, vdim = mha.config.d_model, mha.kdim, mha.vdim
    shapes: dict[str, Shape] = {"in_proj_weight": (3 * d_model, d_model)}
    if not kdim == vdim == d_model:
        shapes = dict(zip(SEPARATE, ((d_model, n) for n in (d_model, kdim, vdim)), strict=True))
    if mha.config.use_bias:
        shapes["in_proj_bias"] = (3 * d_model,)
    shapes["out_proj.weight"] = (d_model, d_model)
    if mha.config.use_bias:
        shapes["out_proj.bias"] = (d_model,)
    return shapes


# Checks


def _check_layer(mha: object) -> None:
    if not isinstance(mha, MultiHeadAttention):
        hint = "give a ruvector_numba.MultiHeadAttention first, then the state"
        raise InvalidInputError(f"mha is a {type(mha).__name__}", hint=hint)


def _check_names(mha: MultiHeadAttention, state: Mapping[str, Any], expected: Iterable[str]) -> None:
    if set(state) == set(expected):
        return
    prefixes = {str(name).removesuffix("out_proj.weight") for name in state if str(name).endswith(".out_proj.weight")}
    if prefixes:
        prefix = sorted(prefixes)[0]
        hint = f"one layer of a model: {{name.removeprefix({prefix!r}): x for name, x in state.items() if "
        hint += f"name.startswith({prefix!r})}}"
        raise InvalidInputError("the names in the state have a prefix", shapes=_names(state, expected), hint=hint)
    if "bias_k" in state or "bias_v" in state:
        hint = "append these rows to key and value yourself, after their projection, or train without them"
        raise InvalidConfigError("the state is of a layer with add_bias_kv=True, which has no counterpart", hint=hint)
    _check_biases(mha, state)
    if "in_proj_weight" in state and "in_proj_weight" not in expected:
        sizes = {"d_model": mha.config.d_model, "kdim": mha.kdim, "vdim": mha.vdim}
        hint = "build it without kdim and vdim"
        raise InvalidConfigError("the state's kdim and vdim are d_model, the layer's are not", shapes=sizes, hint=hint)
    if "in_proj_weight" in expected and set(SEPARATE) <= set(state):
        given = {f"{name}.shape": _array(name, state[name]).shape for name in SEPARATE}
        hint = "build it as MultiHeadAttention(config, kdim=..., vdim=...), of the sizes that these end with"
        raise InvalidConfigError("the state is of a layer with kdim or vdim", shapes=given, hint=hint)
    missing = [name for name in expected if name not in state]
    told = f"{', '.join(missing)} missing" if missing else "there are more names than the layer has"
    raise InvalidInputError(f"the state does not fit: {told}", shapes=_names(state, expected))


def _check_biases(mha: MultiHeadAttention, state: Mapping[str, Any]) -> None:
    given = {"in_proj_bias", "out_proj.bias"} & set(state)
    if mha.config.use_bias and not given:
        hint = "build it with AttentionConfig(use_bias=False), or add biases of zeros to the state"
        raise InvalidConfigError("the state has no biases, the layer has", hint=hint)
    if given and not mha.config.use_bias:
        raise InvalidConfigError(
            "the state has biases, the layer has none", hint="build it with AttentionConfig(use_bias=True)"
        )


def _names(state: Iterable[str], expected: Iterable[str]) -> dict[str, str]:
    given = sorted(map(str, state))
    more = f", and {len(given) - 8} more" if len(given) > 8 else ""
    return {"in the state": ", ".join(given[:8]) + more, "expected": ", ".join(expected)}


def _sizes_hint(mha: MultiHeadAttention) -> str:
    return f"the layer has d_model={mha.config.d_model}, kdim={mha.kdim}, vdim={mha.vdim}; build it as the torch layer"


def _array(name: str, x: Any) -> Array:
    """An array of the state, or a tensor of it, wherever that is, as float32 or float64."""
    if getattr(x, "is_meta", False):
        hint = "load a checkpoint into the module first: module.load_state_dict(torch.load(path), assign=True)"
        raise InvalidInputError(f"{name} is on the device meta, where tensors have no numbers", hint=hint)
    hint = f"cast it: state[{name!r}].float() of a tensor, .astype(numpy.float32) of an array"
    try:
        array = from_sequence(name, x.detach().cpu() if hasattr(x, "detach") else x)
    except TypeError as error:  # bfloat16, which NumPy lacks, or a sparse tensor
        raise InvalidInputError(f"{name} cannot become an array: {error}", hint=hint) from None
    if array.dtype not in FLOATS or not array.dtype.isnative:
        raise InvalidInputError(f"{name} has dtype {array.dtype}, not float32 or float64", hint=hint)
    return array
