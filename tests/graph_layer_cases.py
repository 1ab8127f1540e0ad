"""Graph layers that test files share: what one is built with, said to the package and to the specification."""

from __future__ import annotations

from typing import Any, NamedTuple

import graph_reference as spec
import numpy as np
from neighbor_cases import draw_edges

import ruvector_numba as rv

KINDS = ["GAT", "GATv2", "GraphTransformer"]
ORACLES = {"GAT": spec.gat, "GATv2": spec.gatv2, "GraphTransformer": spec.graph_transformer}


class Case(NamedTuple):
    layer: Any
    x: Any  # features, or a pair of sources' and targets'
    edge_index: Any
    edge_attr: Any
    edge_weight: Any
    spec: dict[str, Any]  # keyword arguments of the specification
    num_targets: int

    @property
    def graph(self):
        num_sources = len(self.x[0]) if isinstance(self.x, tuple) else len(self.x)
        return rv.CSRGraph.from_edge_index(self.edge_index, (num_sources, self.num_targets))

    @property
    def call(self):
        """What forward takes."""
        return (self.x, self.graph, self.edge_attr), {"edge_weight": self.edge_weight}

    def forward(self):
        arguments, more = self.call
        return self.layer.forward(*arguments, **more)

    def forward_cached(self, **settings):
        arguments, more = self.call
        return self.layer.forward_cached(*arguments, **more, **settings)

    def exact(self, **more):
        oracle = ORACLES[self.layer.name()]
        weight = self.edge_weight
        return oracle(
            self.layer.parameters, self.x, self.edge_index, self.edge_attr, edge_weight=weight, **self.spec, **more
        )

    def grad_output(self, seed=3):
        exact = self.exact().output
        return np.random.default_rng(seed).standard_normal(exact.shape).astype(first(self.x).dtype)


def first(x):
    return x[0] if isinstance(x, tuple) else x


def make(
    kind, in_channels=3, out_channels=2, heads=2, *, N=6, E=15, weighted=False, pair=None, lacks_targets=False,
    dtype=np.float64, seed=0, hub=0, **settings,
):  # fmt: skip
    """A layer with parameters at random (biases begin as 0, which hides mistakes), and what to call it with.

    `N` may be a pair of numbers of sources and targets; `pair` says whether features are one, None: if N is.
    """
    rng = np.random.default_rng([seed, KINDS.index(kind), E])
    bipartite = isinstance(N, tuple)
    Ns, Nt = N if bipartite else (N, N)
    in0, in1 = in_channels if isinstance(in_channels, tuple) else (in_channels, in_channels)
    layer = getattr(rv, kind)(in_channels, out_channels, heads, seed=seed, dtype=dtype, **settings)
    layer.set_parameters(rng.standard_normal(layer.parameter_count()).astype(dtype))
    source, target = rng.standard_normal((Ns, in0)).astype(dtype), rng.standard_normal((Nt, in1)).astype(dtype)
    x = source
    if bipartite if pair is None else pair:
        x = (source, None if lacks_targets else target)
    edge_index = draw_edges(Nt, Ns, E, hub, seed)
    E += hub
    edge_dim = settings.pop("edge_dim", None)
    edge_attr = None if edge_dim is None else rng.standard_normal((E, edge_dim)).astype(dtype)
    edge_weight = rng.standard_normal(E).astype(dtype) if weighted else None
    settings.pop("bias", None), settings.pop("residual", None), settings.pop("dropout", None)
    if kind == "GraphTransformer":
        settings["heads"] = heads
    else:
        settings["loops"] = settings.pop("add_self_loops", True)
        settings["num_targets"] = Nt
    return Case(layer, x, edge_index, edge_attr, edge_weight, settings, Nt)


def random_case(kind, n):
    """The n-th of random configurations; each option is about as often one way as the other."""
    rng = np.random.default_rng([n, KINDS.index(kind)])

    def one_of(*options):
        return options[rng.integers(len(options))]

    bipartite = one_of(True, False)
    pair = bipartite or one_of(True, False, False)
    N = (one_of(1, 5, 6), one_of(2, 4, 7)) if bipartite else one_of(1, 5, 6)
    in_channels = (3, 2) if pair and one_of(True, False) else one_of(1, 3)
    settings = {
        "out_channels": one_of(1, 2, 3), "heads": one_of(1, 2, 3), "concat": one_of(True, False),
        "edge_dim": one_of(None, 1, 2), "bias": one_of(True, True, False), "aggregation": one_of("sum", "mean", "max"),
    }  # fmt: skip
    if kind == "GraphTransformer":
        settings.update(beta=one_of(True, False), root_weight=one_of(True, True, False))
        loops = False
    else:
        loops = one_of(True, "replace", "add", "keep", False)
        settings.update(
            add_self_loops=loops, negative_slope=one_of(0.2, 0.2, 0.05, 1.0), residual=one_of(True, False),
            normalize=one_of(True, True, False), fill_value=one_of("mean", "mean", "add", 0.7),
        )  # fmt: skip
    if kind == "GATv2":
        settings["share_weights"] = not isinstance(in_channels, tuple) and one_of(True, False)
    lacks_targets = kind == "GAT" and pair and not settings["residual"] and one_of(True, False)
    weighted = loops in (False, "keep") and one_of(True, False)
    E = one_of(0, 4, 15)
    return make(
        kind, in_channels, N=N, E=E, weighted=weighted, pair=pair, lacks_targets=lacks_targets, seed=n, **settings
    )
