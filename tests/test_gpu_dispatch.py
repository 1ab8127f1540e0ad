"""Which calls go to a GPU, told by what their arrays say of themselves. Needs neither a GPU nor numba-cuda."""

import sys
import types

import numpy as np
import pytest

import ruvector_numba as rv
from ruvector_numba import gpu
from ruvector_numba.errors import InvalidConfigError, InvalidInputError, InvalidMaskError
from ruvector_numba.gpu import arrays as module
from ruvector_numba.gpu.dense import gradient


class FakeCupy:
    """It speaks the interface; its memory is at an address that nobody may read."""

    def __init__(self, shape, dtype="<f4", address=4096, strides=None):
        self.shape = shape
        self.__dict__["interface"] = dict(
            shape=shape, typestr=dtype, data=(address, False), version=3, strides=strides, stream=None
        )

    @property
    def __cuda_array_interface__(self):
        return self.interface


class FakeDlpack:
    def __init__(self, kind):
        self.kind = kind

    def __dlpack_device__(self):
        return self.kind, 0

    def __dlpack__(self, **_):
        raise AssertionError("nothing asks for its memory")


class FakeTensor:
    """As torch's: every tensor has the interface, and only those on a GPU may be asked for it."""

    def __init__(self, is_cuda):
        self.is_cuda = is_cuda

    @property
    def __cuda_array_interface__(self):
        raise AttributeError("tensors on the CPU have none")


FakeTensor.__module__ = "torch"


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(module, "problem", lambda: ("there is no driver", "install one"))
    monkeypatch.setattr(module, "_local", types.SimpleNamespace())


def test_arrays_say_where_they_are():
    assert gpu.is_on_gpu(FakeCupy((2, 3)))
    assert gpu.is_on_gpu(FakeTensor(True)) and not gpu.is_on_gpu(FakeTensor(False))
    assert gpu.is_on_gpu(FakeDlpack(2)) and not gpu.is_on_gpu(FakeDlpack(1))
    for x in (np.zeros(3), np.float32(1), [1.0], None, "cuda", np.ma.zeros(3)):
        assert not gpu.is_on_gpu(x)


def test_an_array_that_cannot_say_where_it_lies_is_not_on_a_gpu():
    class Speaks(FakeDlpack):
        def __dlpack_device__(self):
            raise self.kind

    assert not gpu.is_on_gpu(Speaks(BufferError("read-only")))
    with pytest.raises(MemoryError):  # not what it is asked for: not for us to hide
        gpu.is_on_gpu(Speaks(MemoryError()))


def test_calls_with_such_arrays_go_to_the_gpu_whichever_it_is(no_gpu):
    there, here = FakeCupy((1, 5, 8)), np.zeros((1, 5, 8), np.float32)
    for arrays in ((there, there, there), (FakeDlpack(2), FakeDlpack(2), FakeDlpack(2))):
        for call in (rv.scaled_dot_product_attention, rv.attention_forward):
            with pytest.raises(InvalidConfigError, match="there is no driver"):
                call(*arrays)
    with pytest.raises(InvalidInputError, match="query is on the CPU, other arrays are on the GPU"):
        rv.scaled_dot_product_attention(here, there, there)


def test_arrays_of_numpy_stay_on_the_cpu_unless_asked(no_gpu):
    x = np.ones((1, 5, 8), np.float32)
    assert type(rv.scaled_dot_product_attention(x, x, x)) is np.ndarray
    assert type(rv.scaled_dot_product_attention(x, x, x, device="cpu")) is np.ndarray
    with pytest.raises(InvalidConfigError, match="no GPU can be used: there is no driver") as caught:
        rv.scaled_dot_product_attention(x, x, x, device="cuda")
    assert "install one" in str(caught.value)
    with pytest.raises(InvalidInputError, match="device is 'gpu'"):
        rv.attention_forward(x, x, x, device="gpu")
    with pytest.raises(InvalidInputError, match="device is array"):
        rv.attention_forward(x, x, x, device=np.zeros(2))


