"""The same bits: on any number of threads, in any company of batches and heads, every run, whichever way is chosen."""

import numba
import numpy as np
import pytest
import reference
from cases import MASKS, TERMS, draw, make
from ruvector_numba.kernels import jit
from ruvector_numba.kernels.simd import target

import ruvector_numba as rv
from ruvector_numba import masks
from ruvector_numba.plan import dense as plan

pytestmark = pytest.mark.core

MOST = numba.config.NUMBA_NUM_THREADS
NAMES = {
    "causal float32": (["causal"], np.float32),
    "window": (["window"], np.float64),
    "bool": (["bool"], np.float64),
    "everything": ([*MASKS, *TERMS], np.float64),
    "wide everything float32": (["window", "lengths", "bool", "float", *TERMS], np.float32),
}
SIZES = [(150, 260, 40, 24), (5, 260, 64, 24), (5, 9000, 16, 8), (12, 4500, 16, 8)]
every_size = pytest.mark.parametrize("size", SIZES, ids=str)
every_name = pytest.mark.parametrize("name", NAMES)


def of(name, size):
    names, dtype = NAMES[name]
    return make(names, size, dtype, fill=len(names) > 1)


def results(case):
    """All bits of a call, large enough for several threads."""
    cache = case.forward()
    g = rv.attention_backward(case.grad_output, cache, case.grad_lse)
    found = {"output": cache.output, "lse": cache.lse, "weights": cache.weights()}
    return found | {name: getattr(g, name) for name in ("query", "key", "value", "bias")}


def same_bits(got, wanted):
    for name, w in wanted.items():
        g = got[name]
        assert (g is None) == (w is None), name
        assert g is None or np.array_equal(g.view(f"u{g.itemsize}"), w.view(f"u{w.itemsize}")), name


@every_size
@every_name
@pytest.mark.skipif(MOST == 1, reason="there is one thread to run on")
def test_threads(name, size):
    case = of(name, size)
    found = []
    for n in {1, 2, MOST} & set(range(1, MOST + 1)):
        with rv.threads(n):
            found.append(results(case))
    for other in found[1:]:
        same_bits(other, found[0])


@every_name
def test_runs(name):
    case = of(name, SIZES[0])
    wanted = results(case)
    for _ in range(5):
        same_bits(results(case), wanted)


@every_size
@every_name
def test_asking_for_less_changes_nothing(name, size):
    """Neither without the logsumexp, nor with the result put somewhere else."""
    case = of(name, size)
    wanted = case.forward().output
    out = np.full(wanted.shape, np.nan, wanted.dtype)
    assert rv.scaled_dot_product_attention(*case.inputs, **case.call, out=out) is out
    same_bits({"a": out, "b": rv.scaled_dot_product_attention(*case.inputs, **case.call)}, {"a": wanted, "b": wanted})


@every_size
@every_name
def test_one_pass_or_two(name, size, monkeypatch):
    """How many threads there are decides whether whole key heads are tasks, or dq and dk, dv are made apart."""
    case, found, passes, backward = of(name, size), [], [], plan.backward

    def noted(*problem):
        passes.append(len(backward(*problem)))
        return backward(*problem)

    monkeypatch.setattr(plan, "backward", noted)
    for n in (1, 2, 3, 64):
        monkeypatch.setattr(plan, "threads", lambda n=n: n)
        found.append(results(case))
    assert passes[0] == 1 and passes[-1] == 2
    for other in found[1:]:
        same_bits(other, found[0])


# In any company

COMPANY = ["plain", "window", "lengths", "arrays and terms"]


