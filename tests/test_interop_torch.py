"""torch's tensors in, torch's tensors out, gradients in torch's autograd."""

import doctest
import re
import subprocess
import sys

import numpy as np
import pytest

from ruvector_numba import DimensionMismatchError, InvalidInputError, InvalidMaskError, TrainingError, masks

torch = pytest.importorskip("torch")
from ruvector_numba.interop import torch as ours  # noqa: E402
from ruvector_numba.interop.torch import attention  # noqa: E402

B, H, Hk, Lq, Lk, D, Dv = 2, 4, 2, 5, 7, 3, 6
SHAPES = {"query": (B, H, Lq, D), "key": (B, H, Lk, D), "value": (B, H, Lk, Dv)}


def tensors(dtype=torch.float64, Hk=H, requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    shapes = (B, H, Lq, D), (B, Hk, Lk, D), (B, Hk, Lk, Dv)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_(requires_grad) for s in shapes]


def float_mask(*shape, dtype=torch.float64):
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    mask[..., -2] = -torch.inf
    return mask


def bool_mask():
    return torch.rand(B, 1, Lq, Lk, generator=torch.Generator().manual_seed(2)) > 0.3


# Results and gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"enable_gqa": True},
        {"attn_mask": bool_mask},
        {"attn_mask": float_mask},
    ],
    ids=["plain", "causal", "scale", "shared heads", "bool", "float"],
)
def test_the_same_as_torch(call, dtype):
    results = []
    for function in (attention, torch.nn.functional.scaled_dot_product_attention):
        inputs, more = tensors(dtype, Hk if "enable_gqa" in call else H), dict(call)
        if call.get("attn_mask") is bool_mask:
            more["attn_mask"] = bool_mask()
        elif call.get("attn_mask") is float_mask:
            more["attn_mask"] = float_mask(B, 1, Lq, Lk, dtype=dtype).requires_grad_()
            inputs.append(more["attn_mask"])
        output = function(*inputs[:3], **more)
        (output * torch.arange(Dv)).sum().backward()
        results.append([output, *(x.grad for x in inputs)])
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == wanted.dtype == dtype
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-5)


CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": -0.7},
    "shared heads": {"enable_gqa": True},
    "softcap": {"softcap": 1.5},
    "slopes": {"alibi_slopes": [0.5, 0.25, 0.1, 0.0]},
    "slopes of a tensor": {"alibi_slopes": torch.rand(B, H), "is_causal": True},
    "dropout": {"dropout_p": 0.4, "seed": 3},
    "bool": {"attn_mask": bool_mask()},
    "object": {"attn_mask": masks.Causal("bottom_right") & masks.Lengths(keys=[3, 7])},
    "object with an array": {"attn_mask": masks.Window(left=2) & float_mask(Lq, Lk).numpy()},
    "float": {"attn_mask": float_mask(Lq, Lk)},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_gradcheck(call):
    inputs = tensors(Hk=Hk if "enable_gqa" in call else H)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, **call), inputs)


@pytest.mark.parametrize("shape", [(Lq, Lk), (B, H, Lq, Lk), (H, 1, Lk), (B, 1, Lq, 1), (1,), ()], ids=str)
def test_gradcheck_of_a_float_mask(shape):
    mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    more = {"is_causal": True, "softcap": 2.0}
    assert torch.autograd.gradcheck(lambda *x: attention(*x, **more), [*tensors(), mask])


@pytest.mark.parametrize("shape", [(3,), (B, 3), (B, H, 3), (2, 1, 2, 3)], ids=lambda s: f"{len(s) + 1} axes")
def test_any_number_of_axes(shape):
    x = torch.randn(*shape[:-1], 4, shape[-1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attention(x, x, x), [x])


@pytest.mark.parametrize(("lq", "lk", "d", "dv"), [(0, 3, 2, 2), (3, 0, 2, 2), (3, 2, 0, 2), (3, 2, 2, 0)])
def test_empty(lq, lk, d, dv):
    x = [torch.ones(2, *s, requires_grad=True) for s in ((lq, d), (lk, d), (lk, dv))]
    output = attention(*x)
    assert output.shape == (2, lq, dv) and (lk or not output.any())
    output.sum().backward()
    assert [t.grad.shape for t in x] == [t.shape for t in x]


def test_a_query_that_sees_no_key_has_gradients_of_zero():
    mask = torch.ones(Lq, Lk, dtype=torch.bool)
    mask[2] = False
    query, key, value = tensors()
    output = attention(query, key, value, mask)
    output.sum().backward()
    assert not output[:, :, 2].any() and not query.grad[:, :, 2].any()
    assert all(x.grad.isfinite().all() for x in (query, key, value))


def test_torch_is_loaded_at_first_use():
    code = "import sys, ruvector_numba.interop as i; print('torch' in sys.modules, i.torch.attention.__name__)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False", "attention"]


