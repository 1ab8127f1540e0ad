"""The two limits of this machine, measured in the same rounds as the work: multiply-adds, and reading memory.

Both are contestants for `ruvector_numba.bench.compare`, named in its `measuring`. As a script it prints both:

    python perf/peak.py --threads 2
"""

import argparse
import concurrent.futures
import os
import statistics
import time

import numba
import numpy as np

from ruvector_numba.bench.works import Build, Runner, Task, Work

READ_BYTES = 1 << 28  # far beyond any cache


def _one_thread_peak() -> float:
    import ruvector_numba as rv

    return float(rv.info(measure=True)["peak_gflops"])


def fma_peak(_: Task, threads: int) -> Runner:
    """GFLOP/s of float32 multiply-adds in registers, added up over as many threads as there are.

    The kernel that measures runs without Python's lock. All run at the same time, so that shared clocks and shared
    cores count.
    """
    pool = concurrent.futures.ThreadPoolExecutor(threads)

    def all_at_once() -> float:
        return sum(pool.map(lambda _: _one_thread_peak(), range(threads)))

    return Runner(all_at_once, measures=True, keeps=pool)


def _or_words(words: np.ndarray) -> np.uint64:
    """All bits, or-ed: one vector operation for each load, so that memory is what takes the time."""
    found = np.uint64(0)
    for word in words:
        found |= word
    return found


_read = numba.njit(nogil=True)(_or_words)


def read_bandwidth(_: Task, threads: int) -> Runner:
    """GB/s of reading memory once, each thread its own part."""
    words = np.ones(READ_BYTES // 8, np.uint64)
    parts = np.array_split(words, threads)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    _read(words[:8])

    def once() -> float:
        start = time.perf_counter()
        list(pool.map(_read, parts))
        return READ_BYTES / (time.perf_counter() - start) / 1e9

    return Runner(lambda: max(once() for _ in range(5)), measures=True, keeps=pool)


LIMITS: dict[str, Build] = {"peak": fma_peak, "bandwidth": read_bandwidth}  # by a work's `limit`


def main() -> None:
    """Print both limits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    threads = parser.parse_args().threads
    nothing = Work(1, 1, 1, 1, 1)
    for name, unit, build in (("multiply-adds", "GFLOP/s", fma_peak), ("reading", "GB/s", read_bandwidth)):
        runner = build(nothing, threads)
        found = statistics.median(runner.call() for _ in range(5))
        print(f"{name}: {found:.1f} {unit}, {threads} threads")


if __name__ == "__main__":
    main()
