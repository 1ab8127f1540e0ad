"""The machine and the build: how many threads to use, what there is, and compiling ahead.

Numba and what else is slow to import is imported inside the functions, so that `import ruvector_numba` stays quick.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from . import halves
from .arrays import Array
from .errors import InvalidInputError
from .values import switch, whole_number

__all__ = ["get_num_threads", "info", "set_num_threads", "threads", "warmup"]


# --- threads -------------------------------------------------------------------------------------------------------
def _most() -> int:
    from .kernels import jit

    return int(jit.slots())


def _checked(n: int) -> int:
    more = "set the environment variable NUMBA_NUM_THREADS before Python starts if there must be more"
    hint = f"give a whole number from 1 to {_most()}; {more}"
    return whole_number("the number of threads", n, 1, _most(), hint=hint)


def _team() -> int:
    """The number that was set, 0 if none was."""
    from .plan import team

    return team.size()


def set_num_threads(n: int) -> None:
    """Use n threads from now on, in every call of this process, whichever Python thread makes it.

    Results do not depend on it. Until it is called, the environment variable RUVECTOR_NUMBA_THREADS counts, and without
    that what Numba would use.

    Parameters
    ----------
    n : int
        From 1 to `numba.config.NUMBA_NUM_THREADS`, which is the number of processors unless the environment variable of
        that name says otherwise.

    Raises
    ------
    InvalidInputError
        If n is anything else.

    See Also
    --------
    threads : the same for the length of a `with` block.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> former = rv.get_num_threads()
    >>> rv.set_num_threads(1)
    >>> rv.get_num_threads()
    1
    >>> rv.set_num_threads(former)
    """
    from .kernels import jit

    jit.set_team(_checked(n))


def get_num_threads() -> int:
    """The number of threads that a large call made here would use.

    Returns
    -------
    int

    Raises
    ------
    InvalidInputError
        If RUVECTOR_NUMBA_THREADS is set to something that is no such number.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> rv.get_num_threads() >= 1
    True
    """
    import numba

    return _team() or int(numba.get_num_threads())


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """Use n threads inside a `with` block, and as many as before after it, also when it ends in an error.

    As `set_num_threads` it is about the whole process, so that a pool of Python threads started inside the block is
    bound by it too. Blocks in several Python threads must therefore not overlap.

    Parameters
    ----------
    n : int
        As in `set_num_threads`.

    Returns
    -------
    context manager

    Raises
    ------
    InvalidInputError
        If n is no such number, when the block is entered.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> with rv.threads(1):
    ...     rv.get_num_threads()
    1
    """
    from .kernels import jit

    n, former = _checked(n), _team()
    jit.set_team(n)
    try:
        yield
    finally:
        jit.set_team(former)


# --- what there is -------------------------------------------------------------------------------------------------
_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bf16", "amx-bf16", "neon", "bf16")  # as LLVM calls them


def _cpu_name() -> str:
    import platform

    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _features() -> list[str]:
    """Those that matter here and that code is compiled for, which may be fewer than the CPU has."""
    from numba.core.registry import cpu_target

    from .kernels.simd import halves as known
    from .kernels.simd import target

    listed = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    found = {name[1:] for name in listed if name.startswith("+")}
    # the list is empty where NUMBA_CPU_FEATURES= leaves it to the name of the CPU; what LLVM then makes shows the rest
    probed = {(64, True): {"avx2", "fma", "avx512f"}, (32, True): {"avx2", "fma"}, (16, True): {"neon"}}
    found |= probed.get((target().vector_bytes, target().fma), set())
    found |= {"avx512bf16"} if known().bfloat16 else set()
    found |= {"f16c"} if known().float16 and "neon" not in found else set()
    return [name for name in _FEATURES if name in found]


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("numba", "llvmlite", "numpy", "scipy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def info(measure: bool = False) -> dict[str, Any]:
    """What the machine and this build can do.

    Parameters
    ----------
    measure : bool
        Also measure the peak of one thread, which takes some 0.2 s, and at the very first time a second to compile.

    Returns
    -------
    dict
        version
            of this package.
        cpu
            the processor's name.
        target, features, lanes, tile
            the CPU that Numba compiles for, its instructions that matter, float32 elements in a vector, and how many
            vectors of sums are kept in registers, keys by queries.
        threads, max_threads, threading_layer
            threads in use, the most that can be asked for, and what runs them: "omp", "tbb" or "workqueue".
        cache_folder
            where compiled kernels are kept; None where nothing can be written.
        compiled
            the kernels compiled or loaded so far: element type, and the optional terms they know.
        gpu
            its name and compute capability, or what is missing to use one.
        versions
            of Python and the packages below this one.
        peak_gflops
            if measured: float32 multiply-adds in registers, in 1e9 operations a second.

    Raises
    ------
    InvalidInputError
        If `measure` is neither True nor False, or RUVECTOR_NUMBA_THREADS is set to something that is no such number.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> found = rv.info()
    >>> found["threads"] <= found["max_threads"]
    True
    """
    from . import __version__, gpu
    from .kernels import jit, peak
    from .kernels.simd import target

    gflops = peak.measure(np.dtype(np.float32), 0.2) if switch("measure", measure) else None
    folder = jit.cache_folder()
    found = {
        "version": __version__,
        "cpu": _cpu_name(),
        "target": target().cpu,
        "lanes": target().lanes(4),
        "tile": f"{target().rows}x{target().cols}",
        "features": _features(),
        "threads": get_num_threads(),
        "max_threads": _most(),
        "threading_layer": str(jit.layer()),
        "cache_folder": None if folder is None else str(folder),
        "compiled": jit.variants(),
        "gpu": gpu.describe(),
        "versions": _versions(),
    }
    return found if gflops is None else {**found, "peak_gflops": gflops}


# --- compiling ahead -----------------------------------------------------------------------------------------------
_HEADS, _LENGTH, _D = 2, 128, 16  # enough work for two threads, so that their loop is compiled too
_KEYS = 1024  # of a decode, whose work is little enough for the serial loop

Options = dict[str, Any]


def _forward(query: Array, key: Array, value: Array, **options: Any) -> None:
    import ruvector_numba as rv

    rv.scaled_dot_product_attention(query, key, value, **options)


def _forward_backward(query: Array, key: Array, value: Array, **options: Any) -> None:
    import ruvector_numba as rv

    cache = rv.attention_forward(query, key, value, **options)
    rv.attention_backward(np.ones_like(cache.output), cache)


def _weights(query: Array, key: Array, value: Array, **options: Any) -> None:
    import ruvector_numba as rv

    rv.attention_forward(query, key, value, **options).weights(rows=[0])


def _layer(query: Array, key: Array, value: Array, dropout: float) -> None:
    import ruvector_numba as rv

    attention = rv.MultiHeadAttention(rv.AttentionConfig(_HEADS * _D, _HEADS, dropout))
    x = query.reshape(1, -1, _HEADS * _D)
    output, cache = attention.forward_cached(x, x, x)
    attention.backward(output, cache)
    attention.step(x[:, :1], attention.new_cache(1, 1, x.dtype))


def _graph(query: Array, key: Array, value: Array) -> None:
    import ruvector_numba as rv

    x = query.reshape(-1, _HEADS * _D)
    around = np.arange(len(x))
    layer = rv.GAT(x.shape[1], _D, _HEADS)
    output, cache = layer.forward_cached(x, rv.CSRGraph.from_edge_index([around, around[::-1]]))
    cache.coefficients()
    layer.backward(output, cache)


def _no_options(_: np.dtype[Any]) -> Options:
    return {}


class _Call(NamedTuple):
    """One small call that `warmup` makes; its optional arguments may depend on the dtype."""

    name: str
    run: Callable[..., None] = _forward
    options: Callable[[np.dtype[Any]], Options] = _no_options
    queries: int = _LENGTH
    keys: int = _LENGTH

    def __call__(self, dtype: np.dtype[Any]) -> None:
        query = np.ones((1, _HEADS, self.queries, _D), dtype)
        key = np.ones((1, _HEADS, self.keys, _D), dtype)
        bits = {"dtype": "bfloat16"} if dtype == halves.BITS else {}
        self.run(query, key, key, **self.options(dtype), **bits)

    def serves(self, dtype: np.dtype[Any]) -> bool:
        """Layers compute in float32 what is given in half precision."""
        return self.run in (_forward, _forward_backward, _weights) or dtype.itemsize > 2


_TERMS: dict[str, Callable[[np.dtype[Any]], Options]] = {
    "plain": _no_options,
    "causal": lambda _: {"is_causal": True},
    "bool mask": lambda _: {"attn_mask": np.tri(_LENGTH, dtype=bool)},
    "float mask": lambda dtype: {"attn_mask": np.zeros((_LENGTH, _LENGTH), dtype)},
    "softcap": lambda _: {"softcap": 30.0},
    "alibi": lambda _: {"alibi_slopes": np.ones(_HEADS)},
}
_CALLS = (
    *(_Call(f"forward {name}", options=options) for name, options in _TERMS.items()),
    _Call("decode", queries=1, keys=_KEYS),
    _Call("weights", _weights),
    *(_Call(f"backward {name}", _forward_backward, options) for name, options in _TERMS.items()),
    _Call("layer", _layer, lambda _: {"dropout": 0.0}),
    _Call("layer with dropout", _layer, lambda _: {"dropout": 0.1}),
    _Call("graph", _graph),
)


_WARM = ("float32", "float64", "float16", "bfloat16")


def _dtypes(given: DTypeLike | Iterable[DTypeLike]) -> list[np.dtype[Any]]:
    several = [given] if isinstance(given, str | type | np.dtype) or not isinstance(given, Iterable) else list(given)
    hint = "give some of " + ", ".join(_WARM)
    try:
        names = ["bfloat16" if str(each) == "bfloat16" else np.dtype(each).name for each in several]
    except TypeError as error:
        raise InvalidInputError(f"dtypes is {given!r}: {error}", hint=hint) from None
    for name in names:
        if name not in _WARM:
            raise InvalidInputError(f"dtypes has {name}, which nothing is compiled for", hint=hint)
    return [halves.BITS if name == "bfloat16" else np.dtype(name) for name in names]


def warmup(
    dtypes: DTypeLike | Iterable[DTypeLike] = ("float32",),
    progress: Callable[[int, int, str], object] | None = None,
) -> None:
    """Compile what the common calls need, or load it from the cache, before the first of them has to wait for it.

    Kernels are compiled once for a machine and kept in the cache: run this when an image is built or a service starts.
    It takes one to three minutes for each dtype, and does forward and backward passes of dense attention, plain and
    with each of its terms, weights, few queries over many keys, a layer with its steps, and a `GAT`.

    Parameters
    ----------
    dtypes : dtype or several
        The element types to compile for: float32, float64, float16, bfloat16, by name or as NumPy knows them.
    progress : callable, optional
        Called as `progress(done, total, name)` after each step.

    Raises
    ------
    InvalidInputError
        If a dtype is another.

    Examples
    --------
    >>> import ruvector_numba as rv
    >>> rv.warmup(progress=lambda done, total, name: None)
    """
    steps = [(call, dtype) for dtype in _dtypes(dtypes) for call in _CALLS if call.serves(dtype)]
    for done, (call, dtype) in enumerate(steps, 1):
        call(dtype)
        if progress is not None:
            progress(done, len(steps), f"{call.name}, {'bfloat16' if dtype == halves.BITS else dtype}")
