"""The cache of compiled kernels: whatever happens to its folder, results are right, and nothing is compiled twice.

Each test runs in processes of its own. Where attention itself does not matter, they compile a much smaller kernel.
"""

import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest

import ruvector_numba as rv

ATTEND = """
def work():
    x = np.random.default_rng(0).standard_normal((2, 128, 16), dtype=np.float32)
    p = np.exp(x @ x.swapaxes(-1, -2).astype(np.float64) / 4)
    want = p / p.sum(axis=-1, keepdims=True) @ x
    assert np.abs(rv.scaled_dot_product_attention(x, x, x) - want).max() < 1e-5
"""

ADD = """
def work(dtype="float32"):
    launch, tile = peak.prepare(np.dtype(dtype), 1000)
    launch()
    assert (tile == 501).all(), tile
"""

CHILD = """
import json, shutil, sys
import numpy as np
from numba.core import event
import ruvector_numba as rv
from ruvector_numba.kernels import jit, peak
{work}
with event.install_recorder("numba:run_pass") as passes:
    {do}
folder = jit.cache_folder()
print(json.dumps([len(passes.buffer), None if folder is None else str(folder), rv.__file__]))
"""


FMA = re.compile(r"^def _?fma\(b, x, y, z\):", re.MULTILINE)  # what every product comes to


class Child(NamedTuple):
    passes: int  # of Numba's compiler
    folder: str | None
    package: str  # its file
    warnings: str

    @property
    def compiled(self):
        return self.passes > 0


def start(work, cache, do="work()", cwd=None, **environment):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), **environment}
    for name in ("RUVECTOR_NUMBA_CACHE", "RUVECTOR_NUMBA_THREADS"):
        environment.pop(name, None)
    script = CHILD.format(work=work, do=do)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", script], env=environment, cwd=cwd, text=True, **pipes)


def finish(process):
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return Child(*json.loads(output), errors)


def run(*arguments, **options):
    return finish(start(*arguments, **options))


def files(cache):
    """The compiled functions below the folder, with what shows that they were written anew."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in pathlib.Path(cache).rglob("*.bin")}


def copy_of_package(folder):
    """The package in a folder of its own, so that what lies beside the sources can be changed; for PYTHONPATH."""
    from ruvector_numba.kernels import jit

    leave = shutil.ignore_patterns("__pycache__", "kernels")
    package = shutil.copytree(pathlib.Path(rv.__file__).parent, folder / "ruvector_numba", ignore=leave)
    shutil.copytree(pathlib.Path(jit.__file__).parent, package / "kernels", ignore=leave)
    return {"cwd": folder, "PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def attended(tmp_path_factory):
    """A folder, and the two processes that compiled attention into it at once."""
    cache = tmp_path_factory.mktemp("attended")
    processes = [start(ATTEND, cache, NUMBA_NUM_THREADS="2") for _ in range(2)]
    return cache, [finish(process) for process in processes]


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    """A folder with a small kernel, and the process that compiled it."""
    cache = tmp_path_factory.mktemp("added")
    return cache, run(ADD, cache)


@pytest.fixture
def warm(added, tmp_path):
    return shutil.copytree(added[0], tmp_path / "cache")


def test_two_processes_that_compile_at_once_are_both_right_and_leave_only_whole_files(attended):
    cache, children = attended
    assert all(child.compiled and child.folder == str(cache / "ruvector_numba") for child in children)
    left = {path for path in cache.rglob("*") if path.is_file()}
    assert left == files(cache).keys() and left  # nothing half-done


def test_a_warm_process_compiles_nothing(attended):
    cache, cold = attended
    before = files(cache)
    child = run(ATTEND, cache, NUMBA_NUM_THREADS="2")
    assert not child.compiled and "compiling" not in child.warnings
    assert files(cache) == before
    assert all("compiling" in other.warnings and str(cache) in other.warnings for other in cold)  # once, and where


DAMAGES = {
    "rubbish": lambda content: b"rubbish!" * (len(content) // 8),
    "cut short": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "wrong in the middle": lambda content: content[:-9000] + bytes(64) + content[-8936:],
    "something else": lambda content: pickle.dumps({"not": "a kernel"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_compiled_again_and_replaced(damage, warm):
    assert files(warm)
    for path in files(warm):
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    damaged = files(warm)
    assert run(ADD, warm).compiled
    healed = files(warm)
    assert healed.keys() == damaged.keys() and all(healed[path] != damaged[path] for path in damaged)
    assert not run(ADD, warm).compiled


def test_a_folder_deleted_between_two_kernels(tmp_path):
    child = run(ADD, tmp_path / "cache", do="work(); shutil.rmtree(jit.cache_folder()); work('float64'); work()")
    assert child.compiled


def test_nothing_can_be_written(tmp_path):
    package = copy_of_package(tmp_path)
    blocked = tmp_path / "ruvector_numba" / "kernels" / "__pycache__"
    blocked.write_text("a file, where a folder is wanted: not even root can write into it")
    before = set(tmp_path.rglob("*.*"))
    child = run(ADD, blocked, **package, HOME=str(blocked), XDG_CACHE_HOME=str(blocked), PYTHONDONTWRITEBYTECODE="1")
    assert child.compiled and child.folder is None and child.package.startswith(str(tmp_path))
    assert set(tmp_path.rglob("*.*")) == before


def test_where_compiled_kernels_are_kept(tmp_path, added):
    """NUMBA_CACHE_DIR, then the user's cache, then beside the sources."""
    cache, child = added
    assert child.folder == str(cache / "ruvector_numba") and child.compiled
    package = copy_of_package(tmp_path)
    beside = tmp_path / "ruvector_numba" / "kernels" / "__pycache__"
    nowhere = pathlib.Path(os.devnull, "nowhere")
    user = {"XDG_CACHE_HOME": str(tmp_path / "user")}
    assert run(ADD, nowhere, **package, **user).folder == str(tmp_path / "user" / "ruvector_numba")
    assert files(tmp_path / "user")
    assert run(ADD, nowhere, **package, XDG_CACHE_HOME=str(nowhere)).folder == str(beside) and files(beside)


