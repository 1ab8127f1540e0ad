"""Scaled dot-product attention as in ruvector-attention: one head on (B, L, d_model), without parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy.typing import ArrayLike

from . import checks, dense_past, gpu, layers, layers_half
from .arrays import Array
from .config import AttentionConfig
from .gpu import layers as gpu_layers
from .parameters import ParameterSet, Trainable
from .protocols import TrainableAttention
from .results import AttentionCache, AttentionGradients, read_only

__all__ = ["ScaledDotProductAttention"]


class _Record(NamedTuple):
    """What a pass was computed from and with."""

    inputs: tuple[Array, Array, Array]
    past: dense_past.Past  # of one head

    @property
    def output(self) -> Array:
        return self.past.output[:, 0]

    @property
    def lse(self) -> Array:
        return self.past.lse[:, 0]

    def weights(self, rows: Any = None) -> Array:
        return self.past.weights(rows)[:, 0]

    def backward(self, grad_output: ArrayLike) -> AttentionGradients:
        grad = checks.gradient("grad_output", grad_output, self.output.shape, self.output.dtype)
        g = self.past.backward(grad[:, None])
        return AttentionGradients(query=g.query[:, 0], key=g.key[:, 0], value=g.value[:, 0], bias=g.bias)


class ScaledDotProductAttention(Trainable, TrainableAttention):
    """softmax(query key^T * scale) value for sequences of d_model channels (Vaswani et al., 2017).

    Parameters
    ----------
    config : AttentionConfig
        `scale` is 1 / sqrt(d_model / num_heads) unless given, as in ruvector-attention; set num_heads=1 for
        1 / sqrt(d_model). `dropout` counts in training only; `eps` is added to the denominator of the softmax. There
        are no heads here and nothing is projected: see `MultiHeadAttention`.
    seed : int, optional
        Of the dropout.

    Raises
    ------
    InvalidConfigError
        If `config` is no valid AttentionConfig, or `seed` no whole number of 0 or more.

    Examples
    --------
    >>> import numpy as np, ruvector_numba as rv
    >>> attention = rv.ScaledDotProductAttention(rv.AttentionConfig(d_model=8, num_heads=1, causal=True))
    >>> x = np.random.default_rng(0).standard_normal((2, 5, 8), dtype=np.float32)
    >>> output, weights = attention.forward(x, x, x)
    >>> output.shape, weights.shape, float(weights[0, 0, 1])
    ((2, 5, 8), (2, 5, 5), 0.0)
    """

    def __init__(self, config: AttentionConfig, seed: int | None = None) -> None:
        self.config = layers.checked_config(config)
        self._parameters = ParameterSet({})
        self._random = layers.generator(seed)

    def __repr__(self) -> str:
        return f"ScaledDotProductAttention({self.config})"

    def d_model(self) -> int:
        return self.config.d_model

    def name(self) -> str:
        return "ScaledDotProductAttention"

    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike | None = None,
        value: ArrayLike | None = None,
        mask: Any = None,
        *,
        device: str | None = None,
    ) -> Array:
        """The output alone, as `forward`; no array of Lq x Lk is formed."""
        return self._attend(query, key, value, mask, 0.0, None, device).output

    def forward(
        self,
        query: ArrayLike,
        key: ArrayLike | None = None,
        value: ArrayLike | None = None,
        mask: Any = None,
        *,
        device: str | None = None,
    ) -> tuple[Array, Array]:
        """The output and the weights, without dropout.

        Parameters
        ----------
        query : array (B, Lq, d_model), float16, bfloat16, float32 or float64
        key : array (B, Lk, d_model), optional
            The query if None.
        value : array (B, Lk, Dv), of any Dv, optional
            The key if None.
        mask : array (Lq, Lk) or (B, Lq, Lk), or mask of `ruvector_numba.masks`, optional
            In an array True, or a number above 0.5, **hides**; axes of 1 are shared. A mask object says who attends, as
            everywhere, and so does a bool array that is joined to one: write ``~hide & rv.masks.Causal()``. With
            `causal` in the configuration query i sees keys j <= i at most, for any Lq and Lk.
        device : "cuda", optional
            Move arrays of NumPy to the GPU, and the results back. Arrays that lie on a GPU are read there without it,
            and so results are arrays there.

        Returns
        -------
        output : array (B, Lq, Dv)
            0 where a query sees nothing.
        weights : array (B, Lq, Lk)
            `forward_cached` forms no such array.

        Raises
        ------
        InvalidInputError
            If an input has other than three axes or none of these dtypes, is longer than `max_seq_len`, or differs from
            the others in dtype, in B or in Lk.
        DimensionMismatchError
            If `query` or `key` has other than d_model channels.
        InvalidMaskError
            If the mask does not fit the scores, or holds no numbers, negative ones or NaN.
        OutOfMemoryError
            If the weights are larger than this machine's memory.
        """
        record = self._attend(query, key, value, mask, 0.0, None, device)
        return record.output, record.weights()

    def forward_cached(
        self,
        query: ArrayLike,
        key: ArrayLike | None = None,
        value: ArrayLike | None = None,
        mask: Any = None,
        training: bool = True,
        *,
        seed: int | None = None,
        device: str | None = None,
    ) -> tuple[Array, AttentionCache]:
        """The output, and what `backward` needs; with dropout if `training`. No array of Lq x Lk is formed.

        Parameters
        ----------
        query, key, value, mask, device
            As in `forward`.
        training : bool, default True
            Whether weights are dropped, with the probability `dropout` of the configuration.
        seed : int, optional
            Decides which are dropped; without it, the layer's own generator does.

        Returns
        -------
        output : array (B, Lq, Dv)
            Read-only, since `backward` reads it.
        cache : AttentionCache

        Raises
        ------
        InvalidInputError, DimensionMismatchError, InvalidMaskError, OutOfMemoryError
            As in `forward`; InvalidInputError also if `training` is neither True nor False, or `seed` is no whole
            number from 0 to 2**63 - 1.

        Examples
        --------
        >>> import numpy as np, ruvector_numba as rv
        >>> attention = rv.ScaledDotProductAttention(rv.AttentionConfig(d_model=8, num_heads=1))
        >>> output, cache = attention.forward_cached(np.ones((2, 5, 8), np.float32), training=False)
        >>> attention.backward(output, cache).query.shape
        (2, 5, 8)
        """
        dropout, seed = layers.dropout(self.config, training, seed, self._random)
        record = self._attend(query, key, value, mask, dropout, seed, device)
        q, k, v = record.inputs
        output, lse = read_only(record.output), record.lse
        return output, AttentionCache(q, k, v, mask=mask, output=output, lse=lse, record=record)

    def backward(self, grad_output: ArrayLike, cache: AttentionCache) -> AttentionGradients:
        """The gradients of a loss by query, key and value, given its gradient by the output. Exact.

        Parameters
        ----------
        grad_output : array (B, Lq, Dv)
        cache : AttentionCache
            Of `forward_cached`, or built by hand.

        Returns
        -------
        AttentionGradients
            In the dtype of the inputs; `query`, `key` and `value`, and `bias` of a float mask.

        Raises
        ------
        InvalidInputError
            If `cache` is that of another kind of attention, or `grad_output` has another dtype than the output.
        DimensionMismatchError
            If `grad_output` has another shape than the output.
        """
        record = layers.record_of(cache, None, _Record, gpu_layers.OneHead, layers_half.Rounded)
        if record is None:
            record = self._attend(cache.query, cache.key, cache.value, cache.mask, 0.0, None)
        return record.backward(grad_output)

    def _attend(
        self, query: ArrayLike, key: ArrayLike | None, value: ArrayLike | None, mask: Any, dropout: float,
        seed: int | None, device: str | None = None,
    ) -> Any:  # fmt: skip
        key = query if key is None else key
        value = key if value is None else value
        config = self.config
        if gpu.concerns(device, query, key, value):
            return gpu_layers.one_head(config, (query, key, value), mask, dropout, seed, device)
        (q, k, v), half = layers_half.widened(query, key, value)
        if half is not None:
            record = self._attend(q, k, v, layers_half.widened_mask(mask), dropout, seed)
            return layers_half.Rounded.of(record, (query, key, value), mask, half)
        query, key, value = layers.batch(query, key, value, (config.d_model, config.d_model, None), config.max_seq_len)
        B, Lq, Lk = *query.shape[:2], key.shape[1]
        seen = layers.hidden(mask, (B, 1, Lq, Lk), per_head=False)
        q, k, v = (x[:, None] for x in (query, key, value))
        scale = config.get_scale()
        c = checks.call(q, k, v, seen, dropout_p=dropout, is_causal=config.causal, scale=scale, seed=seed)
        return _Record((query, key, value), dense_past.forward(c._replace(eps=config.eps)))

    def _file_header(self) -> dict[str, str]:
        return {"kind": self.name(), "config": self.config.to_json()}

    @classmethod
    def _of_file_header(cls, header: dict[str, str]) -> ScaledDotProductAttention:
        return cls(AttentionConfig.from_json(header["config"]))
