"""Compiling and launching kernels on a GPU. The only file here that calls numba.cuda's decorators.

A kernel is a function `kernel(job)` of one NamedTuple of pointers, numbers and smaller such tuples, annotated with the
kinds below. What must be known when it is compiled, the element type, sizes of tiles, which terms a score has, is a
`variant`, another NamedTuple: `@kernel` decorates the function that builds `kernel(job)` for one.

On Numba's simulator (NUMBA_ENABLE_CUDASIM=1) the same functions run as Python, one thread for each thread of the GPU;
pointers are then flat NumPy arrays.
"""

import contextlib
import ctypes
import functools
import logging
import struct
import threading
import time
import typing
from types import SimpleNamespace as Described

import numpy as np
from numba import config, cuda, types

SIMULATED = bool(config.ENABLE_CUDASIM)

Floats = typing.NewType("Floats", int)  # a pointer to float32
Elements = typing.NewType("Elements", int)  # to the variant's elements: float32 or 16 bits
Indices = typing.NewType("Indices", int)  # to int64
Ints = typing.NewType("Ints", int)  # to int32
Bytes = typing.NewType("Bytes", int)  # to uint8

# What numba-cuda takes for "fast", whatever it is called, if it is not empty: products are contracted with sums,
# division and roots may be off in the last place or two, logarithms are the fast ones, and subnormal numbers count
# as 0. It assumes nothing about NaN and infinity, which are data here.
FAST = {"contract"}

WARP = 32
NOWHERE = 0  # for a pointer of a job that a launch does not look at
_POINTEES = {
    Floats: types.float32,
    Indices: types.int64,
    Ints: types.int32,
    Bytes: types.uint8,
}
_POINTER = struct.Struct("<q")
_log = logging.getLogger("ruvector_numba")
_KERNELS: dict[str, "Kernel"] = {}
_COMPILING = threading.RLock()


class Flat(typing.NamedTuple):
    """The variant of kernels that give each thread a number, or each warp a row."""

    element: str
    threads: int
    resident: int = 1


def device(function):
    """A function of the kernels: inlined, so that arrays handed to it stay in registers."""
    if SIMULATED:  # what names no cuda.threadIdx or the like is called as it is, for a call through Numba takes long
        return cuda.jit(device=True)(function) if "cuda" in function.__code__.co_names else function
    return cuda.jit(device=True, forceinline=True, fastmath=FAST)(function)


@functools.cache
def job_type(job_class, storage):
    """The Numba type of such a job, and how many numbers and pointers it has."""
    fields = []
    for kind in typing.get_type_hints(job_class).values():
        if hasattr(kind, "_fields"):
            fields.append(job_type(kind, storage))
        elif kind is int:
            fields.append(types.int64)
        elif kind is float:
            fields.append(types.float32)
        else:
            fields.append(types.CPointer(storage if kind is Elements else _POINTEES[kind]))
    return types.NamedTuple(fields, job_class)


@functools.cache
def form(job_class):
    """The `struct` format of such a job, 8 bytes for each number and pointer."""
    kinds = typing.get_type_hints(job_class).values()
    return "".join(form(k) if hasattr(k, "_fields") else "f4x" if k is float else "q" for k in kinds)


@functools.cache
def _nested(job_class):
    """The places of tuples in such a job, the last first."""
    kinds = list(typing.get_type_hints(job_class).values())
    return [n for n in reversed(range(len(kinds))) if hasattr(kinds[n], "_fields")]


def _flat(job):
    """All numbers and pointers of a job. Looking at each of a hundred would take as long as the launch."""
    found = list(job)
    for n in _nested(type(job)):
        found[n : n + 1] = _flat(found[n])
    return found


