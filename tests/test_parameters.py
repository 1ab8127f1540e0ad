"""Parameter sets never change, layers swap them whole, and nothing that is refused leaves a trace."""

import copy
import itertools
import multiprocessing
import os
import pickle
import sys
import threading
import time
import types

import numpy as np
import pytest
from toy import Line, state

from ruvector_numba import DimensionMismatchError, InvalidConfigError, InvalidInputError, TrainingError
from ruvector_numba.parameters import ParameterSet, Trainable

F32, F64 = np.float32, np.float64


def arrays(dtype=F64):
    rng = np.random.default_rng(0)
    return {
        "w": rng.standard_normal((2, 3)).astype(dtype), "b": rng.standard_normal(3).astype(dtype),
        "scale": np.array(2.0, dtype), "none": np.zeros((0, 4), dtype),
    }  # fmt: skip


# --- ParameterSet --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_set_is_views_of_one_flat_copy(dtype):
    given = arrays(dtype)
    parameters = ParameterSet(given)
    assert list(parameters) == ["w", "b", "scale", "none"] and len(parameters) == 4 and "b" in parameters
    assert parameters.shapes == {"w": (2, 3), "b": (3,), "scale": (), "none": (0, 4)}
    flat = parameters.flat
    assert flat.dtype == parameters.dtype == dtype and flat.flags.c_contiguous
    np.testing.assert_array_equal(flat, np.concatenate([x.ravel() for x in given.values()]))
    for name, x in parameters.items():
        np.testing.assert_array_equal(x, given[name])
        assert not np.shares_memory(x, given[name]) and (np.shares_memory(x, flat) or not x.size)
    with pytest.raises(KeyError):
        parameters["v"]


def test_transposed_and_strided_arrays_are_copied_in_their_own_order():
    x = np.arange(24.0).reshape(4, 6)
    parameters = ParameterSet({"t": x.T, "s": x[::2, ::-3]})
    np.testing.assert_array_equal(parameters["t"], x.T)
    np.testing.assert_array_equal(parameters["s"], x[::2, ::-3])
    assert parameters["t"].flags.c_contiguous


def test_a_set_cannot_be_written_to():
    parameters = ParameterSet(arrays())
    for x in (parameters.flat, parameters["w"], parameters.as_type(F32)["w"], parameters.with_flat(np.ones(10))["w"]):
        with pytest.raises(ValueError, match="read-only"):
            x[...] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            x.flags.writeable = True
    with pytest.raises(InvalidInputError, match=r"never changes\nHINT: .*\{\*\*layer.parameters, 'w': x\}"):
        parameters["w"] = np.ones((2, 3))
    with pytest.raises(InvalidInputError, match=r"HINT: layer.set_parameters\(x\)"):
        Line().parameters = parameters
    with pytest.raises(AttributeError):
        parameters.dtype = F32
    parameters.shapes["w"] = (6,)
    parameters["w"].shape = (6,)
    assert parameters["w"].shape == parameters.shapes["w"] == (2, 3)


def test_a_set_that_comes_from_a_copy_cannot_be_written_to_either():
    parameters = ParameterSet(arrays(F32))
    for other in (copy.deepcopy(parameters), copy.copy(parameters), pickle.loads(pickle.dumps(parameters))):
        assert other == parameters and other.dtype == F32 and list(other) == list(parameters)
        with pytest.raises(ValueError, match="read-only"):
            other["w"][...] = 1
        with pytest.raises(ValueError, match="read-only"):
            other.flat[...] = 1


def test_equality_is_by_names_shapes_dtype_and_numbers():
    a, b = ParameterSet({"w": [1.0, 2.0], "b": [3.0]}), ParameterSet({"w": [1.0, 2.0], "b": [3.0]})
    assert a == b and a != a.as_type(F32) and a != a.with_flat([1.0, 2.0, 4.0]) and a != "ab"
    assert a != ParameterSet({"b": [1.0, 2.0], "w": [3.0]}) and a != ParameterSet({"w": [1.0], "b": [2.0, 3.0]})
    with pytest.raises(TypeError, match="unhashable"):
        hash(a)


def test_repr_names_the_shapes():
    assert (
        repr(ParameterSet(arrays(F32))) == "ParameterSet(float32, 10 numbers: w (2, 3), b (3,), scale (), none (0, 4))"
    )
    assert repr(ParameterSet({})) == "ParameterSet(float32, 0 numbers)"


