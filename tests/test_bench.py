"""The bench: what is counted, what is right, how blocks become rates; and that contestants who fail are left out."""

import dataclasses
import functools
import importlib.util
import math
import time

import contestants
import numpy as np
import pytest
import reference as spec

import ruvector_numba as rv
from ruvector_numba.bench import comparison, peers, works
from ruvector_numba.bench.works import Runner, Unsupported, Work


# --- work -------------------------------------------------------------------------------------------------------------
def visible(work):
    """The definition: what `bounds` and `pairs` must agree with."""
    i, j = np.arange(work.queries)[:, None], np.arange(work.keys)
    seen = np.ones((work.queries, work.keys), bool)
    if work.causal or work.window is not None:
        seen &= j <= i
    if work.window is not None:
        seen &= i - j < work.window
    return seen


WORKS = [
    Work(2, 3, 7, 11, 8),
    Work(1, 2, 9, 9, 4, causal=True),
    Work(2, 1, 12, 12, 4, window=5),
    Work(1, 1, 12, 9, 4, causal=True, window=5),
    Work(1, 1, 3, 5, 2, window=40),
    Work(1, 2, 6, 6, 4, causal=True, backward=True),
]
LAYERS = [Work(2, 3, 7, 7, 4, layer=True), Work(2, 3, 7, 7, 4, layer=True, backward=True)]


@pytest.mark.parametrize("work", WORKS, ids=lambda w: w.name)
def test_pairs_and_bounds_count_what_is_attended(work):
    seen = visible(work)
    low, high = work.bounds(np.arange(work.queries))
    j = np.arange(work.keys)
    np.testing.assert_array_equal((low[:, None] <= j) & (j < high[:, None]), seen)
    assert work.pairs == seen.sum() * work.batch * work.heads


def test_flops_are_two_products_forward_and_five_more_backward():
    forward = Work(2, 3, 10, 10, 16)
    assert forward.flops == 4 * 2 * 3 * 100 * 16
    assert Work(2, 3, 10, 10, 16, backward=True).flops == 14 * 2 * 3 * 100 * 16
    assert Work(2, 3, 10, 10, 16, causal=True).flops == 4 * 2 * 3 * 55 * 16
    assert forward.rate(1e-3) == pytest.approx(forward.flops / 1e6)


def test_flops_of_a_layer_are_those_of_four_projections_more():
    batch, length, d_model = 2, 10, 48
    projections, attention = 4 * 2 * batch * length * d_model**2, 4 * batch * length**2 * d_model
    assert Work(2, 3, 10, 10, 16, layer=True).flops == projections + attention
    assert Work(2, 3, 10, 10, 16, layer=True, backward=True).flops == 3 * projections + 3.5 * attention


def test_a_decode_is_measured_by_the_keys_and_values_it_reads():
    decode = Work(1, 8, 1, 65536, 64)
    assert decode.is_decode
    assert decode.bytes_read == 2 * 8 * 65536 * 64 * 4
    assert decode.rate(0.01) == pytest.approx(decode.bytes_read / 1e7)
    assert not Work(1, 8, 1024, 1024, 64).is_decode


@pytest.mark.parametrize(
    ("work", "name"),
    [
        (Work(2, 8, 64, 64, 32), "(2, 8, 64, 32) forward"),
        (Work(2, 8, 1, 64, 32), "(2, 8, 1x64, 32) forward"),
        (Work(2, 8, 64, 64, 32, causal=True, backward=True), "(2, 8, 64, 32) forward + backward, causal"),
        (Work(2, 8, 64, 64, 32, causal=True, window=9), "(2, 8, 64, 32) forward, window 9"),
        (Work(2, 8, 64, 64, 32, spiky=True), "(2, 8, 64, 32) forward, spiky"),
        (Work(2, 8, 64, 64, 32, layer=True, backward=True), "(2, 8, 64, 32) forward + backward, layer"),
    ],
)
def test_names(work, name):
    assert work.name == name


