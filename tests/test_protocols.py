"""The protocols: the seed's methods and defaults, met by classes that write them out or inherit them."""

import inspect
from typing import overload

import numpy as np
import pytest
from scipy.sparse import csr_array

from ruvector_numba import protocols
from ruvector_numba.protocols import (
    Attention,
    GeometricAttention,
    GraphAttention,
    SparseAttention,
    TrainableAttention,
)

REQUIRED = {
    Attention: {"forward": ("query", "key", "value", "mask"), "d_model": (), "name": ()},
    GraphAttention: {
        "graph_forward": ("node_features", "edge_index", "edge_attr"),
        "sparse_forward": ("node_features", "adjacency"),
        "num_graph_heads": (),
    },
    GeometricAttention: {
        "geometric_forward": ("query_pos", "key_pos", "features"),
        "distance_attention": ("positions", "features", "radius"),
        "geometric_dim": (),
    },
    SparseAttention: {
        "sparse_forward": ("query", "key", "value", "connectivity_pattern"),
        "sparsity_ratio": (),
        "max_attended_positions": (),
    },
    TrainableAttention: {
        "update_parameters": ("gradients", "learning_rate"),
        "parameter_count": (),
        "get_parameters": (),
        "set_parameters": ("parameters",),
        "backward": ("grad_output", "cache"),
        "zero_grad": (),
    },
}
DEFAULTS = {
    Attention: {"supports_masking": True},
    GraphAttention: {"supports_edge_features": False, "supports_heterogeneous": False},
    GeometricAttention: {"is_rotation_equivariant": False, "is_translation_invariant": True},
    SparseAttention: {"supports_dynamic_sparsity": False},
    TrainableAttention: {"regularization_loss": None},
}
PROTOCOLS = list(REQUIRED)
protocol = pytest.mark.parametrize("protocol", PROTOCOLS)


def methods_of(protocol):
    """Names of all methods of a protocol, with those of what it builds on."""
    kinds = {protocol, Attention}
    return {name for kind in kinds for name in (*REQUIRED[kind], *DEFAULTS[kind])}


def written_out(names):
    """An object with these methods that inherits from nothing."""
    return type("Toy", (), dict.fromkeys(names, lambda self, *arguments: None))()


def inherited(protocol, without=()):
    """A class that inherits from a protocol and adds what it requires."""
    required = {name for kind in (protocol, Attention) for name in REQUIRED[kind]} - set(without)
    return type("Toy", (protocol,), dict.fromkeys(required, lambda self, *arguments: None))


def test_all_five_are_public():
    assert {getattr(protocols, name) for name in protocols.__all__} == set(PROTOCOLS)


@protocol
def test_the_methods_and_their_arguments_are_the_seeds(protocol):
    public = {name for kind in protocol.__mro__ for name in vars(kind) if not name.startswith("_")}
    assert public == methods_of(protocol)
    for name, arguments in REQUIRED[protocol].items():
        assert tuple(inspect.signature(getattr(protocol, name)).parameters) == ("self", *arguments)
    for name in methods_of(protocol):
        assert inspect.getdoc(getattr(protocol, name))


@protocol
def test_whoever_has_the_methods_is_one(protocol):
    assert isinstance(written_out(methods_of(protocol)), protocol)
    assert isinstance(written_out(methods_of(protocol)), Attention)
    assert not isinstance(object(), protocol) and not isinstance(None, protocol)


@protocol
def test_whoever_lacks_one_method_is_none(protocol):
    for name in methods_of(protocol):
        assert not isinstance(written_out(methods_of(protocol) - {name}), protocol), name


@protocol
def test_a_kind_is_no_other_kind(protocol):
    toy = written_out(methods_of(protocol))
    assert [kind for kind in PROTOCOLS if isinstance(toy, kind)] == sorted(
        {Attention, protocol}, key=PROTOCOLS.index
    )  # GraphAttention and SparseAttention too, though they share the name sparse_forward


@protocol
def test_whoever_inherits_gets_the_defaults(protocol):
    toy = inherited(protocol)()
    assert isinstance(toy, protocol) and isinstance(toy, Attention)
    for name, answer in {**DEFAULTS[Attention], **DEFAULTS[protocol]}.items():
        if answer is not None:
            assert getattr(toy, name)() is answer, name


