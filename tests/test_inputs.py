"""What may be passed: any strides, any number of leading axes, lists, sizes of 0, and an array for the result."""

import mmap
import tempfile

import numpy as np
import pytest
import reference
from cases import conforms, draw, make

import ruvector_numba as rv
from ruvector_numba import masks
from ruvector_numba.plan import dense as plan

FEW, MANY = (5, 30, 6, 7), (20, 30, 6, 7)
sizes = pytest.mark.parametrize("size", [FEW, MANY], ids=["few", "many"])


# Strides


def fortran(x):
    return np.asfortranarray(x)


def transposed(x):
    return np.ascontiguousarray(np.swapaxes(x, -1, -2)).swapaxes(-1, -2)


def heads_inside(x):
    """(B, L, H, D), seen as (B, H, L, D)"""
    return np.ascontiguousarray(np.swapaxes(x, -2, -3)).swapaxes(-2, -3)


def reversed_everywhere(x):
    return x[::-1, ::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1, ::-1]


def sliced(x):
    wide = np.full([2 * n + 1 for n in x.shape], np.nan, x.dtype)
    wide[1::2, 1::2, 1::2, 1::2] = x
    return wide[1::2, 1::2, 1::2, 1::2]


def rows_of_more(x):
    wide = np.full((*x.shape[:-1], x.shape[-1] + 3), np.nan, x.dtype)
    wide[..., 2:-1] = x
    return wide[..., 2:-1]


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def mapped(x):
    file = tempfile.TemporaryFile()
    file.write(x.tobytes())
    file.flush()
    memory = mmap.mmap(file.fileno(), x.nbytes, access=mmap.ACCESS_READ)
    return np.frombuffer(memory, x.dtype).reshape(x.shape)


def memmap(x):
    array = np.memmap(tempfile.TemporaryFile(), x.dtype, "w+", shape=x.shape)
    array[...] = x
    return array


def unaligned(x):
    crooked = np.frombuffer(b"." + x.tobytes(), x.dtype, offset=1).reshape(x.shape)
    assert not crooked.flags.aligned
    return crooked


class Subclass(np.ndarray):
    pass


LAYOUTS = [fortran, transposed, heads_inside, reversed_everywhere, sliced, rows_of_more, read_only, mapped, memmap,
           unaligned, lambda x: x.view(Subclass)]  # fmt: skip


@sizes
@pytest.mark.parametrize("arrange", LAYOUTS, ids=lambda f: f.__name__.strip("<>"))
@pytest.mark.parametrize("which", [0, 1, 2, 3, 4, None])
def test_any_strides(which, arrange, size):
    """Of each array alone, and of all; gradients are arrays of their own."""
    case = make(["causal"], size)
    names = ("query", "key", "value", "grad_output", "grad_lse")
    chosen = {names[which]} if which is not None else set(names)
    if which == 4:  # it has an axis less
        case = case._replace(grad_lse=arrange(case.grad_lse[..., None])[..., 0])
    else:
        case = case._replace(**{name: arrange(getattr(case, name)) for name in chosen - {"grad_lse"}})
    conforms(case)
    g = rv.attention_backward(case.grad_output, case.forward())
    for name in ("query", "key", "value"):
        x = getattr(g, name)
        assert x.flags.c_contiguous and x.flags.writeable and x.shape == getattr(case, name).shape


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_that_crowd_the_cache_give_the_same_bits(dtype, monkeypatch):
    """Keys and values whose rows are 1024 bytes apart are copied first; those that just touch a limit are not."""
    plain = [
        np.random.default_rng(n).standard_normal((2, 16, L, 16)).astype(dtype) for n, L in enumerate((530, 90, 90))
    ]
    for x in plain[1:]:
        x[1, :, 77:] = np.nan  # hidden; and queries from 150 on see nothing
    inside = [heads_inside(x) for x in plain]
    assert inside[1].strides[-2] % 1024 == 0
    kept = [x.copy() for x in inside]
    copies = []
    monkeypatch.setattr(plan.halves, "copied", lambda x, name, f=plan.halves.copied: copies.append(name) or f(x, name))
    mask = masks.Window(60, 20) & masks.Lengths(keys=[90, 77])

    def everything(q, k, v):
        cache = rv.attention_forward(q, k, v, mask)
        g = rv.attention_backward(plain[0], cache)
        return cache.output, cache.lse, cache.weights(rows=[3, 40]), g.query, g.key, g.value

    wanted = everything(*plain)
    assert not copies
    assert all(np.isfinite(x).all() for x in wanted if x is not wanted[1]) and not wanted[0][..., 150:, :].any()
    for n in (1, rv.get_num_threads()):
        copies.clear()
        with rv.threads(n):
            for x, y in zip(everything(*inside), wanted, strict=True):
                assert x.tobytes() == y.tobytes()
        assert copies == ["key", "value"] * 2  # forward and backward; two rows of weights are few
    assert [x.tobytes() for x in inside] == [x.tobytes() for x in kept]
    rv.attention_forward(inside[0][..., :250, :], *inside[1:])
    rv.attention_forward(plain[0], inside[1], plain[2])  # one of the two alone
    assert len(copies) == 5
    shared = np.broadcast_to(inside[1][:, :1], inside[1].shape)
    rv.attention_forward(plain[0], shared, plain[2])  # a copy would be sixteen times as large
    assert len(copies) == 5


