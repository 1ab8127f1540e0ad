"""Which types of half precision go together; hints that keep the numbers of bfloat16 that lie as bits in uint16."""

import ml_dtypes
import numpy as np
import pytest
from cases import make

import ruvector_numba as rv
from ruvector_numba import masks

BFLOAT16, FLOAT16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
MANY = (41, 70, 16, 24)


# Hints are followed: each is run as it stands


def follow(error, **names):
    """The value of the first expression that the hint gives."""
    hint = error.value.hint
    code = hint[hint.index(": ") + 2 :] if hint.startswith("cast") else hint
    return eval(code.split(", ")[0], {"numpy": np, "np": np, "ml_dtypes": ml_dtypes, **names})


def as_floats(x):
    return x.astype(np.float32) if x.dtype != np.uint16 else x.view(BFLOAT16).astype(np.float32)


@pytest.mark.parametrize("call", [BFLOAT16, FLOAT16, np.dtype(np.uint16), np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("given", [BFLOAT16, FLOAT16, np.dtype(np.uint16), np.dtype(np.float32)], ids=str)
def test_a_hint_for_a_gradient_keeps_its_numbers(call, given):
    if given == call or (given == BFLOAT16 and call == np.uint16):
        pytest.skip("it is taken as it is")
    x = np.linspace(0.5, 2, 24).reshape(4, 6).astype(BFLOAT16)
    numbers = x.view(np.uint16) if call == np.uint16 else x.astype(call)
    cache = rv.attention_forward(*[numbers] * 3, dtype="bfloat16" if call == np.uint16 else None)
    grad = x.view(np.uint16) if given == np.uint16 else x.astype(given)
    with pytest.raises(rv.InvalidInputError, match="the call had") as error:
        rv.attention_backward(grad, cache)
    cast = follow(error, grad_output=grad)
    rv.attention_backward(cast, cache)
    np.testing.assert_array_equal(as_floats(cast), x.astype(np.float32))


def test_a_hint_for_bits_in_a_layer_keeps_their_numbers():
    layer = rv.MultiHeadAttention(rv.AttentionConfig(d_model=8, num_heads=2))
    x = np.linspace(0.5, 2, 32).reshape(1, 4, 8).astype(BFLOAT16)
    with pytest.raises(rv.InvalidInputError, match="query has dtype uint16") as error:
        layer(x.view(np.uint16))
    np.testing.assert_array_equal(follow(error, query=x.view(np.uint16)), x.astype(np.float32))


def test_hints_for_masks_of_other_types():
    x, bits = np.ones((2, 4, 8), BFLOAT16), np.zeros((4, 4), BFLOAT16).view(np.uint16)
    for mask in (bits, bits & masks.Causal()):
        with pytest.raises(rv.InvalidMaskError, match="dtype uint16; a mask is bool") as error:
            rv.scaled_dot_product_attention(x, x, x, mask)
        assert "astype" not in error.value.hint
        assert follow(error, attn_mask=bits).dtype == BFLOAT16
    with pytest.raises(rv.InvalidMaskError, match="dtype uint16"):
        (bits & masks.Causal()).to_dense(4, 4)
    for dtype, numbers in ((None, x), ("bfloat16", x.view(np.uint16))):
        with pytest.raises(rv.InvalidMaskError, match="it is float64") as error:
            rv.scaled_dot_product_attention(numbers, numbers, numbers, np.zeros((4, 4)), dtype=dtype)
        assert "or attn_mask.astype(np.float32)" in error.value.hint
        mask = follow(error, attn_mask=np.zeros((4, 4)))
        rv.scaled_dot_product_attention(numbers, numbers, numbers, mask, dtype=dtype)


@pytest.mark.parametrize("kind", [BFLOAT16, FLOAT16, np.dtype(np.uint16), np.dtype(ml_dtypes.float8_e4m3fn)], ids=str)
def test_the_steps_one_by_one_hint_at_float32(kind):
    x = np.ones((4, 8), kind)
    with pytest.raises(rv.InvalidInputError, match=f"query has dtype {kind}") as error:
        rv.functional.attention_scores(x, x, 1.0)
    assert follow(error, query=x).dtype == np.float32


def test_bits_and_ml_dtypes_are_one_type_where_the_call_says_so():
    case = make(["float", "causal"], MANY, BFLOAT16, bias_shape=(41, 70))
    q, k, v = case.inputs
    bits = [x.view(np.uint16) for x in case.inputs]
    more = dict(is_causal=True, enable_gqa=True, dtype="bfloat16")
    wanted = rv.attention_forward(*bits, case.bias.view(np.uint16), **more)
    expected = rv.attention_backward(case.grad_output.view(np.uint16), wanted)
    for inputs in ((bits[0], k, v), (q, bits[1], v), (q, k, bits[2])):
        for mask in (case.bias, case.bias.view(np.uint16), case.bias.view(np.uint16) & masks.Window(left=500)):
            cache = rv.attention_forward(*inputs, mask, **more)
            assert cache.output.dtype == inputs[0].dtype
            np.testing.assert_array_equal(cache.output.view(np.uint16), wanted.output)
    cache = rv.attention_forward(*bits, case.bias.view(np.uint16) & masks.Full(), **more)
    g = rv.attention_backward(case.grad_output, cache)
    for name in ("query", "key", "value", "bias"):
        np.testing.assert_array_equal(getattr(g, name), getattr(expected, name), err_msg=name)
