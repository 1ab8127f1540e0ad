"""Threads, what info() tells, and compiling ahead."""

import gc
import json
import os
import platform
import subprocess
import sys
import threading
import time
import types

import numba
import numpy as np
import pytest
from ruvector_numba.kernels import jit

import ruvector_numba as rv
from ruvector_numba import runtime

MOST = numba.config.NUMBA_NUM_THREADS
two_threads = pytest.mark.skipif(MOST < 2, reason="one processor, and NUMBA_NUM_THREADS is not set")


@pytest.fixture(autouse=True)
def same_number_afterwards():
    with rv.threads(rv.get_num_threads()):
        yield


def run(script, **environment):
    environment = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_another_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def large(seed=0):
    return np.random.default_rng(seed).standard_normal((2, 3, 130, 20), dtype=np.float32)


# --- threads -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, MOST, np.int64(1), np.uint8(MOST)])
def test_the_number_that_was_set_is_the_number_in_use(n):
    rv.set_num_threads(n)
    assert rv.get_num_threads() == n and type(rv.get_num_threads()) is int


@pytest.mark.parametrize("n", [0, -1, MOST + 1, True, np.True_, 1.0, "1", None, np.array([1])], ids=repr)
def test_no_other_number_can_be_set(n):
    before = rv.get_num_threads()
    for attempt in (rv.set_num_threads, lambda n: rv.threads(n).__enter__()):
        with pytest.raises(rv.InvalidInputError) as caught:
            attempt(n)
        assert f"the number of threads is {n!r}\nHINT: give a whole number from 1 to {MOST}" in str(caught.value)
        assert "NUMBA_NUM_THREADS" in caught.value.hint
    assert rv.get_num_threads() == before


@two_threads
def test_blocks_nest_and_restore_the_number_even_after_an_error():
    rv.set_num_threads(2)
    with pytest.raises(ZeroDivisionError), rv.threads(1):
        assert rv.get_num_threads() == 1
        with rv.threads(2):
            assert rv.get_num_threads() == 2
        assert rv.get_num_threads() == 1
        _ = 1 / 0
    assert rv.get_num_threads() == 2


@two_threads
@pytest.mark.parametrize("n", [1, 2])
def test_the_number_counts_in_every_python_thread(n):
    rv.set_num_threads(n)
    assert in_another_thread(rv.get_num_threads) == n
    with rv.threads(3 - n):
        assert in_another_thread(rv.get_num_threads) == 3 - n
    in_another_thread(lambda: rv.set_num_threads(3 - n))
    assert rv.get_num_threads() == 3 - n


@two_threads
@pytest.mark.parametrize("call", [lambda f: f(), in_another_thread], ids=["this thread", "another thread"])
def test_kernels_use_as_many_threads_as_were_set(call, monkeypatch):
    from ruvector_numba.kernels import jit

    x, loop, seen = large(), jit._loop(True), []

    def watched(function, job, tasks, slots, team):
        seen.append((slots, team))
        loop(function, job, tasks, slots, team)

    monkeypatch.setitem(jit._LOOP, True, watched)
    with rv.threads(1):
        call(lambda: rv.scaled_dot_product_attention(x, x, x))
    assert seen == []
    with rv.threads(2):
        call(lambda: rv.scaled_dot_product_attention(x, x, x))
    assert seen == [(2, 2)]


@two_threads
@pytest.mark.parametrize("own", [1, 2])
def test_numbas_own_number_in_the_calling_thread_is_left_alone(own):
    x, most = large(), numba.get_num_threads()
    numba.set_num_threads(own)
    try:
        with rv.threads(3 - own):
            rv.scaled_dot_product_attention(x, x, x)
        assert numba.get_num_threads() == own
    finally:
        numba.set_num_threads(most)


@two_threads
def test_more_threads_than_numbas_own_number_really_work():
    x, most = np.random.default_rng(0).standard_normal((4, 6000, 64), dtype=np.float32), numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        with rv.threads(2):
            rv.scaled_dot_product_attention(x[:, :300], x, x)
            mine, all_of_them = time.thread_time(), time.process_time()
            rv.scaled_dot_product_attention(x, x, x)
            mine, all_of_them = time.thread_time() - mine, time.process_time() - all_of_them
    finally:
        numba.set_num_threads(most)
    assert mine < 0.8 * all_of_them  # a share of the work, not its speed


@two_threads
def test_one_and_two_threads_give_the_same_bits():
    q, k, v = large(0), large(1), large(2)
    results = []
    for n in (1, 2):
        with rv.threads(n):
            cache = rv.attention_forward(q, k, v, is_causal=True)
            grads = rv.attention_backward(q, cache)
            results.append([cache.output, cache.lse, grads.query, grads.key, grads.value])
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)