def test_arrays_of_a_gpu_are_not_taken_to_the_cpu():
    x, graph = FakeCupy((1, 5, 8)), rv.CSRGraph.from_edge_index([[0], [1]], num_nodes=5)
    config = rv.AttentionConfig(8, 1)
    calls = [rv.scaled_dot_product_attention, rv.attention_forward, rv.MultiHeadAttention(config, seed=0)]
    calls += [lambda *a, **more: rv.neighbor_attention(*a, graph, **more)]
    calls += [lambda x, *_, **more: rv.GAT(8, 2)(x, graph, **more)]
    for call in calls:
        with pytest.raises(InvalidInputError, match="device is 'cpu', and an array lies on a GPU") as caught:
            call(x, x, x, device="cpu")
        assert "copy it" in caught.value.hint


def test_what_the_cpu_refuses_is_not_moved(no_gpu):
    x = np.ones((1, 5, 8), np.float32)
    odd = {
        "numpy.ma": np.ma.masked_greater(x, 0), "cannot become an array": [[1.0], [1.0, 2.0]],
        "dtype object": x.astype(object), "dtype >f4": x.astype(">f4"), "dtype \\|V2": np.zeros((1, 5, 8), "V2"),
    }  # fmt: skip
    graph = rv.CSRGraph.from_edge_index([[0], [1]], num_nodes=5)
    layer = rv.MultiHeadAttention(rv.AttentionConfig(8, 1), seed=0)
    for message, given in odd.items():
        for call in (rv.scaled_dot_product_attention, layer):
            with pytest.raises(InvalidInputError, match=f"query .*{message}"):
                call(given, x, x, device="cuda")
        with pytest.raises(InvalidInputError, match=f"query .*{message}"):
            rv.neighbor_attention(given, x, x, graph, device="cuda")
        with pytest.raises(InvalidInputError, match=f"x_source .*{message}"):
            rv.GAT((8, 8), 2)((given, x), graph, device="cuda")
    for mask in (np.ones((5, 5), np.uint8), np.ma.ones((5, 5)), [[True], [True, False]]):
        with pytest.raises(InvalidMaskError):
            rv.scaled_dot_product_attention(x, x, x, mask, device="cuda")
    with pytest.raises(InvalidInputError, match="out is given"):
        rv.scaled_dot_product_attention(x, x, x, out=np.empty_like(x), device="cuda")
    with pytest.raises(InvalidInputError, match="x is a tuple of 3"):
        rv.GAT(8, 2)((x, x, x), graph, device="cuda")
    with pytest.raises(InvalidInputError, match="key is None") as caught:
        gpu.floats("key", None)
    assert "device" not in caught.value.hint


