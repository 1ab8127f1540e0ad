"""Cases of attention over neighbours that test files share: said to the package and to the specification."""

from typing import Any, NamedTuple

import graph_reference as spec
import numpy as np
import pytest
from cases import SECOND_PASS, close

import ruvector_numba as rv
from ruvector_numba.errors import AttentionError

TERMS = ("edge_bias", "edge_key", "edge_value", "edge_weight")
AGGREGATIONS = ["sum", "mean", "max"]
ALL = " ".join(TERMS)
dtypes = pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
aggregations = pytest.mark.parametrize("aggregation", AGGREGATIONS)


class Case(NamedTuple):
    query: Any
    key: Any
    value: Any
    edge_index: Any
    terms: dict[str, Any]  # keyword arguments that the package and the specification share
    grad_output: Any

    @property
    def inputs(self):
        return self.query, self.key, self.value

    @property
    def graph(self):
        return rv.CSRGraph.from_edge_index(self.edge_index, (len(self.key), len(self.query)))

    def forward(self, **more):
        return rv.neighbor_attention_forward(*self.inputs, self.graph, **self.terms, **more)

    def exact(self, **more):
        return spec.neighbor_attention(*self.inputs, self.edge_index, **self.terms, **more)

    def exact_gradients(self, **more):
        return spec.neighbor_gradients(self.grad_output, *self.inputs, self.edge_index, **self.terms, **more)


def draw_edges(Nt, Ns, E, hub=0, seed=0):
    """E edges at random, some of them duplicates, in no order; then `hub` more into the last target."""
    rng = np.random.default_rng([Nt, Ns, E, seed])
    sources, targets = (rng.integers(0, n, E) if E else np.zeros(0, int) for n in (Ns, Nt))
    more = rng.integers(0, Ns, hub) if hub else np.zeros(0, int)
    edges = np.stack([np.append(sources, more), np.append(targets, np.full(hub, Nt - 1))]).astype(np.int64)
    return edges[:, rng.permutation(E + hub)]


def draw(Nt=9, Ns=7, E=40, H=2, D=5, C=6, terms="", dtype=np.float64, hub=0, hidden=0.2, seed=0, **settings):
    """A case with these terms; a fifth of the scores hidden where there is a bias, and all of target 0."""
    rng = np.random.default_rng([Nt, Ns, E, H, D, C, seed])
    edge_index = draw_edges(Nt, Ns, E, hub, seed)
    E += hub
    shapes = {"edge_bias": (E, H), "edge_key": (E, H, D), "edge_value": (E, H, C), "edge_weight": (E,)}
    given = {name: rng.standard_normal(shapes[name]).astype(dtype) for name in terms.split()}
    if "edge_bias" in given and hidden:
        given["edge_bias"][(rng.random((E, H)) < hidden) | (edge_index[1] == 0)[:, None]] = -np.inf
    q, k, v, do = (rng.standard_normal(s).astype(dtype) for s in ((Nt, H, D), (Ns, H, D), (Ns, H, C), (Nt, H, C)))
    return Case(q, k, v, edge_index, given | settings, do)


def conforms(case, slack=SECOND_PASS, keep=None, **more):
    """Every result of a case against the specification; `more` is for the package, as `keep` is for the other."""
    single = case.query.dtype == np.float32
    exact = case.exact(keep=keep)
    naive = case.exact(keep=keep, dtype=np.float32) if single else (None,) * 3
    cache = case.forward(**more)
    for name, got, wanted, low in zip(
        ("output", "lse", "coefficients"), (cache.output, cache.lse, cache.coefficients()), exact, naive
    ):
        close(name, got, wanted, low, slack)
        assert got.dtype == case.query.dtype
    alone = rv.neighbor_attention(*case.inputs, case.graph, **case.terms, **more)
    close("output alone", alone, exact[0], naive[0], slack)
    got = rv.neighbor_attention_backward(case.grad_output, cache)
    exact = case.exact_gradients(keep=keep)
    naive = case.exact_gradients(keep=keep, dtype=np.float32) if single else {}
    for name in ("query", "key", "value", *TERMS):
        gradient = getattr(got, name)
        if name in TERMS and name not in case.terms:
            assert gradient is None, name
            continue
        close(f"gradient of {name}", gradient, exact[name], naive.get(name), slack, floor=1)  # some cancel to nothing
        assert gradient.dtype == case.query.dtype


def results(case, **more):
    """All bits of a call."""
    cache = case.forward(**more)
    g = rv.neighbor_attention_backward(case.grad_output, cache)
    found = {"output": cache.output, "lse": cache.lse, "coefficients": cache.coefficients()}
    return found | {n: getattr(g, n) for n in ("query", "key", "value", *TERMS) if getattr(g, n) is not None}


def same_bits(got, wanted):
    assert got.keys() == wanted.keys()
    for name, w in wanted.items():
        g = np.ascontiguousarray(got[name])
        assert g.shape == w.shape and g.dtype == w.dtype, name
        assert g.tobytes() == np.ascontiguousarray(w).tobytes(), name


def refused(call, *told):
    """An error of ours that is a ValueError too, names what is wrong, and says what to do."""
    with pytest.raises(AttentionError) as caught:
        call()
    assert isinstance(caught.value, ValueError)
    assert caught.value.hint, str(caught.value)
    for part in told:
        assert part in str(caught.value), str(caught.value)


def rows(*shape, dtype=np.float64):
    return np.ones(shape, dtype)
