"""Dense attention on a GPU, on Numba's simulator, against the float64 reference: what the functions say of it.

Races, asynchrony and speed do not show here; perf/cuda.py is for them.
"""

import cuda_simulation as simulation  # first: it skips all of this where the simulator is off
import numpy as np
import pytest
import reference
from cases import keep_matrix
from numba import cuda

import ruvector_numba as rv
from ruvector_numba.errors import DimensionMismatchError, InvalidInputError, InvalidMaskError
from ruvector_numba.gpu import dense as gpu_dense

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NaN and wrapping integers are data here
TOLERANCE = {"float32": 3e-6, "float16": 3e-3, "bfloat16": 2e-2}


def draw(rng, element, *shape):
    return simulation.values(rng.standard_normal(shape), element)


def compare(
    element="float32", B=1, H=2, Hk=1, L=19, S=37, D=16, Dv=16, mask=None, visible=None, bias=None, poison=False,
    apart=False, lse=False, dropout=0.0, slopes=None, offset=0, **options,
):  # fmt: skip
    """Forward, logsumexp, some weights and all gradients of one call, beside the reference on the rounded inputs."""
    rng = np.random.default_rng(3)
    q, do = draw(rng, element, B, H, L, D), draw(rng, element, B, H, L, Dv)
    k, v = draw(rng, element, B, Hk, S, D), draw(rng, element, B, Hk, S, Dv)
    if apart:  # no channel in common: scores are the bias alone
        q[..., D // 2 :], k[..., : D // 2] = 0, 0
    if poison:  # the last key and value are seen by nobody or by some, the first query and gradient see the first key
        k[..., -1, 2], v[..., -1, 3], v[..., 5, 1] = np.nan, np.nan, np.inf
    grad_lse = rng.standard_normal((B, H, L)).astype(np.float32) if lse else None
    given = mask if mask is None or isinstance(mask, rv.masks.Mask) else cuda.to_device(mask)
    past = rv.attention_forward(
        *map(cuda.to_device, (q, k, v)), given, enable_gqa=H != Hk, dropout_p=dropout, seed=5, alibi_slopes=slopes,
        **options,
    )  # fmt: skip
    made = rv.attention_backward(cuda.to_device(do), past, None if grad_lse is None else cuda.to_device(grad_lse))
    seen = np.ones((L, S), bool) if visible is None else visible
    if options.get("is_causal"):
        seen = seen & (np.arange(S) <= np.arange(L)[:, None])
    terms = dict(
        visible=seen, bias=bias, softcap=options.get("softcap"), slopes=slopes, offset=offset,
        scale=options.get("scale"), keep=keep_matrix((B, H), L, S, dropout, 5) if dropout else None,
    )  # fmt: skip
    wide = [np.asarray(x, np.float64) for x in (do, q, k, v)]
    with np.errstate(all="ignore"):
        output, log_sum, weights = reference.attention(*wide[1:], **terms)
        expected = reference.gradients(*wide, grad_lse=grad_lse, **terms)
    tolerance = TOLERANCE[element]
    assert_close(past.output, output, tolerance)
    assert_close(past.lse, log_sum, tolerance)
    assert_close(past.weights(rows=slice(2, 5)), weights[..., 2:5, :], tolerance)
    for name in ("query", "key", "value"):
        assert_close(getattr(made, name), expected[name], 2 * tolerance)
    assert (made.bias is None) == (bias is None)
    if bias is not None:
        assert_close(made.bias, reference.reduce_to(expected["scores"], bias.shape), 2 * tolerance)


def assert_close(got, wanted, tolerance):
    got = np.asarray(got.copy_to_host(), np.float64)
    assert got.shape == wanted.shape
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(wanted))
    finite = np.isfinite(wanted)
    size = np.abs(wanted[finite]).max(initial=0.3)
    np.testing.assert_allclose(got[finite], wanted[finite], atol=tolerance * size, rtol=0)


# --- numbers -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("element", TOLERANCE)
def test_plain_and_causal(element):
    compare(element)
    compare(element, is_causal=True, B=2, Hk=2)


