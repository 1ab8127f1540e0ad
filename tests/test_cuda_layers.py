"""Layers of dense attention on arrays of a GPU, on Numba's simulator: what they do on the CPU, they do there."""

import cuda_simulation as sim
import numpy as np
import pytest
from numba import cuda

import ruvector_numba as rv
from ruvector_numba.errors import DimensionMismatchError, InvalidInputError, InvalidMaskError

B, LQ, LK, D, H = 2, 7, 11, 24, 3
FIELDS = [f"{w}_{k}" for w in ("query", "key", "value", "output") for k in ("weights", "bias")] + [
    "query",
    "key",
    "value",
]


def inputs(kind=np.float32, widths=(D, D, D)):
    rng = np.random.default_rng(1)
    shapes = ((B, LQ, widths[0]), (B, LK, widths[1]), (B, LK, widths[2]), (B, LQ, D))
    return [sim.values(rng.standard_normal(shape), kind) for shape in shapes]


def host(x):
    return np.asarray(x.copy_to_host(), np.float64)


def compare(layer, arrays, tolerance=2e-5, fields=FIELDS, mask=None, gpu_mask=None, **options):
    """Output, weights and all gradients, beside the CPU's in float64."""
    *given, grad = arrays
    options.setdefault("seed", 4)  # of the dropout, which is the CPU's
    wide = [np.asarray(x, np.float64) for x in arrays]
    output, cache = layer.forward_cached(*wide[:3], mask, **options)
    wanted = layer.backward(wide[3], cache)
    there = [cuda.to_device(x) for x in given]
    made, past = layer.forward_cached(*there, mask if gpu_mask is None else gpu_mask, **options)
    got = layer.backward(cuda.to_device(grad), past)
    np.testing.assert_allclose(host(made), output, atol=tolerance * 3)
    np.testing.assert_allclose(host(past.lse), cache.lse, atol=tolerance * 3)
    for rows in (None, [1, 4]):
        np.testing.assert_allclose(host(past.weights(rows)), cache.weights(rows), atol=tolerance)
    for name in fields:
        x, y = getattr(got, name), getattr(wanted, name)
        if y is None:
            assert x is None
            continue
        assert x.dtype == grad.dtype
        np.testing.assert_allclose(host(x), y, atol=tolerance * max(1, np.abs(y).max()), err_msg=name)
    return got


@pytest.mark.parametrize("kind, tolerance", [("float32", 2e-5), ("bfloat16", 3e-2)])
def test_multi_head(kind, tolerance):
    config = rv.AttentionConfig(D, H, dropout=0.3, causal=True)
    compare(rv.MultiHeadAttention(config, seed=0), inputs(kind), tolerance)


def test_multi_head_of_other_widths_without_biases():
    config = rv.AttentionConfig(D, H, use_bias=False)
    layer = rv.MultiHeadAttention(config, seed=0, kdim=10, vdim=9)
    compare(layer, inputs(widths=(D, 10, 9)))


def test_masks_hide():
    rng, layer = np.random.default_rng(2), rv.MultiHeadAttention(rv.AttentionConfig(D, H), seed=0)
    arrays = inputs()
    there = [cuda.to_device(x) for x in arrays[:3]]
    lengths = np.arange(LK) >= np.array([3, 11])[:, None]
    scattered = rng.random((B, LK)) > 0.7
    for shape, kind in (((LQ, LK), bool), ((B, 1, LK), np.uint8), ((B, H, LQ, LK), bool)):
        mask = (rng.random(shape) > 0.6).astype(kind)
        np.testing.assert_allclose(host(layer(*there, cuda.to_device(mask))), layer(*arrays[:3], mask), atol=1e-5)
    for mask, padding in ((rv.masks.Window(2, 2), None), (rv.masks.Window(9, 2), lengths), (None, scattered)):
        wanted = layer(*arrays[:3], mask, key_padding_mask=padding)
        padding = padding if mask is not None or padding is None else cuda.to_device(padding)
        np.testing.assert_allclose(host(layer(*there, mask, key_padding_mask=padding)), wanted, atol=1e-5)
        kept = layer.forward_cached(*there, mask, key_padding_mask=padding)[1].mask
        np.testing.assert_allclose(host(layer(*there, kept)), wanted, atol=1e-5)
    mask = rng.random((B, 1, LK)) > 0.6
    compare(layer, arrays, mask=mask, gpu_mask=cuda.to_device(mask), fields=["query", "key_weights"])


def test_a_head_of_its_own():
    layer = rv.ScaledDotProductAttention(rv.AttentionConfig(D, 1, causal=True))
    mask = np.random.default_rng(2).random((B, LQ, LK)) > 0.7
    compare(layer, inputs(), mask=mask, gpu_mask=cuda.to_device(mask), fields=["query", "key", "value"])
    output, weights = layer.forward(*(cuda.to_device(x) for x in inputs()[:3]))
    assert output.shape == (B, LQ, D) and weights.shape == (B, LQ, LK)


