"""Multi-head attention as an object: parameters, training, decoding step by step, threads, memory, copies, files."""

import copy
import itertools
import pickle
import threading
import tracemalloc

import numpy as np
import pytest
from multi_head_cases import DTYPES, agrees, draw, layer

import ruvector_numba as rv


# --- parameters -------------------------------------------------------------------------------------------------------
def test_flat_order_and_shapes():
    attention = layer(4, 2, kdim=3, vdim=5)
    names = ["w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v", "b_o"]
    assert list(attention.parameters) == names
    assert attention.parameters.shapes["w_k"] == (3, 4) and attention.parameters.shapes["w_v"] == (5, 4)
    flat = np.concatenate([attention.parameters[name].ravel() for name in names])
    np.testing.assert_array_equal(attention.get_parameters(), flat)
    assert attention.parameter_count() == flat.size == (4 + 3 + 5 + 4) * 4 + 4 * 4


def test_parameters_begin_glorot_uniform_and_seeded():
    config = rv.AttentionConfig(d_model=256, num_heads=4)
    a, b, c = (rv.MultiHeadAttention(config, seed, kdim=64).parameters for seed in (1, 1, 2))
    assert a == b and a != c and a.dtype == np.float32
    for name, fan_in in (("w_q", 256), ("w_k", 64), ("w_o", 256)):
        limit = (6 / (fan_in + 256)) ** 0.5
        assert 0.99 * limit < np.abs(a[name]).max() <= np.float32(limit)
        assert abs(a[name].std() * 3**0.5 / limit - 1) < 0.02
    assert not a["b_q"].any()


def test_what_is_computed_has_the_dtype_of_the_inputs():
    single = layer(dtype=np.float32)
    assert single(draw()[0]).dtype == np.float64 and single.parameters.dtype == np.float32
    output, cache = single.forward_cached(*draw())
    single.update_parameters(single.backward(output, cache), 0.1)
    assert single.parameters.dtype == np.float32


def test_training_with_micro_batches_is_training_with_the_batch():
    attention, (q, k, v) = layer(dropout=0.0), draw(B=4)
    target = np.random.default_rng(5).standard_normal(q.shape)

    def gradients(rows):
        output, cache = attention.forward_cached(q[rows], k[rows], v[rows])
        return attention.backward(2 * (output - target[rows]) / output[:1].size / len(output), cache)

    whole = gradients(slice(None)).parameters
    for rows in (slice(0, 2), slice(2, 4)):
        attention.accumulate(gradients(rows))
    for name, mean in attention.mean_gradients().items():
        np.testing.assert_allclose(mean, whole[name], rtol=1e-10, atol=1e-14)
    attention.zero_grad()
    losses = []
    for _ in range(50):
        losses.append(float(((attention(q, k, v) - target) ** 2).mean()))
        attention.update_parameters(gradients(slice(None)), 0.5)
    assert losses[-1] < 0.9 * losses[0]


def test_readers_always_see_a_whole_set():
    """Eight threads compute while one trains: with all biases of a set equal, so are the outputs of a masked row."""
    attention, (q, k, v) = layer(), draw(3, 5)
    nothing = rv.masks.Lengths(keys=0)  # an array that hides would need kernels that no other test does
    zeros = {name: np.zeros(shape) for name, shape in attention.parameters.shapes.items()}
    torn, done = [], threading.Event()

    def write():
        for n in itertools.count():
            if done.is_set():
                return
            attention.set_parameters({name: x + n for name, x in zeros.items()})

    def read():
        for _ in range(100):
            output, cache = attention.forward_cached(q, k, v, nothing)
            flat = attention.get_parameters()
            if len(np.unique(output)) != 1 or len(np.unique(flat)) != 1:
                torn.append(output)
            attention.backward(output, cache)

    attention.set_parameters(zeros)
    writer, readers = threading.Thread(target=write), [threading.Thread(target=read) for _ in range(8)]
    for thread in (writer, *readers):
        thread.start()
    for thread in readers:
        thread.join()
    done.set()
    writer.join()
    assert not torn


@pytest.mark.parametrize("bad", [np.nan, np.inf, "shape", "name"])
def test_bad_gradients_change_nothing(bad):
    attention, (q, k, v) = layer(), draw()
    g = attention.backward(q, attention.forward_cached(q, k, v)[1]).parameters
    g["b_o"] = g["b_o"][:3] if bad == "shape" else g["b_o"]
    if bad == "name":
        g["b_x"] = g["b_o"]
    elif bad != "shape":
        g["b_o"][3] = bad
    before = attention.parameters
    for call in (lambda: attention.update_parameters(g, 0.1), lambda: attention.accumulate(g)):
        with pytest.raises(rv.TrainingError):
            call()
    assert attention.parameters is before


