"""What the engine survives: many Python threads, a fork, the workqueue layer, Ctrl-C. And that bounds are checked."""

import os
import signal
import subprocess
import sys
import time

import pytest

THREADS_AND_FORK = """
import os, threading
import numpy as np, ruvector_numba as rv
q = np.random.default_rng(0).standard_normal((2, 4, 256, 64), dtype=np.float32)
attend = lambda: rv.scaled_dot_product_attention(q, q, q)
want, wrong = attend(), []
def work():
    for _ in range(10):
        if not np.array_equal(want, attend()):
            wrong.append(1)
threads = [threading.Thread(target=work) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
assert not wrong
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(want, attend()) else 3)
assert os.waitpid(child, 0)[1] == 0
"""

BEYOND_THE_KEYS = """
import numpy as np, ruvector_numba as rv
from ruvector_numba.plan import dense as plan
job = plan._job
beyond = {"Lk": 72, "split_keys": 72, "limits": np.array([0, 72])}
plan._job = lambda *sizes, **more: job(*sizes, **{**more, **beyond})
q, longer = np.ones((1, 64, 16), np.float32), np.ones((1, 80, 16), np.float32)
try:
    rv.scaled_dot_product_attention(q, longer[:, :64], longer[:, :64])
except IndexError as error:
    assert "left the bounds" in str(error)
else:
    raise SystemExit("a read beyond the keys went unseen")
"""

MORE_THREADS_MEANWHILE = """
import numpy as np, ruvector_numba as rv
from ruvector_numba.plan import memory
q = np.random.default_rng(0).standard_normal((3, 2000, 16), dtype=np.float32)
with rv.threads(1):
    want = rv.scaled_dot_product_attention(q, q, q)
scratch = memory.scratch
def meanwhile(*size):
    found = scratch(*size)
    rv.set_num_threads(8)
    return found
memory.scratch = meanwhile
with rv.threads(1):
    assert np.array_equal(want, rv.scaled_dot_product_attention(q, q, q))
    assert rv.get_num_threads() == 8
"""

INTERRUPTED = """
import signal
import numpy as np, ruvector_numba as rv
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background may have it ignored
long = np.random.default_rng(0).standard_normal((4, 20000, 64), dtype=np.float32)
out = np.empty_like(long)
short = long[:, :100]
want = rv.scaled_dot_product_attention(short, short, short)
print("ready", flush=True)
try:
    while True:
        out[...] = np.nan
        rv.scaled_dot_product_attention(long, long, long, out=out)
except KeyboardInterrupt:
    print("interrupted", flush=True)
assert np.isnan(out).any()  # and not at its end
assert np.array_equal(want, rv.scaled_dot_product_attention(short, short, short))
rv.scaled_dot_product_attention(long[:, :1000], long, long)  # on threads
print("right")
"""

WITHOUT_COMPILER = """
import numpy as np, ruvector_numba as rv
q = np.ones((4, 2), np.float32)
try:
    rv.scaled_dot_product_attention(q, q, q)
except RuntimeError as error:
    assert "unset NUMBA_DISABLE_JIT" in str(error)
else:
    raise SystemExit("attention without a compiler?")
"""


def run(script, **environment):
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("layer", ["default", "workqueue"])
def test_eight_threads_and_a_forked_child(layer):
    run(THREADS_AND_FORK, NUMBA_THREADING_LAYER=layer)


def test_bounds_checking_notices_a_read_beyond_an_array():
    run(BEYOND_THE_KEYS, NUMBA_BOUNDSCHECK="1")


def test_another_python_thread_may_raise_the_number_of_threads_while_a_call_lays_out_its_scratch():
    run(MORE_THREADS_MEANWHILE, NUMBA_BOUNDSCHECK="1", NUMBA_NUM_THREADS="8")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process there")
def test_ctrl_c_in_a_long_call_ends_it_and_leaves_everything_usable():
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "ready\n", child.stderr.read()
        time.sleep(0.2)  # into the first call
        child.send_signal(signal.SIGINT)
        output, errors = child.communicate(timeout=120)
    finally:
        child.kill()
    assert (output, child.returncode) == ("interrupted\nright\n", 0), errors


def test_without_numbas_compiler_the_error_says_so():
    run(WITHOUT_COMPILER, NUMBA_DISABLE_JIT="1")