GOOD = """
import threading
import ruvector_numba as rv
assert rv.get_num_threads() == 2
threading.Thread(target=lambda: print(rv.get_num_threads())).start()
rv.set_num_threads(3)
assert rv.get_num_threads() == 3
"""

BAD = """
import numpy as np, ruvector_numba as rv
x = np.ones((4, 2), np.float32)
for use in (
    lambda: rv.scaled_dot_product_attention(x, x, x),
    lambda: rv.scaled_dot_product_attention(x, x, x, precision="bfloat16"),
    lambda: rv.scaled_dot_product_attention(*[x.astype(np.float16)] * 3),
    lambda: rv.MultiHeadAttention(rv.AttentionConfig(2, 1))(x[None]),
    lambda: rv.functional.attention_scores(x, x),
    lambda: rv.CSRGraph.from_edge_index([[0], [1]]),
    rv.get_num_threads,
    rv.info,
    rv.threads(1).__enter__,
):
    try:
        use()
    except rv.InvalidInputError as error:
        print(error)
rv.set_num_threads(1)
rv.scaled_dot_product_attention(x, x, x)
"""


def test_the_environment_sets_the_first_number():
    assert run(GOOD, RUVECTOR_NUMBA_THREADS="2", NUMBA_NUM_THREADS="3") == "2\n"


@pytest.mark.parametrize("text", ["two", "0", "-1", "1.5", "4"])
def test_a_bad_number_in_the_environment_is_told_at_first_use(text):
    told = run(BAD, RUVECTOR_NUMBA_THREADS=text, NUMBA_NUM_THREADS="3")
    assert told.count(f"RUVECTOR_NUMBA_THREADS is {text!r}, and must be a whole number from 1 to 3") == 9


# --- info ----------------------------------------------------------------------------------------------------------
def test_info_says_what_there_is():
    from ruvector_numba.kernels.simd import target

    rv.scaled_dot_product_attention(large(), large(), large())
    with rv.threads(1):
        found = rv.info()
    assert found["version"] == rv.__version__
    assert found["cpu"] and isinstance(found["cpu"], str)
    assert (found["target"], found["lanes"]) == (target().cpu, target().lanes(4))
    assert found["tile"] == f"{target().rows}x{target().cols}"
    assert (found["threads"], found["max_threads"]) == (1, MOST)
    assert found["threading_layer"] in ("omp", "tbb", "workqueue")
    assert any(name.startswith("dense.forward(float32") for name in found["compiled"])
    assert found["versions"]["python"] == platform.python_version()
    assert (found["versions"]["numba"], found["versions"]["numpy"]) == (numba.__version__, np.__version__)
    assert found["gpu"].startswith("none: ") or "compute capability" in found["gpu"] or "simulated" in found["gpu"]
    assert {"llvmlite", "scipy"} < found["versions"].keys()
    assert "peak_gflops" not in found
    assert json.loads(json.dumps(found)) == found


def test_info_measures_the_peak_if_asked():
    found = rv.info(measure=True)
    assert type(found["peak_gflops"]) is float and found["peak_gflops"] > 0
    assert "peak.peak(float32)" in found["compiled"]


TARGETS = {
    ("haswell", ""): (8, {"avx2", "fma", "f16c"}),
    ("znver4", ""): (16, {"avx2", "fma", "f16c", "avx512f", "avx512bf16"}),
    ("haswell", "+avx,+avx2,+fma,+f16c"): (8, {"avx2", "fma", "f16c"}),
    ("x86-64", ""): (4, set()),
}


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="about x86")
@pytest.mark.parametrize(("cpu", "features"), TARGETS)
def test_info_is_about_what_is_compiled_for_not_what_the_machine_has(cpu, features):
    script = "import json, ruvector_numba as rv; print(json.dumps(rv.info()))"
    found = json.loads(run(script, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features))
    assert found["target"] == cpu
    assert (found["lanes"], set(found["features"])) == TARGETS[cpu, features]


# --- compiling ahead -----------------------------------------------------------------------------------------------
def test_warmup_compiles_what_common_calls_need_and_tells_how_far_it_is():
    told = []
    rv.warmup(progress=lambda *step: told.append(step))
    total = len(told)
    assert [step[:2] for step in told] == [(done, total) for done in range(1, total + 1)]
    assert {"forward plain, float32", "backward causal, float32", "decode, float32"} <= {name for _, _, name in told}
    assert total == len({name for _, _, name in told})
    compiled = rv.info()["compiled"]
    x = large()
    cache = rv.attention_forward(x, x, x, np.tri(130, dtype=bool), softcap=None)
    rv.attention_backward(x, cache)
    rv.scaled_dot_product_attention(x[:, :, :1], x, x, is_causal=True)
    rv.scaled_dot_product_attention(x, x, x, softcap=10.0)
    layer = rv.MultiHeadAttention(rv.AttentionConfig(d_model=64, num_heads=2, causal=True))
    row = np.ones((2, 40, 64), np.float32)
    for training in (False, True):
        layer.backward(row, layer.forward_cached(row, row, row, training=training)[1])
    layer.step(row[:, :1], layer.new_cache(2, 5))
    assert rv.info()["compiled"] == compiled


