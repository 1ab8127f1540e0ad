"""Cases that the test files share: one description of inputs, masks and terms, said to the engine and to the reference.

A case is compiled for its element type and for the set of optional terms that are given, some seconds each. So that
all pairs of masks and terms need no kernels of their own, `given_all` gives every term, the absent ones with a value
that says next to nothing, and the same value to the reference.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import reference

import ruvector_numba as rv
from ruvector_numba import masks

MASKS = ("causal", "bottom_right", "window", "lengths", "segments", "scattered", "bool", "float")
TERMS = ("softcap", "slopes", "dropout")
DROPPED, SEED = 0.3, 5


class Case(NamedTuple):
    query: Any
    key: Any
    value: Any
    call: dict[str, Any]  # keyword arguments of rv.attention_forward
    spec: dict[str, Any]  # keyword arguments of reference.attention
    grad_output: Any
    grad_lse: Any

    @property
    def inputs(self):
        return self.query, self.key, self.value

    @property
    def bias(self):
        return self.spec.get("bias")

    def forward(self, **more):
        return rv.attention_forward(*self.inputs, **{**self.call, **more})


def keep_matrix(lead, Lq, Lk, p=DROPPED, seed=SEED):
    """What dropout multiplies the weights with, as the engine draws it: equal scores, and the identity for a value."""
    return _keep_matrix(tuple(lead), Lq, Lk, p, seed)


@functools.lru_cache(64)
def _keep_matrix(lead, Lq, Lk, p, seed):
    q, k = np.zeros((*lead, Lq, 1)), np.zeros((*lead, Lk, 1))
    identity = np.broadcast_to(np.eye(Lk), (*lead, Lk, Lk))
    dropped = rv.scaled_dot_product_attention(q, k, identity, dropout_p=p, seed=seed)
    keep = np.where(dropped > 0, 1 / (1 - p), 0.0)
    np.testing.assert_allclose(dropped, keep / Lk, rtol=1e-13)
    return keep


def draw(Lq, Lk, D, Dv, dtype=np.float64, lead=(2, 4), Hk=None, seed=0):
    rng = np.random.default_rng([Lq, Lk, D, seed])
    key_lead = lead if Hk is None else (*lead[:-1], Hk)
    shapes = (*lead, Lq, D), (*key_lead, Lk, D), (*key_lead, Lk, Dv)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def make(names, size, dtype=np.float64, lead=(2, 4), Hk=2, seed=0, bias_shape=None, fill=False):
    """A case of the masks and terms of these names, of size (Lq, Lk, D, Dv); `fill` as `given_all` says."""
    Lq, Lk, D, Dv = size
    names = set(names)
    q, k, v = draw(Lq, Lk, D, Dv, dtype, lead, Hk, seed)
    rng = np.random.default_rng([seed, Lq, Lk])
    scores = (*lead, Lq, Lk)
    call: dict[str, Any] = {"enable_gqa": lead[-1] != Hk}
    spec: dict[str, Any] = {"visible": np.ones(scores, bool), "offset": 0}
    parts: list[Any] = []

    def see(part, dense=None):
        parts.append(part)
        dense = part.to_dense(Lq, Lk) if dense is None else dense
        spec["visible"] = spec["visible"] & dense

    if "causal" in names:
        call["is_causal"] = True
        spec["visible"] = spec["visible"] & np.tri(Lq, Lk, dtype=bool)
    if "bottom_right" in names:
        see(masks.Causal("bottom_right"))
        spec["offset"] = Lk - Lq
    if "window" in names:
        see(masks.Window(left=Lk // 3, right=Lk // 5))
    if "lengths" in names:  # the last query of row 0 sees nothing, if there are two
        see(masks.Lengths(queries=[max(1, Lq - 1), Lq], keys=[Lk, Lk - Lk // 3]))
    if "segments" in names:
        see(masks.Segments(np.sort(rng.integers(0, 4, Lq)), np.sort(rng.integers(0, 4, (lead[0], Lk)))))
    if "scattered" in names:
        see(masks.Segments(rng.integers(0, 3, Lq), rng.integers(0, 3, Lk)))
    if "bool" in names:
        allowed = rng.random(scores) < 0.6
        allowed[..., Lq // 2, :] = Lq == 1  # an empty row, if there are several
        see(allowed, allowed)
    if "float" in names:
        shape = (lead[-1], Lq, Lk) if bias_shape is None else bias_shape
        bias = rng.standard_normal(shape).astype(dtype)
        if bias_shape is None:
            bias[rng.random(shape) < 0.2] = -np.inf
        parts.append(bias)
        spec["bias"] = bias
    if "softcap" in names:
        call["softcap"] = spec["softcap"] = 1.5
    if "slopes" in names:
        call["alibi_slopes"] = spec["slopes"] = np.array([0.02, 0.1, 0.5, 0.0] * lead[-1])[: lead[-1]].astype(dtype)
    if "dropout" in names:
        call.update(dropout_p=DROPPED, seed=SEED)
        spec["keep"] = keep_matrix(lead, Lq, Lk)
    if fill:
        given_all(call, spec, parts, Lq, dtype)
    if parts:
        call["attn_mask"] = masks.All(parts)
    grads = rng.standard_normal((*scores[:-1], Dv)).astype(dtype), rng.standard_normal(scores[:-1]).astype(dtype)
    return Case(q, k, v, call, spec, *grads)


def given_all(call, spec, parts, Lq, dtype):
    """Give every optional term. A cap of 50 hardly bends a score; a chance of 1e-12 drops nothing in 32 bits.

    Few queries without dropout stay without it, since with it they would take the way of many.
    """
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    if not any(x.dtype.kind == "b" for x in arrays):
        parts.append(np.ones((1, 1), bool))
    if not any(x.dtype.kind != "b" for x in arrays):
        parts.append(np.zeros((1, 1), dtype))
    call.setdefault("softcap", 50.0)
    spec["softcap"] = call["softcap"]
    call.setdefault("alibi_slopes", np.zeros(1, dtype) if Lq == 0 else np.zeros(spec["visible"].shape[-3], dtype))
    spec["slopes"] = call["alibi_slopes"]
    if Lq > 8 and "dropout_p" not in call:
        call["dropout_p"] = 1e-12
        spec["keep"] = 1 / (1 - 1e-12)


# --- how near is near enough ----------------------------------------------------------------------------------------
FIRST_PASS, SECOND_PASS = 8, 16  # output and lse; weights and gradients, made from scores that are computed again


def close(name, got, exact, naive=None, slack=FIRST_PASS, floor=0.0):
    """float64: within 1e-12 of the largest magnitude.

    float32: at most twice the error of the plain formula in float32 (`naive`), both measured against float64 in the
    maximum norm, and `slack` units in the last place of the largest magnitude. The slack is for sizes where the plain
    formula is lucky: where a row has one key it is exact, and a stream that learns the maximum late is not. Without
    slack the contract is tested on the mean of many draws (test_accuracy.py). -inf must be where it is expected.

    `floor` is the least magnitude to count with, for gradients that may cancel to nothing.
    """
    got, exact = np.asarray(got), np.asarray(exact)
    assert got.shape == exact.shape, f"{name}: shape {got.shape}, expected {exact.shape}"
    if naive is not None:
        assert got.dtype == np.float32, f"{name} is {got.dtype}"
    absent = np.isneginf(exact)
    np.testing.assert_array_equal(np.isneginf(got), absent, err_msg=f"{name}: -inf")
    got, exact = np.where(absent, 0, got), np.where(absent, 0, exact)
    floor = 1.0 if name == "lse" else floor  # an error of a sum is absolute in its logarithm
    magnitude = np.abs(exact).max(initial=floor)
    error = np.abs(got - exact).max(initial=0)
    if naive is None:
        allowed = 1e-12 * magnitude
    else:
        naive_error = np.abs(np.where(absent, 0, naive) - exact).max(initial=0)
        allowed = 2 * naive_error + slack * np.finfo(np.float32).eps * magnitude
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}, magnitude {magnitude:.3e}"


def conforms(case, gradients=True, weights=True):
    """Every result of a case against the reference."""
    single = case.query.dtype == np.float32
    exact = reference.attention(*case.inputs, **case.spec)
    naive = reference.naive32(*case.inputs, **case.spec) if single else (None,) * 3
    cache = case.forward()
    close("output", cache.output, exact[0], naive[0])
    close("lse", cache.lse, exact[1], naive[1])
    if weights:
        close("weights", cache.weights(), exact[2], naive[2], SECOND_PASS)
    if gradients:
        gradients_conform(case, cache)
    return cache


def gradients_conform(case, cache, **grads):
    single = case.query.dtype == np.float32
    given = {"grad_output": case.grad_output, "grad_lse": case.grad_lse, **grads}
    got = rv.attention_backward(cache=cache, **given)
    do, grad_lse = given["grad_output"], given["grad_lse"]
    exact = reference.gradients(do, *case.inputs, grad_lse=grad_lse, **case.spec)
    naive = reference.naive32_gradients(do, *case.inputs, grad_lse=grad_lse, **case.spec) if single else {}
    for name in ("query", "key", "value"):
        close(f"gradient of {name}", getattr(got, name), exact[name], naive.get(name), SECOND_PASS)
        assert getattr(got, name).dtype == case.query.dtype
    if case.bias is not None:
        shape = case.bias.shape
        low = reference.reduce_to(naive["scores"], shape) if single else None
        close("gradient of bias", got.bias, reference.reduce_to(exact["scores"], shape), low, SECOND_PASS)
    elif not isinstance(case.call.get("attn_mask"), masks.All):
        assert got.bias is None
