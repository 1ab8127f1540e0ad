"""What must hold for any sizes, masks and terms; hypothesis draws them."""

import numpy as np
import reference
from cases import SECOND_PASS, close, given_all
from hypothesis import given, settings
from hypothesis import strategies as st

import ruvector_numba as rv
from ruvector_numba import masks

modest = settings(deadline=None, derandomize=True, max_examples=60)
many = settings(deadline=None, derandomize=True, max_examples=200)
LENGTH = st.integers(1, 12) | st.integers(1, 150)
ALIGN = st.sampled_from(["top_left", "bottom_right"])
INTERVALS = masks.Causal, masks.Window, masks.Lengths, masks.Full


@st.composite
def sizes(draw, batch=None):
    batch = tuple(draw(st.lists(st.integers(1, 2), max_size=2))) if batch is None else batch
    Hk, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    channels = st.integers(1, 20)
    return batch, Hk * group, Hk, draw(LENGTH), draw(LENGTH), draw(channels), draw(channels)


def inputs(size, rng, dtype=np.float64):
    batch, H, Hk, Lq, Lk, D, Dv = size
    shapes = (*batch, H, Lq, D), (*batch, Hk, Lk, D), (*batch, Hk, Lk, Dv)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@st.composite
def calls(draw, dtype):
    """Inputs, the call, and the same for the reference. No term at all or every term, for the compiler's sake."""
    size = draw(sizes())
    batch, H, Hk, Lq, Lk, *_ = size
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = (*batch, H, Lq, Lk)

    def within(target):
        """A shape that broadcasts to the target."""
        shape = tuple(draw(st.sampled_from([1, n])) for n in target)
        return shape[draw(st.integers(0, len(shape))) :]

    def ids(L):
        found = rng.integers(0, 4, (*within(batch), L))
        return np.sort(found) if draw(st.booleans()) else found

    def part():
        kind = draw(st.sampled_from(["causal", "window", "lengths", "segments", "bool"]))
        if kind == "causal":
            return masks.Causal(draw(ALIGN))
        if kind == "window":
            reach = st.none() | st.integers(0, 40)
            return masks.Window(draw(reach), draw(reach), draw(ALIGN))
        if kind == "lengths":
            return masks.Lengths(
                *(draw(st.sampled_from([None, rng.integers(0, L + 1, within(batch))])) for L in (Lq, Lk))
            )
        return masks.Segments(ids(Lq), ids(Lk)) if kind == "segments" else rng.random(within(scores)) < 0.7

    parts = [part() for _ in range(draw(st.integers(0, 3)))]
    call, spec = {"enable_gqa": True}, {"visible": np.broadcast_to(masks.All(parts).to_dense(Lq, Lk), scores)}
    if any(getattr(p, "align", None) == "bottom_right" for p in parts):
        spec["offset"] = Lk - Lq
    if draw(st.booleans()):
        call["is_causal"] = True
        spec["visible"] = spec["visible"] & np.tri(Lq, Lk, dtype=bool)
    if draw(st.booleans()):
        call["scale"] = spec["scale"] = draw(st.floats(-0.5, 0.5))
    terms = draw(st.sets(st.sampled_from(["bias", "softcap", "slopes"])))
    if "bias" in terms:
        shape = within(scores)
        bias = rng.standard_normal(shape).astype(dtype)
        spec["bias"] = np.where(rng.random(shape) < 0.2, -np.inf, bias).astype(dtype)
        parts.insert(draw(st.integers(0, len(parts))), spec["bias"])
    if "softcap" in terms:
        call["softcap"] = spec["softcap"] = draw(st.floats(0.5, 20))
    if "slopes" in terms:
        call["alibi_slopes"] = spec["slopes"] = rng.random(H).astype(dtype)
    if terms or not all(isinstance(p, INTERVALS) for p in parts):
        given_all(call, spec, parts, Lq, dtype)
    if parts:
        call["attn_mask"] = masks.All(parts)
    return (*inputs(size, rng, dtype), call, spec, rng)