def test_what_nobody_sees_does_not_leak():
    arrays = inputs()
    arrays[1][:, -1, 2] = arrays[2][:, -2, 1] = np.nan
    mask = np.zeros((LQ, LK), bool)
    mask[:, -2:] = True
    layer = rv.MultiHeadAttention(rv.AttentionConfig(D, H), seed=0)
    output, past = layer.forward_cached(*map(cuda.to_device, arrays[:3]), cuda.to_device(mask))
    got = layer.backward(cuda.to_device(arrays[3]), past)
    assert np.isfinite(host(output)).all()
    assert all(np.isfinite(host(getattr(got, name))).all() for name in FIELDS)


def test_a_step_of_training_is_seen_by_the_next_pass():
    arrays = inputs()
    there = [cuda.to_device(x) for x in arrays[:3]]
    layer = rv.MultiHeadAttention(rv.AttentionConfig(D, H, dropout=0.0), seed=0)
    before, past = layer.forward_cached(*there)
    gradients = layer.backward(before, past)
    layer.update_parameters(gradients, learning_rate=0.002)
    after = layer(*there)
    assert (host(after) ** 2).sum() < (host(before) ** 2).sum()
    np.testing.assert_allclose(host(after), layer(*arrays[:3]), atol=1e-4)


@pytest.mark.parametrize("kind", [rv.MultiHeadAttention, rv.ScaledDotProductAttention])
def test_arrays_of_numpy_are_moved_only_when_asked(kind):
    *arrays, grad = inputs()
    layer = kind(rv.AttentionConfig(D, H if kind is rv.MultiHeadAttention else 1, dropout=0.0), seed=0)
    mask = np.random.default_rng(2).random((B, LQ, LK))  # numbers above 0.5 hide
    output, past = layer.forward_cached(*arrays, mask, device="cuda")
    got, (wanted, cache) = layer.backward(grad, past), layer.forward_cached(*arrays, mask)
    made = layer.backward(grad, cache)
    for a, b in ((output, wanted), (past.lse, cache.lse), (past.weights(), cache.weights()), (got.key, made.key)):
        assert type(a) is type(b) is np.ndarray
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert got.parameters.keys() == made.parameters.keys()


@pytest.mark.parametrize("of_numpy", [0, 1])
def test_results_are_where_the_first_array_was(of_numpy):
    arrays = [x if n == of_numpy else cuda.to_device(x) for n, x in enumerate(inputs()[:3])]
    for call in (
        rv.MultiHeadAttention(rv.AttentionConfig(D, H), seed=0),
        rv.ScaledDotProductAttention(rv.AttentionConfig(D, 1)),
        rv.scaled_dot_product_attention,
    ):
        assert (type(call(*arrays, device="cuda")) is np.ndarray) == (of_numpy == 0)


def test_padding_is_downloaded_once(monkeypatch):
    from ruvector_numba import gpu

    kept, seen = type(gpu.default()).download, []
    monkeypatch.setattr(type(gpu.default()), "download", lambda library, x: seen.append(x) or kept(library, x))
    padding = cuda.to_device(np.arange(LK) >= np.array([3, 11])[:, None])
    layer = rv.MultiHeadAttention(rv.AttentionConfig(D, H), seed=0)
    layer.forward_cached(*map(cuda.to_device, inputs()[:3]), key_padding_mask=padding)
    assert len(seen) == 1 and seen[0] is padding


def test_bad_inputs_are_named():
    layer = rv.MultiHeadAttention(rv.AttentionConfig(D, H), seed=0)
    x, y = (cuda.to_device(np.zeros((B, LQ, n), np.float32)) for n in (D, D + 1))
    half = cuda.to_device(np.zeros((B, LQ, D), np.float16))
    with pytest.raises(DimensionMismatchError, match=r"value\.shape"):
        layer(x, x, y)
    with pytest.raises(InvalidInputError, match="differ in dtype"):
        layer(x, half, x)
    with pytest.raises(InvalidInputError, match="mask is on the CPU"):
        layer(x, x, x, np.zeros((LQ, LQ), bool))
    with pytest.raises(InvalidMaskError, match="Mask shape"):
        layer(x, x, x, cuda.to_device(np.zeros((LQ, 3), bool)))
    with pytest.raises(InvalidMaskError, match="mask has dtype float32 on the GPU"):
        layer(x, x, x, cuda.to_device(np.zeros((LQ, LQ), np.float32)))
    both = dict(key_padding_mask=np.zeros((B, LQ), bool))
    with pytest.raises(InvalidMaskError, match="both given"):
        layer(x, x, x, cuda.to_device(np.zeros((LQ, LQ), bool)), **both)
    here = np.zeros((B, LQ, D), np.float32)
    for value in (-1.0, np.nan):
        with pytest.raises(InvalidMaskError, match="mask has negative numbers or NaN"):
            layer(here, mask=np.full((LQ, LQ), value), device="cuda")
    with pytest.raises(InvalidInputError, match=r"mask is a numpy\.ma array"):
        layer(here, mask=np.ma.zeros((LQ, LQ)), device="cuda")
    output, past = layer.forward_cached(x, x, x)
    with pytest.raises(DimensionMismatchError, match=r"grad_output\.shape"):
        layer.backward(y, past)