def test_the_examples_in_the_docstrings_hold():
    failed, tried = doctest.testmod(ours)
    assert tried and not failed


# Half precision


halves = pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)


@halves
@pytest.mark.parametrize("masked", [None, "bool", "as the inputs", "float32"])
def test_half_precision_is_rounded_once(kind, masked):
    inputs = [x.detach().to(kind).requires_grad_() for x in tensors(torch.float32)]
    wide = [x.detach().float().requires_grad_() for x in inputs]
    mask = {"bool": bool_mask(), "as the inputs": float_mask(Lq, Lk, dtype=kind)}.get(
        masked, float_mask(Lq, Lk).float()
    )
    given = [[], []] if masked is None else [[mask], [mask if masked == "bool" else mask.float()]]
    if masked not in (None, "bool"):
        given = [[x.detach().requires_grad_() for x in each] for each in given]
    grad = torch.randn(B, H, Lq, Dv, generator=torch.Generator().manual_seed(4)).to(kind)
    more = {"is_causal": True, "alibi_slopes": torch.ones(H, dtype=kind)}
    output, expected = attention(*inputs, *given[0], **more), attention(*wide, *given[1], **more)
    assert torch.equal(attention(*[x.detach() for x in inputs], *given[0], **more), output)
    output.backward(grad), expected.backward(grad.float())
    assert output.dtype == kind
    grads = [(x.grad, y.grad) for x, y in zip(inputs + given[0], wide + given[1], strict=True) if y.grad is not None]
    assert len(grads) == 3 + (masked not in (None, "bool"))
    for x, y in [(output, expected), *grads]:
        torch.testing.assert_close(x, y.to(x.dtype), rtol=0, atol=2 * torch.finfo(kind).eps * y.abs().max().item())
    assert all(x.grad.dtype == kind for x in inputs)


