"""Arrays on a GPU: knowing one, reading it where it lies, and making results in its owner's library.

An array is one on a GPU if it is a torch tensor or CuPy or Numba array there, or if it speaks
``__cuda_array_interface__`` or DLPack and says so. Nothing is imported until one is seen, and arrays of NumPy never
move unless ``device="cuda"`` is given. Results are arrays of the library that `query` came from, made on its current
stream.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Shape
from ..checks import check_bits
from ..errors import InvalidConfigError, InvalidInputError

__all__ = ["GpuArray", "is_on_gpu", "problem"]

ELEMENTS = ("float32", "float16", "bfloat16")
_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "bool": 1, "uint8": 1, "int32": 4, "int64": 8}
_DLPACK_CUDA = 2


# --- is there one ------------------------------------------------------------------------------------------------
def problem() -> tuple[str, str] | None:
    """What is missing and what would help; None if a GPU can be used, or is simulated. Only that is remembered: what is
    missing now may be there at the next call.

    Examples
    --------
    >>> from ruvector_numba import gpu
    >>> isinstance(gpu.problem(), (tuple, type(None)))
    True
    """
    global _works
    found = None if _works else _looked_for()
    _works = found is None
    return found


_works = False  # whether a GPU was found that can be used


def _looked_for() -> tuple[str, str] | None:
    import importlib.util

    import numba

    install = 'pip install ".[cuda]", in a clone of ruvector-numba'
    if importlib.util.find_spec("numba_cuda") is None:
        return "the package numba-cuda is not installed", install
    try:
        from numba import cuda

        if numba.config.ENABLE_CUDASIM:
            return None
        from numba.cuda.cudadrv.error import CudaDriverError

        if not cuda.is_available():
            return (
                "numba-cuda finds no NVIDIA driver, or no GPU",
                "nvidia-smi must list a GPU, and its driver be of CUDA 13 (580) or newer",
            )
    except ImportError as error:  # CudaSupportError is one
        return f"numba-cuda does not start: {error}", install
    try:
        capability = cuda.get_current_device().compute_capability
    except CudaDriverError as error:
        return f"the driver does not give the GPU: {error}", "it may be busy: try again, or look at nvidia-smi"
    if tuple(capability) < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}", "8.0 (Ampere) or newer is needed"
    return None


def describe() -> str:
    """The GPU in words, or what is missing and what would help."""
    found = problem()
    if found is not None:
        return f"none: {found[0]}; {found[1]}"
    import numba
    from numba import cuda

    if numba.config.ENABLE_CUDASIM:
        return "simulated by Numba"
    device = cuda.get_current_device()
    name = device.name.decode() if isinstance(device.name, bytes) else device.name
    return f"{name}, compute capability {'.'.join(map(str, device.compute_capability))}"


def require() -> None:
    """Raise `InvalidConfigError` unless a GPU can be used."""
    found = problem()
    if found is not None:
        raise InvalidConfigError(f"no GPU can be used: {found[0]}", hint=found[1])


# --- knowing an array --------------------------------------------------------------------------------------------
def is_on_gpu(x: object) -> bool:
    """Is it an array on a GPU? Looks at nothing but what the array says of itself."""
    kind: Any = type(x)
    if kind is np.ndarray:
        return False
    if _package(kind) == "torch":
        return bool(getattr(x, "is_cuda", False))
    if hasattr(kind, "__cuda_array_interface__") or (kind.__name__ == "FakeCUDAArray"):
        return True
    if hasattr(kind, "__dlpack_device__") and not isinstance(x, np.ndarray | np.generic):
        try:
            return int(x.__dlpack_device__()[0]) == _DLPACK_CUDA  # type: ignore[attr-defined]
        except (AttributeError, BufferError, NotImplementedError, TypeError, ValueError):  # it cannot say
            return False
    return False


def any_on_gpu(*arrays: object) -> bool:
    return any(type(x) is not np.ndarray and x is not None and is_on_gpu(x) for x in arrays)


class GpuArray(NamedTuple):
    """An array where it lies. `data` is its first element's address, or on the simulator a flat array and `start` in
    it; strides are in elements."""

    data: Any
    start: int
    shape: Shape
    strides: tuple[int, ...]
    element: str
    native: Any  # what the caller has, which keeps the memory

    @property
    def aligned(self) -> bool:
        """Do rows begin on 16 bytes and lie element by element, in whole pieces of 16 bytes?"""
        piece, n = 16 // _ITEMSIZE[self.element], self.shape[-1]
        if n == 0 or n % piece or (self.strides[-1] != 1 and n != 1):
            return False
        if self.start % piece if isinstance(self.data, np.ndarray) else self.data % 16:
            return False
        for n, stride in zip(self.shape[:-1], self.strides[:-1], strict=True):
            if n > 1 and stride % piece:
                return False
        return True


@functools.lru_cache(1024)
def contiguous_strides(shape: Shape) -> tuple[int, ...]:
    steps = [1]
    for n in shape[:0:-1]:
        steps.append(steps[-1] * max(1, n))
    return tuple(reversed(steps)) if shape else ()


def part(x: GpuArray, start: int, n: int) -> GpuArray:
    """n elements of a contiguous array, from `start` on."""
    if isinstance(x.data, np.ndarray):
        return x._replace(start=x.start + start, shape=(n,), strides=(1,))
    return x._replace(data=x.data + start * _ITEMSIZE[x.element], shape=(n,), strides=(1,))


@functools.lru_cache(1024)
def _name(dtype: Any) -> str:
    return str(getattr(dtype, "name", dtype)).replace("torch.", "")


# --- the libraries -----------------------------------------------------------------------------------------------
class Library:
    """How arrays are made and read. This one is Numba's own, and serves those that have none of their own."""

    name = "numba"

    @property
    def key(self) -> Any:
        """Whose arrays may be shared."""
        return self.name

    def view(self, x: Any) -> GpuArray:
        interface = x.__cuda_array_interface__
        shape, kind = tuple(interface["shape"]), interface["typestr"]
        element = "bfloat16" if kind in ("<V2", "|V2") else np.dtype(kind).name
        itemsize = 2 if element == "bfloat16" else np.dtype(kind).itemsize
        strides = interface.get("strides")
        steps = contiguous_strides(shape) if strides is None else tuple(s // itemsize for s in strides)
        return GpuArray(int(interface["data"][0] or 0), 0, shape, steps, element, x)

    def empty(self, shape: Shape, element: str) -> Any:
        from numba import cuda

        return cuda.device_array(shape, _numpy_type(element))

    def fresh(self, shape: Shape, element: str) -> GpuArray:
        """A new array, as kernels see it."""
        return self.view(self.empty(shape, element))

    def upload(self, x: Array) -> Any:
        from numba import cuda

        return cuda.to_device(np.ascontiguousarray(x))

    def download(self, x: Any) -> Array:
        return np.asarray(x.copy_to_host())

    def stream(self) -> int:
        return 0


class _Torch(Library):
    name = "torch"

    def __init__(self, device: Any) -> None:
        self.device = device

    @property
    def key(self) -> Any:
        return "torch", self.device.index

    def view(self, x: Any) -> GpuArray:
        return GpuArray(x.data_ptr(), 0, tuple(x.shape), tuple(x.stride()), _name(x.dtype), x)

    def empty(self, shape: Shape, element: str) -> Any:
        import torch

        return torch.empty(shape, dtype=getattr(torch, element), device=self.device)

    def fresh(self, shape: Shape, element: str) -> GpuArray:
        made = self.empty(shape, element)  # whose layout need not be asked for
        return GpuArray(made.data_ptr(), 0, shape, contiguous_strides(shape), element, made)

    def upload(self, x: Array) -> Any:
        import torch

        return torch.from_numpy(np.require(x, requirements=("C", "W"))).to(self.device)

    def download(self, x: Any) -> Array:
        import torch

        x = x.detach()  # NumPy knows no bfloat16
        return np.asarray((x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy())

    def stream(self) -> int:
        import torch

        return int(torch.cuda.current_stream(self.device).cuda_stream)


class _Cupy(Library):
    name = "cupy"

    def empty(self, shape: Shape, element: str) -> Any:
        import cupy

        return cupy.empty(shape, _numpy_type(element))

    def upload(self, x: Array) -> Any:
        import cupy

        return cupy.asarray(x)

    def download(self, x: Any) -> Array:
        return np.asarray(x.get())

    def stream(self) -> int:
        import cupy

        return int(cupy.cuda.get_current_stream().ptr)


class _Simulated(Library):
    """Numba's simulator: arrays of NumPy in disguise."""

    name = "simulated"

    def view(self, x: Any) -> GpuArray:
        array = x._ary
        root = array
        while isinstance(root.base, np.ndarray):
            root = root.base
        flat = root.reshape(-1) if root.dtype == array.dtype else root.reshape(-1).view(array.dtype)
        start = (array.ctypes.data - root.ctypes.data) // array.itemsize
        steps = tuple(s // array.itemsize for s in array.strides)
        element = _name(array.dtype)
        if element in ("bfloat16", "float16"):
            flat = flat.view(np.uint16)
        return GpuArray(flat, start, array.shape, steps, element, x)

    def empty(self, shape: Shape, element: str) -> Any:
        from numba import cuda

        return cuda.to_device(np.empty(shape, _numpy_type(element)))

    def download(self, x: Any) -> Array:
        return np.asarray(x._ary)


def _numpy_type(element: str) -> Any:
    if element != "bfloat16":
        return np.dtype(element)
    try:
        import ml_dtypes
    except ModuleNotFoundError:
        return np.dtype(np.uint16)
    return np.dtype(ml_dtypes.bfloat16)


_own, _local = Library(), threading.local()


def library(x: object) -> Library:
    """The library that an array on a GPU belongs to."""
    kind: Any = type(x)
    package = _package(kind)
    if package == "torch":
        return _Torch(x.device)  # type: ignore[attr-defined]
    if package == "cupy":
        return _Cupy()
    return default()


@functools.lru_cache(1024)
def _package(kind: Any) -> str:
    return str(kind.__module__).split(".")[0]


def default() -> Library:
    import numba

    return _Simulated() if numba.config.ENABLE_CUDASIM else _own


def view(name: str, x: Any, dtype: str | None = None) -> GpuArray:
    """The array where it lies; `dtype` says what the bits of uint16 stand for."""
    if isinstance(x, GpuArray):
        return x
    if x is None:
        raise InvalidInputError(f"{name} is None", hint="give an array")
    if not is_on_gpu(x):
        hint = f"move it there, or take the others to the CPU; or give device='cuda' to have all of them moved: {name}"
        raise InvalidInputError(f"{name} is on the CPU, other arrays are on the GPU", hint=hint)
    if not hasattr(type(x), "__cuda_array_interface__") and type(x).__name__ != "FakeCUDAArray":
        found = _from_dlpack(x)
    else:
        found = library(x).view(x)
    if dtype is not None:
        check_bits(name, shadow((), np.uint16), dtype)  # is it that word?
        found = found._replace(element="bfloat16") if found.element == "uint16" else found
    return found


def _from_dlpack(x: Any) -> GpuArray:
    require()
    from cuda.core.utils import StridedMemoryView

    seen = StridedMemoryView.from_dlpack(x, stream_ptr=-1)
    shape = tuple(seen.shape)
    steps = tuple(seen.strides) if seen.strides is not None else contiguous_strides(shape)
    return GpuArray(int(seen.ptr), 0, shape, steps, _name(seen.dtype), x)


def floats(name: str, x: Any, dtype: str | None = None) -> GpuArray:
    """The same, of a type that the kernels know."""
    found = view(name, x, dtype)
    if dtype is not None and found.element != "bfloat16":
        hint = "give the bits as uint16, or leave dtype out"
        raise InvalidInputError(f"{name} has dtype {found.element}, and dtype is {dtype!r}", hint=hint)
    if found.element not in ELEMENTS:
        hint = f"cast it to one of {', '.join(ELEMENTS)}; double precision is for the CPU"
        raise InvalidInputError(f"{name} has dtype {found.element} on the GPU", hint=hint)
    return found


# --- what kernels are given --------------------------------------------------------------------------------------
class Space:
    """Memory and uploads of one call, in the caller's library and on its stream."""

    def __init__(self, like: Any) -> None:
        self.library = like if isinstance(like, Library) else library(like)
        self.stream = self.library.stream()
        self._kept: list[Any] = []
        enter()

    def empty(self, shape: Shape, element: str) -> GpuArray:
        return self.library.fresh(shape, element)

    def pointer(self, x: GpuArray | None, start: int = 0) -> Any:
        """What a kernel is given for an array whose first element, or that `start` elements on, is where its offsets
        begin."""
        if x is None:
            return self.nothing
        if isinstance(x.data, np.ndarray):
            return x.data[x.start + start :]
        return x.data + start * _ITEMSIZE[x.element] if start else x.data

    def scratch(self, n: int, element: str = "float32") -> Any:
        """The address of room for n elements, which stays as long as this does."""
        made = self.empty((max(1, n),), element)
        self._kept.append(made)
        return self.pointer(made)

    def upload(self, x: Array) -> Any:
        """The address of a copy of an array of NumPy, which stays likewise."""
        made = self.library.view(self.library.upload(x))
        self._kept.append(made)
        return self.pointer(made)

    def constant(self, key: Any, make: Callable[[], NDArray[Any]]) -> Any:
        """The address of a small array that all calls of one shape share: where heads begin, say."""
        known = (self.library.key, key)
        found = _constants.get(known)
        if found is None:
            if len(_constants) > 4096:
                _constants.clear()
            found = _constants[known] = self.library.view(self.library.upload(make()))
        self._kept.append(found)
        return self.pointer(found)

    def keep(self, x: GpuArray) -> GpuArray:
        self._kept.append(x)
        return x

    @property
    def kept(self) -> tuple[GpuArray, ...]:
        """What stays as long as this does."""
        return tuple(self._kept)

    @functools.cached_property
    def nothing(self) -> Any:
        """What a pointer that is not used points to."""
        return self.constant("nothing", lambda: np.zeros(16, np.int64))


_constants: dict[Any, GpuArray] = {}


def enter() -> None:
    """Make the GPU's context current in this Python thread, once; raise if there is no GPU."""
    if not getattr(_local, "entered", False):
        require()
        import numba

        if not numba.config.ENABLE_CUDASIM:
            from numba import cuda

            cuda.current_context()
        _local.entered = True


@functools.lru_cache(1024)
def shadow(shape: Shape, dtype: Any = np.float32) -> Array:
    """An array of NumPy of this shape and next to no memory, for checks that ask for shapes alone."""
    return np.broadcast_to(np.zeros((), dtype), shape)