def test_what_is_missing_is_named(monkeypatch):
    import importlib.util

    monkeypatch.setattr(module, "_works", False)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "numba_cuda" else found(name, *a))
    reason, hint = gpu.problem()
    assert "numba-cuda is not installed" in reason and hint == 'pip install ".[cuda]", in a clone of ruvector-numba'
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: object() if name == "numba_cuda" else None)
    cuda = types.SimpleNamespace(is_available=lambda: False)
    monkeypatch.setitem(sys.modules, "numba.cuda", cuda)
    monkeypatch.setattr("numba.cuda", cuda, raising=False)
    errors = types.SimpleNamespace(CudaDriverError=type("CudaDriverError", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "numba.cuda.cudadrv.error", errors)
    assert "no NVIDIA driver" in gpu.problem()[0]
    cuda.is_available = lambda: True
    cuda.get_current_device = lambda: types.SimpleNamespace(compute_capability=(7, 5))
    assert "compute capability 7.5" in gpu.problem()[0]
    cuda.get_current_device = fails(errors.CudaDriverError("CUDA_ERROR_DEVICE_UNAVAILABLE"))
    reason, hint = gpu.problem()
    assert "CUDA_ERROR_DEVICE_UNAVAILABLE" in reason and "try again" in hint
    cuda.is_available = fails(ImportError("no library of NVVM"))
    assert "numba-cuda does not start: no library of NVVM" in gpu.problem()[0]
    cuda.is_available = fails(ZeroDivisionError())  # an error of somebody's program: nothing to install
    with pytest.raises(ZeroDivisionError):
        gpu.problem()
    cuda.is_available = lambda: True
    cuda.get_current_device = lambda: types.SimpleNamespace(compute_capability=(9, 0), name=b"NVIDIA H200")
    assert gpu.problem() is None  # what was missing is there now
    assert gpu.describe() == "NVIDIA H200, compute capability 9.0"
    cuda.is_available = fails(ImportError("never asked again"))
    assert gpu.problem() is None


def fails(error):
    def call():
        raise error

    return call


def test_arrays_are_read_where_they_lie():
    seen = gpu.Library().view(FakeCupy((2, 3, 8), "<f2", 4096, (96, 32, 2)))
    assert (seen.data, seen.shape, seen.strides, seen.element) == (4096, (2, 3, 8), (48, 16, 1), "float16")
    assert seen.aligned
    assert gpu.Library().view(FakeCupy((2, 8), "<V2")).element == "bfloat16"
    contiguous = gpu.Library().view(FakeCupy((2, 3, 5)))
    assert contiguous.strides == (15, 5, 1) and not contiguous.aligned
    assert not gpu.Library().view(FakeCupy((2, 8), address=4100)).aligned


def test_types_that_the_gpu_does_not_take_are_refused():
    with pytest.raises(InvalidInputError, match="query has dtype float64 on the GPU"):
        gpu.floats("query", FakeCupy((2, 3), "<f8"))
    words = FakeCupy((2, 8), "<u2")
    assert gpu.floats("query", words, "bfloat16").element == "bfloat16"
    with pytest.raises(InvalidInputError, match="dtype uint16"):
        gpu.floats("query", words)
    assert gpu.floats("query", FakeCupy((2, 8), "<V2"), "bfloat16").element == "bfloat16"
    for dtype in ("float16", "float32", "uint16", np.float16):
        with pytest.raises(InvalidInputError, match="dtype is") as caught:
            gpu.floats("query", words, dtype)
        assert "bfloat16" in caught.value.hint
    for kind, name in (("<i2", "int16"), ("<f4", "float32"), ("<f2", "float16")):
        with pytest.raises(InvalidInputError, match=f"query has dtype {name}, and dtype is 'bfloat16'"):
            gpu.floats("query", FakeCupy((2, 8), kind), "bfloat16")


def test_bits_are_gradients_of_bfloat16_alone():
    words = FakeCupy((2, 8), "<u2")
    assert gradient("grad_output", words, (2, 8), "bfloat16").element == "bfloat16"
    for x, element in ((words, "float16"), (FakeCupy((2, 8), "<i2"), "bfloat16"), (FakeCupy((2, 8), "<i2"), "float16")):
        with pytest.raises(InvalidInputError, match=f"grad_output has dtype u?int16, the call had {element}"):
            gradient("grad_output", x, (2, 8), element)
    with pytest.raises(InvalidInputError, match="grad_lse has dtype uint16, the call had float32"):
        gradient("grad_lse", words, (2, 8), "float32")


@pytest.mark.parametrize("package, kind", [("torch", "torch"), ("cupy", "cupy"), ("other", "numba")])
def test_results_are_made_by_the_library_of_the_inputs(package, kind):
    array = type("ndarray", (FakeCupy,), {"__module__": package, "device": types.SimpleNamespace(index=0)})
    assert gpu.library(array((2, 3))).name == kind


def test_what_runs_on_a_cpu_alone_says_so():
    class There(FakeCupy):
        def __array__(self, *_, **__):
            raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    with pytest.raises(InvalidInputError, match="scores is on the GPU") as caught:
        rv.functional.softmax(There((2, 3)))
    assert "copy it to the CPU" in str(caught.value)