def test_as_type_is_made_once():
    parameters = ParameterSet(arrays())
    cast = parameters.as_type(F32)
    assert parameters.as_type("float64") is parameters and parameters.as_type(np.dtype(F32)) is cast
    assert cast.dtype == F32 and cast.shapes == parameters.shapes
    np.testing.assert_array_equal(cast.flat, parameters.flat.astype(F32))


def test_with_flat_keeps_its_dtype_and_shapes():
    parameters, flat = ParameterSet(arrays()), np.arange(10, dtype=F32)
    other = parameters.with_flat(flat)
    flat[:] = -1
    assert other.dtype == F32 and other.shapes == parameters.shapes and other["scale"] == 9
    np.testing.assert_array_equal(other["b"], [6, 7, 8])


def test_an_empty_set():
    parameters = ParameterSet({})
    assert not parameters and parameters.flat.shape == (0,)
    assert parameters.with_flat([]).dtype == F64 and pickle.loads(pickle.dumps(parameters)) == parameters


SETS = [
    ([1.0], InvalidInputError, "parameters are a list, not a mapping"),
    ({1: [1.0]}, InvalidInputError, "parameter names must be str, got 1"),
    ({"w": np.ones(2, int)}, InvalidInputError, r"w has dtype int64.*\n.*astype\(numpy.float32\)"),
    ({"w": np.ones(2, np.float16)}, InvalidInputError, "w has dtype float16"),
    ({"w": np.ones(2, ">f8")}, InvalidInputError, "w has dtype >f8"),
    ({"w": np.ones(2, complex)}, InvalidInputError, "w has dtype complex128"),
    ({"w": "text"}, InvalidInputError, "w has dtype <U4"),
    ({"w": None}, InvalidInputError, "w is None"),
    ({"w": [[1.0], [1.0, 2.0]]}, InvalidInputError, "w cannot become an array.*\n.*rows of equal length"),
    (
        {"w": np.ones(2), "b": np.ones(2, F32)},
        InvalidInputError,
        "differ in dtype\n  w.dtype: float64\n  b.dtype: float32",
    ),
    ({"w": [1.0], "b": [1.0, np.nan]}, TrainingError, "parameter 'b' is not finite\nHINT: .*float64"),
    ({"w": [-np.inf]}, TrainingError, "parameter 'w' is not finite"),
]


@pytest.mark.parametrize(("given", "kind", "words"), SETS)
def test_what_is_no_set(given, kind, words):
    with pytest.raises(kind, match=words):
        ParameterSet(given)


@pytest.mark.parametrize("dtype", [int, np.float16, "f2", complex, "no type", 3.5, ">f4", "float"])
def test_as_type_takes_two_dtypes_only(dtype):
    parameters = ParameterSet(arrays(F32))
    if dtype == "float":  # is float64 to NumPy
        assert parameters.as_type(dtype).dtype == F64
    else:
        with pytest.raises(InvalidInputError, match="dtype is"):
            parameters.as_type(dtype)


def test_as_type_refuses_what_float32_cannot_hold():
    with pytest.raises(TrainingError, match=r"'b' is not finite\nHINT: .*fit float32"):
        ParameterSet({"w": [1.0], "b": [1e300]}).as_type(F32)


# --- Trainable: getting and setting --------------------------------------------------------------------------------
FLATS = [
    (np.ones(4), InvalidConfigError, "Invalid configuration: Expected 5 parameters, got 4\nHINT: get_parameters.*w, b"),
    (np.ones(0), InvalidConfigError, "Expected 5 parameters, got 0"),
    ([1.0] * 6, InvalidConfigError, "Expected 5 parameters, got 6"),
    (np.ones((5, 1)), InvalidInputError, r"flat has 2 axes\n  flat.shape: \(5, 1\)\nHINT: .*ravel"),
    (1.0, InvalidInputError, "flat has 0 axes"),
    (np.ones(5, int), InvalidInputError, "flat has dtype int64"),
    (np.ones(5, complex), InvalidInputError, "flat has dtype complex128"),
    (None, InvalidInputError, "flat is None"),
    ("five!", InvalidInputError, "flat has dtype <U5"),
    ([1, 2, 3, 4, np.nan], TrainingError, "parameter 'b' is not finite"),
    ([np.inf, 2, 3, 4, 5], TrainingError, "parameter 'w' is not finite"),
]
MAPPINGS = [
    (
        {"w": np.ones((2, 2))},
        InvalidInputError,
        "other names\n  given   : w\n  expected: w, b\nHINT.*layer.parameters, 'w': x",
    ),
    ({"w": np.ones((2, 2)), "b": np.ones(1), "v": 1.0}, InvalidInputError, "other names"),
    ({}, InvalidInputError, "other names"),
    ({"w": np.ones((2, 2)), "b": np.ones(2)}, DimensionMismatchError, r"expected \(1,\), got \(2,\)\n  b.shape "),
    ({"w": np.ones(4), "b": np.ones(1)}, DimensionMismatchError, r"expected \(2, 2\), got \(4,\)\n  w.shape "),
    ({"w": np.ones((2, 2)), "b": np.ones(1, F32)}, InvalidInputError, "differ in dtype"),
    ({"w": np.ones((2, 2), int), "b": np.ones(1)}, InvalidInputError, "w has dtype int64"),
    ({"w": np.ones((2, 2)), "b": [np.nan]}, TrainingError, "'b' is not finite"),
]


