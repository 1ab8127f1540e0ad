"""What the engine survives: many Python threads, a forked child, the workqueue layer; and that bounds are checked."""

import os
import subprocess
import sys

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
from ruvector_numba import plan
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
