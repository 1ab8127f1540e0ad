"""The builders: every option has its method, what is set is honoured, what was built stays as it was."""

import copy
import dataclasses

import numpy as np
import pytest

from ruvector_numba.builder import AttentionBuilder, GraphAttentionBuilder
from ruvector_numba.config import AttentionConfig, GraphAttentionConfig
from ruvector_numba.errors import InvalidConfigError

BUILDERS = (AttentionBuilder, GraphAttentionBuilder)
OPTIONS = {
    "d_model": 64, "num_heads": 4, "dropout": 0.25, "use_bias": False, "scale": 0.3, "max_seq_len": 9, "causal": True,
    "eps": 1e-3,
}  # fmt: skip
GRAPH_OPTIONS = {
    "use_edge_features": True, "edge_dim": 3, "aggregation": "max", "normalize": False, "negative_slope": 0.01,
}  # fmt: skip
builders = pytest.mark.parametrize("kind", BUILDERS)


def base_of(config):
    return getattr(config, "base", config)


def test_the_tables_above_name_every_option_and_no_default():
    assert set(OPTIONS) == {field.name for field in dataclasses.fields(AttentionConfig)}
    assert {"base", *GRAPH_OPTIONS} == {field.name for field in dataclasses.fields(GraphAttentionConfig)}
    for defaults, options in ((AttentionConfig(), OPTIONS), (GraphAttentionConfig(), GRAPH_OPTIONS)):
        assert all(getattr(defaults, name) != value for name, value in options.items())


def test_the_defaults_are_those_of_the_configurations():
    assert AttentionBuilder().build_config() == AttentionConfig()
    assert GraphAttentionBuilder().build_config() == GraphAttentionConfig()


@builders
@pytest.mark.parametrize(("name", "value"), OPTIONS.items())
def test_each_option_of_the_base_is_set_and_no_other(kind, name, value):
    builder = kind()
    assert getattr(builder, name)(value) is builder
    config = builder.build_config()
    assert base_of(config) == dataclasses.replace(AttentionConfig(), **{name: value})
    if kind is GraphAttentionBuilder:
        assert config == GraphAttentionConfig(base=config.base)


@pytest.mark.parametrize(("name", "value"), GRAPH_OPTIONS.items())
def test_each_option_of_graphs_is_set_and_no_other(name, value):
    builder = GraphAttentionBuilder().edge_dim(5)  # which use_edge_features needs
    assert getattr(builder, name)(value) is builder
    assert builder.build_config() == dataclasses.replace(GraphAttentionConfig(edge_dim=5), **{name: value})


@builders
@pytest.mark.parametrize("order", [list(OPTIONS.items()), list(OPTIONS.items())[::-1]])
def test_all_options_in_any_order(kind, order):
    builder = kind()
    for name, value in order:
        builder = getattr(builder, name)(value)
    assert base_of(builder.build_config()) == AttentionConfig(**OPTIONS)


def test_all_options_of_graphs_beside_those_of_the_base():
    builder = GraphAttentionBuilder()
    for name, value in {**GRAPH_OPTIONS, **OPTIONS}.items():
        getattr(builder, name)(value)  # without using what it returns
    assert builder.build_config() == GraphAttentionConfig(base=AttentionConfig(**OPTIONS), **GRAPH_OPTIONS)


def test_none_takes_a_setting_back():
    builder = AttentionBuilder().scale(0.5).max_seq_len(None)
    assert builder.build_config() == AttentionConfig(scale=0.5, max_seq_len=None)
    assert builder.scale(None).max_seq_len(512).build_config() == AttentionConfig()
    assert GraphAttentionBuilder().edge_dim(4).edge_dim(None).build_config().edge_dim is None


def test_a_whole_configuration_replaces_what_was_set_and_can_be_changed_further():
    config = AttentionConfig(**OPTIONS)
    builder = AttentionBuilder().d_model(8).config(config)
    assert builder.build_config() is config
    assert builder.d_model(128).build_config() == dataclasses.replace(config, d_model=128)
    assert config == AttentionConfig(**OPTIONS)
    graph = GraphAttentionConfig(base=config, **GRAPH_OPTIONS)
    assert GraphAttentionBuilder().d_model(8).config(graph).build_config() is graph
    assert GraphAttentionBuilder().d_model(8).edge_dim(2).base(config).build_config() == GraphAttentionConfig(
        base=config, edge_dim=2
    )


@builders
def test_a_builder_is_reused_and_what_it_built_stays(kind):
    builder = kind().d_model(64)
    first = builder.build_config()
    second = builder.d_model(128).causal(True).build_config()
    assert (base_of(first).d_model, base_of(first).causal) == (64, False)
    assert (base_of(second).d_model, base_of(second).causal) == (128, True)
    assert builder.build_config() == second


@builders
def test_a_copy_goes_its_own_way(kind):
    builder = kind().d_model(64)
    branch = copy.copy(builder).d_model(128)
    assert base_of(builder.build_config()).d_model == 64
    assert base_of(branch.build_config()).d_model == 128
    assert base_of(copy.deepcopy(branch).build_config()).d_model == 128
    assert kind() is not kind() and base_of(kind().build_config()).d_model == 512


def test_the_repr_shows_the_options_and_can_be_typed():
    for builder in (AttentionBuilder().d_model(64), GraphAttentionBuilder().d_model(64).edge_dim(2)):
        assert eval(repr(builder)).build_config() == builder.build_config()