def agrees(q, k, v, call, spec, rng):
    single = q.dtype == np.float32
    exact = reference.attention(q, k, v, **spec)
    naive = reference.naive32(q, k, v, **spec) if single else (None,) * 3
    cache = rv.attention_forward(q, k, v, **call)
    got = cache.output, cache.lse, cache.weights()
    for name, one, wanted, low in zip(("output", "lse", "weights"), got, exact, naive, strict=True):
        close(name, one, wanted, low, SECOND_PASS)
    do, grad_lse = (rng.standard_normal(x.shape).astype(q.dtype) for x in got[:2])
    g = rv.attention_backward(do, cache, grad_lse)
    wanted = reference.gradients(do, q, k, v, grad_lse=grad_lse, **spec)
    low = reference.naive32_gradients(do, q, k, v, grad_lse=grad_lse, **spec) if single else {}
    for name in ("query", "key", "value"):
        close(f"gradient of {name}", getattr(g, name), wanted[name], low.get(name), 2 * SECOND_PASS, 1.0)
    if "bias" in spec:
        shape = spec["bias"].shape
        low = reference.reduce_to(low["scores"], shape) if single else None
        close("gradient of bias", g.bias, reference.reduce_to(wanted["scores"], shape), low, 2 * SECOND_PASS, 1.0)


@many
@given(calls(np.float64))
def test_float64_equals_the_reference(call):
    agrees(*call)


@modest
@given(calls(np.float32))
def test_float32_is_near_the_reference(call):
    agrees(*call)


@modest
@given(calls(np.float64), st.data())
def test_weights_of_any_rows(call, data):
    q, k, v, call, spec, _ = call
    Lq = q.shape[-2]
    rows = data.draw(st.lists(st.integers(-Lq, Lq - 1), max_size=6) | st.slices(Lq) | st.integers(-Lq, Lq - 1))
    cache = rv.attention_forward(q, k, v, **call)
    chosen = np.atleast_1d(np.arange(Lq)[rows]).astype(int)
    np.testing.assert_allclose(cache.weights(rows), cache.weights()[..., chosen, :], rtol=1e-13, atol=1e-300)


# Keys in parts


@modest
@given(sizes(), st.integers(0, 2**32 - 1), st.integers(1, 5), st.booleans())
def test_merge_of_any_split_of_the_keys_equals_the_whole(size, seed, parts, by_mask):
    """Parts may be empty, and queries may see nothing of one or of all."""
    rng = np.random.default_rng(seed)
    q, k, v = inputs(size, rng)
    Lq, Lk = size[3:5]
    offset = rng.integers(-Lq, Lk)  # a band: queries before or after it see nothing
    band = masks.Window(20, 10) & (np.arange(Lk) - np.arange(Lq)[:, None] <= offset)
    owner = rng.integers(0, parts, Lk)
    whole = rv.attention_forward(q, k, v, band, enable_gqa=True)
    found = []
    for n in range(parts):
        if by_mask:
            found.append(rv.attention_forward(q, k, v, band & (owner == n), enable_gqa=True))
        else:
            mine = owner == n
            seen = band.to_dense(Lq, Lk)[:, mine]
            found.append(rv.attention_forward(q, k[..., mine, :], v[..., mine, :], seen, enable_gqa=True))
    output, lse = rv.merge([p.output for p in found], [p.lse for p in found])
    close("output", output, whole.output)
    close("lse", lse, whole.lse)
    first, rest = found[0], rv.merge([p.output for p in found[1:]] or [np.zeros_like(output)],
                                     [p.lse for p in found[1:]] or [np.full(lse.shape, -np.inf)])  # fmt: skip
    output, lse = rv.merge([first.output, rest[0]], [first.lse, rest[1]])
    close("output, merged twice", output, whole.output)
    close("lse", lse, whole.lse)


def test_merge_keeps_the_dtype_and_shapes():
    q, k, v = inputs(((2,), 2, 2, 9, 14, 4, 3), np.random.default_rng(0), np.float32)
    parts = [rv.attention_forward(q, k[..., at, :], v[..., at, :]) for at in (slice(0, 3), slice(3, 14))]
    output, lse = rv.merge([p.output for p in parts], [p.lse for p in parts])
    whole = rv.attention_forward(q, k, v)
    assert output.dtype == lse.dtype == np.float32
    np.testing.assert_allclose(output, whole.output, atol=1e-6)
    np.testing.assert_allclose(lse, whole.lse, atol=1e-6)
    one = rv.merge([whole.output], [whole.lse])
    np.testing.assert_array_equal(one[0], whole.output)
    np.testing.assert_array_equal(one[1], whole.lse)
    bad = whole.output.copy()
    bad[0, 0, 0] = np.nan  # of a part that saw nothing, so it does not count
    nothing = np.full(whole.lse.shape, -np.inf, np.float32)
    np.testing.assert_array_equal(rv.merge([bad, whole.output], [nothing, whole.lse])[0], whole.output)
    assert not rv.merge([bad], [nothing])[0].any()


