"""Random layers on graphs agree with those of PyTorch Geometric, whose states they load, forward and backward.

What PyTorch Geometric cannot do is not here: no nodes at all, and "mean" as a loop's attributes with more targets than
sources (an index error there).
"""

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest

import ruvector_numba as rv

COUNTERPARTS = {rv.GAT: "GATConv", rv.GATv2: "GATv2Conv", rv.GraphTransformer: "TransformerConv"}
GRAPHS = ["random", "dense", "hub of targets", "hub of sources", "no edges", "one node", "loops only", "chain"]
ROUNDS = 4
CASES = list(itertools.product(COUNTERPARTS, GRAPHS, range(ROUNDS)))
TOLERANCE = 1e-8


class Case(NamedTuple):
    in_channels: Any
    out_channels: int
    heads: int
    settings: dict[str, Any]  # of both
    aggregation: str
    sizes: tuple[int, int]
    x: Any  # an array, or a pair
    edge_index: Any
    edge_attr: Any


def edges(rng, graph, sources, targets):
    """The ends of edges, (2, E), with duplicates, loops and nodes that have none, where nothing else is said."""
    if graph == "no edges":
        return np.zeros((2, 0), np.int64)
    if graph == "chain":  # no loops, no duplicates
        n = min(sources, targets)
        return np.stack([np.arange(n - 1), np.arange(1, n)])
    E = {"dense": 900, "hub of targets": 6500, "hub of sources": 6500, "one node": 5}.get(graph, 2 * sources)
    ends = np.stack([rng.integers(0, n, E) for n in (sources, targets)])
    if graph == "loops only":
        ends = np.tile(rng.integers(0, min(sources, targets), E), (2, 1))
    if graph.startswith("hub"):
        end = int(graph == "hub of targets")
        ends[end, : E - 100] = 1
    return ends


def draw(kind, graph, number):
    rng = np.random.default_rng([list(COUNTERPARTS).index(kind), GRAPHS.index(graph), number])

    def flip(probability=0.5):
        return bool(rng.random() < probability)

    is_pair, heads, out_channels = flip(0.4), int(rng.choice([1, 2, 3, 8])), int(rng.choice([1, 4, 7, 16]))
    settings = {"concat": flip(), "bias": flip(0.7), "edge_dim": int(rng.choice([1, 3, 6])) if flip() else None}
    if kind is rv.GraphTransformer:
        settings |= {"beta": flip(), "root_weight": flip(0.7)}
    else:
        fills = "mean", "add", 0.5, -2.0, rng.standard_normal(settings["edge_dim"] or 1)
        settings |= {"add_self_loops": flip(0.6), "fill_value": fills[rng.integers(5)], "residual": flip()}
        settings |= {"negative_slope": float(rng.choice([0.2, 0.0, 0.7, 1.5]))}
    if kind is rv.GATv2:
        settings |= {"share_weights": flip(0.4)}
    narrow, wide = (int(n) for n in rng.integers(1, 12, 2))
    in_channels = (narrow, narrow if settings.get("share_weights") or flip(0.3) else wide) if is_pair else narrow
    n = 400 if graph.startswith("hub") else int(rng.integers(2, 40))
    sizes = (1, 1) if graph == "one node" else (n, n)
    if is_pair and graph != "one node":
        sizes = (n, int(rng.integers(2, n + 1)))
        if not (settings.get("add_self_loops") and isinstance(settings["fill_value"], str)) and flip():
            sizes = sizes[::-1]
    x = rng.standard_normal((sizes[0], narrow))
    if is_pair:
        has_no_targets = kind is rv.GAT and not settings["residual"] and flip(0.4)
        x = x, None if has_no_targets else rng.standard_normal((sizes[1], in_channels[1]))
    edge_index = edges(rng, graph, *sizes)
    attr = None if settings["edge_dim"] is None else rng.standard_normal((edge_index.shape[1], settings["edge_dim"]))
    if settings["edge_dim"] == 1 and kind is not rv.GraphTransformer and flip():
        attr = attr[:, 0]
    aggregation = str(rng.choice(["sum", "sum", "mean", "max"]))
    return Case(in_channels, out_channels, heads, settings, aggregation, sizes, x, edge_index, attr)