def test_a_change_in_another_source_compiles_anew(tmp_path, warm):
    """Numba's own cache would go on with the old code: it looks at the file of the kernel, not at what it calls."""
    package = copy_of_package(tmp_path)
    assert not run(ADD, warm, **package).compiled  # it does not matter where the package lies
    sources = (tmp_path / "ruvector_numba" / "kernels").rglob("*.py")
    found = {path: FMA.search(path.read_text()) for path in sources}
    [(source, header)] = [(path, match) for path, match in found.items() if match]
    original = source.read_text()
    source.write_text(f"{original}\n\n{header[0]}\n    return b.fadd(y, z)\n")  # 1 + z, where 0.5 * 1 + z was
    child = run(ADD.replace("501", "1001"), warm, **package)
    assert child.compiled and child.package.startswith(str(tmp_path))
    source.write_text(original)
    assert not run(ADD, warm, **package).compiled


def test_sources_that_change_while_a_process_runs_leave_nothing_stale(tmp_path):
    """What it imported is not what the files say now: under either name its code would be wrong for somebody."""
    package = copy_of_package(tmp_path)
    cache = tmp_path / "cache"
    change = "open(jit.__file__, 'a').write('# another version'); work()"
    child = run(ADD, cache, do=change, **package)
    assert child.compiled and child.package.startswith(str(tmp_path))
    assert not files(cache)
    assert run(ADD, cache, **package).compiled and files(cache)


SOMEBODY_ELSE = """
import threading
import numba
from ruvector_numba.kernels import gather
assert "add" in jit._PARTS
source = "def add(x):" + "".join(f"\\n    s{i} = np.sum(x[{i}:])" for i in range(60)) + "\\n    return s0"
exec(source, globals())
theirs, found, begun = numba.njit(add), [], threading.Event()


def compile_theirs():
    with event.install_listener("numba:compile", Told()):
        found.append(theirs(np.ones(3)))


class Told(event.Listener):
    def on_start(self, _):
        begun.set()

    def on_end(self, _):
        pass
"""


def test_what_others_compile_meanwhile_is_theirs(tmp_path):
    """Parts of kernels are known by name, while Numba's one target makes them: a user's `add` is none."""
    race = "t = threading.Thread(target=compile_theirs); t.start(); begun.wait(); work(); t.join()"
    run(SOMEBODY_ELSE + ADD, tmp_path / "cache", do=race + "; assert found == [3.0], found")


def test_a_name_is_that_of_a_kernel_or_of_a_part():
    """Else the kernel would be compiled as a part, which has no address, once both are imported."""
    from ruvector_numba.kernels import functional, gather, jit  # noqa: F401

    def named(name):
        def function(job, slot, task):
            pass

        function.__qualname__ = name
        return function

    for wrong, decorate in (("take_row", jit.kernel), ("product", jit.apart)):
        with pytest.raises(ValueError, match=f"{wrong} would be the name of a kernel and of a part"):
            decorate(named(wrong))