def test_inputs_are_the_same_each_time_and_spiky_means_query_equals_key():
    work = Work(1, 2, 6, 6, 4, spiky=True)
    for a, b in zip(work.inputs(), work.inputs()):
        np.testing.assert_array_equal(a, b)
    query, key, *_ = work.inputs()
    np.testing.assert_array_equal(query, key)
    assert all(x.dtype == np.float32 for x in work.inputs())


def test_inputs_of_a_layer_are_the_same_each_time():
    (x, grad, parameters), again = LAYERS[1].layer_inputs(), LAYERS[1].layer_inputs()
    assert x.shape == grad.shape == (2, 7, 12)
    for a, b in zip((x, grad, *parameters.values()), (*again[:2], *again[2].values())):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, b)


# --- what is right ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("work", WORKS, ids=lambda w: w.name)
def test_its_reference_is_the_spec(work):
    query, key, value, grad = (x.astype(np.float64) for x in work.inputs())
    want = [spec.attention(query, key, value, visible=visible(work))[0]]
    if work.backward:
        gradients = spec.gradients(grad, query, key, value, visible=visible(work))
        want += [gradients[name] for name in ("query", "key", "value")]
    for ours, theirs in zip(work.reference(slab=5), want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-13)


def test_its_reference_of_a_layer_is_the_spec():
    """With gradients by central differences; the loss is the sum of output * grad."""
    work = Work(1, 2, 4, 4, 3, layer=True, backward=True)
    x, grad, parameters = work.layer_inputs()

    def output(**changed):
        given = {"x": x, **parameters, **changed}
        y = given.pop("x")
        return spec.multi_head(y, y, y, given, work.heads)[0]

    def slope(name):
        start = x if name == "x" else parameters[name]
        return spec.central_differences(lambda at: (output(**{name: at}) * grad).sum(), start)

    forward = dataclasses.replace(work, backward=False)
    np.testing.assert_allclose(forward.reference(slab=3)[0], output(), rtol=1e-12, atol=1e-13)
    want = works.layer_results(output(), slope("x"), {name: slope(name) for name in parameters})
    for ours, theirs in zip(work.reference(slab=3), want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-7 * abs(theirs).max())


@pytest.mark.parametrize("wrong", range(9))
def test_every_result_of_a_layer_counts(wrong):
    right = comparison.reference(LAYERS[1])
    assert len(right) == 9
    found = [x * 1.01 if n == wrong else x for n, x in enumerate(right)]
    assert comparison.relative_error(found, right) == pytest.approx(0.01)


def test_relative_error():
    right = [np.array([1.0, -4.0]), np.zeros(2)]
    assert comparison.relative_error([np.array([1.0, -4.0]), np.zeros(2)], right) == 0
    assert comparison.relative_error([np.array([1.5, -4.0]), np.zeros(2)], right) == 0.125
    assert comparison.relative_error([np.array([1.0, -4.0]), np.full(2, 0.1)], right) == pytest.approx(0.1)
    assert comparison.relative_error([np.array([1.0, np.nan]), np.zeros(2)], right) == math.inf
    assert comparison.relative_error([np.ones(3), np.zeros(2)], right) == math.inf