@pytest.mark.parametrize(("given", "kind", "words"), FLATS + MAPPINGS)
def test_what_parameters_cannot_be_set_to(given, kind, words):
    layer = Line()
    before = layer.parameters
    with pytest.raises(kind, match=words) as caught:
        layer.set_parameters(given)
    assert type(caught.value) is kind and layer.parameters is before


def test_setting_and_getting():
    layer = Line()
    assert layer.parameter_count() == 5 and layer.parameters.dtype == F32
    before, flat = layer.parameters, layer.get_parameters()
    flat += 1  # a copy
    assert layer.parameters == before
    layer.set_parameters(flat)
    np.testing.assert_array_equal(layer.get_parameters(), before.flat + F32(1))
    assert layer.parameters.dtype == F32 and before == Line().parameters
    layer.set_parameters(flat.astype(F64))
    assert layer.parameters.dtype == layer.get_parameters().dtype == F64
    layer.set_parameters(range(5))
    np.testing.assert_array_equal(layer.parameters["w"], [[0, 1], [2, 3]])
    layer.set_parameters({"b": np.full(1, 9, F32), "w": np.eye(2, dtype=F32)})  # in any order
    assert list(layer.parameters) == ["w", "b"] and layer.parameters.dtype == F32
    np.testing.assert_array_equal(layer.get_parameters(), [1, 0, 0, 1, 9])
    layer.set_parameters(Line().parameters)
    assert layer.parameters == before


# --- Trainable: learning -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [F32, F64])
def test_an_update_is_a_step_down_the_gradients_in_the_dtype_of_the_layer(dtype):
    layer, rng = Line(dtype), np.random.default_rng(1)
    g = {"w": rng.standard_normal((2, 2)), "b": rng.standard_normal(1)}
    before = layer.parameters
    layer.update_parameters(g, 0.3)
    for name, p in before.items():
        np.testing.assert_array_equal(layer.parameters[name], p - dtype(0.3) * g[name].astype(dtype))
        assert layer.parameters[name].dtype == dtype


def test_gradients_come_as_an_object_or_a_mapping_and_may_be_missing():
    w, b = np.ones((2, 2)), np.ones(1)
    results = []
    for gradients in (
        {"w": w},
        {"w": w, "b": None},
        types.SimpleNamespace(parameters={"w": w}, query=b),
        {"w": w.tolist()},
    ):
        layer = Line()
        before = layer.parameters
        layer.update_parameters(gradients, np.float64(0.5))
        np.testing.assert_array_equal(layer.parameters["b"], before["b"])
        results.append(layer.get_parameters())
    np.testing.assert_array_equal(results[0][:4], before.flat[:4] - F32(0.5))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    layer.update_parameters({}, 1.0)
    np.testing.assert_array_equal(layer.get_parameters(), results[-1])


def wrong(bad, index=(0,)):
    g = {"w": np.ones((2, 2)), "b": np.ones(1)}
    g["b"][index] = bad
    return g


