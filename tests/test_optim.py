"""Optimizers take the steps of torch's, which a float64 reference here spells out, and refuse without a trace."""

import copy
import math
import pickle
import threading
import types

import numpy as np
import pytest
from toy import Line, state

from ruvector_numba import InvalidConfigError, InvalidInputError, TrainingError
from ruvector_numba.optim import SGD, Adam, AdamW, clip_by_norm

F32, F64 = np.float32, np.float64
STEPS = 12
CASES = [
    (SGD, {}),
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    (SGD, {"lr": 0.1, "momentum": 0.5, "dampening": -0.5, "weight_decay": 0.1}),
    (SGD, {"lr": 0.1, "weight_decay": 0.2}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (Adam, {}),
    (Adam, {"lr": 0.1}),
    (Adam, {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-3}),
    (Adam, {"lr": 0.1, "betas": (0.0, 0.0)}),
    (Adam, {"lr": 0.1, "weight_decay": 0.2}),
    (Adam, {"lr": 0.1, "betas": (0.9, 0.5), "amsgrad": True}),
    (Adam, {"lr": 0.1, "betas": (0.9, 0.5), "amsgrad": True, "weight_decay": 0.2}),
    (AdamW, {}),
    (AdamW, {"lr": 0.1}),
    (AdamW, {"lr": 0.1, "weight_decay": 0.3, "eps": 1e-4}),
    (AdamW, {"lr": 0.1, "weight_decay": 0.0}),
    (AdamW, {"lr": 0.1, "betas": (0.9, 0.5), "amsgrad": True}),
]
cases = pytest.mark.parametrize(("kind", "settings"), CASES, ids=[f"{k.__name__} {s}" for k, s in CASES])
both_dtypes = pytest.mark.parametrize("dtype", [F32, F64])


def start(dtype=F64):
    rng = np.random.default_rng(0)
    shapes = {"w": (3, 4), "b": (4,), "scale": ()}
    return {name: np.asarray(rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}


def course(dtype=F64):
    """The gradients of each step: that of b is missing now and then, and some are much larger than others."""
    rng = np.random.default_rng(1)
    for i in range(STEPS):
        g = {
            name: np.asarray(rng.standard_normal(p.shape) * 10.0 ** rng.integers(-2, 1)) for name, p in start().items()
        }
        yield {name: None if name == "b" and i % 3 == 1 else x.astype(dtype) for name, x in g.items()}


def walk(optimizer, dtype=F64):
    parameters = start(dtype)
    for gradients in course(dtype):
        parameters = optimizer.step(parameters, gradients)
    return parameters


# --- the reference: the algorithms as the pages of torch print them, one number at a time ----------------------------
def sgd(x, gradients, lr=1e-3, momentum=0, dampening=0, weight_decay=0, nesterov=False):
    b = None
    for g in gradients:
        g = g + weight_decay * x
        if momentum:
            b = g if b is None else momentum * b + (1 - dampening) * g
            g = g + momentum * b if nesterov else b
        x = x - lr * g
    return x


def adam(x, gradients, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False):
    m = v = most = 0
    for t, g in enumerate(gradients, 1):
        g = g + weight_decay * x
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        most = max(most, v)
        x = x - lr * (m / (1 - betas[0] ** t)) / (math.sqrt((most if amsgrad else v) / (1 - betas[1] ** t)) + eps)
    return x


def adamw(x, gradients, lr=1e-3, weight_decay=0.01, **settings):
    """Adam's steps depend on the gradients alone; before each, the parameter shrinks."""
    gradients = list(gradients)
    for t in range(1, len(gradients) + 1):
        x = x - lr * weight_decay * x
        path = [adam(0.0, gradients[:n], lr=lr, **settings) for n in (t - 1, t)]
        x = x + (path[1] - path[0])
    return x


@cases
@both_dtypes
def test_steps_are_those_of_the_reference(kind, settings, dtype):
    got, reference = walk(kind(**settings), dtype), {SGD: sgd, Adam: adam, AdamW: adamw}[kind]
    for name, p in start(dtype).items():
        gradients = [g[name].astype(F64) for g in course(dtype) if g[name] is not None]
        want = [reference(float(p.flat[i]), [float(g.flat[i]) for g in gradients], **settings) for i in range(p.size)]
        assert got[name].dtype == dtype and got[name].shape == p.shape and isinstance(got[name], np.ndarray)
        tolerance = 1e-6 if dtype is F32 else 1e-12
        np.testing.assert_allclose(got[name].ravel(), want, rtol=tolerance, atol=tolerance)


@cases
@both_dtypes
def test_steps_are_those_of_torch(kind, settings, dtype):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.tensor(p, requires_grad=True) for name, p in start(dtype).items()}
    theirs = getattr(torch.optim, kind.__name__)(tensors.values(), **settings)
    parameters, ours = start(dtype), kind(**settings)
    for gradients in course(dtype):
        for name, tensor in tensors.items():
            tensor.grad = None if gradients[name] is None else torch.tensor(gradients[name])
        theirs.step()
        parameters = ours.step(parameters, gradients)
        for name, tensor in tensors.items():
            want = tensor.detach().numpy()
            assert parameters[name].dtype == want.dtype
            np.testing.assert_allclose(parameters[name], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_defaults_are_those_of_torch(kind):
    torch = pytest.importorskip("torch")
    theirs = getattr(torch.optim, kind.__name__)([torch.zeros(1)]).defaults
    for name, value in vars(kind()).items():
        assert name == "state" or theirs[name] == value, name


@both_dtypes
@pytest.mark.parametrize("max_norm", [0.0, 1e-3, 1.0, 7.5, 1e6, math.inf])
def test_clipping_is_that_of_torch(dtype, max_norm):
    torch = pytest.importorskip("torch")
    for gradients in course(dtype):
        tensors = {name: torch.zeros(p.shape, requires_grad=True) for name, p in start().items()}
        for name, g in gradients.items():
            tensors[name] = torch.tensor(start(dtype)[name], requires_grad=True)
            tensors[name].grad = None if g is None else torch.tensor(g)
        want_norm = torch.nn.utils.clip_grad_norm_(tensors.values(), max_norm)
        clipped, norm = clip_by_norm(gradients, max_norm)
        assert norm == pytest.approx(float(want_norm), rel=1e-6)
        for name, tensor in tensors.items():
            assert (tensor.grad is None) == (name not in clipped)
            if name in clipped:
                assert clipped[name].dtype == dtype
                np.testing.assert_allclose(clipped[name], tensor.grad.numpy(), rtol=1e-6)


# --- clipping --------------------------------------------------------------------------------------------------------
def test_clipping():
    given = {"w": np.array([[3.0, 0.0]]), "b": np.array(4.0), "v": None}
    clipped, norm = clip_by_norm(given, 2)
    factor = 2 / (5 + 1e-6)
    assert norm == 5 and isinstance(norm, float) and list(clipped) == ["w", "b"]
    np.testing.assert_allclose(clipped["w"], [[3 * factor, 0]], rtol=1e-15)
    np.testing.assert_allclose(clipped["b"], 4 * factor, rtol=1e-15)
    for limit in (6, np.float32(5.5), math.inf):
        untouched, _ = clip_by_norm(types.SimpleNamespace(parameters=given), limit)
        np.testing.assert_array_equal(untouched["w"], given["w"])
        assert not np.shares_memory(untouched["w"], given["w"])
    assert clip_by_norm({}, 1.0) == ({}, 0.0) and not clip_by_norm({"w": np.zeros(2)}, 1.0)[0]["w"].any()
    large = clip_by_norm({"w": np.full(4, 3e38, F32)}, 1.0)  # squares that float32 cannot hold
    assert large[1] == pytest.approx(6e38) and large[0]["w"].dtype == F32
    np.testing.assert_allclose(large[0]["w"], 0.5, rtol=1e-6)


def test_clipping_refuses():
    for bad in (-1, math.nan, -math.inf, "1", None, True, np.ones(2), 10**400):
        with pytest.raises(
            InvalidConfigError, match=r"max_norm is .*\nHINT: give a (number that is not negative|smaller)"
        ):
            clip_by_norm({"w": np.ones(2)}, bad)
    for gradients, words in (
        ({"w": [1.0, math.nan]}, "the gradient of 'w' is not finite in 1 of 2 places"),
        ({"w": np.full(2, np.inf)}, "the gradient of 'w' is not finite"),
        ({"w": np.ones(2, int)}, "the gradient of 'w' has dtype int64"),
        ({"w": np.full(2, 1e300)}, "norm of the gradients is too large"),
        (np.ones(2), "gradients are a ndarray"),
    ):
        with pytest.raises(TrainingError, match=words):
            clip_by_norm(gradients, 1.0)


# --- settings --------------------------------------------------------------------------------------------------------
NOT_NEGATIVE = [-1e-9, math.nan, math.inf, "0.1", None, True, np.ones(1), 1j, 10**400]
BAD = [
    *((kind, "lr", x) for kind in (SGD, Adam, AdamW) for x in NOT_NEGATIVE),
    *((kind, "weight_decay", x) for kind in (SGD, Adam, AdamW) for x in NOT_NEGATIVE),
    *((SGD, "momentum", x) for x in NOT_NEGATIVE),
    *((SGD, "dampening", x) for x in (math.nan, math.inf, -math.inf, "0")),
    *((Adam, "eps", x) for x in NOT_NEGATIVE),
    *(
        (Adam, "betas", x)
        for x in (0.9, None, (0.9,), (0.9, 0.9, 0.9), (1.0, 0.9), (0.9, 1), (-0.1, 0.9), (0.9, math.nan))
    ),
    *((Adam, "betas", x) for x in (("0.9", 0.9), "ab", (True, 0.9))),
    *((Adam, "amsgrad", x) for x in (2, "yes", None)),
    *((SGD, "nesterov", x) for x in (2, "no", True)),
]


@pytest.mark.parametrize(("kind", "name", "value"), BAD, ids=[f"{k.__name__} {n} {x!r}"[:40] for k, n, x in BAD])
def test_settings_out_of_range(kind, name, value):
    with pytest.raises(InvalidConfigError, match=rf"{name}.* (is|needs) [\s\S]*\nHINT: (give|set) "):
        kind(**{name: value})
    optimizer, layer = kind(), Line()
    before = layer.parameters
    setattr(optimizer, name, value)
    for act in (lambda: optimizer.update(layer, {"b": [1.0]}), lambda: optimizer.step(start(), {"b": np.ones(4)})):
        with pytest.raises(InvalidConfigError, match=name):
            act()
    assert layer.parameters is before and not optimizer.state


def test_nesterov_needs_momentum_and_no_dampening():
    for more in ({}, {"momentum": 0.9, "dampening": 0.1}):
        with pytest.raises(
            InvalidConfigError, match=r"nesterov needs momentum[\s\S]*\n  momentum : 0[\s\S]*\nHINT: set"
        ):
            SGD(nesterov=True, **more)


def test_settings_are_floats_and_may_change_between_steps():
    optimizer = SGD(np.float64(1), momentum=np.int64(0))
    assert repr(optimizer) == "SGD(lr=1.0, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False)"
    assert type(optimizer.lr) is float and AdamW(betas=[0, np.float32(0.5)]).betas == (0.0, 0.5)
    p = optimizer.step({"x": np.array([1.0], F32)}, {"x": np.array([0.25], F32)})
    optimizer.lr = np.float64(2)  # would make float64 of float32
    p = optimizer.step(p, {"x": np.array([0.25], F32)})
    assert p["x"] == 0.25 and p["x"].dtype == F32
    assert SGD(0.1) == SGD(lr=0.1) != SGD(0.2)


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_a_name_that_is_no_setting_is_refused(kind):
    """It would train with the old setting and say nothing."""
    optimizer = kind(lr=0.0)
    for each in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        with pytest.raises(AttributeError, match=f"{kind.__name__} has no setting 'learning_rate'") as caught:
            each.learning_rate = 1.0
        assert isinstance(caught.value, InvalidConfigError) and not hasattr(each, "learning_rate")
        assert caught.value.hint == "its settings are " + ", ".join(kind.__match_args__)


# --- state -----------------------------------------------------------------------------------------------------------
def seen(optimizer):
    """All that an optimizer remembers, to the bit."""
    return pickle.dumps({name: copy.deepcopy(x) for name, x in optimizer.state.items()})


STATEFUL = [
    SGD(0.1, momentum=0.9), SGD(0.1, momentum=0.9, nesterov=True), Adam(0.1), Adam(0.1, amsgrad=True), AdamW(0.1)
]  # fmt: skip
stateful = pytest.mark.parametrize("optimizer", STATEFUL, ids=repr)


@stateful
def test_an_optimizer_that_is_pickled_or_copied_goes_on_where_it_was(optimizer):
    gradients, optimizer = list(course()), copy.deepcopy(optimizer)
    parameters = start()
    for g in gradients[:5]:
        parameters = optimizer.step(parameters, g)
    others = pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)
    results = []
    for each in (optimizer, *others):
        assert each == optimizer
        p = parameters
        for g in gradients[5:]:
            p = each.step(p, g)
        results.append(p)
    for other in results[1:]:
        for name, p in other.items():
            np.testing.assert_array_equal(p, results[0][name])


@stateful
def test_steps_write_to_nothing_they_were_given_and_share_nothing(optimizer):
    optimizer, parameters = copy.deepcopy(optimizer), start()
    want = walk(copy.deepcopy(optimizer))
    for gradients in course():
        for x in (*parameters.values(), *(g for g in gradients.values() if g is not None)):
            x.flags.writeable = False
        new = optimizer.step(parameters, gradients)
        for name, p in new.items():
            assert not np.shares_memory(p, parameters[name])
        for g in gradients.values():
            if g is not None:
                g.flags.writeable = True
                g[...] = np.nan  # what is remembered is no view of it
        parameters = new
    for name, p in want.items():
        np.testing.assert_array_equal(parameters[name], p)


@stateful
def test_a_layer_that_goes_to_another_dtype_takes_its_optimizer_along(optimizer):
    optimizer, parameters = copy.deepcopy(optimizer), start(F32)
    for i, gradients in enumerate(course(F32)):
        dtype = (F32, F64)[i // 3 % 2]
        parameters = optimizer.step({name: p.astype(dtype) for name, p in parameters.items()}, gradients)
        assert {p.dtype for p in parameters.values()} == {np.dtype(dtype)}


GRADIENTS = [
    ({"w": np.full((2, 2), np.nan)}, "the gradient of 'w' is not finite in 4 of 4 places"),
    ({"w": np.ones((2, 2)), "b": [-np.inf]}, "the gradient of 'b' is not finite"),
    ({"w": np.ones((2, 2)), "b": [1e300]}, "the gradient of 'b' is not finite"),
    ({"w": np.ones((2, 2)), "b": [1.0, 2.0]}, r"'b' has the wrong shape\n  gradient.shape : \(2,\)"),
    ({"w": np.ones((2, 2)), "v": [1.0]}, "there is no parameter 'v'"),
    ({"w": np.ones((2, 2)), "b": np.ones(1, int)}, "the gradient of 'b' has dtype int64"),
    (np.ones(5), "gradients are a ndarray"),
    (None, "gradients are a NoneType"),
]


@stateful
@pytest.mark.parametrize(("gradients", "words"), GRADIENTS)
def test_bad_gradients_change_neither_state_nor_parameters(optimizer, gradients, words):
    optimizer, layer = copy.deepcopy(optimizer), Line()
    optimizer.update(layer, {"w": np.ones((2, 2)), "b": [2.0]})
    before, remembered, was = layer.parameters, seen(optimizer), state(layer)
    with pytest.raises(TrainingError, match=words):
        optimizer.update(layer, gradients)
    with pytest.raises(TrainingError, match=words):
        optimizer.step(layer.parameters, gradients)
    assert layer.parameters is before and state(layer) == was and seen(optimizer) == remembered


@pytest.mark.parametrize(
    ("optimizer", "g"),
    [
        (SGD(10.0), 1e38),
        (SGD(1e38, momentum=0.9), 1e3),
        (SGD(1.0, momentum=0.9), 3e38),
        (Adam(0.1), 1e30),
        (Adam(eps=0), 0),
    ],
    ids=repr,
)
def test_steps_that_overflow_change_neither_state_nor_parameters(optimizer, g):
    layer, optimizer = Line(), copy.deepcopy(optimizer)
    gradients = {"w": np.full((2, 2), 0.1, F32), "b": np.full(1, g, F32)}
    before, remembered = layer.parameters, None
    with pytest.raises(TrainingError, match="the step of 'b' is not finite in float32\nHINT: clip the gradients"):
        for _ in range(3):
            before, remembered = layer.parameters, seen(optimizer)
            optimizer.update(layer, gradients)
    assert layer.parameters is before and seen(optimizer) == remembered


def test_an_optimizer_of_another_layer_is_refused():
    optimizer, layer = Adam(), Line()
    optimizer.step({"b": np.ones(7)}, {"b": np.ones(7)})
    before, remembered = layer.parameters, seen(optimizer)
    with pytest.raises(
        TrainingError, match=r"knows another 'b'\n  remembered     : \(7,\)\n.*\(1,\)\nHINT: make one optim"
    ):
        optimizer.update(layer, {"b": [1.0]})
    assert layer.parameters is before and seen(optimizer) == remembered


@stateful
def test_an_optimizer_of_another_layer_of_the_same_shapes_is_refused(optimizer):
    optimizer, layer, other = copy.deepcopy(optimizer), Line(), Line()
    gradients = {"w": np.ones((2, 2)), "b": [2.0]}
    optimizer.update(layer, gradients)
    before, remembered = other.parameters, seen(optimizer)
    with pytest.raises(TrainingError, match="remembers another layer\nHINT: make one optimizer for each layer"):
        optimizer.update(other, gradients)
    assert other.parameters is before and seen(optimizer) == remembered
    optimizer.update(layer, gradients)
    for goes_on in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        goes_on.update(copy.deepcopy(layer), gradients)


def test_an_optimizer_that_remembers_nothing_serves_several_layers():
    optimizer = SGD(0.1)
    for layer in (Line(), Line()):
        optimizer.update(layer, {"w": np.ones((2, 2))})


def test_what_steps_cannot_be_taken_on():
    for kind in (SGD, Adam, AdamW):
        with pytest.raises(InvalidInputError, match="parameters are a ndarray\nHINT: give a mapping"):
            kind().step(np.ones(2), {"w": np.ones(2)})
        with pytest.raises(InvalidInputError, match="parameter 'w' has dtype int64"):
            kind().step({"w": np.ones(2, int)}, {"w": np.ones(2)})
        with pytest.raises(TrainingError, match="the step of 'w' is not finite"):
            kind().step({"w": np.array([1.0, np.nan])}, {"w": np.ones(2)})
        with pytest.raises(InvalidInputError, match=r"layer is a dict\nHINT: .*step\(parameters, gradients\)"):
            kind().update({"w": np.ones(2)}, {"w": np.ones(2)})


# --- on layers -------------------------------------------------------------------------------------------------------
@cases
@both_dtypes
def test_updating_a_layer_is_a_step_on_its_parameters(kind, settings, dtype):
    layer, one, other = Line(dtype), kind(**settings), kind(**settings)
    rng = np.random.default_rng(4)
    for _ in range(3):
        gradients = types.SimpleNamespace(parameters={"w": rng.standard_normal((2, 2)), "b": None})
        before = layer.parameters
        want = one.step(before, gradients)
        other.update(layer, gradients)
        assert (
            layer.parameters is not before and layer.parameters.dtype == dtype and list(layer.parameters) == ["w", "b"]
        )
        for name, p in layer.parameters.items():
            np.testing.assert_array_equal(p, want[name])


@pytest.mark.parametrize("optimizer", [SGD(0.3, momentum=0.8), Adam(0.2), AdamW(0.2, weight_decay=0.0)], ids=repr)
def test_a_layer_learns_from_clipped_means_of_micro_batches(optimizer):
    rng, layer, optimizer = np.random.default_rng(5), Line(F64), copy.deepcopy(optimizer)
    x = rng.standard_normal((60, 2))
    y = x @ [[1.5, -2.0], [0.5, 3.0]] + 0.25
    for step in range(400):
        layer.zero_grad()
        for part in range(3):
            layer.accumulate(layer.loss(x[part::3], y[part::3])[1])
        optimizer.lr = 0.2 if step < 200 else 0.02
        optimizer.update(layer, clip_by_norm(layer.mean_gradients(), 1.0)[0])
    np.testing.assert_allclose(layer.get_parameters(), [1.5, -2, 0.5, 3, 0.25], atol=1e-4)


def test_no_step_is_lost_between_threads():
    layer, optimizer = Line(F64), Adam(1e-3)

    def train():
        for _ in range(50):
            optimizer.update(layer, {"b": [1.0]})

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert optimizer.state["b"].steps == 200
    np.testing.assert_allclose(layer.parameters["b"], Line(F64).parameters["b"] - 200 * 1e-3, rtol=1e-6)