def test_the_cases_cover_what_they_should():
    cases = {kind: [draw(*case) for case in CASES if case[0] is kind] for kind in COUNTERPARTS}
    assert len(CASES) >= 60
    for kind, drawn in cases.items():
        for name in drawn[0].settings:
            values = {str(case.settings[name]) for case in drawn}
            assert len(values) > 1, f"{kind.__name__} {name} is always {values}"
        assert {case.aggregation for case in drawn} == {"sum", "mean", "max"}
        assert {isinstance(case.x, tuple) for case in drawn} == {False, True}
        assert any(case.sizes[0] < case.sizes[1] for case in drawn) and any(
            case.sizes[0] > case.sizes[1] for case in drawn
        )
    assert sum(isinstance(case.x, tuple) and case.x[1] is None for case in cases[rv.GAT]) >= 2
    for end in (0, 1):
        assert max(np.bincount(case.edge_index[end]).max(initial=0) for case in cases[rv.GAT]) > 5000


def pyg():
    pytest.importorskip("torch_geometric")
    import torch
    import torch_geometric.nn

    return torch, torch_geometric.nn


def tensors(torch, x):
    if isinstance(x, tuple):
        return tuple(tensors(torch, one) for one in x)
    return None if x is None else torch.tensor(x, requires_grad=True)


def both(kind, case):
    """Their layer with random parameters, and ours with its state."""
    torch, nn = pyg()
    torch.manual_seed(0)
    settings = dict(case.settings)
    if isinstance(settings.get("fill_value"), np.ndarray):
        settings["fill_value"] = torch.tensor(settings["fill_value"])
    sizes = case.in_channels, case.out_channels, case.heads
    theirs = getattr(nn, COUNTERPARTS[kind])(*sizes, **settings, aggr=case.aggregation).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    ours = kind(*sizes, **case.settings, aggregation=case.aggregation)
    rv.interop.load_pyg_state(ours, theirs.state_dict())
    theirs.load_state_dict({name: torch.from_numpy(x) for name, x in rv.interop.to_pyg_state(ours).items()})
    return theirs, ours


def gradient(tensor):
    """None, where nothing depends on it, is zeros."""
    return (tensor if tensor.grad is None else tensor.grad).detach().numpy() * (tensor.grad is not None)


def agree(pairs, case):
    for name, (mine, exact) in pairs.items():
        assert mine.dtype == np.float64 and mine.shape == exact.shape, name
        largest = max(1, np.abs(exact).max(initial=0))
        np.testing.assert_allclose(mine, exact, rtol=0, atol=TOLERANCE * largest, err_msg=f"{name} of {case}")


@pytest.mark.parametrize(("kind", "graph", "number"), CASES)
def test_the_same_results_and_gradients(kind, graph, number):
    torch, _ = pyg()
    case = draw(kind, graph, number)
    theirs, ours = both(kind, case)
    x, attr = tensors(torch, case.x), tensors(torch, case.edge_attr)
    size = {"size": case.sizes} if kind is rv.GAT and isinstance(x, tuple) else {}
    output, (their_edges, weights) = theirs(
        x, torch.tensor(case.edge_index), attr, **size, return_attention_weights=True
    )
    own_graph = rv.CSRGraph.from_edge_index(case.edge_index, num_nodes=case.sizes)
    got = ours(case.x, own_graph, case.edge_attr)
    cached, cache = ours.forward_cached(case.x, own_graph, case.edge_attr)
    np.testing.assert_array_equal(cached, got)
    np.testing.assert_array_equal(cache.graph.to_edge_index(), their_edges.numpy())
    do = np.random.default_rng(number).standard_normal(got.shape)
    output.backward(torch.from_numpy(do))
    g = ours.backward(do, cache)

    nodes = x if isinstance(x, tuple) else (x,)
    own_nodes = g.node_features if isinstance(x, tuple) else (g.node_features,)
    pairs = {
        "output": (got, output.detach().numpy()),
        "coefficients": (cache.coefficients(), weights.detach().numpy()),
        **{f"parameter {name}": (g.parameters[name], gradient(p)) for name, p in theirs.named_parameters()},
        **{f"x[{i}]": (own_nodes[i], gradient(one)) for i, one in enumerate(nodes) if one is not None},
        **({} if attr is None else {"edge_attr": (g.edge_attr, gradient(attr))}),
    }
    assert g.parameters.keys() == dict(theirs.named_parameters()).keys()
    assert (g.edge_attr is None) == (attr is None) and [d is None for d in own_nodes] == [d is None for d in nodes]
    agree(pairs, f"{theirs}, {case}")