GRADIENTS = [
    (wrong(np.nan), "the gradient of 'b' is not finite in 1 of 1 places\nHINT: leave this step out"),
    (wrong(-np.inf), "the gradient of 'b' is not finite"),
    (wrong(1e300), "the gradient of 'b' is not finite"),  # in float32
    ({"w": np.full((2, 2), np.nan)}, "the gradient of 'w' is not finite in 4 of 4 places"),
    (
        {"w": np.ones((2, 3))},
        r"'w' has the wrong shape\n  gradient.shape : \(2, 3\)\n  parameter.shape: \(2, 2\)\nHINT",
    ),
    ({"w": np.ones((2, 2)), "b": 1.0}, "the gradient of 'b' has the wrong shape"),
    ({"w": np.ones((1, 2, 2))}, "wrong shape"),
    ({"v": np.ones(1)}, "there is no parameter 'v'\n  gradients : v\n  parameters: w, b\nHINT: are they from another"),
    ({"w": np.ones((2, 2)), 3: np.ones(1)}, "there is no parameter 3"),
    ({"w": np.ones((2, 2), int)}, "the gradient of 'w' has dtype int64"),
    ({"w": "much"}, "the gradient of 'w' has dtype"),
    ({"w": [[1.0], [1.0, 2.0]]}, "the gradient of 'w' cannot become an array"),
    (np.ones(5), "gradients are a ndarray\nHINT: give what backward"),
    (None, "gradients are a NoneType"),
    (types.SimpleNamespace(parameters=[1]), "gradients are a SimpleNamespace"),
]


@pytest.mark.parametrize(("gradients", "words"), GRADIENTS)
@pytest.mark.parametrize("how", ["update", "accumulate"])
def test_bad_gradients_change_nothing(gradients, words, how):
    layer = Line()
    layer.accumulate({"w": np.ones((2, 2))})
    before, mean = layer.parameters, layer.mean_gradients()
    with pytest.raises(TrainingError, match=words):
        layer.update_parameters(gradients, 0.1) if how == "update" else layer.accumulate(gradients)
    assert layer.parameters is before and list(layer.mean_gradients()) == ["w"]
    np.testing.assert_array_equal(layer.mean_gradients()["w"], mean["w"])


@pytest.mark.parametrize(
    "rate", [np.nan, np.inf, -np.inf, "0.1", None, True, 1j, np.ones(1), 10**400], ids=lambda x: repr(x)[:20]
)
def test_bad_learning_rates_change_nothing(rate):
    layer = Line()
    before = layer.parameters
    with pytest.raises(TrainingError, match=r"learning_rate is .*\nHINT: give a (finite|smaller) number"):
        layer.update_parameters(wrong(1), rate)
    assert layer.parameters is before


def test_an_update_that_overflows_changes_nothing():
    layer = Line()
    before = layer.parameters
    with pytest.raises(TrainingError, match=r"'b' is not finite\nHINT: .*lower the learning rate"):
        layer.update_parameters({"w": np.ones((2, 2)), "b": [3e38]}, 10.0)
    assert layer.parameters is before


def test_accumulated_gradients_are_the_mean_over_micro_batches():
    layer, rng = Line(), np.random.default_rng(2)
    batches = [{"w": rng.standard_normal((2, 2)).astype(F32), "b": None} for _ in range(7)]
    batches[3]["b"] = np.full(1, 14, F32)  # the others count as 0
    for g in batches:
        layer.accumulate(types.SimpleNamespace(parameters=g))
    mean = layer.mean_gradients()
    assert mean["w"].dtype == mean["b"].dtype == F32 and mean["b"] == 2
    np.testing.assert_array_equal(mean["w"], np.mean([F64(g["w"]) for g in batches], axis=0).astype(F32))
    mean["w"][:] = 0  # a copy
    batches[0]["w"][:] = 0
    assert np.all(layer.mean_gradients()["w"] != 0)
    layer.update_parameters(layer.mean_gradients(), 0.1)
    layer.zero_grad()
    with pytest.raises(TrainingError, match="no gradients were accumulated\nHINT: call accumulate"):
        layer.mean_gradients()
    with pytest.raises(TrainingError, match="no gradients"):
        Line().mean_gradients()
    layer.accumulate({"w": np.ones((2, 2))})
    assert list(layer.mean_gradients()) == ["w"] and np.all(layer.mean_gradients()["w"] == 1)


def test_layers_accumulate_apart():
    one, other = Line(), Line()
    one.accumulate({"b": [1.0]})
    with pytest.raises(TrainingError, match="no gradients"):
        other.mean_gradients()


def test_regularization_and_its_gradient():
    layer = Line(F64)
    flat, l2 = layer.get_parameters(), 0.3
    assert layer.regularization_loss(l2) == pytest.approx(l2 * np.sum(flat**2), rel=1e-14)
    assert isinstance(layer.regularization_loss(l2), float) and layer.regularization_loss(0) == 0
    got = ParameterSet(layer.regularization_gradients(l2)).flat
    for i in range(5):
        losses = []
        for side in (1e-5, -1e-5):
            layer.set_parameters(flat + side * np.eye(5)[i])
            losses.append(layer.regularization_loss(l2))
        assert got[i] == pytest.approx((losses[0] - losses[1]) / 2e-5, abs=1e-9)
    single = Line(F32)
    assert {g.dtype for g in single.regularization_gradients(1e-3).values()} == {np.dtype(F32)}
    single.update_parameters(single.regularization_gradients(0.5), 1.0)  # p - p
    assert not single.get_parameters().any()
    for bad in (np.nan, np.inf, "1", None, False):
        for method in (single.regularization_loss, single.regularization_gradients):
            with pytest.raises(TrainingError, match="l2_weight is"):
                method(bad)