WRONG = [
    ("d_model", 0, "d_model must be greater than 0"),
    ("d_model", 255, r"d_model \(255\) must be divisible by num_heads \(8\)"),
    ("d_model", "64", "d_model must be a whole number, got '64'"),
    ("num_heads", 0, "num_heads must be greater than 0"),
    ("num_heads", True, "num_heads must be a whole number, got True"),
    ("dropout", 1.5, "dropout must be between 0.0 and 1.0, got 1.5"),
    ("use_bias", 1, "use_bias must be True or False, got 1"),
    ("scale", np.nan, "scale must be finite, got nan"),
    ("max_seq_len", 0, "max_seq_len must be greater than 0"),
    ("causal", None, "causal must be True or False, got None"),
    ("eps", 0, "eps must be positive, got 0"),
]
WRONG_ON_GRAPHS = [
    ("use_edge_features", True, "use_edge_features is True and edge_dim is None"),
    ("use_edge_features", "no", "use_edge_features must be True or False"),
    ("edge_dim", 0, "edge_dim must be greater than 0"),
    ("aggregation", "avg", "aggregation must be one of 'sum', 'mean', 'max', got 'avg'"),
    ("normalize", 1, "normalize must be True or False"),
    ("negative_slope", np.inf, "negative_slope must be finite, got inf"),
]


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [(kind, *wrong) for kind in BUILDERS for wrong in WRONG] + [(GraphAttentionBuilder, *w) for w in WRONG_ON_GRAPHS],
)
def test_a_wrong_option_is_refused_when_something_is_built(kind, name, value, message):
    builder = getattr(kind(), name)(value)
    with pytest.raises(InvalidConfigError, match=message):
        builder.build_config()


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_wrong_option_is_refused_when_a_layer_is_built(name, value, message):
    builder = getattr(AttentionBuilder(), name)(value)
    for build in (builder.build_multi_head, builder.build_scaled_dot_product):
        with pytest.raises(InvalidConfigError, match=message):
            build()


@pytest.mark.parametrize("config", [None, {}, {"d_model": 64}, AttentionConfig, GraphAttentionConfig(), 3])
def test_only_a_configuration_is_one(config):
    with pytest.raises(InvalidConfigError, match=r"config must be of type AttentionConfig(.|\n)*from_dict"):
        AttentionBuilder().config(config)
    with pytest.raises(InvalidConfigError, match="base must be of type AttentionConfig"):
        GraphAttentionBuilder().base(config)


def test_only_a_graph_configuration_is_one_of_graphs():
    with pytest.raises(InvalidConfigError, match=r"config must be of type GraphAttentionConfig, not AttentionConfig"):
        GraphAttentionBuilder().config(AttentionConfig())
    with pytest.raises(InvalidConfigError, match="base must be of type AttentionConfig, not dict"):
        GraphAttentionBuilder().config(GraphAttentionConfig(base={})).d_model(64)


def test_a_refused_call_changes_nothing():
    builder = AttentionBuilder().d_model(64)
    with pytest.raises(InvalidConfigError):
        builder.config({})
    assert builder.build_config() == AttentionConfig(d_model=64)


# The seed's three tests, and what they leave open: that what was set is in what is built.


def test_builder_pattern():
    layer = AttentionBuilder().d_model(256).num_heads(4).dropout(0.1).build_multi_head()
    assert layer.config == AttentionConfig(d_model=256, num_heads=4, dropout=0.1)


def test_invalid_config():
    with pytest.raises(InvalidConfigError, match="d_model must be greater than 0"):
        AttentionBuilder().d_model(0).build_multi_head()


def test_dimension_mismatch():
    with pytest.raises(InvalidConfigError, match=r"d_model \(255\) must be divisible by num_heads \(8\)"):
        AttentionBuilder().d_model(255).num_heads(8).build_multi_head()


def test_layers_hold_the_whole_configuration():
    builder = AttentionBuilder().config(AttentionConfig(**OPTIONS))
    for layer in (builder.build_multi_head(), builder.build_scaled_dot_product()):
        assert layer.config == AttentionConfig(**OPTIONS)
    first = builder.build_multi_head()
    builder.d_model(128)
    assert first.config.d_model == 64 and builder.build_multi_head().config.d_model == 128


def test_seed_and_sizes_reach_the_layer():
    builder = AttentionBuilder().d_model(16).num_heads(2)
    layer = builder.build_multi_head(3, 5, 7)
    assert (layer.kdim, layer.vdim) == (5, 7)
    same, other = builder.build_multi_head(seed=3, kdim=5, vdim=7), builder.build_multi_head(seed=4, kdim=5, vdim=7)
    assert np.array_equal(layer.get_parameters(), same.get_parameters())
    assert not np.array_equal(layer.get_parameters(), other.get_parameters())
    x, plain = np.ones((1, 9, 16)), [builder.build_scaled_dot_product(seed=seed) for seed in (3, 3, 4)]
    first, again, another = (layer.forward_cached(x, x, np.cumsum(x, 1))[0] for layer in plain)
    assert np.array_equal(first, again) and not np.array_equal(first, another)


def test_bert_base_builds():
    assert AttentionBuilder().d_model(768).num_heads(12).build_multi_head().config.d_k == 64