@sizes
@pytest.mark.parametrize("arrange", LAYOUTS[:8], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["bool", "float"])
def test_any_strides_of_a_mask(name, arrange, size):
    case = make([name], size, bias_shape=(2, 4, *size[:2]) if name == "float" else None)
    (mask,) = case.call["attn_mask"].parts
    case.call["attn_mask"] = arrange(mask.astype(np.float64)) if name == "float" else arrange(mask.astype(np.uint8)) > 0
    if name == "bool" and arrange is not sliced:
        case.call["attn_mask"] = arrange(mask)
    conforms(case, weights=name == "bool")


@sizes
def test_broadcast_inputs(size):
    """One key and value for all heads and batches, without a copy; gradients are of each copy."""
    case = make([], size, Hk=4)
    k, v = (np.broadcast_to(x[:1, :1], x.shape) for x in (case.key, case.value))
    conforms(case._replace(key=k, value=v))
    same = np.broadcast_to(case.query[..., :1, :], case.query.shape)
    do = np.broadcast_to(case.grad_output[:, :1, :1], case.grad_output.shape)
    conforms(case._replace(query=same, grad_output=do))


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 1, 20, 30), (2, 4, 1, 30), (20, 1)])
def test_masks_that_numpy_has_broadcast(shape):
    case = make(["float"], MANY, bias_shape=shape)
    case.call["attn_mask"] = np.broadcast_to(case.bias, (2, 4, 20, 30))
    cache = case.forward()
    g = rv.attention_backward(case.grad_output, cache)
    wanted = reference.gradients(case.grad_output, *case.inputs, **case.spec)["scores"]
    np.testing.assert_allclose(g.bias, wanted, atol=1e-12)


@sizes
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (1, 2, 2, 3)], ids=str)
def test_any_number_of_leading_axes(lead, size):
    q, k, v = draw(*size, lead=lead)
    do = np.random.default_rng(0).standard_normal((*lead, size[0], size[3]))
    cache = rv.attention_forward(q, k, v, is_causal=True)
    visible = np.tri(*size[:2], dtype=bool)
    wanted = reference.attention(q, k, v, visible=visible)
    for got, w in zip((cache.output, cache.lse, cache.weights()), wanted, strict=True):
        np.testing.assert_allclose(got, w, atol=1e-12)
    g, wanted = rv.attention_backward(do, cache), reference.gradients(do, q, k, v, visible=visible)
    for name in ("query", "key", "value"):
        np.testing.assert_allclose(getattr(g, name), wanted[name], atol=1e-12)


@sizes
def test_masks_of_inputs_with_two_and_with_five_axes(size):
    for lead in ((), (2, 2, 3)):
        q, k, v = draw(*size, lead=lead)
        rng = np.random.default_rng(0)
        bias = rng.standard_normal((*lead, *size[:2]))
        visible = rng.random(size[:2]) < 0.6
        mask = masks.Lengths(keys=np.array([[9, 30], [30, 2]]) if lead else 9)
        seen = visible & mask.to_dense(*size[:2])
        slopes, dropout_p = [0.1] * (lead or (1,))[-1], 1e-12 if size is MANY else 0.0
        terms = {"softcap": 1.0, "alibi_slopes": slopes, "dropout_p": dropout_p}
        cache = rv.attention_forward(q, k, v, mask & visible & bias, **terms)
        terms = {"visible": seen, "bias": bias, "softcap": 1.0, "slopes": slopes if lead else 0.1}
        np.testing.assert_allclose(cache.output, reference.attention(q, k, v, **terms)[0], atol=1e-11)


# Other ways to say it


