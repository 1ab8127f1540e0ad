"""Compiling, caching, running on threads. The only file that calls Numba's decorators.

A kernel is a serial function `kernel(job, slot, task)` that does one task of a job and owns what it writes. `@kernel`
compiles it to a C function, once for each element type and each set of optional arguments that are None, when it is
first needed. One `prange` loop, `_parallel`, serves every kernel: its threads draw task numbers from a shared counter
until none is left. Which thread does a task changes nothing in it, so results never depend on the number of threads,
and the serial twin, `_drain`, runs the very same machine code. (One loop for all also halves compiling: Numba compiles
the body of a `prange` twice, 2.2 of the first prototype's 3.7 s.)

Arguments of a kernel are a NamedTuple of arrays, numbers and smaller such tuples, annotated with the kinds of jobs.py.
"""

import contextlib
import functools
import gc
import logging
import math
import os
import struct
import threading
import time
import typing

import numba
import numpy as np
from numba import config, prange, types
from numba.core import ccallback, codegen
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from . import simd
from .cache import PackageCache, cache_folder
from .jobs import COUNTER, HEADER, REPORT, address, bounds, fields, flatten, layout

# never nnan or ninf: infinity and NaN are data. No reassociation either: a sum has one order, on every machine.
_FLAGS = {"nogil": True, "error_model": "numpy", "boundscheck": False}
SILENCE = 8.0  # seconds that compiling may go on unspoken of
NOT_WORTH_A_THREAD = 150_000  # multiply-adds: done before a second thread has woken (2 us)
PATIENCE = 1e10  # multiply-adds of a thread, part of a second: then Python is asked whether somebody pressed Ctrl-C


# --- kernels -------------------------------------------------------------------------------------------------------
_KERNELS: dict[str, "Kernel"] = {}
_NUMBERS = (np.float16, np.float32, np.float64, np.int32, np.int64)
_ELEMENT = {np.dtype(t): numba.from_dtype(np.dtype(t)) for t in _NUMBERS}
_ELEMENT[np.dtype(np.uint16)] = simd.bfloat16  # NumPy has no such type: its bits
_COMPILING = threading.RLock()
_log = logging.getLogger("ruvector_numba")


def _name_of(function) -> str:
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


