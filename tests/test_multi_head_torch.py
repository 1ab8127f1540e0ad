"""Forty random layers agree with torch.nn.MultiheadAttention, whose states they load, forward and backward."""

import numpy as np
import pytest

import ruvector_numba as rv

torch = pytest.importorskip("torch")
NO_EPS = 1e-30  # torch has none


def draw(number):
    """A torch layer, ours of the same state, inputs and masks."""
    rng = np.random.default_rng(number)
    dtype = np.float32 if number % 4 == 3 else np.float64
    heads, d_k = int(rng.choice([1, 2, 3, 8])), int(rng.choice([1, 4, 7, 16, 64]))
    d = heads * d_k
    kdim, vdim = (None, None) if rng.random() < 0.6 else (int(rng.integers(1, 40)), int(rng.integers(1, 40)))
    bias = bool(rng.random() < 0.7)
    torch.manual_seed(number)
    kind = {"batch_first": True, "bias": bias, "kdim": kdim, "vdim": vdim}
    theirs = torch.nn.MultiheadAttention(d, heads, **kind, dtype=torch.from_numpy(np.zeros(1, dtype)).dtype)
    if bias:
        for parameter in (theirs.in_proj_bias, theirs.out_proj.bias):
            torch.nn.init.normal_(parameter)
    config = rv.AttentionConfig(d, heads, dropout=0.0, use_bias=bias, max_seq_len=None, eps=NO_EPS)
    ours = rv.MultiHeadAttention(config, kdim=kdim, vdim=vdim)
    rv.interop.load_torch_state(ours, theirs.state_dict())
    B, Lq, Lk = (int(rng.integers(1, n)) for n in (5, 80, 150))
    shapes = (B, Lq, d), (B, Lk, kdim or d), (B, Lk, vdim or d)
    inputs = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    hides = [None, rng.random((Lq, Lk)) < 0.3, rng.random((B, Lq, Lk)) < 0.3, rng.random((B, heads, Lq, Lk)) < 0.3]
    mask = hides[rng.integers(4)]
    if mask is not None:
        mask[..., 0] = False  # torch's rows that see nothing are NaN
    padding = np.arange(Lk) >= rng.integers(1, Lk + 1, B)[:, None] if rng.random() < 0.5 else None
    return theirs, ours, inputs, mask, padding, dtype


@pytest.mark.parametrize("number", range(40))
def test_the_same_results_and_gradients(number):
    theirs, ours, inputs, mask, padding, dtype = draw(number)
    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    their_mask = None
    if mask is not None:
        B, heads, (Lq, Lk) = len(inputs[0]), ours.config.num_heads, mask.shape[-2:]
        per_head = mask if mask.ndim != 3 else np.broadcast_to(mask[:, None], (B, heads, Lq, Lk))
        their_mask = torch.tensor(per_head.reshape(-1, Lq, Lk) if mask.ndim > 2 else mask)
    their_padding = None if padding is None else torch.tensor(padding)
    output, weights = theirs(*tensors, attn_mask=their_mask, key_padding_mask=their_padding)
    got, got_weights = ours.forward(*inputs, mask, key_padding_mask=padding)
    cached, cache = ours.forward_cached(*inputs, mask, key_padding_mask=padding)
    np.testing.assert_array_equal(cached, got)
    do = np.random.default_rng(number).standard_normal(got.shape).astype(dtype)
    output.backward(torch.from_numpy(do))
    g = ours.backward(do, cache)

    tolerance = 1e-9 if dtype == np.float64 else 5e-4
    gradients = {name: p.grad.detach().clone() for name, p in theirs.named_parameters()}
    mirror = rv.MultiHeadAttention(ours.config, kdim=ours.kdim, vdim=ours.vdim)
    rv.interop.load_torch_state(mirror, gradients)  # laid out as our parameters are
    pairs = {
        "output": (got, output.detach().numpy()),
        "weights": (got_weights, weights.detach().numpy()),
        **{name: (getattr(g, name), x.grad.numpy()) for name, x in zip(("query", "key", "value"), tensors)},
        **{name: (x, mirror.parameters[name]) for name, x in g.parameters.items()},
    }
    assert len(pairs) == (13 if ours.config.use_bias else 9)
    for name, (x, exact) in pairs.items():
        assert x.dtype == dtype
        np.testing.assert_allclose(x, exact, rtol=0, atol=tolerance * max(1, abs(exact).max()), err_msg=name)