def test_lists():
    q, k, v = (x[0, 0] for x in draw(4, 5, 3, 2))
    wanted = rv.scaled_dot_product_attention(q, k, v)
    np.testing.assert_array_equal(rv.scaled_dot_product_attention(q.tolist(), k.tolist(), v.tolist()), wanted)
    whole = rv.scaled_dot_product_attention([[1, 2]], [[0, 1], [1, 0]], [[1], [3]])
    assert whole.dtype == np.float64
    np.testing.assert_allclose(whole, reference.attention([[1, 2]], [[0, 1], [1, 0]], [[1], [3]])[0])
    g = rv.attention_backward([[1.0]], rv.attention_forward([[1.0]], [[2.0]], [[3.0]]), [0.5])
    np.testing.assert_allclose(g.query, [[1.0]])
    rv.scaled_dot_product_attention(q, k, v, [[True, False, True, True, True]])


def test_things_that_become_arrays():
    q, k, v = (x[0, 0] for x in draw(4, 5, 3, 2))

    class Like:
        def __array__(self, dtype=None, copy=None):
            return q

    np.testing.assert_array_equal(
        rv.scaled_dot_product_attention(Like(), k, v), rv.scaled_dot_product_attention(q, k, v)
    )


def test_the_signature_of_torch():
    """query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, by position; the rest by name."""
    q, k, v = draw(20, 30, 6, 7, Hk=2)
    for function in (rv.scaled_dot_product_attention, lambda *a: rv.attention_forward(*a).output):
        got = function(q, k, v, None, 0.0, True, 0.3, True)
        wanted = reference.attention(q, k, v, visible=np.tri(20, 30, dtype=bool), scale=0.3)[0]
        np.testing.assert_allclose(got, wanted, atol=1e-12)
    with pytest.raises(TypeError):
        rv.scaled_dot_product_attention(q, k, v, None, 0.0, True, 0.3, True, 1.0)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.array(0.5), 0.5])
def test_numbers_of_any_kind(number):
    q, k, v = draw(20, 30, 6, 7)
    np.testing.assert_array_equal(
        rv.scaled_dot_product_attention(q, k, v, scale=number), rv.scaled_dot_product_attention(q, k, v, scale=0.5)
    )
    assert rv.scaled_dot_product_attention(q, k, v, dropout_p=np.int64(0)).shape == (2, 4, 20, 7)
    rv.scaled_dot_product_attention(q, k, v, dropout_p=number, seed=np.int64(3))


# Sizes of 0

ZEROS = [
    (2, 2, 0, 5, 4, 3), (2, 2, 5, 0, 4, 3), (2, 2, 12, 0, 4, 3), (2, 2, 0, 0, 4, 3), (2, 2, 5, 6, 0, 3),
    (2, 2, 12, 6, 0, 3), (2, 2, 5, 6, 4, 0), (2, 2, 12, 6, 4, 0), (2, 2, 12, 6, 0, 0), (0, 2, 5, 6, 4, 3),
    (2, 0, 5, 6, 4, 3), (2, 2, 0, 0, 0, 0),
]  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("B", "H", "Lq", "Lk", "D", "Dv"), ZEROS)
def test_sizes_of_0(B, H, Lq, Lk, D, Dv, masked):
    """Whatever can be 0: B, H, Lq, Lk, D (scores of 0), Dv; forward, weights and backward."""
    rng = np.random.default_rng(0)
    q, k, v, do = (rng.standard_normal((B, H, *s)) for s in ((Lq, D), (Lk, D), (Lk, Dv), (Lq, Dv)))
    grad_lse = rng.standard_normal((B, H, Lq))
    call, spec = {}, {"scale": 1.0}
    if masked:
        visible, bias = rng.random((Lq, Lk)) < 0.7, rng.standard_normal((H, Lq, Lk))
        call = {"attn_mask": masks.Full() & visible & bias, "softcap": 2.0, "alibi_slopes": np.full(H, 0.1)}
        call["dropout_p"] = 1e-12 if Lq > 8 else 0.0
        spec |= {"visible": visible, "bias": bias, "softcap": 2.0, "slopes": np.full(H, 0.1)}
    if D:
        spec["scale"] = D**-0.5
    cache = rv.attention_forward(q, k, v, **call)
    output, lse, weights = reference.attention(q, k, v, **spec)
    for got, wanted in (
        (cache.output, output),
        (cache.lse, lse),
        (cache.weights(), weights),
        (cache.weights([]), weights[..., :0, :]),
    ):
        assert got.shape == wanted.shape and got.dtype == np.float64
        np.testing.assert_allclose(got, wanted, atol=1e-11)
    g = rv.attention_backward(do, cache, grad_lse)
    wanted = reference.gradients(do, q, k, v, grad_lse=grad_lse, **spec)
    for name, x in (("query", q), ("key", k), ("value", v)):
        got = getattr(g, name)
        assert got.shape == x.shape and got.dtype == np.float64
        np.testing.assert_allclose(got, wanted[name], atol=1e-11, err_msg=name)
    if masked:
        assert g.bias.shape == (H, Lq, Lk)
        np.testing.assert_allclose(g.bias, wanted["scores"].sum(0), atol=1e-11)
    else:
        assert g.bias is None