class Kernel:
    """A compiled `kernel(job, slot, task)`; call it with a job and the number of its tasks."""

    def __init__(self, function):
        functools.update_wrapper(self, function)
        self._function = function
        self._job_class = next(iter(typing.get_type_hints(function).values()))
        self._optional = [i for i, field in enumerate(fields(self._job_class)) if field[2]]
        self._compiled: dict = {}
        self.name = _name_of(function)
        _KERNELS[self.name] = self

    def variant(self, stored, absent: tuple):
        """Compile, or load from the cache, for one element type and one set of absent arguments."""
        key = (stored, absent)
        with _COMPILING:
            if key not in self._compiled:
                job, forms = layout(self._job_class, stored, absent)
                function = _c_function(self._function, types.void(job, types.int64, types.int64))
                self._compiled[key] = function, struct.Struct("=" + "".join(forms))
        return self._compiled[key]

    def variants(self) -> list[str]:
        """What was compiled so far: the element type and the optional arguments that are there."""
        names = [fields(self._job_class)[i][0] for i in self._optional]
        made = []
        for stored, absent in list(self._compiled):
            present = [name for name, missing in zip(names, absent, strict=True) if not missing]
            made.append(f"{self.name}({', '.join([str(stored), *present])})")
        return made

    def prepare(self, job, tasks: int, dtype: np.dtype, work: float = math.inf) -> "Launch":
        """A job of so many tasks, packed once: fields that hold a name are filled in at each launch, arrays in it are
        kept. `work`, in multiply-adds, tells whether it pays to wake more threads."""
        key = _ELEMENT[dtype], tuple([job[i] is None for i in self._optional])
        function, form = self._compiled.get(key) or self.variant(*key)
        values, open_slots = flatten(job)
        template = np.zeros(HEADER + form.size // 8, np.int64)
        form.pack_into(template, 8 * HEADER, *values)
        return Launch(self.name, function.address, job, template, open_slots, tasks, work)


class Launch(typing.NamedTuple):
    """A packed job: call it with the arrays and whole numbers that its named fields stand for, None for no array."""

    name: str
    function: int
    job: tuple
    template: np.ndarray
    open_slots: tuple
    tasks: int
    work: float

    def __call__(self, **values) -> None:
        if simd.CHECKED:
            return self._checked(values)
        job = self.template.copy()
        for name, slot in self.open_slots:
            value = values[name]
            if value is not None:
                job[slot] = value if type(value) is int else address(value)
        _run(self.function, job, self.tasks, self.work)

    def _checked(self, values: dict) -> None:
        """Arrays with their bounds, none where there is no array, and an error if one was left."""
        job = self.template.copy()
        for name, slot in self.open_slots:
            value = values[name] if type(name) is str else name
            if type(value) is int:
                job[slot] = value
            else:
                of_array = (0, 0, 0) if value is None else bounds(value)
                job[slot : slot + 4] = *of_array, job.ctypes.data + 8 * REPORT
        _run(self.function, job, self.tasks, self.work)
        if job[REPORT]:
            raise IndexError(f"kernel {self.name} left the bounds of an array")


_PARTS: set[str] = set()
_WHOLE: set[str] = set()  # kernels


def _named(function, mine, others):
    """Remember whose name that is: while a kernel is compiled, Numba's libraries are known by names alone."""
    if function.__qualname__ in others:
        raise ValueError(f"{function.__qualname__} would be the name of a kernel and of a part of kernels")
    mine.add(function.__qualname__)


def kernel(function) -> Kernel:
    """Decorate `function(job, slot, task)`, whose first annotation is the NamedTuple of its arguments."""
    _named(function, _WHOLE, _PARTS)
    return Kernel(function)


_PART_FLAGS = {**_FLAGS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # only kernels call parts


def inline(function):
    """A function for kernels to call, which Numba pastes into its caller: for small ones."""
    _named(function, _PARTS, _WHOLE)
    return numba.njit(**_PART_FLAGS, inline="always")(function)


def apart(function):
    """A function for kernels to call that stays one: large, called from several places, or mapped over a tile."""
    _named(function, _PARTS, _WHOLE)
    return numba.njit(**_PART_FLAGS)(function)


def within(function):
    """A function for kernels to call that becomes part of its caller's machine code: with so many arguments (a tuple is
    passed field by field) that passing them would cost more than what it does. Each call is a copy to compile, of all
    that is within it too: large ones are called from one place."""
    _named(function, _PARTS, _WHOLE)
    return numba.njit(**_PART_FLAGS, forceinline=True)(function)


class _KernelLibrary(codegen.JITCodeLibrary):
    """The code of a kernel, optimised once, when all its parts are in it. Numba does it before as well: LLVM then makes
    two loops of one, for either value of a condition, and each gets its own parts, which are most of the code: the
    forward kernel of neighbours was compiled in 16 s, and is in 9.
    """

    def _optimize_functions(self, module):
        module.data_layout = self._codegen._data_layout


class _PartLibrary(_KernelLibrary):
    """The code of a part, which is optimised and becomes machine code only within the kernel that it is linked into.

    Numba does both for every function and again for all that call it: 3.3 of the 6.9 s of the plain forward kernel.
    """

    def finalize(self):
        self._raise_if_finalized()
        for library in dict.fromkeys(self._linking_libraries):
            self._reload_init.update(library._reload_init)
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalize_dynamic_globals()
        self._finalized = True


@contextlib.contextmanager
def _parts_uncompiled():
    """While a kernel is compiled, its parts become `_PartLibrary`s, which have no address.

    Numba's one CPU target is changed meanwhile, and parts are known by name alone: whoever does so holds Numba's lock,
    or a function that another thread compiles, of the name of a part, would have no address either.
    """
    context = cpu_target.target_context
    generator = context.codegen()
    create_library, get_executable = generator.create_library, context.get_executable

    def create(name, **options):
        generator._library_class = _PartLibrary if name in _PARTS else _KernelLibrary
        return create_library(name, **options)

    def executable(library, fndesc, env):
        if isinstance(library, _PartLibrary):
            return [].append  # the dispatcher asks for a builtin function, as a name for this overload
        return get_executable(library, fndesc, env)

    generator.create_library, context.get_executable = create, executable
    try:
        yield
    finally:
        del generator.create_library, context.get_executable
        generator._library_class = codegen.JITCodeLibrary


@contextlib.contextmanager
def _garbage_kept():
    """Compiling makes objects by the million and few cycles: looking for those takes a tenth of the time, in a process
    that has compiled much a fifth."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _c_function(function, signature):
    """As `numba.cfunc`, with the package's cache."""
    if config.DISABLE_JIT:
        raise RuntimeError("ruvector_numba needs Numba's compiler: unset NUMBA_DISABLE_JIT")
    compiled = ccallback.CFunc(function, (signature.args, signature.return_type), locals={}, options=dict(_FLAGS))
    compiled._cache = PackageCache(function)
    if not compiled._cache.holds(compiled._sig):
        _say_compiling(_name_of(function))
    with global_compiler_lock, _garbage_kept(), _parts_uncompiled():
        compiled.compile()
    return compiled


class _Said:
    """When compiling was last spoken of."""

    at = -math.inf


def _say_compiling(name: str) -> None:
    """Why a call takes long: once in full, and then whenever nothing was said for a while."""
    if os.environ.get("RUVECTOR_NUMBA_QUIET") == "1":
        return
    now = time.monotonic()
    if _Said.at == -math.inf:
        _log.warning(
            "ruvector_numba: compiling kernels for this machine, some seconds each, once (kept in %s); "
            "ruvector_numba.warmup() does it ahead",
            cache_folder() or "no folder: RUVECTOR_NUMBA_CACHE is 0, or none can be written",
        )
    elif now - _Said.at > SILENCE:
        _log.warning("ruvector_numba: compiling %s", name)
    else:
        return
    _Said.at = now


def variants() -> list[str]:
    """The variants of all kernels that this process has compiled, or loaded from the cache."""
    return sorted(name for kernel in list(_KERNELS.values()) for name in kernel.variants())


# --- threads -------------------------------------------------------------------------------------------------------
def _drain(function, job, tasks, slot):
    """Draw task numbers from the job's counter until none is left: the serial twin of `_parallel`."""
    task = simd.draw(job, COUNTER)
    while task < tasks:
        simd.call(function, job, HEADER, slot, task)
        task = simd.draw(job, COUNTER)


def _parallel(function, job, tasks, slots, team):
    before = _numba_threads()
    if team > 0:
        _use_numba_threads(team)
    for slot in prange(slots):
        drain(function, job, tasks, slot)
    _use_numba_threads(before)  # they are the calling thread's own, and its other Numba code counts on them


drain = numba.njit(**_FLAGS)(_drain)
# numba.get_num_threads and set_num_threads cost 1 us each, and as a pointer in the code they could not be cached
_numba_threads = types.ExternalFunction("get_num_threads", types.intp())
_use_numba_threads = types.ExternalFunction("set_num_threads", types.void(types.intc))
_LOOP = {}


def _loop(parallel: bool):
    """The compiled `_parallel` or `_drain`, made when first needed."""
    with _COMPILING:
        if parallel not in _LOOP:
            function = _parallel if parallel else _drain
            dispatcher = numba.njit(**_FLAGS, parallel=parallel)(function)
            dispatcher._cache = PackageCache(function)
            n = types.int64
            dispatcher.compile(types.void(n, types.Array(n, 1, "C"), *[n] * (3 if parallel else 2)))
            dispatcher.disable_compile()
            _LOOP[parallel] = dispatcher
    return _LOOP[parallel]


class _Threads:
    """When more than one thread may be used, and how many."""

    forked = False  # GNU OpenMP kills a forked child that enters a parallel region
    one_at_a_time = threading.Lock()  # the workqueue layer aborts the process when two threads use it at once
    layer: str | None = None
    team: int | None = None  # of the whole process; 0: as many as Numba has; None: the environment was not asked yet


def _after_fork():
    _Threads.forked = True
    _Threads.one_at_a_time = threading.Lock()
    global _COMPILING
    _COMPILING = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def slots() -> int:
    """Pieces of scratch that a job needs: one for each thread that might ever run it.

    Not only for those that are in use now: another Python thread may raise their number while a job is laid out. Memory
    that no thread touches costs nothing.
    """
    return config.NUMBA_NUM_THREADS


def team() -> int:
    """The number of threads that was set for the process; 0 where none was, and Numba's own number counts."""
    if _Threads.team is None:
        text = os.environ.get("RUVECTOR_NUMBA_THREADS", "").strip()
        most = config.NUMBA_NUM_THREADS
        if text and not (text.isdecimal() and 1 <= int(text) <= most):
            raise ValueError(f"RUVECTOR_NUMBA_THREADS is {text!r}, and must be a whole number from 1 to {most}")
        _Threads.team = int(text or 0)
    return _Threads.team


def threads() -> int:
    """Threads that a large kernel called now would use."""
    return team() or config.NUMBA_NUM_THREADS


def set_team(n: int) -> None:
    """Let kernels use n threads, whichever Python thread calls them; 0 for as many as Numba has."""
    _Threads.team = n


def layer() -> str:
    """Numba's threading layer: the one in use, or the one asked for while none is needed yet."""
    try:
        return numba.threading_layer()
    except ValueError:
        return config.THREADING_LAYER


def _run(function: int, job, tasks: int, work: float) -> None:
    """All tasks of a job; of a long one some at a time, and between these Python raises what a signal has asked for."""
    if PATIENCE < work < math.inf:
        pieces = min(int(work / (PATIENCE * threads())), tasks // (8 * threads()))
        for piece in range(1, pieces):
            last = piece * tasks // pieces
            _run_to(function, job, last, work)
            job[COUNTER] = last  # each thread has drawn one more
    _run_to(function, job, tasks, work)


def _run_to(function: int, job, tasks: int, work: float) -> None:
    """The tasks from the job's counter on."""
    size = team()
    n = min(size or config.NUMBA_NUM_THREADS, tasks)
    if n <= 1 or work < NOT_WORTH_A_THREAD or _Threads.forked or _is_foreign_thread():
        (_LOOP.get(False) or _loop(False))(function, job, tasks, 0)
        return
    loop = _LOOP.get(True) or _loop(True)
    if _Threads.layer not in (None, "workqueue"):
        loop(function, job, tasks, n, size)
    elif _Threads.one_at_a_time.acquire(blocking=_Threads.layer is None):
        try:
            loop(function, job, tasks, n, size)
            _Threads.layer = numba.threading_layer()
        finally:
            _Threads.one_at_a_time.release()
    else:
        _loop(False)(function, job, tasks, 0)


def _is_foreign_thread() -> bool:
    """A thread that Python did not start is a worker of somebody's parallel loop: do not open another inside it."""
    return isinstance(threading._active.get(threading.get_ident()), threading._DummyThread | None)