class _Loaded:
    """A compiled kernel, started through the driver: 10 us, where Numba needs 180 to prepare fifty numbers."""

    def __init__(self, compiled, job_class):
        from cuda.bindings import driver

        self._driver, self._packed = driver, struct.Struct("<" + form(job_class))
        self._handle = int(compiled._codelibrary.get_cufunc().kernel.handle)
        self._offsets = np.arange(self._packed.size // 8, dtype=np.uint64) * 8
        self._compiled = compiled  # keeps the code loaded

    def pack(self, flat):
        """The bytes of a job's numbers and pointers."""
        return self._packed.pack(*flat)

    def numbers(self, packed):
        """Memory that holds a packed job, as `start` wants it."""
        memory = ctypes.create_string_buffer(packed, len(packed))
        addresses = self._offsets + np.uint64(ctypes.addressof(memory))
        return _Numbers(memory, addresses, addresses.ctypes.data)

    def start(self, numbers, grid, threads, stream):
        """Start it on a packed job."""
        (error,) = self._driver.cuLaunchKernel(self._handle, *grid, threads, 1, 1, 0, int(stream), numbers.begin, 0)
        if int(error):
            raise RuntimeError(f"the GPU refused to start a kernel: {error!r}")


class _Numbers(typing.NamedTuple):
    memory: typing.Any
    addresses: np.ndarray  # of each number in it
    begin: int  # the address of these


class Launch:
    """A job made ready once: call it with the stream, and with what its fields that hold a name stand for."""

    def __init__(self, compiled, job, grid, threads):
        self._compiled, self._job, self._grid, self._threads = compiled, job, grid, threads
        if not SIMULATED:
            flat = _flat(job)
            self._slots = [(x, 8 * n) for n, x in enumerate(flat) if type(x) is str]
            self._numbers = compiled.numbers(compiled.pack([0 if type(x) is str else x for x in flat]))
            self._lock = threading.Lock()  # the driver reads the numbers while it is asked, and then no more

    def __call__(self, stream, **values):
        if SIMULATED:
            self._compiled[self._grid, self._threads](_filled(self._job, values))
        else:
            with self._lock:
                for name, place in self._slots:
                    _POINTER.pack_into(self._numbers.memory, place, values[name])
                self._compiled.start(self._numbers, self._grid, self._threads, stream)


def _filled(job, values):
    parts = (_filled(x, values) if hasattr(x, "_fields") else values[x] if type(x) is str else x for x in job)
    return type(job)(*parts)


class Kernel:
    """`build(variant)` gives the function to compile; asked for are `variant.element`, `.threads` and
    `.resident`, how many blocks of threads shall fit on one multiprocessor. `registers` is how many a thread may take,
    and `stack` how many bytes of memory besides, by the variant's width: what ptxas must keep to on every GPU."""

    def __init__(self, build, job_class, registers=255, stack=None):
        functools.update_wrapper(self, build)
        self._build = build
        self.job_class, self.registers, self.stack = job_class, registers, stack or {}
        self.name = f"{build.__module__.rpartition('.')[2]}.{build.__name__}"
        self._compiled = {}
        _KERNELS[self.name] = self

    def signature(self, variant):
        from .elements import STORAGE

        return types.void(job_type(self.job_class, STORAGE[variant.element]))

    def function(self, variant):
        """The Python function for one variant, not compiled."""
        return self._build(variant)

    def compiled(self, variant):
        """The function for one variant, compiled for the current device."""
        found = self._compiled.get(variant)
        if found is None:
            with _COMPILING:
                found = self._compiled.get(variant) or self._compile(variant)
                self._compiled[variant] = found
        return found

    def _compile(self, variant):
        function = self._build(variant)
        if SIMULATED:
            return cuda.jit(function)
        _log.info("compiling the GPU kernel %s for %s", self.name, variant)
        start = time.perf_counter()
        signature = self.signature(variant)
        dispatcher = cuda.jit(launch_bounds=(variant.threads, variant.resident), fastmath=FAST)(function)
        with _row_stack():
            loaded = _Loaded(dispatcher.compile(signature.args), self.job_class)
        _log.info("%s took %.1f s to compile", self.name, time.perf_counter() - start)
        return loaded

    def ptx(self, variant, compute_capability):
        """The assembly for a compute capability such as (9, 0); needs a toolkit, no GPU. One capability a process."""
        with _as_if_there_were(compute_capability), _row_stack():
            code, _ = cuda.compile_ptx(
                self._build(variant), self.signature(variant).args, cc=compute_capability, fastmath=FAST,
                launch_bounds=(variant.threads, variant.resident),
            )  # fmt: skip
        return code

    def __call__(self, variant, job, grid, stream=0):
        """Run it on `grid` blocks of `variant.threads` threads; `stream` is the address of a CUDA stream."""
        compiled = self.compiled(variant)
        if SIMULATED:
            compiled[grid, variant.threads](job)
        else:
            compiled.start(compiled.numbers(compiled.pack(_flat(job))), grid, variant.threads, stream)

    def prepare(self, variant, job, grid):
        """A job of which some pointers are only named, for many launches."""
        return Launch(self.compiled(variant), job, grid, variant.threads)


@contextlib.contextmanager
def _row_stack():
    """NumPy 2.5 has dropped a name that numba-cuda 0.30 asks for when it first compiles."""
    missing = not hasattr(np, "row_stack")
    if missing:
        setattr(np, "row_stack", np.vstack)  # noqa: B010 written as an assignment, linters take it for a use
    try:
        yield
    finally:
        if missing:
            delattr(np, "row_stack")


@contextlib.contextmanager
def _as_if_there_were(compute_capability):
    """Numba asks the driver for the GPU at hand whenever it compiles a device function, even if only for its text."""
    from numba.cuda import dispatcher

    asked = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: Described(compute_capability=compute_capability)
    try:
        yield
    finally:
        dispatcher.get_current_device = asked


def kernel(job_class, registers=255, stack=None):
    """Make a `Kernel` of the function that builds it for a variant."""
    return functools.partial(Kernel, job_class=job_class, registers=registers, stack=stack)


def kernels():
    return dict(_KERNELS)
