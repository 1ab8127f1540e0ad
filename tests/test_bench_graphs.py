"""The bench on graphs: what is counted, and that its reference is the definition of the layers."""

import dataclasses
import math

import numpy as np
import pytest
import reference as spec

import ruvector_numba as rv
from ruvector_numba.bench import comparison, peers, works
from ruvector_numba.bench.peers_graph import GraphWork

LAYERS = ["GAT", "GATv2", "GraphTransformer"]
WORKS = [GraphWork(layer, 12, 40, 5, 2, 3, backward=True) for layer in LAYERS]
WORKS += [dataclasses.replace(work, edge_dim=2) for work in WORKS]
IDS = LAYERS + [f"{layer}, edges with features" for layer in LAYERS]


def leaky(z):
    return np.where(z > 0, z, 0.2 * z)


def definition(work, x, p):
    """Node by node and head by head, from the papers' formulas."""
    source, target = work.edge_index()
    attr = work.edge_attr()
    heads = (work.nodes, work.heads, work.channels)

    def linear(name):
        return (x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)).reshape(heads)

    loops = work.layer != "GraphTransformer"
    out = np.zeros(heads)
    for i in range(work.nodes):
        into = (target == i) & ~(loops & (source == i))
        near = np.append(source[into], i) if loops else source[into]
        added = np.zeros((len(near), *heads[1:]))
        if attr is not None:
            mean = attr[into].astype(float).mean(axis=0, keepdims=True) if into.any() else np.zeros((1, work.edge_dim))
            own = np.concatenate([attr[into], mean]) if loops else attr[into].astype(float)
            added += (own @ p["lin_edge.weight"].T).reshape(added.shape)
        for h in range(work.heads):
            if work.layer == "GAT":
                value = linear("lin")[near, h]
                z = value @ p["att_src"][0, h] + linear("lin")[i, h] @ p["att_dst"][0, h]
                s = leaky(z if attr is None else z + added[:, h] @ p["att_edge"][0, h])
            elif work.layer == "GATv2":
                value = linear("lin_l")[near, h]
                s = leaky(value + linear("lin_r")[i, h] + added[:, h]) @ p["att"][0, h]
            else:
                value = linear("lin_value")[near, h] + added[:, h]
                s = (linear("lin_key")[near, h] + added[:, h]) @ linear("lin_query")[i, h] / math.sqrt(work.channels)
            if len(near):
                e = np.exp(s - s.max())
                messages = (e / e.sum())[:, None] * value
                out[i, h] = messages.max(axis=0) if work.aggregation == "max" else messages.sum(axis=0)
    joined = out.reshape(work.nodes, -1)
    return joined + (p["bias"] if loops else linear("lin_skip").reshape(work.nodes, -1))