def call_of(kind, Lq, Lk, batch, heads):
    """The same masks and terms for a part of the batches and heads."""
    rng = np.random.default_rng(0)
    allowed, bias = rng.random((3, 4, Lq, Lk)) < 0.7, rng.standard_normal((4, 1, Lk))
    if kind == "plain":
        return {}
    if kind == "window":
        return {"attn_mask": masks.Window(90, 20, "bottom_right")}
    if kind == "lengths":
        return {"attn_mask": masks.Lengths(queries=np.array([Lq, 3, Lq])[batch], keys=np.array([90, Lk, 1])[batch])}
    mask = masks.Causal("bottom_right") & allowed[batch, heads] & bias[heads]
    slopes = np.array([0.5, 0.1, 0.0, 0.2])[heads]
    return {"attn_mask": mask, "softcap": 2.0, "alibi_slopes": slopes, "dropout_p": 1e-12 if Lq > 8 else 0.0}


def part(kind, size, batch, heads, key_heads):
    q, k, v = draw(*size, lead=(3, 4), Hk=2)
    do, grad_lse = np.random.default_rng(1).standard_normal((2, 3, 4, size[0], size[3]))
    call = call_of(kind, *size[:2], batch, heads)
    inputs = q[batch, heads], k[batch, key_heads], v[batch, key_heads]
    cache = rv.attention_forward(*inputs, enable_gqa=True, **call)
    g = rv.attention_backward(do[batch, heads], cache, grad_lse[batch, heads, :, 0])
    found = {"output": cache.output, "lse": cache.lse, "weights": cache.weights()}
    return found | {"query": g.query, "key": g.key, "value": g.value}


ALL = slice(None)