@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-2), (F64, 1e-6)])
def test_scipy_minimizes_over_flat_parameters(dtype, tolerance):
    """It searches in the dtype it begins with, and the layer takes that over."""
    from scipy.optimize import minimize

    rng = np.random.default_rng(3)
    x, layer = rng.standard_normal((40, 2)), Line(F32)
    y = x @ [[1.5, -2.0], [0.5, 3.0]] + 0.25

    def objective(flat):
        layer.set_parameters(flat)
        loss, gradients = layer.loss(x, y)
        return loss, ParameterSet(gradients).flat

    best = minimize(objective, layer.get_parameters().astype(dtype), jac=True, method="L-BFGS-B")
    assert best.success and layer.parameters.dtype == dtype
    layer.set_parameters(best.x)
    np.testing.assert_allclose(layer.get_parameters(), [1.5, -2, 0.5, 3, 0.25], atol=tolerance)


# --- Trainable: copies, threads, processes -------------------------------------------------------------------------
def test_layers_are_pickled_and_copied_apart():
    layer = Line()
    layer.accumulate({"b": [2.0]})
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert state(other) == state(layer) and other.mean_gradients()["b"] == 2
        other.update_parameters({"b": [1.0]}, 1.0)
        other.zero_grad()
        assert state(layer) == state(Line()) and layer.mean_gradients()["b"] == 2


def level(value, n=5000):
    """A layer all of whose parameters are one number, so that a mixture of two sets shows."""
    layer = Trainable()
    layer._parameters = ParameterSet({f"p{i}": np.full(n, value, F64) for i in range(4)})
    return layer


@pytest.fixture
def quick_switches():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def run(threads):
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_eight_readers_always_see_a_whole_set(quick_switches):
    layer, done, torn, seen = level(0.0), threading.Event(), [], [set() for _ in range(8)]
    ones = {name: np.ones(5000) for name in layer.parameters}

    def write():
        deadline = time.monotonic() + 30
        for k in itertools.count():
            if (k > 100 and min(map(len, seen)) > 5) or time.monotonic() > deadline:
                break
            if k % 3 == 0:
                layer.set_parameters(np.full(20000, float(k)))
            elif k % 3 == 1:
                layer.set_parameters({name: k * g for name, g in ones.items()})
            else:
                layer.update_parameters(ones, -1.0)
        done.set()

    def read(numbers):
        while not done.is_set():
            parameters = layer.parameters
            parts = [*parameters.values(), layer.get_parameters(), parameters.as_type(F32).flat]
            torn.extend(x for x in parts if x.min() != x.max())
            if len({x[0] for x in [*parts[:4], parts[5]]}) > 1:
                torn.append(parts)
            numbers.add(parts[0][0])

    run([threading.Thread(target=read, args=(numbers,)) for numbers in seen] + [threading.Thread(target=write)])
    assert not torn
    assert min(map(len, seen)) > 5  # each did read while the writer wrote


def test_no_update_is_lost_between_writers(quick_switches):
    layer = level(0.0, n=200)
    ones = {name: np.ones(200) for name in layer.parameters}

    def write():
        for _ in range(100):
            layer.update_parameters(ones, -1.0)
            layer.accumulate(ones)

    run([threading.Thread(target=write) for _ in range(4)])
    np.testing.assert_array_equal(layer.get_parameters(), 400)
    assert layer._accumulated[0] == 400


def child(layer, connection):
    layer.update_parameters({"b": np.ones(1)}, 1.0)
    connection.send(layer.get_parameters())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_in_the_midst_of_a_write_can_write():
    layer, writing, finish = Line(), threading.Event(), threading.Event()

    def slow(parameters):
        writing.set()
        finish.wait(60)
        return parameters

    writer = threading.Thread(target=layer._change, args=(slow,))
    writer.start()
    writing.wait(60)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(layer, theirs))
    process.start()
    answered = ours.poll(30)
    finish.set()
    writer.join()
    if not answered:
        process.kill()
    process.join()
    assert answered and ours.recv()[4] == layer.get_parameters()[4] - 1
