"""Multi-head attention as in ruvector-attention: four projections around dense attention, with exact gradients."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from . import checks, dense_past, gpu, halves, layers, layers_half, visibility
from .arrays import Array
from .config import AttentionConfig
from .dense_call import DenseCall
from .errors import InvalidConfigError, InvalidInputError
from .gpu import layers as gpu_layers
from .kv_cache import KeyValueCache
from .parameters import ParameterSet, Trainable
from .plan import memory
from .projection import product, weight_gradient
from .protocols import TrainableAttention
from .results import AttentionCache, AttentionGradients, read_only
from .values import check_memory, whole_number

__all__ = ["KeyValueCache", "MultiHeadAttention"]

KEYS_AT_ONCE = 1024


class MultiHeadAttention(Trainable, TrainableAttention):
    """Attention of several heads between linear projections (Vaswani et al., 2017), as torch.nn.MultiheadAttention.

    output = (softmax(q_h k_h^T * scale) v_h, for all heads h, side by side) w_o + b_o, where q = query w_q + b_q, and k
    and v likewise; q_h is what head h has of it.

    The parameters are w_q (d_model, d_model), w_k (kdim, d_model), w_v (vdim, d_model), w_o (d_model, d_model), and
    with `use_bias` b_q, b_k, b_v, b_o (d_model,), in this order wherever they are flat. Weights start Glorot-uniform
    (Glorot and Bengio, 2010), biases at 0.

    Parameters
    ----------
    config : AttentionConfig
        `d_model`, `num_heads`, `use_bias`, `scale` (1 / sqrt(d_k) if None), `causal`, `max_seq_len`; `dropout` of the
        weights in training only; `eps`, added to the denominator of the softmax.
    seed : int, optional
        Of the initial parameters and the dropout: the same seed, the same layer.
    kdim, vdim : int, optional
        Channels of `key` and `value`; d_model if None.
    dtype : float32 or float64
        Of the initial parameters. What is computed has the dtype of the inputs, whatever the parameters have.

    Raises
    ------
    InvalidConfigError, InvalidInputError
        If `config` is not valid, or `seed`, `kdim` or `vdim` no such number; if `dtype` is neither float32 nor float64.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> layer = rv.MultiHeadAttention(rv.AttentionConfig(d_model=32, num_heads=4), seed=0)
    >>> x = np.random.default_rng(0).standard_normal((2, 10, 32), dtype=np.float32)
    >>> layer(x).shape
    (2, 10, 32)
    >>> output, cache = layer.forward_cached(x)
    >>> layer.update_parameters(layer.backward(output, cache), learning_rate=0.01)
    """

    def __init__(
        self,
        config: AttentionConfig,
        seed: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.config = layers.checked_config(config)
        d = config.d_model
        self.kdim, self.vdim = _width("kdim", kdim, d), _width("vdim", vdim, d)
        self._random, self._identity = layers.generator(seed), layers.identity()
        inputs = {"w_q": d, "w_k": self.kdim, "w_v": self.vdim, "w_o": d}
        initial = {name: layers.glorot_uniform(self._random, (n, d)) for name, n in inputs.items()}
        if config.use_bias:
            initial |= {name: np.zeros(d) for name in ("b_q", "b_k", "b_v", "b_o")}
        self._parameters = ParameterSet(initial).as_type(dtype)

    def __repr__(self) -> str:
        widths = "".join(f", {n}={w}" for n, w in (("kdim", self.kdim), ("vdim", self.vdim)) if w != self.d_model())
        return f"MultiHeadAttention({self.config}{widths})"

    def d_model(self) -> int:
        return self.config.d_model

    def name(self) -> str:
        return "MultiHeadAttention"

    # --- forward ----------------------------------------------------------------------------------------------------
    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike | None = None,
        value: ArrayLike | None = None,
        mask: Any = None,
        *,
        key_padding_mask: ArrayLike | None = None,
        device: str | None = None,
    ) -> Array:
        """The output alone, as `forward`; no array of Lq x Lk is formed."""
        return self._attend(query, key, value, mask, key_padding_mask, 0.0, None, device).output

    def forward(
        self,
        query: ArrayLike,
        key: ArrayLike | None = None,
        value: ArrayLike | None = None,
        mask: Any = None,
        *,
        key_padding_mask: ArrayLike | None = None,
        device: str | None = None,
    ) -> tuple[Array, Array]:
        """The output and the weights, without dropout: their mean over the heads. `head_weights` has each head's own.

        Parameters
        ----------
        query : array (B, Lq, d_model), float32, float64, float16, or bfloat16 of the package ml_dtypes
            Half precision is computed in float32, and the results are rounded.
        key, value : array (B, Lk, kdim) and (B, Lk, vdim), optional
            The query, and the key, if None.
        mask : array (Lq, Lk), (B, Lq, Lk) or (B, heads, Lq, Lk), or mask of `ruvector_numba.masks`, optional
            In an array True, or a number above 0.5, **hides**; axes of 1 are shared. A mask object says who attends, as
            everywhere, and so does a bool array that is joined to one: write ``~hide & rv.masks.Causal()``. A float
            array that is to be added to the scores goes in as ``rv.masks.All([array])``. With `causal` in the
            configuration query i sees keys j <= i at most, for any Lq and Lk.
        key_padding_mask : array (B, Lk), optional
            True, or a number above 0.5, hides from all queries. Where the last keys are hidden, they cost nothing.
        device : "cuda", optional
            Move arrays of NumPy to the GPU and the results back. Arrays that lie on a GPU stay there without it.

        Returns
        -------
        output : array (B, Lq, d_model)
            b_o where a query sees nothing.
        weights : array (B, Lq, Lk)
            The mean over the heads. A call of the layer, and `forward_cached`, form none.

        Raises
        ------
        InvalidInputError, DimensionMismatchError
            If an input has other axes, channels or dtypes than these, is longer than `max_seq_len`, or differs from the
            others in dtype, B or Lk.
        InvalidMaskError, OutOfMemoryError
            If a mask does not fit the scores, or has negative numbers or NaN; if there is no memory for the weights.
        """
        record = self._attend(query, key, value, mask, key_padding_mask, 0.0, None, device)
        return record.output, record.weights()

    def head_weights(
        self,
        query: ArrayLike,
        key: ArrayLike | None = None,
        value: ArrayLike | None = None,
        mask: Any = None,
        *,
        key_padding_mask: ArrayLike | None = None,
        rows: Any = None,
        device: str | None = None,
    ) -> Array:
        """The weights of each head, without dropout: their mean over axis 1 is what `forward` gives.

        Parameters
        ----------
        query, key, value, mask, key_padding_mask, device
            As in `forward`.
        rows : slice, int, or sequence of int, optional
            Which queries; all by default.

        Returns
        -------
        array (B, heads, number of rows, Lk)

        Raises
        ------
        InvalidInputError, DimensionMismatchError, InvalidMaskError, OutOfMemoryError
            As in `forward`; InvalidInputError also if `rows` is not a selection of queries.
        """
        return self._attend(query, key, value, mask, key_padding_mask, 0.0, None, device).head_weights(rows)

    def forward_cached(
        self,
        query: ArrayLike,
        key: ArrayLike | None = None,
        value: ArrayLike | None = None,
        mask: Any = None,
        training: bool = True,
        *,
        key_padding_mask: ArrayLike | None = None,
        seed: int | None = None,
        device: str | None = None,
    ) -> tuple[Array, AttentionCache]:
        """The output, and what `backward` needs; with dropout if `training`. No array of Lq x Lk is formed.

        Parameters
        ----------
        query, key, value, mask, key_padding_mask, device
            As in `forward`.
        training : bool, default True
            Whether weights are dropped, with the probability `dropout` of the configuration.
        seed : int, optional
            Decides which are dropped; without it, the layer's own generator does.

        Returns
        -------
        output : array (B, Lq, d_model), read-only
        cache : AttentionCache

        Raises
        ------
        InvalidInputError, DimensionMismatchError, InvalidMaskError, OutOfMemoryError
            As in `forward`; InvalidInputError also if `training` is no bool, or `seed` no number from 0 to 2**63 - 1.
        """
        dropout, seed = layers.dropout(self.config, training, seed, self._random)
        record = self._attend(query, key, value, mask, key_padding_mask, dropout, seed, device)
        output, lse = record.output, record.lse
        q, k, v = record.inputs
        kept, mask = read_only(output), record.mask
        return output, AttentionCache(q, k, v, mask=mask, output=kept, lse=lse, record=record, owner=self._identity)

    def _attend(
        self,
        query: ArrayLike,
        key: ArrayLike | None,
        value: ArrayLike | None,
        mask: Any,
        key_padding_mask: ArrayLike | None,
        dropout: float,
        seed: int | None,
        device: str | None = None,
    ) -> Any:
        key = query if key is None else key
        value = key if value is None else value
        config, H = self.config, self.config.num_heads
        if gpu.concerns(device, query, key, value):
            widths, arrays = (config.d_model, self.kdim, self.vdim), (query, key, value)
            parts = (mask, key_padding_mask, dropout, seed, device)
            return gpu_layers.multi_head(config, self._parameters, widths, arrays, *parts)
        (q, k, v), half = layers_half.widened(query, key, value)
        if half is not None:
            wide = layers_half.widened_mask(mask), layers_half.widened_mask(key_padding_mask)
            record = self._attend(q, k, v, *wide, dropout, seed)
            return layers_half.Rounded.of(record, (query, key, value), mask, half)
        inputs = layers.batch(query, key, value, (config.d_model, self.kdim, self.vdim), config.max_seq_len)
        (B, Lq, _), Lk = inputs[0].shape, inputs[1].shape[1]
        for x in inputs:
            check_memory((*x.shape[:2], config.d_model), x.dtype, "projection", "use a smaller batch")
        mask = layers.with_padding(mask, key_padding_mask, layers.padded(key_padding_mask, B, Lk), (B, H, Lq, Lk))
        seen = layers.hidden(mask, (B, H, Lq, Lk), per_head=True)
        parameters = self._parameters.as_type(inputs[0].dtype)
        q, k, v = _heads(inputs, parameters, H)
        scale = config.get_scale()
        c = checks.call(q, k, v, seen, dropout_p=dropout, is_causal=config.causal, scale=scale, seed=seed)
        return _output(c._replace(eps=config.eps), inputs, parameters, mask)

    # --- backward ---------------------------------------------------------------------------------------------------
    def backward(self, grad_output: ArrayLike, cache: AttentionCache) -> AttentionGradients:
        """The gradients of a loss by all parameters and inputs, given its gradient by the output. Exact.

        Parameters
        ----------
        grad_output : array (B, Lq, d_model)
        cache : AttentionCache
            Of this layer's `forward_cached`, or of a copy's: the gradients are those of what was computed then, with
            the parameters of then and the same weights dropped. Or built by hand, see there.

        Returns
        -------
        AttentionGradients
            In the dtype of the inputs.

        Raises
        ------
        InvalidInputError, DimensionMismatchError
            If `cache` is none of this layer's, or `grad_output` has another dtype or shape than the output.
        """
        record = layers.record_of(cache, self._identity, _Record, gpu_layers.Record, layers_half.Rounded)
        if record is None:
            record = self._attend(cache.query, cache.key, cache.value, cache.mask, None, 0.0, None)
        return record.backward(grad_output)

    # --- decoding ---------------------------------------------------------------------------------------------------
    def new_cache(self, batch: int, max_len: int, dtype: DTypeLike | None = None) -> KeyValueCache:
        """Room for the keys and values of sequences that grow step by step.

        Parameters
        ----------
        batch : int
            Number of sequences.
        max_len : int
            The most positions that each can have; no more than the configuration's `max_seq_len`.
        dtype : float32, float64, float16 or bfloat16 of the package ml_dtypes, optional
            Of the inputs to come; that of the parameters if None.

        Returns
        -------
        KeyValueCache

        Raises
        ------
        InvalidInputError, OutOfMemoryError
            If a number is none or above `max_seq_len`, `kdim` or `vdim` is not d_model, or `dtype` is another; if there
            is no memory for so much.
        """
        batch, max_len = whole_number("batch", batch, 0), whole_number("max_len", max_len, 0)
        limit = self.config.max_seq_len
        if limit is not None and max_len > limit:
            hint = f"AttentionConfig(max_seq_len={max_len}), or max_seq_len=None for no limit"
            raise InvalidInputError(f"max_len is {max_len}, and max_seq_len {limit}", hint=hint)
        if self.kdim != self.d_model() or self.vdim != self.d_model():
            hint = "keys and values come from the same input as queries: kdim and vdim must be d_model"
            raise InvalidInputError(f"kdim is {self.kdim} and vdim {self.vdim}: no step-by-step decoding", hint=hint)
        half = layers_half.half_type(dtype)
        kind = half or self._parameters.as_type(self._parameters.dtype if dtype is None else dtype).dtype
        shape = (int(batch), self.config.num_heads, int(max_len), self.config.d_k)
        check_memory((2, *shape), kind, "keys and values", hint="fewer positions, or a smaller batch")
        return KeyValueCache(np.zeros(shape, kind), np.zeros(shape, kind))

    def step(self, x: ArrayLike, cache: KeyValueCache) -> Array:
        """Take the next positions of each sequence: the same as a causal pass over all so far, to rounding.

        A position sees itself and those before it, whether or not the configuration is `causal`.

        Parameters
        ----------
        x : array (B, n, d_model)
            The next n positions, one or more; a whole prompt at first, say.
        cache : KeyValueCache
            Of `new_cache`; their keys and values are added to it. `KeyValueCache` has an example.

        Returns
        -------
        array (B, n, d_model)

        Raises
        ------
        InvalidInputError, DimensionMismatchError
            If the cache is full, or of another layer, batch or dtype than x; if x is not (B, n, d_model). The cache is
            then as it was.
        """
        config, H = self.config, self.config.num_heads
        if not isinstance(cache, KeyValueCache):
            raise InvalidInputError(f"cache is a {type(cache).__name__}", hint="give what new_cache returned")
        (wide,), half = layers_half.widened(x)
        new = layers.sequences("x", wide, config.d_model)
        cache.check(new, half or new.dtype, H, config)
        start, stop = cache.length, cache.length + new.shape[1]
        parameters = self._parameters.as_type(new.dtype)
        made = _heads((new, new, new), parameters, H)
        query, key, value = made if half is None else (halves.rounded(x, half) for x in made)
        cache.keys[:, :, start:stop], cache.values[:, :, start:stop] = key, value
        # Keys by the thousand, and limits that say how many count: a plan for each length would cost 0.1 ms a step.
        room = -(-stop // KEYS_AT_ONCE) * KEYS_AT_ONCE
        limits = np.zeros((*new.shape[:2], 2), np.int64)
        limits[..., 1] = np.arange(start + 1, stop + 1)
        seen = visibility.Visibility(limits=limits)
        keys, values = cache.keys[:, :, :room], cache.values[:, :, :room]
        c = checks.call(query, keys, values, scale=config.get_scale())
        c = c._replace(eps=config.eps, seen=seen, dtype=new.dtype)
        output = _output(c, (new, new, new), parameters).output
        cache.length = stop
        return output if half is None else halves.rounded(output, half)

    # --- files ------------------------------------------------------------------------------------------------------
    def _file_header(self) -> dict[str, str]:
        widths = {"kdim": self.kdim, "vdim": self.vdim}
        return {"kind": self.name(), "config": self.config.to_json(), "widths": json.dumps(widths)}

    @classmethod
    def _of_file_header(cls, header: dict[str, str]) -> MultiHeadAttention:
        widths = json.loads(header["widths"])
        return cls(AttentionConfig.from_json(header["config"]), kdim=widths["kdim"], vdim=widths["vdim"])


# --- the passes ------------------------------------------------------------------------------------------------------
class _Record(NamedTuple):
    """What a pass was computed from and with."""

    inputs: tuple[Array, Array, Array]
    parameters: ParameterSet
    past: dense_past.Past  # of the heads
    joined: Array  # (B, Lq, heads, d_k): what w_o is applied to
    output: Array
    mask: Any  # of the layer, its key_padding_mask included

    @property
    def lse(self) -> Array:
        return self.past.lse

    def head_weights(self, rows: Any = None) -> Array:
        return self.past.weights(rows)

    def weights(self, rows: Any = None) -> Array:
        """Averaged over the heads: (B, rows, Lk), some rows at a time, so that the heads' own need little room."""
        B, H, Lq, Lk = *self.past.output.shape[:3], self.past.call.key.shape[2]
        chosen = checks.row_indices(rows, Lq)
        check_memory((B, len(chosen), Lk), self.output.dtype, "weights", dense_past.SOME_WEIGHTS)
        result = np.zeros((B, len(chosen), Lk), self.output.dtype)
        at_once = max(1, (1 << 22) // max(1, B * H * Lk))
        for i in range(0, len(chosen), at_once):
            result[:, i : i + at_once] = self.past.weights(chosen[i : i + at_once]).mean(axis=1)
        return result

    def backward(self, grad_output: ArrayLike) -> AttentionGradients:
        grad = checks.gradient("grad_output", grad_output, self.output.shape, self.output.dtype)
        B, Lq, d = grad.shape
        H, d_k = self.joined.shape[2:]
        # output = joined w_o + b_o
        w_o = self.parameters["w_o"].reshape(H, d_k, 1, d)
        grad_joined = memory.result((B, H, Lq, d_k), grad.dtype)
        product(grad[:, :, None], _transposed(w_o), grad_joined.transpose(0, 2, 1, 3))
        made = {"o": _weight_gradients(self.joined.reshape(B, Lq, 1, d), grad[:, :, None])}
        # joined = attention of the heads
        g = self.past.backward(grad_joined)
        # heads = inputs w + b
        dx = []
        for x, name, dy in zip(self.inputs, "qkv", (g.query, g.key, g.value), strict=True):
            w = self.parameters[f"w_{name}"].reshape(1, x.shape[2], H, d_k)
            dx.append(memory.result(x.shape, x.dtype))
            product(dy.transpose(0, 2, 1, 3), _transposed(w), dx[-1][:, :, None])
            made[name] = _weight_gradients(x[:, :, None], dy.transpose(0, 2, 1, 3))
        parts: dict[str, Array] = {}
        for name, whole in zip("qkvo", ("query", "key", "value", "output"), strict=True):
            parts[f"{whole}_weights"], bias = made[name]
            if f"b_{name}" in self.parameters:
                parts[f"{whole}_bias"] = bias
        dq, dk, dv = dx
        return AttentionGradients(**parts, query=dq, key=dk, value=dv, bias=g.bias)


def _heads(inputs: tuple[Array, Array, Array], parameters: ParameterSet, H: int) -> list[Array]:
    """x w + b of query, key and value, each (B, heads, L, d_k); if all three are one array, by one product."""
    x, d = inputs[0], parameters["w_q"].shape[1]
    if inputs[1] is x and inputs[2] is x:
        n, flat = x.shape[2], parameters.flat  # which begins with w_q, w_k and w_v
        weights = flat[: 3 * n * d].reshape(3, n, 1, d).transpose(2, 1, 0, 3)
        bias = flat[-4 * d : -d] if "b_q" in parameters else None  # and ends with b_q, b_k, b_v and b_o
        made = _projected(x, weights, bias, 3 * H, d // H)
        return [made[:, i * H : (i + 1) * H] for i in range(3)]
    return [
        _projected(x, parameters[f"w_{name}"][None, :, None], parameters.get(f"b_{name}"), H, d // H)
        for x, name in zip(inputs, "qkv", strict=True)
    ]


def _projected(x: Array, weights: Array, bias: Array | None, heads: int, d_k: int) -> Array:
    """(B, heads, L, d_k), given weights whose columns are those of all heads."""
    out = memory.result((x.shape[0], heads, x.shape[1], d_k), x.dtype)
    product(x[:, :, None], weights, out.transpose(0, 2, 1, 3), bias)
    return out


def _output(c: DenseCall, inputs: tuple[Array, Array, Array], parameters: ParameterSet, mask: Any = None) -> _Record:
    """Attention of the heads, written joined, and the last projection."""
    B, H, Lq, d_k = c.query.shape
    d = H * d_k
    joined = memory.result((B, Lq, H, d_k), c.dtype)
    past = dense_past.forward(c, joined.transpose(0, 2, 1, 3))
    output = memory.result((B, Lq, d), joined.dtype)
    product(
        joined.reshape(B, Lq, 1, d), parameters["w_o"].reshape(1, d, 1, d), output[:, :, None], parameters.get("b_o")
    )
    return _Record(inputs, parameters, past, joined, output, mask)


def _transposed(x: Array) -> Array:
    """Rows, which are pairs, for columns."""
    return x.transpose(2, 3, 0, 1)


def _weight_gradients(x: Array, dy: Array) -> tuple[Array, Array]:
    """dw = x^T dy and db = sum dy, for (B, L, H, C) arrays."""
    n, m = x.shape[2] * x.shape[3], dy.shape[2] * dy.shape[3]
    dw, db = memory.result((n, m), x.dtype), np.empty(m, x.dtype)
    weight_gradient(x, dy, dw.reshape(*x.shape[2:], *dy.shape[2:]), db)
    return dw, db


def _width(name: str, n: object, d_model: int) -> int:
    if n is None:
        return d_model
    return whole_number(name, n, 1, error=InvalidConfigError, hint="give a whole number, 1 or more; None means d_model")
