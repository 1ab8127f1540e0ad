"""Attention on graphs without nodes, without edges, or with both on one side only: shapes hold, gradients are zeros."""

import itertools

import numpy as np
import pytest

import ruvector_numba as rv

KINDS = [(rv.GAT, {}), (rv.GATv2, {}), (rv.GATv2, {"share_weights": True}), (rv.GraphTransformer, {"beta": True})]
SIZES = [(0, 0), (3, 3), (0, 2), (2, 0)]  # sources and targets


@pytest.mark.parametrize("aggregation", ["sum", "max"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_layers(kind, settings, sizes, aggregation):
    graph = rv.CSRGraph.from_edge_index(np.zeros((2, 0), np.int64), num_nodes=sizes)
    loops = [{}] if kind is rv.GraphTransformer else [{"add_self_loops": False}, {"residual": True}]
    pairs = [True] if sizes[0] != sizes[1] else [False, True]
    for more, concat, edge_dim, is_pair in itertools.product(loops, [False, True], [None, 2], pairs):
        layer = kind(3, 4, 2, concat=concat, edge_dim=edge_dim, aggregation=aggregation, **settings, **more)
        nodes = [np.ones((n, 3), np.float32) for n in sizes]
        x = tuple(nodes) if is_pair else nodes[0]
        attr = None if edge_dim is None else np.ones((0, 2), np.float32)
        output, cache = layer.forward_cached(x, graph, attr)
        assert output.shape == (sizes[1], layer.width) and np.isfinite(output).all()
        gradients = layer.backward(np.ones_like(output), cache)
        for name, p in layer.parameters.items():
            assert gradients.parameters[name].shape == p.shape and np.isfinite(gradients.parameters[name]).all()
            assert sizes[1] or not gradients.parameters[name].any()
        of_nodes = gradients.node_features if is_pair else [gradients.node_features]
        assert [d.shape for d in of_nodes] == [n.shape for n in nodes[: len(of_nodes)]]
        assert edge_dim is None or gradients.edge_attr.shape == (0, 2)


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_attributes_of_no_edges_can_be_left_out(kind, settings, loops):
    more = {} if kind is rv.GraphTransformer else {"add_self_loops": loops}
    layer = kind(4, 3, edge_dim=2, **settings, **more)
    output, cache = layer.forward_cached(np.ones((5, 4), np.float32), np.zeros((2, 0), int))
    gradients = layer.backward(output, cache)
    assert gradients.edge_attr is None
    assert gradients.parameters["lin_edge.weight"].shape == (3, 2)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("shape", [(0,), (0, 2)])
def test_edge_softmax(shape, sizes):
    graph = rv.CSRGraph.from_edge_index(np.zeros((2, 0), np.int64), num_nodes=sizes)
    weights = rv.edge_softmax(np.zeros(shape), graph)
    assert weights.shape == shape
    assert rv.edge_softmax_backward(weights, weights, graph).shape == shape