# --- peers ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("work", WORKS, ids=lambda w: w.name)
@pytest.mark.parametrize("name", [works.OURS, "numpy"])
def test_the_adapters_that_are_always_there_are_right(name, work, monkeypatch):
    """`perf/peers.py` asks the others, each in a process of its own, since they set what cannot be set back."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)  # so that NumPy's keeps its threads
    with rv.threads(1):
        runner = peers.PEERS[name](work, 1)
        assert (
            comparison.relative_error(runner.results(runner.call()), comparison.reference(work)) < comparison.TOLERANCE
        )


@pytest.mark.parametrize("work", LAYERS, ids=lambda w: w.name)
def test_our_adapter_of_a_layer_is_right(work):
    with rv.threads(1):
        runner = peers.adapters(work)[works.OURS](work, 1)
        assert (
            comparison.relative_error(runner.results(runner.call()), comparison.reference(work)) < comparison.TOLERANCE
        )


def test_only_some_have_layers():
    assert list(peers.adapters(LAYERS[0])) == [works.OURS, "torch"]
    assert peers.adapters(WORKS[0]) is peers.PEERS


def test_numpys_adapter_forms_no_scores_that_take_too_long():
    with pytest.raises(Unsupported, match="512 MiB of scores"):
        peers.PEERS["numpy"](Work(1, 8, 4096, 4096, 64), 1)


def test_those_who_are_here():
    assert {works.OURS, "numpy"} <= set(peers.installed()) <= set(peers.PEERS)


def test_a_block_is_the_median_of_its_calls():
    pauses = iter([0.03, 0.0, 0.0, 0.02])
    assert Runner(lambda: time.sleep(next(pauses))).time(3) < 0.01
    rates = iter([5.0, 1.0, 3.0, 2.0])
    assert Runner(lambda: next(rates), measures=True).time(3) == 2.0
    assert Runner(lambda: 7.0, measures=True).time(1) == 7.0


def test_choose_puts_ours_first_and_refuses_what_is_not_there():
    assert next(iter(comparison.choose(None))) == works.OURS
    assert list(comparison.choose(["numpy"])) == [works.OURS, "numpy"]
    assert list(comparison.choose(["numpy", works.OURS])) == [works.OURS, "numpy"]
    with pytest.raises(ValueError, match="no peer named 'abacus'"):
        comparison.choose(["abacus"])


# --- the comparison, with contestants of our own ----------------------------------------------------------------------
def test_compare_times_only_right_answers_and_says_why_others_are_missing():
    builds = {
        "ours": functools.partial(contestants.answer, 0.0, 0.01),
        "slow": functools.partial(contestants.answer, 1e-6, 0.03),
        "wrong": functools.partial(contestants.answer, 0.1, 0.0),
        "refuses": contestants.refuse,
        "fails": contestants.fail,
        "dies": contestants.die,
        "limit": contestants.rate,
    }
    plan = comparison.Plan(blocks=3, seconds=0.02, pause=0.0)
    scores = {s.name: s for s in comparison.compare(Work(1, 1, 4, 4, 2), builds, 2, plan, measuring=["limit"])}
    assert scores["ours"].ratio == 1
    assert scores["slow"].ratio == pytest.approx(3, rel=0.5)
    assert len(scores["slow"].blocks) == len(scores["slow"].ratios) == 3
    assert 0 < scores["slow"].error < 1e-5
    assert scores["limit"].rate == 84
    assert math.isnan(scores["limit"].ratio)
    assert scores["wrong"].skipped.startswith("wrong: its largest relative error is")
    assert scores["refuses"].skipped == "not on Sundays"
    assert scores["fails"].skipped == "RuntimeError: no such"
    assert scores["dies"].skipped == "its process ended with code 3"
    assert not scores["wrong"].blocks

    plain = scores["refuses"].to_dict()
    assert plain == {"name": "refuses", "work": "(1, 1, 4, 2) forward", "threads": 2, "skipped": "not on Sundays"}


def test_the_table():
    def score(name, **more):
        return comparison.Score(name, "work", 1, **more)

    rows = [
        [score("ours", rate=95.4), score("torch", rate=70.2, ratio=1.359), score("numpy", skipped="no gradients")],
        [score("ours", skipped="wrong"), score("torch", rate=70.2, ratio=math.nan)],
    ]
    assert comparison.format_table(rows, ["ours", "torch", "numpy"]) == [
        ["work (batch, heads, length, dim)", "ours", "torch", "numpy"],
        ["work", "95", "70 (1.36x)", "-"],
        ["work", "-", "70 (nanx)", "-"],
    ]


@pytest.mark.parametrize(
    ("rate", "text"), [(123.4, "123"), (10.2, "10"), (9.96, "10"), (3.04, "3.0"), (0.053, "0.053")]
)
def test_rates_have_two_digits(rate, text):
    assert comparison._cell(comparison.Score("ours", "work", 1, rate=rate), True) == text