@halves
def test_half_precision_is_not_copied(kind, seen_arrays):
    inputs = [x.detach().to(kind).transpose(1, 2).contiguous().transpose(1, 2) for x in tensors()]
    attention(*inputs)
    (call,) = seen_arrays
    for x, array in zip(inputs, (call.query, call.key, call.value), strict=True):
        assert array.ctypes.data == x.data_ptr() and [n // 2 for n in array.strides] == list(x.stride())


@pytest.mark.parametrize("sizes", [(0, 3, 2, 2), (3, 0, 2, 2), (3, 2, 0, 2)], ids=str)
def test_empty_tensors_of_half_precision(sizes):
    lq, lk, d, dv = sizes
    x = [torch.ones(2, *s, dtype=torch.bfloat16, requires_grad=True) for s in ((lq, d), (lk, d), (lk, dv))]
    attention(*x).sum().backward()
    assert [t.grad.shape for t in x] == [t.shape for t in x]


def test_a_mask_of_another_half_type_is_refused():
    inputs = [x.to(torch.bfloat16) for x in tensors()]
    with pytest.raises(InvalidMaskError, match=r"torch.float16; .* torch.bfloat16 as the query or torch.float32"):
        attention(*inputs, torch.zeros(Lq, Lk).half())


def test_autocast():
    project, x = torch.nn.Linear(8, 24), torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v = project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        output = attention(q, k, v)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert output.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(output, wanted, rtol=0, atol=0.02)
    output.sum().backward()
    assert project.weight.grad.isfinite().all()


# Compilers


def test_compilers_leave_it_as_it_is(recwarn):
    """Neither a warning nor an error, that nobody sees, when they trace into it; and the same numbers."""
    q, k, v = (x.float() for x in tensors(requires_grad=False))
    compiled = torch.compile(lambda q, k, v: attention(q * 2, k, v) + 1, backend="eager")
    assert torch.equal(compiled(q, k, v), attention(q * 2, k, v) + 1)
    assert not [w for w in recwarn if "ruvector" in str(w.message) or "ruvector" in w.filename]
    told = str(torch._dynamo.utils.counters["unimplemented"])
    assert "autograd" not in told


# Memory


@pytest.fixture
def seen_arrays(monkeypatch):
    """The arrays of all calls that the engine was given, and those it gave."""
    given = []
    checked = ours.checks.call

    def spy(*arguments, **options):
        call = checked(*arguments, **options)
        given.append(call)
        return call

    monkeypatch.setattr(ours.checks, "call", spy)
    return given


STRIDED = {
    "contiguous": lambda x: x,
    "heads last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    "every second row": lambda x: torch.cat([x, x], 2)[:, :, ::2],
    "every second channel": lambda x: torch.cat([x, x], 3)[..., ::2],
    "columns first": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("layout", STRIDED.values(), ids=STRIDED)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_no_copy_is_made(layout, requires_grad, seen_arrays):
    inputs = [layout(x.detach()).requires_grad_(requires_grad) for x in tensors()]
    mask = layout(float_mask(B, H, Lq, Lk))
    output = attention(*inputs, mask)
    if requires_grad:
        output.sum().backward()
    assert len(seen_arrays) == 1 + requires_grad  # of the forward pass, and of the backward pass
    for call in seen_arrays:
        arrays = call.query, call.key, call.value, call.seen.bias
        for x, array in zip([*inputs, mask], arrays, strict=True):
            assert array.ctypes.data == x.data_ptr()
            assert [n // 8 for n in array.strides] == list(x.stride())


def test_the_result_is_the_array_that_was_computed(monkeypatch):
    made = []
    forward, backward = ours.dense_past.forward, ours.dense_past.Past.backward
    monkeypatch.setattr(ours.dense_past, "forward", lambda *x, **more: made.append(forward(*x, **more)) or made[-1])
    monkeypatch.setattr(ours.dense_past.Past, "backward", lambda *x: made.append(backward(*x)) or made[-1])
    inputs = tensors()
    output = attention(*inputs)
    gradients = torch.autograd.grad(output.sum(), inputs)
    assert output.data_ptr() == made[0].output.ctypes.data
    for name, x in zip(SHAPES, gradients, strict=True):
        assert x.data_ptr() == getattr(made[-1], name).ctypes.data


def test_gradients_of_strided_and_expanded_results():
    """What reaches the backward pass need not be contiguous: of a sum it is one number, expanded."""
    weights = torch.randn(B, Lq, H, Dv, dtype=torch.float64)
    for loss in (lambda x: x.sum(), lambda x: (x.transpose(1, 2) * weights).sum(), lambda x: x[..., ::2].sum()):
        both = []
        for function in (attention, torch.nn.functional.scaled_dot_product_attention):
            inputs = tensors()
            both.append(torch.autograd.grad(loss(function(*inputs)), inputs))
        for got, wanted in zip(*both, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_lazily_negated_memory_is_read_right():
    """Tensors may have their sign in a bit beside the memory, as parts of conjugates do."""
    z = torch.randn(4, 3, dtype=torch.complex128)
    x = z.conj().imag
    assert x.is_neg()
    torch.testing.assert_close(attention(x, x, x), attention(*[x.clone()] * 3))


# Autograd


@pytest.mark.parametrize("needs", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 1, 1)], ids=str)
def test_gradients_for_some_inputs_only(needs):
    def inputs(needs):
        given = [*tensors(requires_grad=False), float_mask(Lq, Lk)]
        return [x.requires_grad_(bool(n)) for x, n in zip(given, needs, strict=True)]

    some, all_ = inputs(needs), inputs((1, 1, 1, 1))
    attention(*some).square().sum().backward()
    attention(*all_).square().sum().backward()
    for x, whole, n in zip(some, all_, needs, strict=True):
        assert (x.grad is not None) == bool(n)
        if n:
            assert torch.equal(x.grad, whole.grad)


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "nothing requires it"])
def test_without_gradients_nothing_is_kept(how, monkeypatch):
    with_gradients = attention(*tensors()).detach()
    monkeypatch.setattr(ours.dense_past, "forward", None)  # which would compute what a backward pass needs
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(how, torch.enable_grad)
    with context():
        output = attention(*tensors(requires_grad=how != "nothing requires it"))
    assert not output.requires_grad and output.grad_fn is None
    assert torch.equal(output, with_gradients)


@pytest.mark.parametrize("which", ["query", "key", "value", "attn_mask", "output"])
def test_a_change_in_place_is_noticed(which):
    """The backward pass reads the memory of the inputs and of the output: torch counts changes to it."""
    given = dict(zip([*SHAPES, "attn_mask"], [*tensors(), float_mask(Lq, Lk)], strict=True))
    output = attention(**given)
    with torch.no_grad():
        (output if which == "output" else given[which]).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_changed_slopes_do_not_matter():
    gradients = []
    for change in (0, 5):
        slopes, inputs = torch.rand(H, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), tensors()
        output = attention(*inputs, alibi_slopes=slopes)
        slopes += change
        gradients.append(torch.autograd.grad(output.sum(), inputs)[0])
    assert torch.equal(*gradients)