@pytest.mark.parametrize(
    "given", ["float64", np.float64, np.dtype("float64"), ["float64"], iter([np.float64])], ids=repr
)
def test_warmup_takes_one_dtype_or_several(given, monkeypatch):
    told = []
    monkeypatch.setattr(runtime, "_CALLS", runtime._CALLS[:1])
    rv.warmup(given, lambda *step: told.append(step))
    assert told == [(1, 1, "forward plain, float64")]


def test_warmup_knows_half_precision_and_leaves_out_what_is_float32_there(monkeypatch):
    told = []
    calls = [call for call in runtime._CALLS if call.name in ("decode", "layer", "graph")]
    monkeypatch.setattr(runtime, "_CALLS", calls)
    rv.warmup(["bfloat16", "float16"], lambda *step: told.append(step))
    assert told == [(1, 2, "decode, bfloat16"), (2, 2, "decode, float16")]


@pytest.mark.parametrize("given", ["flout32", ["float32", "flout32"], 32.5, "int8", ["float32", np.uint16]])
def test_warmup_refuses_what_is_no_dtype_before_any_work(given):
    told = []
    with pytest.raises(
        rv.InvalidInputError, match=r"dtypes (is|has)(.|\n)*HINT: give some of float32, float64, float16, bfloat16"
    ):
        rv.warmup(given, lambda *step: told.append(step))
    assert told == []


def test_functions_and_layers_need_the_same_kernels(monkeypatch):
    """Else whoever uses both waits twice. `eps`, which layers add to the softmax's sum, once had kernels of its own."""
    prepare, needed = jit.Kernel.prepare, []

    def watched(kernel, job, *others):
        needed[-1].add((kernel.name, *(field for field, x in zip(job._fields, job, strict=True) if x is None)))
        return prepare(kernel, job, *others)

    monkeypatch.setattr(jit.Kernel, "prepare", watched)
    layer = rv.MultiHeadAttention(rv.AttentionConfig(12, 2, dropout=0.0), seed=0)
    for length in (23, 1):  # that no other test has, whose plans are kept
        x = np.random.default_rng(0).standard_normal((3, length, 12), dtype=np.float32)
        heads = np.ascontiguousarray(x.reshape(3, length, 2, 6).swapaxes(1, 2))
        needed.append(set())
        cache = rv.attention_forward(heads, heads, heads)
        rv.attention_backward(heads, cache)
        needed.append(set())
        layer.backward(*layer.forward_cached(x))
        by_function, by_layer = needed[-2:]
        assert by_function and by_function == {kernel for kernel in by_layer if kernel[0] != "projection.project"}


def test_compiling_is_spoken_of_at_first_and_after_a_silence(caplog, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(jit.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(jit._Said, "at", -np.inf)
    for name, later in (("dense.forward", 0), ("dense.backward", 3), ("csr.forward", 9), ("csr.fold", 1)):
        now[0] += later
        jit._say_compiling(name)
    first, second = caplog.messages
    assert "once" in first and "warmup" in first and "csr.forward" in second


@pytest.mark.parametrize(("quiet", "notices"), [("1", 0), ("0", 1), (None, 1)])
def test_notices_of_compiling_can_be_silenced(quiet, notices, caplog, monkeypatch):
    monkeypatch.delenv("RUVECTOR_NUMBA_QUIET", raising=False)
    if quiet is not None:
        monkeypatch.setenv("RUVECTOR_NUMBA_QUIET", quiet)
    monkeypatch.setattr(jit._Said, "at", -np.inf)
    jit._say_compiling("dense.forward")
    assert len(caplog.messages) == notices


@pytest.mark.parametrize("enabled", [True, False])
def test_compiling_leaves_garbage_collection_as_it_was(enabled, monkeypatch):
    """Also when it fails: a process that never collects again would grow without end."""
    seen = []

    class Uncompilable:
        def __init__(self, *args, **options):
            self._sig = None

        def compile(self):
            seen.append(gc.isenabled())
            raise RuntimeError("no")

    monkeypatch.setattr(jit.ccallback, "CFunc", Uncompilable)
    monkeypatch.setattr(jit, "PackageCache", lambda function: types.SimpleNamespace(holds=lambda signature: True))
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(RuntimeError, match="no"):
            jit._c_function(None, numba.void(numba.int64))
        assert gc.isenabled() == enabled and seen == [False]
    finally:
        (gc.enable if was else gc.disable)()
