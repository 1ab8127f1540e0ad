"""The configurations: the seed's fields, defaults and sentences; types, values, dictionaries and JSON."""

import copy
import dataclasses
import json
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruvector_numba.config import AttentionConfig, GraphAttentionConfig, SparseAttentionConfig
from ruvector_numba.errors import AttentionError, InvalidConfigError

KINDS = (AttentionConfig, GraphAttentionConfig, SparseAttentionConfig)
NAN, INF = math.nan, math.inf

DEFAULTS = {
    AttentionConfig: {
        "d_model": 512, "num_heads": 8, "dropout": 0.1, "use_bias": True, "scale": None, "max_seq_len": 512,
        "causal": False, "eps": 1e-6,
    },
    GraphAttentionConfig: {
        "base": AttentionConfig(), "use_edge_features": False, "edge_dim": None, "aggregation": "sum",
        "normalize": True, "negative_slope": 0.2,
    },
    SparseAttentionConfig: {
        "base": AttentionConfig(), "sparsity_pattern": "local", "block_size": 64, "local_window": 128,
        "num_global_tokens": None, "top_k": None,
    },
}  # fmt: skip

# Kind, what is set, and the message up to the hint.
WRONG_VALUES = [
    (AttentionConfig, {"d_model": 0}, "d_model must be greater than 0\n  d_model: 0"),
    (AttentionConfig, {"d_model": -8}, "d_model must be greater than 0\n  d_model: -8"),
    (AttentionConfig, {"num_heads": 0}, "num_heads must be greater than 0\n  num_heads: 0"),
    (AttentionConfig, {"num_heads": -1}, "num_heads must be greater than 0\n  num_heads: -1"),
    (AttentionConfig, {"d_model": 255}, "d_model (255) must be divisible by num_heads (8)"),
    (AttentionConfig, {"d_model": 4}, "d_model (4) must be divisible by num_heads (8)"),
    (AttentionConfig, {"dropout": 1.5}, "dropout must be between 0.0 and 1.0, got 1.5"),
    (AttentionConfig, {"dropout": -0.1}, "dropout must be between 0.0 and 1.0, got -0.1"),
    (AttentionConfig, {"dropout": NAN}, "dropout must be between 0.0 and 1.0, got nan"),
    (AttentionConfig, {"dropout": 10**400}, "dropout must be between 0.0 and 1.0, got inf"),
    (AttentionConfig, {"dropout": -(10**400)}, "dropout must be between 0.0 and 1.0, got -inf"),
    (AttentionConfig, {"eps": 0}, "eps must be positive, got 0.0"),
    (AttentionConfig, {"eps": -1e-6}, "eps must be positive, got -1e-06"),
    (AttentionConfig, {"eps": NAN}, "eps must be positive, got nan"),
    (AttentionConfig, {"eps": INF}, "eps must be finite, got inf"),
    (AttentionConfig, {"scale": NAN}, "scale must be finite, got nan"),
    (AttentionConfig, {"scale": -INF}, "scale must be finite, got -inf"),
    (AttentionConfig, {"max_seq_len": 0}, "max_seq_len must be greater than 0\n  max_seq_len: 0"),
    (AttentionConfig, {"d_model": 1 << 63}, "d_model does not fit 64 bits"),
    (AttentionConfig, {"num_heads": 10**5000}, "num_heads does not fit 64 bits"),
    (GraphAttentionConfig, {"base": AttentionConfig(eps=0)}, "eps must be positive, got 0.0"),
    (GraphAttentionConfig, {"use_edge_features": True}, "use_edge_features is True and edge_dim is None"),
    (GraphAttentionConfig, {"edge_dim": 0}, "edge_dim must be greater than 0\n  edge_dim: 0"),
    (GraphAttentionConfig, {"negative_slope": NAN}, "negative_slope must be finite, got nan"),
    (GraphAttentionConfig, {"negative_slope": INF}, "negative_slope must be finite, got inf"),
    (GraphAttentionConfig, {"aggregation": "avg"}, "aggregation must be one of 'sum', 'mean', 'max', got 'avg' (str)"),
    (GraphAttentionConfig, {"aggregation": "SUM"}, "aggregation must be one of 'sum', 'mean', 'max', got 'SUM' (str)"),
    (SparseAttentionConfig, {"base": AttentionConfig(d_model=0)}, "d_model must be greater than 0\n  d_model: 0"),
    (SparseAttentionConfig, {"sparsity_pattern": "random"},
     "sparsity_pattern must be one of 'fixed', 'strided', 'local', 'global', got 'random' (str)"),
    (SparseAttentionConfig, {"block_size": 0}, "block_size must be greater than 0\n  block_size: 0"),
    (SparseAttentionConfig, {"local_window": -3}, "local_window must be greater than 0\n  local_window: -3"),
    (SparseAttentionConfig, {"num_global_tokens": 0},
     "num_global_tokens must be greater than 0\n  num_global_tokens: 0"),
    (SparseAttentionConfig, {"top_k": 0}, "top_k must be greater than 0\n  top_k: 0"),
]  # fmt: skip
WRONG_TYPES = [
    (AttentionConfig, "d_model", "64", "d_model must be a whole number, got '64' (str)"),
    (AttentionConfig, "d_model", True, "d_model must be a whole number, got True (bool)"),
    (AttentionConfig, "d_model", np.True_, "d_model must be a whole number, got True (bool)"),
    (AttentionConfig, "d_model", 64.0, "d_model must be a whole number, got 64.0 (float)"),
    (AttentionConfig, "d_model", None, "d_model must be a whole number, got None (NoneType)"),
    (AttentionConfig, "d_model", [64], "d_model must be a whole number, got [64] (list)"),
    (AttentionConfig, "num_heads", np.array([8]), "num_heads must be a whole number, got array([8]) (ndarray)"),
    (AttentionConfig, "dropout", "0.1", "dropout must be a number, got '0.1' (str)"),
    (AttentionConfig, "dropout", False, "dropout must be a number, got False (bool)"),
    (AttentionConfig, "dropout", 0.1j, "dropout must be a number, got 0.1j (complex)"),
    (AttentionConfig, "dropout", None, "dropout must be a number, got None (NoneType)"),
    (AttentionConfig, "use_bias", 1, "use_bias must be True or False, got 1 (int)"),
    (AttentionConfig, "use_bias", "yes", "use_bias must be True or False, got 'yes' (str)"),
    (AttentionConfig, "scale", "auto", "scale must be a number, or None, got 'auto' (str)"),
    (AttentionConfig, "max_seq_len", 1e3, "max_seq_len must be a whole number, or None, got 1000.0 (float)"),
    (AttentionConfig, "causal", None, "causal must be True or False, got None (NoneType)"),
    (AttentionConfig, "eps", np.ma.masked, "eps must be a number, got masked (MaskedConstant)"),
    (GraphAttentionConfig, "base", None, "base must be an AttentionConfig, got None (NoneType)"),
    (GraphAttentionConfig, "base", {}, "base must be an AttentionConfig, got {} (dict)"),
    (GraphAttentionConfig, "use_edge_features", 0, "use_edge_features must be True or False, got 0 (int)"),
    (GraphAttentionConfig, "edge_dim", 3.5, "edge_dim must be a whole number, or None, got 3.5 (float)"),
    (GraphAttentionConfig, "aggregation", None,
     "aggregation must be one of 'sum', 'mean', 'max', got None (NoneType)"),
    (GraphAttentionConfig, "aggregation", np.array(["sum", "max"]), "aggregation must be one of 'sum', 'mean', 'max'"),
    (GraphAttentionConfig, "normalize", 1.0, "normalize must be True or False, got 1.0 (float)"),
    (GraphAttentionConfig, "negative_slope", "0.2", "negative_slope must be a number, got '0.2' (str)"),
    (SparseAttentionConfig, "base", GraphAttentionConfig(), "base must be an AttentionConfig, got "),
    (SparseAttentionConfig, "sparsity_pattern", 3,
     "sparsity_pattern must be one of 'fixed', 'strided', 'local', 'global', got 3 (int)"),
    (SparseAttentionConfig, "block_size", True, "block_size must be a whole number, or None, got True (bool)"),
    (SparseAttentionConfig, "local_window", "128", "local_window must be a whole number, or None, got '128' (str)"),
    (SparseAttentionConfig, "num_global_tokens", 2.0, "num_global_tokens must be a whole number, or None"),
    (SparseAttentionConfig, "top_k", [1], "top_k must be a whole number, or None, got [1] (list)"),
]  # fmt: skip