def test_twice_through_one_graph():
    inputs = tensors()
    output = attention(*inputs)
    first = torch.autograd.grad(output.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(output.sum(), inputs)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.sum().backward()


@pytest.mark.parametrize("loss", [lambda x: x.sum(), lambda x: x.square().sum()], ids=["constant", "squared"])
def test_second_derivatives_are_refused(loss):
    """Also where the gradient of the output is a constant: torch's once_differentiable would let that pass."""
    inputs = tensors()
    gradients = torch.autograd.grad(loss(attention(*inputs)), inputs, create_graph=True)
    with pytest.raises(TrainingError, match=r"no gradients of their own\nHINT: .*SDPBackend.MATH"):
        (gradients[0].square().sum() + inputs[0].square().sum()).backward()


def test_one_tensor_in_all_places():
    x, y = (torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    x.requires_grad_(), y.requires_grad_()
    attention(x, x, x, is_causal=True).square().sum().backward()
    torch.nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_hooks_for_saved_tensors_are_used():
    """Everything that lies in tensors passes through them: so they can offload all of it."""
    inputs, packed, mask = tensors(), [], bool_mask()
    wanted = torch.autograd.grad(attention(*inputs, mask).sum(), inputs)

    def unpack(x):
        packed.append(x)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone(), unpack):
        output = attention(*inputs, mask)
    assert all(map(torch.equal, torch.autograd.grad(output.sum(), inputs), wanted))
    assert [tuple(x.shape) for x in packed] == [*SHAPES.values(), mask.shape, output.shape, (*output.shape[:-1], 2)]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_drop_the_same_weights(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    def block(*x):
        return attention(*x, dropout_p=0.5)

    gradients = []
    for run in (block, lambda *x: checkpoint(block, *x, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        inputs = tensors()
        run(*inputs).sum().backward()
        gradients.append([x.grad for x in inputs])
    assert all(map(torch.equal, *gradients))


def test_dropout_follows_the_generator_of_torch_or_the_seed():
    inputs, p = tensors(requires_grad=False), {"dropout_p": 0.5}
    torch.manual_seed(0)
    first, second = attention(*inputs, **p), attention(*inputs, **p)
    torch.manual_seed(0)
    assert torch.equal(attention(*inputs, **p), first) and not torch.equal(first, second)
    assert torch.equal(attention(*inputs, **p, seed=1), attention(*inputs, **p, seed=1))
    before = torch.get_rng_state()
    attention(*inputs), attention(*inputs, **p, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_replayed_for_gradients_whatever_kind_of_number_it_is():
    query, key, value = tensors()
    for p in (0.5, np.float32(0.5), np.array(0.5)):
        output = attention(query, key, value, dropout_p=p)
        (grad,) = torch.autograd.grad(output.sum(), value)
        # the output is linear in the values, so the gradient tells the output's sum
        torch.testing.assert_close((grad * value).sum(), output.sum())


def test_a_module_learns():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project, self.out = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)

        def forward(self, x):
            q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            return self.out(attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(8, 10, 8)
    wanted = x.cumsum(1) / torch.arange(1, 11)[:, None]  # the mean of what each position sees
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (layer(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_backward_in_many_threads():
    from concurrent.futures import ThreadPoolExecutor

    def gradient(_):
        inputs = tensors()
        return torch.autograd.grad(attention(*inputs).sum(), inputs)[0]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(gradient, range(32)))
    assert all(torch.equal(x, results[0]) for x in results)


# Bad input


def cast(dtype):
    return lambda x: x.to(dtype)


REFUSED = [
    # other than tensors
    ("query", lambda x: x.detach().numpy(), InvalidInputError, "query is a ndarray, not a tensor", "as_tensor"),
    ("key", lambda x: x.detach().numpy(), InvalidInputError, "key is a ndarray, not a tensor", "as_tensor"),
    ("value", lambda x: x.tolist(), InvalidInputError, "value is a list", "scaled_dot_product_attention"),
    ("value", lambda x: None, InvalidInputError, "value is a NoneType", None),
    ("attn_mask", lambda x: np.ones((Lq, Lk), bool), InvalidInputError, "attn_mask is a ndarray", "as_tensor"),
    ("attn_mask", lambda x: masks.Causal, InvalidInputError, "attn_mask is a type", None),
    # devices and layouts
    ("query", lambda x: x.to("meta"), InvalidInputError, "query is on device meta", r"query.cpu\(\)"),
    ("attn_mask", lambda x: torch.ones(Lq, Lk, device="meta"), InvalidInputError, "attn_mask is on device meta", None),
    ("key", lambda x: x.to_sparse(), InvalidInputError, "key has layout torch.sparse_coo", r"key.to_dense\(\)"),
    (
        "value",
        lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
        InvalidInputError,
        "value is a nested tensor",
        "Lengths",
    ),
    # dtypes
    ("query", cast(torch.float16), InvalidInputError, "differ in dtype", r"key = key.to\(query.dtype\)"),
    ("query", cast(torch.uint8), InvalidInputError, "query has dtype torch.uint8, not", r"query.float\(\)"),
    ("key", cast(torch.int64), InvalidInputError, "key has dtype torch.int64", r"key.float\(\)"),
    ("value", cast(torch.complex128), InvalidInputError, "value has dtype torch.complex128", None),
    ("query", cast(torch.float32), InvalidInputError, "differ in dtype", r"key = key.to\(query.dtype\)"),
    ("key", cast(torch.float32), InvalidInputError, r"key.dtype\s*: torch.float32", r"key = key.to\(query.dtype\)"),
    ("value", cast(torch.float32), InvalidInputError, "differ in dtype", r"value = value.to\(query.dtype\)"),
    ("attn_mask", lambda x: torch.ones(Lq, Lk).int(), InvalidMaskError, "dtype torch.int32; a mask is bool", "bool"),
    ("attn_mask", lambda x: torch.ones(Lq, Lk), InvalidMaskError, "dtype torch.float32; .* torch.float64", "to"),
    ("attn_mask", lambda x: torch.ones(Lq, Lk).half(), InvalidMaskError, "dtype torch.float16", None),
    # shapes and numbers
    ("query", lambda x: x[0, 0, 0], InvalidInputError, r"query has 1 axes\n  query.shape: \(3,\)", None),
    ("query", lambda x: x[..., :2], DimensionMismatchError, "expected 2, got 3", "share their last axis"),
    ("query", lambda x: x[:, :2], DimensionMismatchError, "expected 2, got 4", "multiple"),
    ("key", lambda x: x[:, :2], DimensionMismatchError, "expected 2, got 4", "one value head a key head"),
    ("key", lambda x: x[:, :, :2], DimensionMismatchError, "expected 2, got 7", None),
    ("attn_mask", lambda x: torch.ones(3, Lk).bool(), InvalidMaskError, "does not broadcast", None),
    ("attn_mask", lambda x: masks.Lengths(keys=99), InvalidMaskError, "99", None),
    ("dropout_p", lambda x: 1.5, InvalidInputError, "dropout_p is 1.5", "probability"),
    ("dropout_p", lambda x: "half", InvalidInputError, "dropout_p is 'half'", None),
    ("dropout_p", lambda x: torch.tensor(0.5), InvalidInputError, "dropout_p is tensor", None),
    ("dropout_p", lambda x: np.array([0.5, 0.5]), InvalidInputError, "dropout_p is array", None),
    ("scale", lambda x: float("nan"), InvalidInputError, "scale is nan", None),
    ("softcap", lambda x: 0.0, InvalidInputError, "softcap is 0.0", None),
    ("seed", lambda x: -1, InvalidInputError, "seed is -1", None),
    ("alibi_slopes", lambda x: torch.ones(H + 1), InvalidInputError, "alibi_slopes has the wrong shape", None),
    ("alibi_slopes", lambda x: torch.ones(H, device="meta"), InvalidInputError, "alibi_slopes is on device", None),
    ("alibi_slopes", lambda x: torch.ones(H).int(), InvalidInputError, "alibi_slopes has dtype", r"\.float\(\)"),
    ("alibi_slopes", lambda x: [[1.0], [1.0, 2.0]], InvalidInputError, "alibi_slopes", "one number for each head"),
    ("alibi_slopes", lambda x: torch.ones(H, requires_grad=True), InvalidInputError, "requires a gradient", "detach"),
]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("name", "change", "kind", "words", "hint"), REFUSED, ids=[f"{r[0]}: {r[3]}" for r in REFUSED])
def test_refused(name, change, kind, words, hint, requires_grad):
    given = dict(zip(SHAPES, tensors(requires_grad=requires_grad), strict=True))
    given[name] = change(given[name].detach() if name in given else None)
    with pytest.raises(kind) as caught:
        attention(**given)
    assert type(caught.value) is kind
    assert re.search(words, str(caught.value)), str(caught.value)
    assert hint is None or re.search(hint, caught.value.hint), str(caught.value)