# What changes nothing


@modest
@given(sizes(), st.integers(0, 2**32 - 1))
def test_the_order_of_keys(size, seed):
    rng = np.random.default_rng(seed)
    q, k, v = inputs(size, rng)
    at = rng.permutation(size[4])
    bias = np.where(rng.random((size[3], size[4])) < 0.2, -np.inf, rng.standard_normal((size[3], size[4])))
    do, grad_lse = rng.standard_normal((*q.shape[:-1], size[6])), rng.standard_normal(q.shape[:-1])
    one = rv.attention_forward(q, k, v, bias, enable_gqa=True)
    other = rv.attention_forward(q, k[..., at, :], v[..., at, :], bias[:, at], enable_gqa=True)
    close("output", other.output, one.output)
    close("lse", other.lse, one.lse)
    one, other = (rv.attention_backward(do, cache, grad_lse) for cache in (one, other))
    close("query", other.query, one.query, floor=1.0)
    for name in ("key", "value"):
        close(name, getattr(other, name), getattr(one, name)[..., at, :], floor=1.0)
    close("bias", other.bias, one.bias[:, at], floor=1.0)


@modest
@given(sizes(), st.integers(0, 2**32 - 1), st.floats(-50, 50))
def test_a_constant_added_to_the_scores_of_a_row(size, seed, constant):
    """Moves lse and nothing else; so the gradient of a row's scores sums to that of its lse."""
    rng = np.random.default_rng(seed)
    q, k, v = inputs(size, rng)
    bias = rng.standard_normal((*q.shape[:-1], size[4]))
    row = np.zeros((size[3], 1))
    row[rng.integers(0, size[3])] = constant
    one, other = (rv.attention_forward(q, k, v, b, enable_gqa=True) for b in (bias, bias + row))
    np.testing.assert_allclose(other.output, one.output, atol=1e-11)
    np.testing.assert_allclose(other.lse, one.lse + row[:, 0], atol=1e-11)
    do, grad_lse = rng.standard_normal(one.output.shape), rng.standard_normal(one.lse.shape)
    np.testing.assert_allclose(rv.attention_backward(do, one, grad_lse).bias.sum(-1), grad_lse, atol=1e-11)


@modest
@given(sizes(), st.integers(0, 2**32 - 1), st.floats(0.1, 10))
def test_scales(size, seed, factor):
    """Of the query and of `scale`; the output is linear in the values."""
    rng = np.random.default_rng(seed)
    q, k, v = inputs(size, rng)
    scale = size[5] ** -0.5
    wanted = rv.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    got = rv.scaled_dot_product_attention(q * factor, k, v, scale=scale / factor, enable_gqa=True)
    close("output", got, wanted, floor=1.0)
    more = rng.standard_normal(v.shape)
    both = rv.scaled_dot_product_attention(q, k, factor * v + more, enable_gqa=True)
    np.testing.assert_allclose(
        both, factor * wanted + rv.scaled_dot_product_attention(q, k, more, enable_gqa=True), atol=1e-11 * factor
    )


@modest
@given(sizes(), st.integers(0, 2**32 - 1))
def test_shared_heads_are_repeated_heads(size, seed):
    rng = np.random.default_rng(seed)
    q, k, v = inputs(size, rng)
    group = size[1] // size[2]
    cache = rv.attention_forward(q, k, v, is_causal=True, enable_gqa=True)
    copies = [np.repeat(x, group, axis=-3) for x in (k, v)]
    repeated = rv.attention_forward(q, *copies, is_causal=True)
    close("output", cache.output, repeated.output)
    do = rng.standard_normal(cache.output.shape)
    one, other = rv.attention_backward(do, cache), rv.attention_backward(do, repeated)
    close("query", one.query, other.query, floor=1.0)
    for name, x in (("key", k), ("value", v)):
        summed = getattr(other, name).reshape(*x.shape[:-2], group, *x.shape[-2:]).sum(-3)
        close(name, getattr(one, name), summed, floor=1.0)
