"""Memory that is taken again: on a cache line, never shared by two that live, and bounded."""

import gc
import subprocess
import sys
import threading

import numpy as np
import pytest

from ruvector_numba.errors import AttentionError
from ruvector_numba.plan import memory

F32 = np.dtype(np.float32)
MANY = (300, 1001)  # 1.2 MB: large


def address(x):
    return x.ctypes.data


@pytest.fixture(autouse=True)
def nothing_idle():
    gc.collect()
    memory._idle.clear()
    yield
    memory._idle.clear()


@pytest.mark.parametrize("shape", [(3, 5), MANY, (0, 4), ()])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint16])
def test_is_an_array_on_a_line(shape, dtype):
    x = memory.empty(shape, np.dtype(dtype))
    assert x.shape == shape and x.dtype == dtype and x.flags.c_contiguous and x.flags.writeable
    assert address(x) % 64 == 0 or not x.size
    x[...] = 7
    assert (x == 7).all()


def test_memory_that_is_gone_is_taken_again():
    first = memory.empty(MANY, F32)
    at = address(first)
    del first
    assert memory.idle() >= 4 * 300 * 1001
    second = memory.empty((1001, 300), F32)
    assert address(second) == at and memory.idle() == 0


def test_small_arrays_are_not_kept():
    memory.empty((10, 10), F32)
    assert memory.idle() == 0


def test_a_view_keeps_the_memory():
    first = memory.empty(MANY, F32)
    first[...] = 3
    row = first[5, 10:20].view(np.int32)[::2].T
    kept = row.copy()
    del first
    second = memory.empty(MANY, F32)
    second[...] = 4
    assert memory.idle() == 0 and np.array_equal(row, kept)
    assert not np.shares_memory(row, second)


def test_only_memory_that_fits_is_taken():
    first = memory.empty((4000, 1000), F32)
    at = address(first)
    del first
    small = memory.empty(MANY, F32)  # would waste most of it
    large = memory.empty((4001, 1100), F32)  # would leave it
    assert at not in (address(small), address(large)) and memory.idle() > 0


def test_no_more_is_kept_than_the_limit(monkeypatch):
    monkeypatch.setattr(memory, "limit", lambda: 3 << 20)
    arrays = [memory.empty(MANY, F32) for _ in range(5)]
    last = {address(x) for x in arrays[-2:]}
    while arrays:
        arrays.pop(0)
    assert 0 < memory.idle() <= 3 << 20
    again = [memory.empty(MANY, F32) for _ in range(2)]
    assert {address(x) for x in again} == last  # the oldest went first


@pytest.mark.parametrize("kept", ["0", "1"])
def test_the_limit_is_set_by_the_environment(kept):
    code = (
        "import numpy as np; from ruvector_numba.plan import memory as m;"
        "x = m.empty((100000, 16), np.dtype(np.float32)); del x; print(m.limit(), m.idle())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={"RUVECTOR_NUMBA_KEEP": kept}, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [str(int(kept) << 20), "0"]  # 6.4 MB are more than either


def test_a_limit_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("RUVECTOR_NUMBA_KEEP", "lots")
    monkeypatch.setattr(memory, "limit", memory.limit.__wrapped__)  # not the one it had before
    with pytest.raises(AttentionError, match="RUVECTOR_NUMBA_KEEP is 'lots', and must be a whole number of MB") as e:
        memory.empty(MANY, F32)
    assert "before starting Python" in e.value.hint


def test_arrays_that_live_at_the_end_of_the_process_are_no_error():
    code = (
        "import numpy as np; from ruvector_numba.plan import memory as m;"
        "x = m.empty((1000, 1000), np.dtype(np.float32)); y = [x]; y.append(y); m.scratch(1 << 20, x.dtype)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr == ""


def test_threads_never_share():
    """Each writes its own number all over, lets others run, and finds nothing else."""
    wrong = []

    def work(number):
        for _ in range(30):
            x = memory.empty(MANY, F32)
            x[...] = number
            y = memory.empty(MANY, F32)
            y[...] = -number
            if not ((x == number).all() and (y == -number).all()):
                wrong.append(number)
            del x, y

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_garbage_may_be_collected_while_memory_is_looked_for():
    """Wherever the interpreter makes an object it may collect a cycle that holds an array, and so run its finaliser."""
    enabled, thresholds = gc.isenabled(), gc.get_threshold()
    try:
        for distance in range(12):
            gc.disable()
            held = [memory.empty((1 << 20, 1 + i), np.dtype(np.uint8)) for i in range(20)]
            held.clear()
            cycle = [memory.empty((60, 1 << 20), np.dtype(np.uint8))]
            cycle.append(cycle)
            del cycle
            gc.set_threshold(max(1, gc.get_count()[0] + distance), 1000, 1000)
            gc.enable()
            memory._taken(300 << 20)
            gc.disable()
            gc.collect()
            assert memory.idle() == sum(x.nbytes for x in memory._idle.values()) and not memory._returned
            memory._idle.clear()
    finally:
        gc.set_threshold(*thresholds)
        (gc.enable if enabled else gc.disable)()