@pytest.mark.parametrize(
    "L, S, D", [(9, 12, 16), (1, 80, 16), (5, 9, 7)]
)  # one block; keys in parts; rows to be copied
def test_a_call_that_is_ready_takes_the_arrays_it_is_given(L, S, D):
    gpu_dense._ready.clear()
    for seed in range(2):
        rng = np.random.default_rng(seed)
        arrays = draw(rng, "float32", 1, 2, L, D), draw(rng, "float32", 1, 2, S, D), draw(rng, "float32", 1, 2, S, D)
        got = rv.scaled_dot_product_attention(*map(cuda.to_device, arrays))
        assert_close(got, reference.attention(*(x.astype(np.float64) for x in arrays))[0], TOLERANCE["float32"])
    assert len(gpu_dense._ready) == 1
    with pytest.raises(InvalidInputError, match="dropout_p"):
        rv.scaled_dot_product_attention(*map(cuda.to_device, arrays), dropout_p=np.array([0.0, 0.5]))


@pytest.mark.parametrize("element", TOLERANCE)
def test_what_is_hidden_does_not_leak(element):
    compare(element, is_causal=True, poison=True)
    scattered = np.random.default_rng(0).random((1, 2, 19, 37)) > 0.3
    compare(element, mask=scattered, visible=scattered, poison=True)


@pytest.mark.parametrize("D, Dv", [(1, 1), (7, 30), (33, 16), (70, 64), (100, 130), (200, 256)])
@pytest.mark.parametrize("element", ["float32", "bfloat16"])
def test_any_number_of_channels(element, D, Dv):
    compare(element, L=9, S=10, D=D, Dv=Dv, H=1)


@pytest.mark.parametrize("L, S", [(1, 1), (16, 16), (17, 33), (40, 7)])
def test_any_number_of_queries_and_keys(L, S):
    compare(L=max(L, 5), S=S)
    compare("bfloat16", L=max(L, 5), S=S, is_causal=True)


def test_softcap_alibi_bias_and_lse():
    rng = np.random.default_rng(1)
    bias = rng.standard_normal((2, 19, 37)).astype(np.float32)
    bias[:, 3:6, 4:9] = -np.inf
    compare(softcap=1.5, slopes=[0.5, 0.1], mask=bias, bias=bias, lse=True, is_causal=True)
    compare("float16", softcap=2.0, scale=-0.3)


@pytest.mark.parametrize("shape", [(37,), (19, 1), (2, 1, 1, 37), (2, 2, 19, 37)])
def test_gradient_of_a_broadcast_bias(shape):
    bias = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    compare(B=2, mask=bias, bias=bias)


@pytest.mark.parametrize("element", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options", [dict(lse=True), dict(L=3, S=80, softcap=2.0), dict(D=200, L=6, S=21, H=1), dict(L=6, dropout=0.4)]
)
def test_a_bias_that_is_large_for_all_keys(element, options):
    """Float32 has no fractions at -1e9, and few at -1e4: added to such scores, the logarithm of a sum is lost."""
    L, S = options.get("L", 19), options.get("S", 37)
    rows = np.random.default_rng(9).standard_normal((L, S))
    rows[0], rows[1], rows[2], rows[2, ::3] = -1e9, -1e4, -1e9, -1e4
    rows[3:5] = -1e9
    rows[4:5, ::2] = -np.inf
    bias = simulation.values(rows, element)
    compare(element, mask=bias, bias=bias, apart=True, **options)


def test_gradients_of_weights_leave_the_range_of_float16_only_if_the_result_does():
    """dp is some 2e5 and a weight 1/64: their product has room, not dp itself."""
    rng = np.random.default_rng(10)
    q, do = (draw(rng, "float16", 1, 9, 16) * np.float16(x) for x in (0.1, 2400))
    k, v = (draw(rng, "float16", 1, 64, 16) * np.float16(x) for x in (1, 10))
    made = rv.attention_backward(cuda.to_device(do), rv.attention_forward(*map(cuda.to_device, (q, k, v))))
    expected = reference.gradients(*(x.astype(np.float64) for x in (do, q, k, v)))
    for name in ("query", "key", "value"):
        assert_close(getattr(made, name), expected[name], 2 * TOLERANCE["float16"])


def test_dropout_is_that_of_the_cpu():
    compare(dropout=0.4, is_causal=True)
    compare("bfloat16", dropout=0.4, Hk=2)


def test_masks_as_intervals():
    i, j = np.arange(19)[:, None], np.arange(37)
    window = (j >= i - 4) & (j <= i + 2)
    compare(mask=rv.masks.Window(4, 2), visible=window)
    lengths = (j < np.array([5, 37])[:, None, None, None]) & window
    compare(B=2, mask=rv.masks.Lengths(keys=[5, 37]) & rv.masks.Window(4, 2), visible=lengths)
    nobody = np.zeros((19, 37), bool)
    compare(mask=rv.masks.Lengths(keys=0), visible=nobody)