@pytest.mark.parametrize("work", WORKS, ids=IDS)
def test_its_reference_is_the_definition(work):
    """With gradients by central differences; the loss is the sum of output * grad."""
    x, grad, parameters = work.inputs()
    given = {name: array.astype(np.float64) for name, array in parameters.items()}

    def slope(name):
        start = x.astype(np.float64) if name == "x" else given[name]

        def loss(at):
            changed = {**given, "x": x.astype(np.float64), name: at}
            return (definition(work, changed.pop("x"), changed) * grad).sum()

        return spec.central_differences(loss, start)

    output, *found = work.reference()
    np.testing.assert_allclose(output, definition(work, x.astype(np.float64), given), rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(output, dataclasses.replace(work, backward=False).reference()[0])
    slopes = {name: slope(name) for name in given}
    if "lin_key.bias" in slopes:
        slopes["lin_query.bias"] = np.stack([slopes.pop("lin_key.bias"), slopes["lin_query.bias"]])
    for ours, theirs in zip(found, [slope("x"), *(slopes[name] for name in sorted(slopes))], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * abs(theirs).max())


LARGEST = {"backward": False, "aggregation": "max"}


@pytest.mark.parametrize("changed", [{}, {"backward": False}, {"power_law": True, "from_edge_index": True}, LARGEST])
@pytest.mark.parametrize("work", WORKS, ids=IDS)
def test_our_adapter_is_right(work, changed):
    work = dataclasses.replace(work, **changed)
    with rv.threads(1):
        runner = peers.adapters(work)[works.OURS](work, 1)
        assert (
            comparison.relative_error(runner.results(runner.call()), comparison.reference(work)) < comparison.TOLERANCE
        )


@pytest.mark.parametrize("work", WORKS, ids=IDS)
def test_its_reference_of_the_largest_is_the_definition(work):
    work = dataclasses.replace(work, edges=15, **LARGEST)  # so few that some nodes have none
    x, _, parameters = work.inputs()
    given = {name: array.astype(np.float64) for name, array in parameters.items()}
    (output,) = work.reference()
    np.testing.assert_allclose(output, definition(work, x.astype(np.float64), given), rtol=1e-12, atol=1e-13)
    assert abs(output - dataclasses.replace(work, aggregation="sum").reference()[0]).max() > 0.1
    with pytest.raises(ValueError, match="without gradients"):
        dataclasses.replace(work, backward=True)


@pytest.mark.parametrize("changed", [{}, LARGEST])
@pytest.mark.parametrize("work", WORKS, ids=IDS)
def test_so_is_that_of_pytorch_geometric(work, changed):
    work = dataclasses.replace(work, **changed)
    torch = pytest.importorskip("torch")
    pytest.importorskip("torch_geometric")
    runner = peers.adapters(work)["torch_geometric"](work, torch.get_num_threads())
    assert comparison.relative_error(runner.results(runner.call()), comparison.reference(work)) < comparison.TOLERANCE


@pytest.mark.parametrize("work", WORKS, ids=IDS)
def test_every_result_counts(work):
    right = comparison.reference(work)
    for wrong in range(len(right)):
        found = [x * 1.01 if n == wrong else x for n, x in enumerate(right)]
        assert comparison.relative_error(found, right) == pytest.approx(0.01)


@pytest.mark.parametrize("layer", LAYERS)
def test_float32_adds_its_numbers_without_rounding(layer):
    """Else a LeakyReLU may take an edge for one on the other side of zero, and a right gradient for a wrong one."""
    work = GraphWork(layer, 500, 10, 128, 8, 16)
    x, _, p = work.inputs()
    names = [n.removesuffix(".weight") for n in p if n.endswith("weight") and n != "lin_skip.weight"]
    made = {n: x @ p[f"{n}.weight"].T + p.get(f"{n}.bias", np.float32(0)) for n in names}
    for name, y in made.items():
        wide = x.astype(np.float64) @ p[f"{name}.weight"].T.astype(np.float64) + p.get(f"{name}.bias", 0.0)
        np.testing.assert_array_equal(y, wide)
    if layer == "GAT":
        h, att = made["lin"].reshape(-1, 8, 16), p["att_src"] + p["att_dst"]
        np.testing.assert_array_equal((h * att).sum(axis=2), (h.astype(np.float64) * att).sum(axis=2))


def test_rates_are_edges_and_what_must_be_read_for_them():
    work = GraphWork("GAT", 10, 4_000_000, 64, 4, 16)
    assert (work.unit, work.limit, work.kind) == ("M edges/s", "bandwidth", "graph")
    assert work.rate(0.5) == 8
    assert work.used(8.0) == pytest.approx(8e6 * 64 * 4 / 1e9)
    assert dataclasses.replace(work, layer="GraphTransformer").used(8.0) == pytest.approx(2 * work.used(8.0))
    assert dataclasses.replace(work, backward=True).used(8.0) == pytest.approx(3 * work.used(8.0))
    assert dataclasses.replace(work, edge_dim=64).used(8.0) == pytest.approx(2 * work.used(8.0))


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({}, "GAT 64→4x16, 100,000 nodes, 1,000,000 edges, forward"),
        ({"aggregation": "max"}, "GAT 64→4x16, 100,000 nodes, 1,000,000 edges, forward, max"),
        ({"edge_dim": 8}, "GAT 64→4x16, 100,000 nodes, 1,000,000 edges with 8 features, forward"),
        ({"power_law": True}, "GAT 64→4x16, 100,000 nodes, 1,000,000 edges of power-law degrees, forward"),
        (
            {"backward": True, "from_edge_index": True},
            "GAT 64→4x16, 100,000 nodes, 1,000,000 edges, forward + backward from edge_index",
        ),
    ],
)
def test_names(changed, name):
    assert dataclasses.replace(GraphWork("GAT", 100_000, 1_000_000, 64, 4, 16), **changed).name == name


def test_inputs_are_the_same_each_time_and_power_law_has_hubs():
    even = GraphWork("GATv2", 2000, 20_000, 6, 2, 3)
    uneven = dataclasses.replace(even, power_law=True)
    for work in (even, uneven):
        np.testing.assert_array_equal(work.edge_index(), work.edge_index())
        assert work.edge_index().dtype == np.int64
        assert work.edge_index().shape == (2, 20_000)
    for end in (0, 1):
        assert np.bincount(even.edge_index()[end]).max() < 40
        assert np.bincount(uneven.edge_index()[end]).max() > 800
    for a, b in zip(even.inputs()[2].values(), even.inputs()[2].values()):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, b)


def test_its_adapters():
    assert list(peers.adapters(WORKS[0])) == [works.OURS, "torch_geometric"]
    assert works.OURS in peers.installed(peers.adapters(WORKS[0]))