# --- decoding ---------------------------------------------------------------------------------------------------------
@pytest.mark.core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pieces", [[1] * 21, [20, 1], [5, 9, 7], [0, 21]])
def test_steps_are_the_causal_pass(pieces, dtype):
    attention = layer(causal=True, dtype=dtype)
    x = draw(21, dtype=dtype)[0]
    cache = attention.new_cache(2, 30)
    ends = np.cumsum(pieces)
    outputs = [attention.step(x[:, end - n : end], cache) for n, end in zip(pieces, ends)]
    agrees(np.concatenate(outputs, axis=1), attention(x), dtype)
    assert cache.length == 21 and repr(cache) == "KeyValueCache(21 of 30 positions, batch 2, 3 heads of 8)"


def test_steps_past_the_first_thousand_keys():
    """Keys are handed to attention by the thousand; what is not filled yet, NaN here, must not count."""
    attention = layer(8, 2, causal=True, max_seq_len=None)
    x = draw(1030, d=8)[0]
    cache = attention.new_cache(2, 2060)
    cache.keys[:], cache.values[:] = np.nan, np.nan
    outputs = [attention.step(x[:, :1020], cache), *(attention.step(x[:, i : i + 1], cache) for i in range(1020, 1030))]
    agrees(np.concatenate(outputs, axis=1), attention(x), np.float64)


def test_bad_steps_leave_the_cache_as_it_was():
    attention, x = layer(max_seq_len=8), draw(6)[0]
    cache = attention.new_cache(batch=2, max_len=8)
    attention.step(x, cache)
    for bad, words in (
        (draw(3)[0], "6 positions and 3 more: the most is 8"),
        (x[:1], "another batch, or by another layer"),
        (x.astype(np.float32), "new_cache(batch, max_len, dtype=numpy.float32)"),
        (x[..., :5], "expected 24, got 5\n  x.shape: (2, 6, 5)\nHINT: the layer was built for 24 channels"),
        (x[0], "x has 2 axes"),
    ):
        with pytest.raises(rv.AttentionError) as caught:
            attention.step(bad, cache)
        assert words in str(caught.value) and cache.length == 6
    with pytest.raises(rv.InvalidInputError, match="cache is a list"):
        attention.step(x, [])
    with pytest.raises(rv.InvalidInputError, match="another layer"):
        layer(16, 2).step(draw(1, d=16)[0], cache)
    for batch, most in ((-1, 5), (2, 1.5), (True, 3)):
        with pytest.raises(rv.InvalidInputError, match="whole number"):
            attention.new_cache(batch, most)
    with pytest.raises(rv.InvalidInputError, match=r"max_len is 9, and max_seq_len 8\nHINT: .*max_seq_len=9"):
        attention.new_cache(2, 9)
    for length in (-2, 9, 1.0, None):
        cache.length = length
        with pytest.raises(rv.InvalidInputError, match=r"cache.length is .*\nHINT: .*0 to 8"):
            attention.step(x[:, :1], cache)
    with pytest.raises(rv.OutOfMemoryError):
        layer(max_seq_len=None).new_cache(1 << 20, 1 << 20)
    with pytest.raises(rv.InvalidInputError, match="kdim is 5"):
        layer(kdim=5).new_cache(1, 1)


# --- bits, memory, copies ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_company_change_no_bit(dtype):
    attention = layer(64, 4, dtype=dtype, dropout=0.0, causal=True)
    x = draw(70, d=64, B=5, dtype=dtype)[0]

    def everything(x):
        output, cache = attention.forward_cached(x, x, x)
        g = attention.backward(output, cache)
        return output, cache.weights(), g.query, g.key, g.value, *g.parameters.values()

    two = everything(x)
    with rv.threads(1):
        one = everything(x)
    assert [a.tobytes() for a in one] == [b.tobytes() for b in two]
    alone = everything(x[3:4])
    for a, b in zip(alone[:5], two[:5]):
        assert a.tobytes() == b[3:4].tobytes()


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("L", [1, 3, 70])
def test_one_array_for_three_changes_no_bit(L, use_bias):
    """Its queries, keys and values are one product; copies of it are three."""
    attention = layer(64, 4, dtype=np.float32, dropout=0.0, use_bias=use_bias)
    x = draw(L, d=64, B=2, dtype=np.float32)[0]
    made = [attention.forward_cached(*inputs) for inputs in ((x,), (x, x.copy(), x.copy()))]
    one, three = ([output, *attention.backward(output, cache).parameters.values()] for output, cache in made)
    assert [a.tobytes() for a in one] == [b.tobytes() for b in three]