@pytest.mark.parametrize("size", [(70, 150, 16, 24), (5, 150, 16, 24), (3, 4200, 8, 8), (12, 4200, 8, 8)], ids=str)
@pytest.mark.parametrize("kind", COMPANY)
def test_batches_and_heads_alone(kind, size):
    together = part(kind, size, ALL, ALL, ALL)
    for b in range(3):
        batch = slice(b, b + 1)
        same_bits(part(kind, size, batch, ALL, ALL), {name: x[batch] for name, x in together.items()})
    for h in range(2):
        heads, key_heads = slice(2 * h, 2 * h + 2), slice(h, h + 1)
        wanted = {name: x[:, key_heads if name in ("key", "value") else heads] for name, x in together.items()}
        same_bits(part(kind, size, ALL, heads, key_heads), wanted)
    for h in range(4):  # of a group, whose gradients of key and value are sums over the group
        heads, key_heads = slice(h, h + 1), slice(h // 2, h // 2 + 1)
        alone = part(kind, size, ALL, heads, key_heads)
        del alone["key"], alone["value"]
        same_bits(alone, {name: together[name][:, heads] for name in alone})


def test_dropout_of_the_first_batches_and_queries_alone():
    """Dice are thrown for (seed, batch, head, query, key): fewer batches and queries leave the others theirs."""
    case = make(["dropout"], (70, 150, 8, 8), lead=(3, 4))
    together = results(case)
    first = case._replace(**{name: getattr(case, name)[:2] for name in case._fields if name not in ("call", "spec")})
    same_bits(results(first), {name: x if x is None else x[:2] for name, x in together.items()})
    whole = 64 // target().width(case.query.itemsize) * target().width(case.query.itemsize)  # blocks, for the bits
    fewer = case._replace(query=case.query[..., :whole, :])
    same_bits({"output": fewer.forward().output}, {"output": together["output"][..., :whole, :]})


def test_dropout_is_the_seeds_affair():
    case = make(["dropout"], (70, 150, 8, 8))
    wanted = case.forward().output
    again, other = case.forward(seed=case.call["seed"]).output, case.forward(seed=6).output
    assert np.array_equal(again, wanted) and not np.array_equal(other, wanted)
    fresh = [case.forward(seed=None).output for _ in range(2)]
    assert not np.array_equal(*fresh), "without a seed every call throws its own dice"
    cache = case.forward(seed=None)  # and its backward pass throws them again
    got = rv.attention_backward(case.grad_output, cache)
    nudge = 1e-6 * np.random.default_rng(0).standard_normal(case.value.shape)
    seeded = rv.attention_forward(
        case.query, case.key, case.value + nudge, **{**case.call, "seed": cache.record.call.seed}
    )
    change = (case.grad_output * (seeded.output - cache.output)).sum()
    np.testing.assert_allclose(change, (got.value * nudge).sum(), rtol=1e-6)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_everywhere(p):
    """Whole rows, columns and heads alike: 4 standard deviations for the whole, 6 for each of its parts."""
    L, lead = 128, (2, 4)
    identity = np.broadcast_to(np.eye(L), (*lead, L, L))
    zeros = np.zeros((*lead, L, 1))
    kept = rv.scaled_dot_product_attention(zeros, zeros, identity, dropout_p=p, seed=1) > 0
    for axes, sigmas in (
        ((0, 1, 2, 3), 4),
        ((0, 1, 2), 6),
        ((0, 1, 3), 6),
        ((1, 2, 3), 6),
        ((0, 2, 3), 6),
        ((2, 3), 6),
    ):
        share = kept.mean(axes)
        n = kept.size / share.size
        assert (abs(share - (1 - p)) < sigmas * np.sqrt(p * (1 - p) / n)).all(), axes
    assert len({x.tobytes() for x in kept.reshape(8, L, L)}) == 8, "heads do not share their dice"


def test_dropout_of_nothing_and_of_all():
    case = make([], (40, 70, 8, 8))
    wanted = case.forward().output
    close = case.forward(dropout_p=1e-12, seed=3).output
    np.testing.assert_allclose(close, wanted, rtol=1e-11)
    nearly = case.forward(dropout_p=1 - 1e-10, seed=3)  # whose threshold would round to 2**32
    assert not nearly.output.any()
    cache = case.forward(dropout_p=1.0, seed=3)
    assert not cache.output.any() and np.array_equal(cache.lse, case.forward().lse)
    g = rv.attention_backward(case.grad_output, cache)
    assert not any(x.any() for x in (g.query, g.key, g.value))


@pytest.mark.skipif(MOST == 1, reason="there is one thread to run on")
def test_a_long_call_in_pieces(monkeypatch):
    """Between which Python hears Ctrl-C: no bit tells of them, on any number of threads."""
    case = make([], (700, 300, 16, 16), np.float32, lead=(2, 4), Hk=4)
    wanted, ends, run_to = results(case), [], jit._run_to
    monkeypatch.setattr(jit, "PATIENCE", 1.0)
    monkeypatch.setattr(jit, "_run_to", lambda f, job, end, work: (ends.append(end), run_to(f, job, end, work)))
    for n in (1, MOST):
        with rv.threads(n):
            same_bits(results(case), wanted)
    assert len(ends) > 20


@pytest.mark.parametrize("group", [2, 3, 8])
@pytest.mark.parametrize("D", [16, 19])
def test_heads_that_share_keys_do_not_see_what_is_hidden(group, D):
    """One query of each, past 300 keys and NaN behind them, and among them where a mask hides it."""
    rng = np.random.default_rng(group)
    query = rng.standard_normal((1, 2 * group, 1, D), dtype=np.float32)
    key, value = rng.standard_normal((2, 1, 2, 310, D), dtype=np.float32)
    visible = rng.random((1, 310)) < 0.8
    visible[:, 300:] = False
    found = []
    for hidden in (0, np.nan):
        key[..., ~visible[0], :], value[..., ~visible[0], :] = hidden, hidden
        for n in {1, MOST}:
            with rv.threads(n):
                found += [rv.scaled_dot_product_attention(query, key, value, visible, enable_gqa=True)]
    assert all(np.array_equal(one.view(np.uint32), found[0].view(np.uint32)) for one in found)
    exact = reference.attention(query, np.repeat(key, group, 1), np.repeat(value, group, 1), visible=visible)[0]
    np.testing.assert_allclose(found[0], exact, rtol=1e-5, atol=1e-6)