# --- nodes and edges of several types --------------------------------------------------------------------------------
NODES = {"paper": 30, "author": 400, "field": 7}
RELATIONS = [
    ("author", "writes", "paper"),
    ("paper", "cites", "paper"),
    ("paper", "has", "field"),
    ("paper", "mentions", "field"),
    ("paper", "by", "author"),
]


def draw_hgt(number):
    """(in_channels, out_channels, metadata, heads), nodes, edges."""
    rng = np.random.default_rng([9, number])
    heads = int(rng.choice([1, 2, 4]))
    out_channels = heads * int(rng.choice([1, 4, 8]))
    relations = [kind for kind in RELATIONS if rng.random() < 0.7] or RELATIONS[:1]
    widths = {kind: out_channels if rng.random() < 0.5 else int(rng.integers(1, 9)) for kind in NODES}
    x = {kind: rng.standard_normal((n, widths[kind])) for kind, n in NODES.items()}
    edge_index = {}
    for source, name, target in relations:
        E = int(rng.choice([0, 1, 60, 6000], p=[0.15, 0.15, 0.5, 0.2]))
        ends = np.stack([rng.integers(0, NODES[kind], E) for kind in (source, target)])
        ends[1, 100:] = 3  # a hub
        if E or not edge_index:
            edge_index[source, name, target] = ends
    in_channels = out_channels if set(widths.values()) == {out_channels} else widths
    return (in_channels, out_channels, (list(NODES), relations), heads), x, edge_index


@pytest.mark.parametrize("number", range(16))
def test_hgt(number):
    torch, nn = pyg()
    arguments, x, edge_index = draw_hgt(number)
    torch.manual_seed(number)
    theirs = nn.HGTConv(*arguments).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours = rv.HGT(*arguments)
    rv.interop.load_pyg_state(ours, theirs.state_dict())
    theirs.load_state_dict({name: torch.from_numpy(a) for name, a in rv.interop.to_pyg_state(ours).items()})
    nodes = {kind: torch.tensor(a, requires_grad=True) for kind, a in x.items()}
    outputs = theirs(nodes, {kind: torch.tensor(ends) for kind, ends in edge_index.items()})
    got, cache = ours.forward_cached(x, edge_index)
    assert got.keys() == outputs.keys()
    rng = np.random.default_rng(number)
    do = {kind: rng.standard_normal(a.shape) for kind, a in got.items()}
    sum((outputs[kind] * torch.from_numpy(d)).sum() for kind, d in do.items()).backward()
    g = ours.backward(do, cache)
    assert g.node_features.keys() == nodes.keys() and not g.edge_attr
    pairs = {
        **{f"output {kind}": (got[kind], a.detach().numpy()) for kind, a in outputs.items()},
        **{f"parameter {name}": (g.parameters[name], gradient(p)) for name, p in theirs.named_parameters()},
        **{f"x {kind}": (g.node_features[kind], gradient(a)) for kind, a in nodes.items()},
    }
    agree(pairs, f"{theirs}, {number}")