@pytest.mark.parametrize("element", ["float32", "bfloat16"])
def test_few_queries_go_past_parts_of_the_keys(element):
    compare(element, L=3, S=150, H=4, Hk=2)
    i, j = np.arange(3)[:, None], np.arange(150)
    compare(element, L=3, S=150, mask=rv.masks.Causal("bottom_right"), visible=j <= i + 147, poison=True)
    compare(element, L=3, S=150, is_causal=True, poison=True)  # whole parts of the keys are hidden, and what is in them
    nobody = np.zeros((3, 150), bool)
    compare(element, L=3, S=150, mask=rv.masks.Lengths(keys=0), visible=nobody, poison=True)


@pytest.mark.parametrize("L, S", [(0, 5), (5, 0), (0, 0)])
def test_nothing(L, S):
    q, k = (cuda.to_device(np.zeros((2, n, 16), np.float32)) for n in (L, S))
    past = rv.attention_forward(q, k, k)
    made = rv.attention_backward(past.output, past)
    assert past.output.shape == made.query.shape == (2, L, 16) and made.key.shape == (2, S, 16)
    for x in (past.output, made.query, made.key, made.value):
        assert not x.copy_to_host().any()
    assert np.isneginf(past.lse.copy_to_host()).all()


def test_the_same_bits_every_time_and_in_any_batch():
    rng = np.random.default_rng(4)
    q, k, v, do = (draw(rng, "bfloat16", 2, 1, 20, 16) for _ in range(4))

    def run(*arrays):
        past = rv.attention_forward(*map(cuda.to_device, arrays[:3]), is_causal=True)
        made = rv.attention_backward(cuda.to_device(arrays[3]), past)
        return [x.copy_to_host() for x in (past.output, made.query, made.key, made.value)]

    whole, again, second = run(q, k, v, do), run(q, k, v, do), run(q[1:], k[1:], v[1:], do[1:])
    for a, b, c in zip(whole, again, second):
        np.testing.assert_array_equal(a.view(np.uint16), b.view(np.uint16))
        np.testing.assert_array_equal(a[1:].view(np.uint16), c.view(np.uint16))


# --- arrays ------------------------------------------------------------------------------------------------------
def test_any_strides_are_read_where_they_lie():
    rng = np.random.default_rng(5)
    wide = rng.standard_normal((2, 19, 3, 40)).astype(np.float32)
    there = cuda.to_device(wide)
    for first in (4, 5):  # rows that begin on 16 bytes, and rows that are copied first
        got = rv.scaled_dot_product_attention(*(there[:, :, n, first : first + 16] for n in range(3)))
        q, k, v = (wide[:, :, n, first : first + 16] for n in range(3))
        np.testing.assert_allclose(got.copy_to_host(), reference.attention(q, k, v)[0], atol=1e-5)


def test_numpy_arrays_are_moved_only_when_asked():
    rng = np.random.default_rng(6)
    q, k, v, do = (rng.standard_normal((2, 19, 16)).astype(np.float32) for _ in range(4))
    got = rv.scaled_dot_product_attention(q, k, v, device="cuda")
    assert type(got) is np.ndarray
    np.testing.assert_allclose(got, reference.attention(q, k, v)[0], atol=1e-5)
    past = rv.attention_forward(q, k, v, np.ones((19, 19), bool), device="cuda")
    made = rv.attention_backward(do, past)
    assert type(past.output) is type(past.lse) is type(made.key) is type(past.weights()) is np.ndarray
    np.testing.assert_allclose(made.key, reference.gradients(do, q, k, v)["key"], atol=1e-5)
    with pytest.raises(InvalidInputError, match="query is on the CPU"):
        rv.scaled_dot_product_attention(q, cuda.to_device(k), v)


def test_out_is_written_where_it_is():
    x = np.random.default_rng(7).standard_normal((2, 19, 16)).astype(np.float32)
    there, out = cuda.to_device(x), cuda.to_device(np.full_like(x, 7))
    assert rv.scaled_dot_product_attention(there, there, there, out=out) is out
    np.testing.assert_allclose(out.copy_to_host(), reference.attention(x, x, x)[0], atol=1e-5)
    with pytest.raises(DimensionMismatchError, match=r"out\.shape"):
        rv.scaled_dot_product_attention(there, there, there, out=out[:1])