def refused(call, *arguments):
    with pytest.raises(InvalidConfigError) as caught:
        call(*arguments)
    assert isinstance(caught.value, AttentionError | ValueError)
    return str(caught.value).removeprefix("Invalid configuration: ")


@pytest.mark.parametrize("kind", KINDS)
def test_fields_and_defaults_are_the_seeds(kind):
    config = kind()
    assert {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} == DEFAULTS[kind]
    assert list(config.to_dict()) == list(DEFAULTS[kind])
    config.validate()


def test_fields_may_be_given_by_position():
    config = AttentionConfig(64, 4, 0.2, False, 0.5, None, True, 1e-5)
    assert config == AttentionConfig(
        d_model=64, num_heads=4, dropout=0.2, use_bias=False, scale=0.5, max_seq_len=None, causal=True, eps=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_configurations_are_frozen_and_values(kind):
    config = kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.eps = 1.0
    assert config == kind() and hash(config) == hash(kind())
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


@pytest.mark.parametrize(("kind", "fields", "message"), WRONG_VALUES)
def test_wrong_values_are_refused_by_validate_and_not_before(kind, fields, message):
    config = kind(**fields)
    assert refused(config.validate).partition("\nHINT")[0] == message
    assert refused(config.to_json).partition("\nHINT")[0] == message
    assert refused(kind.from_dict, fields).partition("\nHINT")[0] == message


@pytest.mark.parametrize(("kind", "field", "value", "message"), WRONG_TYPES)
def test_wrong_types_are_refused_by_validate_and_not_before(kind, field, value, message):
    config = kind(**{field: value})
    assert refused(config.validate).startswith(message)
    assert refused(config.to_json).startswith(message)
    if not isinstance(value, dict):
        assert refused(kind.from_dict, {field: value}).startswith(message)


@pytest.mark.parametrize(
    "config", [AttentionConfig(num_heads=0), AttentionConfig(d_model="64"), AttentionConfig(eps=0)]
)
def test_what_is_computed_from_an_invalid_configuration_is_an_error_too(config):
    assert refused(config.get_scale) == refused(config.validate) == refused(lambda: config.d_k)


def test_the_hint_says_what_to_do():
    assert "HINT: None means no limit" in refused(AttentionConfig(max_seq_len=0).validate)
    assert "HINT: None means 1 / sqrt(d_k)" in refused(AttentionConfig(scale=NAN).validate)
    assert "HINT: set edge_dim" in refused(GraphAttentionConfig(use_edge_features=True).validate)


@pytest.mark.parametrize(
    "fields",
    [
        {"d_model": 768, "num_heads": 12},  # BERT, which the seed refuses within its layers
        {"d_model": 96, "num_heads": 8},
        {"d_model": 1, "num_heads": 1},
        {"max_seq_len": None},
        {"max_seq_len": 1},
        {"dropout": 0.0},
        {"dropout": 1.0},
        {"scale": 0.0},
        {"scale": -2.0},
        {"eps": 5e-324},
    ],
)
def test_all_in_range_is_valid(fields):
    AttentionConfig(**fields).validate()


@pytest.mark.parametrize("aggregation", ["sum", "mean", "max", np.str_("mean")])
def test_aggregations(aggregation):
    GraphAttentionConfig(aggregation=aggregation, negative_slope=-1.0, edge_dim=2).validate()


@pytest.mark.parametrize("pattern", ["fixed", "strided", "local", "global"])
def test_sparsity_patterns(pattern):
    SparseAttentionConfig(
        sparsity_pattern=pattern, block_size=None, local_window=None, num_global_tokens=1, top_k=1
    ).validate()


def test_size_of_a_head_and_scale():
    config = AttentionConfig(d_model=512, num_heads=8)
    assert config.d_k == 64
    assert config.get_scale() == 0.125
    assert AttentionConfig(d_model=768, num_heads=12).get_scale() == 0.125
    assert AttentionConfig(d_model=6, num_heads=2).get_scale() == 1 / math.sqrt(3)
    assert AttentionConfig(scale=0.3).get_scale() == 0.3
    assert AttentionConfig(scale=0).get_scale() == 0.0


def test_numbers_become_pythons_own():
    config = AttentionConfig(
        d_model=np.int32(64), num_heads=np.array(4), dropout=np.float32(0.25), use_bias=np.False_,
        scale=np.longdouble(2), max_seq_len=np.uint8(9), causal=np.bool_(True), eps=Fraction(1, 8),
    )  # fmt: skip
    assert config == AttentionConfig(64, 4, 0.25, False, 2.0, 9, True, 0.125)
    types = {name: type(value) for name, value in config.to_dict().items()}
    assert list(types.values()) == [int, int, float, bool, float, int, bool, float]
    config.validate()
    assert json.loads(config.to_json()) == config.to_dict()


def test_whole_numbers_are_floats_where_a_float_belongs():
    assert repr(AttentionConfig(dropout=0, scale=1)) == repr(AttentionConfig(dropout=0.0, scale=1.0))
    assert type(AttentionConfig(eps=np.int64(1)).eps) is float


@pytest.mark.parametrize("kind", KINDS)
def test_dictionaries(kind):
    config = kind()
    values = config.to_dict()
    assert kind.from_dict(values) == config
    if kind is not AttentionConfig:
        assert values["base"] == AttentionConfig().to_dict()
        changed = kind.from_dict({"base": {"d_model": 64}})
        assert changed == kind(base=AttentionConfig(d_model=64))
        assert kind.from_dict({"base": AttentionConfig(d_model=64)}) == changed
    assert kind.from_dict({}) == config
    values.clear()
    assert config == kind()


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_names_are_refused(kind):
    assert refused(kind.from_dict, {"d_modle": 64}).startswith(f"{kind.__name__} has no field 'd_modle' (str)\nHINT: ")
    assert refused(kind.from_dict, {3: 64}).startswith(f"{kind.__name__} has no field 3 (int)\nHINT: its fields are ")
    assert refused(kind.from_dict, {"validate": 1}).startswith(f"{kind.__name__} has no field 'validate'")
    if kind is not AttentionConfig:
        assert refused(kind.from_dict, {"base": {"heads": 8}}).startswith("AttentionConfig has no field 'heads'")
        assert "d_model must be greater than 0" in refused(kind.from_dict, {"base": {"d_model": 0}})


def test_a_misspelt_name_is_met_with_the_right_one():
    assert refused(AttentionConfig.from_dict, {"d_modle": 64}).endswith("HINT: did you mean d_model?")


@pytest.mark.parametrize("values", [None, 3, "d_model", [("d_model", 64)], AttentionConfig()])
def test_only_mappings_are_dictionaries(values):
    assert refused(AttentionConfig.from_dict, values).startswith("AttentionConfig is read from a dictionary of its")


@pytest.mark.parametrize(
    "text", ["", "{", "{'d_model': 64}", '{"d_model": 64,}', b"\xff\xfe\xfa", 3, None, {}, "[" * 100_000]
)
def test_text_that_is_not_json(text):
    assert "since this is not JSON: " in refused(AttentionConfig.from_json, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("null", "AttentionConfig is read from a dictionary"),
        ("[1]", "AttentionConfig is read from a dictionary"),
        ('{"dropout": NaN}', "dropout must be between 0.0 and 1.0, got nan"),
        ('{"eps": 1e999}', "eps must be finite, got inf"),
        ('{"d_model": 64.0}', "d_model must be a whole number, got 64.0"),
        ('{"d_model": "64"}', "d_model must be a whole number, got '64'"),
        ('{"use_bias": 1}', "use_bias must be True or False, got 1"),
        ('{"causal": null}', "causal must be True or False, got None"),
        ('{"scale": {}}', "scale must be a number, or None, got {}"),
        ('{"heads": 8}', "AttentionConfig has no field 'heads'"),
    ],
)
def test_json_of_something_else(text, message):
    assert refused(AttentionConfig.from_json, text).startswith(message)


