"""Configurations and layers, built option by option.

>>> import ruvector_numba as rv
>>> builder = rv.AttentionBuilder().d_model(256).num_heads(4).dropout(0.1)
>>> builder.build_config().d_k
64

A method sets its option in the builder and returns this builder, so calls can be chained or written one below the
other. Nothing is checked until something is built; then the whole configuration is. What was built holds a frozen
configuration: the builder can be changed and used again, and what it built before stays as it is. `copy.copy` gives
a second builder that starts from the same options.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from .config import Aggregation, AttentionConfig, GraphAttentionConfig
from .errors import InvalidConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

    from .graphs.gat import GAT, GATv2
    from .graphs.transformer import GraphTransformer
    from .multi_head import MultiHeadAttention
    from .scaled_dot_product import ScaledDotProductAttention

__all__ = ["AttentionBuilder", "GraphAttentionBuilder"]

Config = TypeVar("Config", AttentionConfig, GraphAttentionConfig)


class _Options:
    """A method for every option of an `AttentionConfig`, for all builders."""

    _config: AttentionConfig | GraphAttentionConfig

    def _set(self, **options: Any) -> Self:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}().config({self._config!r})"

    def d_model(self, d_model: int) -> Self:
        """Set the channels of queries, keys, values and the output.

        Parameters
        ----------
        d_model : int
            A multiple of `num_heads`.

        Returns
        -------
        Self
        """
        return self._set(d_model=d_model)

    def num_heads(self, num_heads: int) -> Self:
        """Set the number of attention heads.

        Parameters
        ----------
        num_heads : int

        Returns
        -------
        Self
        """
        return self._set(num_heads=num_heads)

    def dropout(self, dropout: float) -> Self:
        """Set the probability to drop a weight; in training only.

        Parameters
        ----------
        dropout : float
            0 to 1.

        Returns
        -------
        Self
        """
        return self._set(dropout=dropout)

    def use_bias(self, use_bias: bool) -> Self:
        """Set whether the linear projections add a bias.

        Parameters
        ----------
        use_bias : bool

        Returns
        -------
        Self
        """
        return self._set(use_bias=use_bias)

    def scale(self, scale: float | None) -> Self:
        """Set what scores are multiplied by.

        Parameters
        ----------
        scale : float or None
            None for 1 / sqrt(d_k).

        Returns
        -------
        Self
        """
        return self._set(scale=scale)

    def max_seq_len(self, max_seq_len: int | None) -> Self:
        """Set the longest sequence that is accepted. Graphs ignore it.

        Parameters
        ----------
        max_seq_len : int or None
            None for no limit.

        Returns
        -------
        Self
        """
        return self._set(max_seq_len=max_seq_len)

    def causal(self, causal: bool) -> Self:
        """Set whether query i sees keys 0 to i only.

        Parameters
        ----------
        causal : bool

        Returns
        -------
        Self
        """
        return self._set(causal=causal)

    def eps(self, eps: float) -> Self:
        """Set what is added to the denominator of the softmax.

        Parameters
        ----------
        eps : float
            Positive.

        Returns
        -------
        Self
        """
        return self._set(eps=eps)


class AttentionBuilder(_Options):
    """Builds scaled dot-product and multi-head attention; starts from the defaults of `AttentionConfig`.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> rv.AttentionBuilder().d_model(64).num_heads(4).scale(0.5).build_config().get_scale()
    0.5
    >>> rv.AttentionBuilder().d_model(0).build_config()
    Traceback (most recent call last):
        ...
    ruvector_numba.errors.InvalidConfigError: Invalid configuration: d_model must be greater than 0
      d_model: 0
    """

    _config: AttentionConfig

    def __init__(self) -> None:
        self._config = AttentionConfig()

    def _set(self, **options: Any) -> Self:
        self._config = replace(self._config, **options)
        return self

    def config(self, config: AttentionConfig) -> Self:
        """Set all options at once.

        Parameters
        ----------
        config : AttentionConfig

        Returns
        -------
        Self

        Raises
        ------
        InvalidConfigError
            If this is of another type.
        """
        self._config = _checked("config", AttentionConfig, config)
        return self

    def build_config(self) -> AttentionConfig:
        """The configuration with all that was set.

        Returns
        -------
        AttentionConfig

        Raises
        ------
        InvalidConfigError
            If it is not valid.
        """
        self._config.validate()
        return self._config

    def build_scaled_dot_product(self, seed: int | None = None) -> ScaledDotProductAttention:
        """Scaled dot-product attention.

        Parameters
        ----------
        seed : int, optional
            Of the dropout; the same seed drops the same.

        Returns
        -------
        ScaledDotProductAttention

        Raises
        ------
        InvalidConfigError
            If the configuration is not valid, or `seed` is none.
        """
        from .scaled_dot_product import ScaledDotProductAttention

        return ScaledDotProductAttention(self.build_config(), seed)

    def build_multi_head(
        self, seed: int | None = None, kdim: int | None = None, vdim: int | None = None
    ) -> MultiHeadAttention:
        """Multi-head attention with fresh parameters.

        Parameters
        ----------
        seed : int, optional
            Of the parameters; the same seed gives the same layer.
        kdim, vdim : int, optional
            Channels of keys and of values, if not `d_model`.

        Returns
        -------
        MultiHeadAttention

        Raises
        ------
        InvalidConfigError
            If the configuration is not valid, or `seed`, `kdim` or `vdim` is no such number.
        """
        from .multi_head import MultiHeadAttention

        return MultiHeadAttention(self.build_config(), seed, kdim, vdim)


class GraphAttentionBuilder(_Options):
    """Builds attention on graphs and its configurations; starts from the defaults of `GraphAttentionConfig`.

    Layers on graphs have no use for `causal`, `eps` and `max_seq_len`, and `GAT` and `GATv2` none for `scale`: these
    are part of a configuration and change nothing in the layer.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> builder = rv.GraphAttentionBuilder().d_model(64).num_heads(4).use_edge_features(True).edge_dim(3)
    >>> builder.aggregation("mean").build_config().base.d_k
    16
    >>> builder.build_gat(seed=0).parameters["lin.weight"].shape
    (64, 64)
    """

    _config: GraphAttentionConfig

    def __init__(self) -> None:
        self._config = GraphAttentionConfig()

    def _set(self, **options: Any) -> Self:
        return self.base(replace(_checked("base", AttentionConfig, self._config.base), **options))

    def base(self, base: AttentionConfig) -> Self:
        """Set all that attention on graphs shares with other attention.

        Parameters
        ----------
        base : AttentionConfig

        Returns
        -------
        Self

        Raises
        ------
        InvalidConfigError
            If this is of another type.
        """
        self._config = replace(self._config, base=_checked("base", AttentionConfig, base))
        return self

    def use_edge_features(self, use_edge_features: bool) -> Self:
        """Set whether edges have features that enter the scores.

        Parameters
        ----------
        use_edge_features : bool
            True needs `edge_dim`.

        Returns
        -------
        Self
        """
        self._config = replace(self._config, use_edge_features=use_edge_features)
        return self

    def edge_dim(self, edge_dim: int | None) -> Self:
        """Set the channels of the features of an edge.

        Parameters
        ----------
        edge_dim : int or None
            None for edges without features.

        Returns
        -------
        Self
        """
        self._config = replace(self._config, edge_dim=edge_dim)
        return self

    def aggregation(self, aggregation: Aggregation) -> Self:
        """Set how what the neighbours send is joined.

        Parameters
        ----------
        aggregation : {"sum", "mean", "max"}

        Returns
        -------
        Self
        """
        self._config = replace(self._config, aggregation=aggregation)
        return self

    def normalize(self, normalize: bool) -> Self:
        """Set whether the coefficients of a node's neighbours are normalised by a softmax.

        Parameters
        ----------
        normalize : bool

        Returns
        -------
        Self
        """
        self._config = replace(self._config, normalize=normalize)
        return self

    def negative_slope(self, negative_slope: float) -> Self:
        """Set the slope of the LeakyReLU below zero.

        Parameters
        ----------
        negative_slope : float

        Returns
        -------
        Self
        """
        self._config = replace(self._config, negative_slope=negative_slope)
        return self

    def config(self, config: GraphAttentionConfig) -> Self:
        """Set all options at once.

        Parameters
        ----------
        config : GraphAttentionConfig

        Returns
        -------
        Self

        Raises
        ------
        InvalidConfigError
            If this is of another type.
        """
        self._config = _checked("config", GraphAttentionConfig, config)
        return self

    def build_config(self) -> GraphAttentionConfig:
        """The configuration with all that was set.

        Returns
        -------
        GraphAttentionConfig

        Raises
        ------
        InvalidConfigError
            If it is not valid, the base included.
        """
        self._config.validate()
        return self._config

    def build_gat(self, in_channels: int | tuple[int, int] | None = None, seed: int | None = None) -> GAT:
        """A `GAT` with fresh parameters. Its self-loops are those of `GAT`'s defaults.

        Parameters
        ----------
        in_channels : int or (int, int), optional
            Channels of the nodes, or of sources and targets; `d_model` if None. `d_model` is the output's, of all heads
            together.
        seed : int, optional
            Seed of the parameters and the dropout; the same seed gives the same layer.

        Returns
        -------
        GAT

        Raises
        ------
        InvalidConfigError
            If the configuration is not valid, or `in_channels` or `seed` is none.
        """
        from .graphs.gat import GAT

        slope = self._config.negative_slope
        return GAT(*self._sizes(in_channels), seed=seed, negative_slope=slope, **self._settings())

    def build_gatv2(self, in_channels: int | tuple[int, int] | None = None, seed: int | None = None) -> GATv2:
        """A `GATv2` with fresh parameters. Its self-loops are those of `GATv2`'s defaults.

        Parameters
        ----------
        in_channels, seed
            As in `build_gat`.

        Returns
        -------
        GATv2

        Raises
        ------
        InvalidConfigError
            If the configuration is not valid, or `in_channels` or `seed` is none.
        """
        from .graphs.gat import GATv2

        slope = self._config.negative_slope
        return GATv2(*self._sizes(in_channels), seed=seed, negative_slope=slope, **self._settings())

    def build_graph_transformer(
        self, in_channels: int | tuple[int, int] | None = None, seed: int | None = None
    ) -> GraphTransformer:
        """A `GraphTransformer` with fresh parameters. `scale` counts, and `negative_slope` does not.

        Parameters
        ----------
        in_channels, seed
            As in `build_gat`.

        Returns
        -------
        GraphTransformer

        Raises
        ------
        InvalidConfigError
            If the configuration is not valid, or `in_channels` or `seed` is none.
        """
        from .graphs.transformer import GraphTransformer

        scale = self._config.base.scale
        return GraphTransformer(*self._sizes(in_channels), seed=seed, scale=scale, **self._settings())

    def _sizes(self, in_channels: int | tuple[int, int] | None) -> tuple[Any, int, int]:
        base = self.build_config().base
        return base.d_model if in_channels is None else in_channels, base.d_k, base.num_heads

    def _settings(self) -> dict[str, Any]:
        config = self._config
        return dict(
            dropout=config.base.dropout, bias=config.base.use_bias, aggregation=config.aggregation,
            edge_dim=config.edge_dim if config.use_edge_features else None, normalize=config.normalize,
        )  # fmt: skip


def _checked(name: str, kind: type[Config], config: Config) -> Config:
    """Types of whole configurations are checked at once: later methods change one option in them."""
    if not isinstance(config, kind):
        hint = f"{kind.__name__}.from_dict reads a dictionary"
        raise InvalidConfigError(f"{name} must be of type {kind.__name__}, not {type(config).__name__}", hint=hint)
    return config