def test_no_array_of_all_pairs_is_formed():
    attention = layer(16, 1, dtype=np.float32, max_seq_len=None)
    x = draw(6000, d=16, B=1, dtype=np.float32)[0]
    attention.backward(x[:, :9], attention.forward_cached(x[:, :9], x[:, :9], x[:, :9])[1])
    tracemalloc.start()
    output, cache = attention.forward_cached(x, x, x)
    attention.backward(output, cache)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * x.nbytes < 6000 * 6000 * 4 / 4


def test_copies_pickles_and_files(tmp_path):
    attention, x = layer(dtype=np.float32, kdim=24, causal=True), draw(dtype=np.float32)[0]
    wanted = attention(x)
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        np.testing.assert_array_equal(other(x), wanted)
        other.set_parameters(2 * other.get_parameters())
        np.testing.assert_array_equal(attention(x), wanted)
    pytest.importorskip("safetensors")
    path = tmp_path / "layer.safetensors"
    attention.save(path)
    from_file = rv.MultiHeadAttention.from_file(path)
    assert from_file.config == attention.config and from_file.parameters == attention.parameters
    other = layer(dtype=np.float32, seed=3, causal=True)
    other.load(path)
    np.testing.assert_array_equal(other(x), wanted)
    different = layer(dtype=np.float32, num_heads=2, causal=True)
    before = different.parameters
    with pytest.raises(rv.InvalidConfigError):
        different.load(path)
    assert different.parameters is before
    rv.ScaledDotProductAttention(attention.config).save(path)
    for refuse in (attention.load, rv.MultiHeadAttention.from_file):
        with pytest.raises(rv.AttentionError):
            refuse(path)


def test_it_says_what_it_is():
    attention = layer(kdim=5)
    assert isinstance(attention, rv.Attention) and isinstance(attention, rv.TrainableAttention)
    assert (attention.name(), attention.d_model(), attention.supports_masking()) == ("MultiHeadAttention", 24, True)
    assert "num_heads=3" in repr(attention) and repr(attention).endswith(", kdim=5)")


def test_gradients_show_their_shapes_in_one_line():
    attention, x = layer(num_heads=2), np.ones((1, 40, 24))
    output, cache = attention.forward_cached(x)
    told = repr(attention.backward(output, cache))
    assert told.startswith("AttentionGradients(query_weights (24, 24), ") and "\n" not in told and "None" not in told
    assert told.endswith(", output_bias (24,), query (1, 40, 24), key (1, 40, 24), value (1, 40, 24))")
    assert repr(rv.AttentionGradients()) == "AttentionGradients()"


def test_arguments_in_the_other_order_are_told_of_in_two_lines():
    attention, x = layer(num_heads=2), np.ones((1, 40, 24))
    gradients = attention.backward(*attention.forward_cached(x))
    for given in (gradients, gradients.parameters):
        with pytest.raises(rv.TrainingError, match=r"HINT: .*update_parameters\(gradients, learning_rate\)") as caught:
            attention.update_parameters(0.1, given)
        assert len(str(caught.value)) < 400 and str(caught.value).count("\n") == 1


def test_a_cache_is_its_layers_and_its_copies():
    """Swapped caches of two layers of one size would train each by the other's gradients."""
    first, second = (rv.MultiHeadAttention(rv.AttentionConfig(8, 2, dropout=0.0), seed=n) for n in range(2))
    x = np.random.default_rng(0).standard_normal((1, 3, 8), dtype=np.float32)
    cache = first.forward_cached(x)[1]
    with pytest.raises(rv.InvalidInputError, match="cache is that of another layer"):
        second.backward(x, cache)
    wanted = first.backward(x, cache).query_weights
    assert np.array_equal(copy.deepcopy(first).backward(x, cache).query_weights, wanted)
    by_hand = second.backward(x, rv.AttentionCache(x, x, x)).query_weights
    assert not np.array_equal(by_hand, wanted)