sizes = st.integers(1, 1 << 40)
floats = st.floats(allow_nan=False, allow_infinity=False)
valid = st.builds(
    lambda d_k, num_heads, **rest: AttentionConfig(d_model=d_k * num_heads, num_heads=num_heads, **rest),
    d_k=st.integers(1, 1 << 20),
    num_heads=st.integers(1, 1 << 20),
    dropout=st.floats(0, 1),
    use_bias=st.booleans(),
    scale=st.none() | floats,
    max_seq_len=st.none() | sizes,
    causal=st.booleans(),
    eps=st.floats(0, exclude_min=True, allow_infinity=False),
)
valid_graph = st.builds(
    GraphAttentionConfig,
    base=valid,
    use_edge_features=st.booleans(),
    edge_dim=sizes,
    aggregation=st.sampled_from(["sum", "mean", "max"]),
    normalize=st.booleans(),
    negative_slope=floats,
)
valid_sparse = st.builds(
    SparseAttentionConfig,
    base=valid,
    sparsity_pattern=st.sampled_from(["fixed", "strided", "local", "global"]),
    block_size=st.none() | sizes,
    local_window=st.none() | sizes,
    num_global_tokens=st.none() | sizes,
    top_k=st.none() | sizes,
)


@given(valid | valid_graph | valid_sparse)
def test_json_and_dictionaries_give_back_every_bit(config):
    kind = type(config)
    text = config.to_json()
    assert kind.from_json(text) == kind.from_json(text.encode()) == kind.from_dict(config.to_dict()) == config
    assert repr(kind.from_json(text)) == repr(config)


anything = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("aé1", max_size=5) | st.lists(st.integers())
)


@given(st.sampled_from(KINDS), st.data())
def test_whatever_is_given_validate_accepts_it_or_names_a_field(kind, data):
    names = [field.name for field in dataclasses.fields(kind)]
    fields = data.draw(st.dictionaries(st.sampled_from(names), anything))
    try:
        config = kind.from_dict(fields)
    except InvalidConfigError as error:
        assert any(name in str(error) for name in fields)
    else:
        assert kind.from_json(config.to_json()) == config