@pytest.mark.parametrize(("B", "H", "Lq", "Lk", "D", "Dv"), ZEROS)
def test_sizes_of_0_into_an_array(B, H, Lq, Lk, D, Dv):
    q, k, v = (np.ones((B, H, *s)) for s in ((Lq, D), (Lk, D), (Lk, Dv)))
    out = np.full((B, H, Lq, Dv), np.nan)
    assert rv.scaled_dot_product_attention(q, k, v, out=out) is out
    assert (out == (1 if Lk else 0)).all()


# out


@sizes
@pytest.mark.parametrize(
    "arrange", [None, fortran, transposed, heads_inside, reversed_everywhere, sliced, rows_of_more]
)
def test_out(arrange, size):
    q, k, v = draw(*size)
    wanted = rv.scaled_dot_product_attention(q, k, v, is_causal=True)
    out = np.full(wanted.shape, np.nan)
    out = out if arrange is None else arrange(out)
    assert rv.scaled_dot_product_attention(q, k, v, is_causal=True, out=out) is out
    np.testing.assert_array_equal(out, wanted)
    cache = rv.attention_forward(q, k, v, is_causal=True, out=out)
    assert cache.output is out
    do = np.random.default_rng(0).standard_normal(out.shape)
    got = rv.attention_backward(do, cache)
    exact = reference.gradients(do, q, k, v, visible=np.tri(*size[:2], dtype=bool))
    np.testing.assert_allclose(got.query, exact["query"], atol=1e-12)


@sizes
def test_out_writes_its_own_elements_only(size):
    q, k, v = draw(*size)
    wide = np.full((2, 4, 2 * size[0], 20), -7.0)
    rv.scaled_dot_product_attention(q, k, v, out=wide[..., 1::2, 5:12])
    wide[..., 1::2, 5:12] = -7
    assert (wide == -7).all()


@sizes
def test_out_between_the_elements_of_an_input_is_no_overlap(size):
    """Interleaved memory is shared by bounds only: it must not be refused, nor harm anybody."""
    Lq, Lk, D, _ = size
    memory = np.random.default_rng(0).standard_normal((2, 4, Lq, 2 * D))
    q, out = memory[..., ::2], memory[..., 1::2]
    k, v = np.random.default_rng(1).standard_normal((2, 2, 4, Lk, D))
    before = q.copy()
    wanted = rv.scaled_dot_product_attention(before, k, v)
    rv.scaled_dot_product_attention(q, k, v, out=out)
    np.testing.assert_allclose(out, wanted, atol=1e-14)
    np.testing.assert_array_equal(q, before)
    both = np.concatenate([before, before], axis=-2)  # one half above the other
    rv.scaled_dot_product_attention(both[..., :Lq, :], k, v, out=both[..., Lq:, :])
    np.testing.assert_allclose(both[..., Lq:, :], wanted, atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_gradients_are_computed_from_cannot_be_written_to(dtype):
    q = np.ones((3, 4), dtype)
    output = rv.attention_forward(q, q, q).output
    with pytest.raises(ValueError, match="read-only"):
        output += 1
    config = rv.AttentionConfig(4, 1, dropout=0.0)
    output, cache = rv.ScaledDotProductAttention(config).forward_cached(q[None])
    assert not output.flags.writeable and cache.output is output
    output, cache = rv.MultiHeadAttention(config).forward_cached(q[None])
    assert output.flags.writeable and not cache.output.flags.writeable


def test_the_output_of_a_cache_keeps_its_memory():
    x = np.ones((1, 4096, 256), np.float32)  # 4 MB: memory that is taken again
    first = rv.attention_forward(x, x, x).output
    second = rv.attention_forward(x, x, 2 * x).output
    assert (first == 1).all() and (second == 2).all() and not np.shares_memory(first, second)