@protocol
def test_whoever_inherits_must_add_the_rest(protocol):
    for name in (*REQUIRED[protocol], *REQUIRED[Attention]):
        with pytest.raises(TypeError, match=name):
            inherited(protocol, without=[name])()
    with pytest.raises(TypeError):
        protocol()


class Linear(TrainableAttention):
    """Output is the value times a number; enough to be trained."""

    def __init__(self, size, dtype=np.float64):
        self.parameters = np.zeros(size, dtype)

    def d_model(self):
        return 4

    def name(self):
        return "Linear"

    def forward(self, query, key, value, mask=None):
        weights = np.broadcast_to(np.eye(key.shape[1]), (*query.shape[:2], key.shape[1]))
        return self.parameters[0] * value, weights

    def backward(self, grad_output, cache, /):
        return {"factor": np.vdot(grad_output, cache)}

    def update_parameters(self, gradients, learning_rate):
        self.parameters = self.parameters - learning_rate * gradients["factor"]

    def parameter_count(self):
        return self.parameters.size

    def get_parameters(self):
        return self.parameters.copy()

    def set_parameters(self, parameters, /):
        self.parameters = np.array(parameters)

    def zero_grad(self):
        pass


def test_an_attention_of_ones_own_trains():
    layer, value = Linear(1), np.random.default_rng(0).standard_normal((2, 3, 4))
    for _ in range(100):
        output, weights = layer.forward(value, value, value)
        layer.update_parameters(layer.backward(output - 3 * value, value), 0.02)
    assert weights.shape == (2, 3, 3)
    assert layer.get_parameters() == pytest.approx(3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_regularization_loss_is_the_sum_of_squares(dtype):
    layer = Linear(3, dtype)
    layer.set_parameters(np.array([1, -2, 3], dtype))
    assert layer.regularization_loss(0.5) == 7.0
    assert layer.regularization_loss(np.float32(0.5)) == 7.0 and type(layer.regularization_loss(1)) is float
    layer.set_parameters(np.full(1000, 1e30, dtype))
    assert layer.regularization_loss(1.0) == pytest.approx(1e63, rel=1e-6)  # beyond float32
    assert Linear(0).regularization_loss(1.0) == 0.0


class Both(GraphAttention, SparseAttention):
    """One class with both methods of the name sparse_forward, told apart as the documentation says."""

    def d_model(self):
        return 4

    def name(self):
        return "Both"

    def forward(self, query, key, value, mask=None):
        return value, np.ones((*query.shape[:2], key.shape[1]))

    def graph_forward(self, node_features, edge_index, edge_attr=None):
        return node_features, np.ones((edge_index.shape[1], 1))

    def num_graph_heads(self):
        return 1

    def sparsity_ratio(self):
        return 0.5

    def max_attended_positions(self):
        return None

    @overload
    def sparse_forward(self, node_features, adjacency): ...

    @overload
    def sparse_forward(self, query, key, value, connectivity_pattern): ...

    def sparse_forward(self, *arguments):
        return self._on_graph(*arguments) if len(arguments) == 2 else self._on_sequences(*arguments)

    def _on_graph(self, node_features, adjacency):
        return adjacency @ node_features, adjacency

    def _on_sequences(self, query, key, value, connectivity_pattern):
        return np.stack([connectivity_pattern @ v for v in value]), [connectivity_pattern] * len(value)


def test_one_class_can_attend_on_graphs_and_by_patterns():
    layer, pattern = Both(), csr_array(np.tril(np.ones((3, 3))))
    assert isinstance(layer, GraphAttention) and isinstance(layer, SparseAttention)
    nodes, batch = np.ones((3, 4)), np.ones((2, 3, 4))
    features, coefficients = layer.sparse_forward(nodes, pattern)
    output, weights = layer.sparse_forward(batch, batch, batch, pattern)
    assert features.shape == (3, 4) and coefficients.shape == (3, 3)
    assert output.shape == (2, 3, 4) and len(weights) == 2
    assert np.array_equal(output[1], features)