def test_sixteen_bits_as_whole_numbers():
    x = draw(np.random.default_rng(8), "bfloat16", 2, 19, 16)
    there = cuda.to_device(x.view(np.uint16))
    got = gpu_dense.call(there, there, there, dtype="bfloat16")
    assert got.query.element == "bfloat16"


def test_bad_inputs_are_named():
    f4 = cuda.to_device(np.zeros((2, 5, 8), np.float32))
    f8 = cuda.to_device(np.zeros((2, 5, 8)))
    f2 = cuda.to_device(np.zeros((2, 5, 8), np.float16))
    wide = cuda.to_device(np.zeros((2, 5, 300), np.float32))
    with pytest.raises(InvalidInputError, match="query has dtype float64 on the GPU"):
        rv.scaled_dot_product_attention(f8, f8, f8)
    with pytest.raises(InvalidInputError, match="differ in dtype"):
        rv.scaled_dot_product_attention(f4, f2, f4)
    with pytest.raises(DimensionMismatchError, match=r"key\.shape"):
        rv.scaled_dot_product_attention(f4, wide, wide)
    with pytest.raises(InvalidInputError, match="at most 256"):
        rv.scaled_dot_product_attention(wide, wide, wide)
    with pytest.raises(InvalidInputError, match="attn_mask is on the CPU"):
        rv.scaled_dot_product_attention(f4, f4, f4, np.ones((5, 5), bool))
    with pytest.raises(InvalidMaskError, match="dtype of query"):
        rv.scaled_dot_product_attention(f4, f4, f4, f2)
    with pytest.raises(InvalidMaskError, match="lies on the CPU"):
        rv.scaled_dot_product_attention(f4, f4, f4, rv.masks.Causal() & np.ones((5, 5), bool))
    with pytest.raises(InvalidInputError, match="device is 'tpu'"):
        rv.scaled_dot_product_attention(f4, f4, f4, device="tpu")
    past = rv.attention_forward(f4, f4, f4)
    with pytest.raises(DimensionMismatchError, match=r"grad_output\.shape"):
        rv.attention_backward(wide, past)
    with pytest.raises(InvalidInputError, match="grad_output has dtype float16"):
        rv.attention_backward(f2, past)
    bits, here = cuda.to_device(np.zeros((2, 5, 8), np.uint16)), np.zeros((2, 5, 8), np.float32)
    with pytest.raises(InvalidInputError, match="grad_output has dtype uint16"):
        rv.attention_backward(bits, past)
    with pytest.raises(InvalidInputError, match="dtype is 'float16'"):
        rv.scaled_dot_product_attention(bits, bits, bits, dtype="float16")
    with pytest.raises(InvalidInputError, match="query has dtype float32, and dtype is 'bfloat16'"):
        rv.scaled_dot_product_attention(here, here, here, dtype="bfloat16", device="cuda")
    with pytest.raises(InvalidMaskError, match="give bools"):
        rv.scaled_dot_product_attention(f4, f4, f4, cuda.to_device(np.ones((5, 5), np.uint8)))
    with pytest.raises(InvalidInputError, match="key is None"):
        rv.scaled_dot_product_attention(here, None, here, device="cuda")


@pytest.mark.parametrize(
    "options", [dict(B=7, H=1, Hk=1), dict(B=5, L=5, S=70, is_causal=True)], ids=["plain", "packed"]
)
def test_more_heads_than_a_grid_is_high(options, monkeypatch):
    """With a grid that ends at 3 instead of 65,535: heads go on along z, and some are worked on twice."""
    from ruvector_numba.plan import cuda_dense as plan

    gpu_dense._ready.clear()
    monkeypatch.setattr(plan, "MOST_ALONG_Y", 3)
    compare(**dict(H=2, Hk=1, L=9, S=10) | options)
    gpu_dense._ready.clear()


def test_a_variant_has_no_more_scores_than_there_are_bits_for_hidden_ones(monkeypatch):
    from ruvector_numba.plan import cuda_dense as plan

    terms = plan.HasTerms(False, False, False, False, False)
    assert all(plan.variant("forward", "bfloat16", width, terms).scores <= 64 for width in plan.WIDTHS)
    monkeypatch.setitem(plan._HALVES["forward"], 48, (128, 2, 2, 2))
    with pytest.raises(AssertionError):
        plan.variant("forward", "bfloat16", 48, terms)
