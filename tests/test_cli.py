"""The command, as a user meets it: results and files, and errors of one or two lines with exit status 2."""

import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest

import ruvector_numba as rv
from ruvector_numba import cli
from ruvector_numba.bench import comparison, peers

H, HK, LQ, LK, D, DV = 4, 2, 10, 13, 8, 5


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder to work in, with q.npy, k.npy, v.npy and two masks; the arrays by name."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    arrays = {
        "q": rng.standard_normal((H, LQ, D), dtype=np.float32),
        "k": rng.standard_normal((H, LK, D), dtype=np.float32),
        "v": rng.standard_normal((H, LK, DV), dtype=np.float32),
        "bool": rng.random((LQ, LK)) < 0.7,
        "float": rng.standard_normal((LQ, LK), dtype=np.float32),
    }
    for name, array in arrays.items():
        np.save(name, array)
    return arrays


def refused(arguments, capsys):
    """What a command that must fail says: one or two lines, no traceback, status 2."""
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert 1 <= len(error.splitlines()) <= 2
    assert error.startswith("ruvector-numba: ")
    assert "Traceback" not in error
    return error


# --- attend -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ([], {}),
        (["--causal"], {"is_causal": True}),
        (["--window", "3", "1"], {"attn_mask": rv.masks.Window(3, 1)}),
        (["--window", "2", "none"], {"attn_mask": rv.masks.Window(left=2)}),
        (["--mask", "bool.npy"], {"attn_mask": "bool"}),
        (["--mask", "float.npy", "--causal"], {"attn_mask": "float", "is_causal": True}),
        (["--scale", "0.3", "--softcap", "2"], {"scale": 0.3, "softcap": 2.0}),
    ],
    ids=lambda x: " ".join(x) or "plain" if isinstance(x, list) else "",
)
def test_attend_does_what_the_function_does(files, capsys, options, terms):
    assert cli.main(["attend", "q.npy", "k.npy", "v.npy", "-o", "out.npy", *options]) == 0
    told = capsys.readouterr().out
    terms = {k: files[v] if isinstance(v, str) else v for k, v in terms.items()}
    want = rv.scaled_dot_product_attention(files["q"], files["k"], files["v"], **terms)
    np.testing.assert_array_equal(np.load("out.npy"), want)
    assert f"({H}, {LQ}, {DV}) float32, written to out.npy" in told


def test_attend_composes_window_and_mask_and_shares_key_heads(files):
    for name in "kv":
        np.save(name, files[name][:HK])
    arguments = ["q.npy", "k.npy", "v.npy", "-o", "out.npy", "--gqa", "--window", "3", "0", "--mask", "bool.npy"]
    assert cli.main(["attend", *arguments]) == 0
    mask = rv.masks.Window(3, 0) & files["bool"]
    want = rv.scaled_dot_product_attention(files["q"], files["k"][:HK], files["v"][:HK], mask, enable_gqa=True)
    np.testing.assert_array_equal(np.load("out.npy"), want)


@pytest.mark.parametrize("name", ["query", "key", "value", "mask"])
def test_attend_writes_over_no_input(files, capsys, name):
    path = {"query": "q.npy", "key": "k.npy", "value": "v.npy", "mask": "bool.npy"}[name]
    same = os.path.join("..", os.path.basename(os.getcwd()), path)
    error = refused(["attend", "q.npy", "k.npy", "v.npy", "--mask", "bool.npy", "-o", same], capsys)
    assert f"the output would replace the {name}, {path}" in error
    for name, array in files.items():
        np.testing.assert_array_equal(np.load(f"{name}.npy"), array)
    assert cli.main(["attend", "q.npy", "k.npy", "v.npy", "-o", "bool.npy"]) == 0  # no input of this call


def test_attend_follows_links_and_keeps_what_is_no_file(files, capsys):
    command = ["attend", "q.npy", "k.npy", "v.npy", "-o"]
    for name in ("target.npy", "out.npy.part"):
        with open(name, "w") as file:
            file.write("mine")
    os.symlink("target.npy", "out.npy")
    os.mkfifo("pipe")
    os.symlink("nowhere/out.npy", "astray.npy")
    assert cli.main([*command, "out.npy"]) == 0
    assert os.path.islink("out.npy") and np.load("target.npy").shape == (H, LQ, DV)
    with open("out.npy.part") as file:
        assert file.read() == "mine"
    assert "pipe is not a file" in refused([*command, "pipe"], capsys)
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)
    assert "nowhere to write out.npy to" in refused([*command, "astray.npy"], capsys)
    assert not [name for name in os.listdir() if name.endswith(".tmp")]


def test_a_save_that_fails_leaves_the_old_output(files, capsys, monkeypatch):
    def fail(*_):
        raise OSError("12 requested and 4 written")  # as NumPy's tofile, on a full disk

    np.save("out.npy", files["q"])
    monkeypatch.setattr(np, "save", fail)
    assert "12 requested and 4 written" in refused(["attend", "q.npy", "k.npy", "v.npy", "-o", "out.npy"], capsys)
    np.testing.assert_array_equal(np.load("out.npy"), files["q"])
    assert not [name for name in os.listdir() if name.endswith(".tmp")]


def test_attend_speaks_of_its_flags(files, capsys):
    for name in "kv":
        np.save(name, files[name][:HK])
    error = refused(["attend", "q.npy", "k.npy", "v.npy", "-o", "out.npy"], capsys)
    assert "pass --gqa" in error and "enable_gqa" not in error
    error = refused(["attend", "q.npy", "k.npy", "v.npy", "-o", "out.npy", "--gqa", "--softcap", "0"], capsys)
    assert "or leave --softcap out" in error
    error = refused(["attend", "q.npy", "k.npy", "v.npy", "-o", "out.npy", "--gqa", "--mask", "q.npy"], capsys)
    assert "mask.shape" in error and "attn_mask" not in error


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"ruvector-numba {rv.__version__}\n"


def test_without_the_compiler_a_line_says_so(capsys, monkeypatch):
    import numba

    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert "NUMBA_DISABLE_JIT is set" in refused(["info"], capsys)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere.npy", "k.npy", "v.npy", "-o", "out.npy"], "query: there is no file nowhere.npy"),
        (["q.npy", "text.npy", "v.npy", "-o", "out.npy"], "key: text.npy is not an .npy file of numbers"),
        (["q.npy", "empty.npy", "v.npy", "-o", "out.npy"], "key: empty.npy is not an .npy file of numbers"),
        (["q.npy", "k.npy", "several.npz", "-o", "out.npy"], "value: several.npz holds several arrays"),
        (["q.npy", "k.npy", ".", "-o", "out.npy"], "value: . cannot be read"),
        (["q.npy", "k.npy", "v.npy", "-o", "nowhere/out.npy"], "there is no folder nowhere"),
        (["q.npy", "k.npy", "v.npy", "-o", "."], ". is a folder"),
        (["half.npy", "k.npy", "v.npy", "-o", "out.npy"], "HINT: cast them to one"),
        (["q.npy", "v.npy", "v.npy", "-o", "out.npy"], f"query.shape: ({H}, {LQ}, {D}); key.shape: ({H}, {LK}, {DV})"),
        (["q.npy", "k.npy", "v.npy", "-o", "out.npy", "--window", "-1", "0"], "left is -1"),
        (["q.npy", "k.npy", "v.npy", "-o", "out.npy", "--mask", "q.npy"], "does not broadcast"),
        (["q.npy", "k.npy", "v.npy", "-o", "out.npy", "--softcap", "0"], "softcap is 0.0"),
        (["q.npy", "k.npy", "v.npy", "-o", "out.npy", "--scale", "nan"], "scale is nan"),
    ],
)
def test_attend_refuses_in_two_lines(files, capsys, arguments, says):
    np.save("half.npy", files["q"].astype(np.float16))
    np.savez("several.npz", files["q"], files["k"])
    open("empty.npy", "w").close()
    with open("text.npy", "w") as file:
        file.write("1 2 3")
    assert says in refused(["attend", *arguments], capsys)
    assert not os.path.exists("out.npy")
    assert not [n for n in os.listdir() if n.endswith(".part")]


def npy(header):
    """The bytes of an .npy file with this header, before some numbers."""
    text = header.ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(4 * 80)


SHAPES = ["(-2, 5, 8)", "(2, 5, 8", "(99999999999999999999, 5, 8)", "(2, (5, 8))", "2", "(2, 5, 8)], [("]


@pytest.mark.parametrize("name", ["query", "mask"])
@pytest.mark.parametrize("shape", [None, *SHAPES])
def test_damaged_files_are_refused_in_two_lines(files, capsys, name, shape):
    np.savez("several.npz", **files)
    with open("several.npz", "rb") as file:
        data = file.read()[:-40]
    with open("damaged.npy", "wb") as file:
        file.write(data if shape is None else npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"))
    query = "damaged.npy" if name == "query" else "q.npy"
    mask = ["--mask", "damaged.npy"] if name == "mask" else []
    error = refused(["attend", query, "k.npy", "v.npy", "-o", "out.npy", *mask], capsys)
    assert f"{name}: damaged.npy is not an .npy file of numbers\n" in error


def test_a_mask_that_is_missing_beside_an_output_that_is_there(files, capsys):
    np.save("out.npy", files["q"])
    error = refused(["attend", "q.npy", "k.npy", "v.npy", "-o", "out.npy", "--mask", "missing.npy"], capsys)
    assert "mask: there is no file missing.npy" in error
    np.testing.assert_array_equal(np.load("out.npy"), files["q"])


def test_names_that_are_too_long(files, capsys, monkeypatch):
    monkeypatch.setattr(rv, "scaled_dot_product_attention", None)  # nothing is computed
    long = "x" * 300
    error = refused(["attend", "q.npy", "k.npy", "v.npy", "-o", long], capsys)
    assert f"{long} cannot be written: " in error
    error = refused(["attend", "q.npy", "k.npy", "v.npy", "-o", f"{long}/out.npy"], capsys)
    assert f"there is no folder {long} to write out.npy to" in error
    assert "query: " in refused(["attend", long, "k.npy", "v.npy", "-o", "out.npy"], capsys)


@pytest.mark.parametrize(
    "arguments", [[], ["attend"], ["attend", "q.npy", "k.npy", "v.npy"], ["sing"], ["demo", "sing"]]
)
def test_usage_is_told_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: ruvector-numba" in capsys.readouterr().err


def test_a_window_that_is_no_number_is_told_without_private_names(capsys):
    with pytest.raises(SystemExit):
        cli.main(["attend", "q.npy", "k.npy", "v.npy", "-o", "out.npy", "--window", "2.5", "0"])
    error = capsys.readouterr().err
    assert "'2.5' is neither a whole number nor none" in error and "_reach" not in error


# --- info, warmup -----------------------------------------------------------------------------------------------------
def test_info_as_json_is_what_the_function_returns(capsys):
    assert cli.main(["info", "--json", "--no-peak"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == rv.__version__
    assert found["threads"] == rv.get_num_threads()
    assert "peak_gflops" not in found


def test_info_says_what_matters(capsys):
    assert cli.main(["info"]) == 0
    told = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert {"version", "cpu", "lanes", "features", "threads", "threading layer", "cache folder", "versions"} <= set(
        told
    )
    assert "GFLOP/s, float32, one thread" in told["peak"]


def test_warmup_shows_progress_and_says_where_code_is_kept(capsys, monkeypatch):
    steps = []

    def warmup(dtypes, progress):
        steps.append(dtypes)
        progress(1, 1, "forward plain, float64")

    monkeypatch.setattr(rv, "warmup", warmup)
    assert cli.main(["warmup", "--dtypes", "float64"]) == 0
    assert steps == [["float64"]]
    assert "compiled in" in capsys.readouterr().out


def test_warmup_says_which_types_it_compiles_for(capsys):
    with pytest.raises(SystemExit):
        cli.main(["warmup", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "one to three minutes each (default: float32 alone)" in told


def test_a_wrong_environment_is_refused_and_the_module_runs():
    """In a process of its own, as `python -m ruvector_numba`."""
    command = [sys.executable, "-m", "ruvector_numba", "info", "--no-peak"]
    done = subprocess.run(
        command, env={**os.environ, "RUVECTOR_NUMBA_THREADS": "many"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "RUVECTOR_NUMBA_THREADS is 'many'" in done.stderr
    assert "Traceback" not in done.stderr


# --- bench, demo ------------------------------------------------------------------------------------------------------
def test_bench_measures_without_any_peer(capsys, monkeypatch):
    monkeypatch.setattr(comparison, "QUICK_WORKS", (peers.Work(1, 2, 9, 9, 8, causal=True, backward=True),))
    assert cli.main(["bench", "--quick", "--threads", "1", "--peers", "numpy"]) == 0
    told = capsys.readouterr().out
    assert "(1, 2, 9, 8)" in told
    assert "numpy" in told
    assert "x)" in told  # a ratio: both were timed, so both were right


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--peers", "abacus"], "there is no peer named 'abacus'"), (["--threads", "0"], "number of threads is 0")],
)
def test_bench_refuses_what_it_cannot_do(arguments, says, capsys):
    assert says in refused(["bench", *arguments], capsys)


def test_what_an_extra_brings_is_named_when_it_is_missing(capsys, monkeypatch):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda n: None if n == "sklearn" else find(n))
    error = refused(["demo"], capsys)
    assert 'pip install ".[demo]", in a clone of ruvector-numba' in error
    assert "sklearn" in error


@pytest.fixture(scope="module")
def demo():
    for package in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(package)
    from ruvector_numba.demo import digits as demo

    return demo


@pytest.fixture(scope="module")
def digits(demo):
    """A few of the digits, so that it is quick."""
    import dataclasses

    every = demo.load_digits()
    assert every.memory.shape == (demo.MEMORIES, 64)
    assert every.tests.shape == (demo.TESTS, 64)
    return dataclasses.replace(
        every, memory=every.memory[:300], memory_labels=every.memory_labels[:300], tests=every.tests[:60],
        test_labels=every.test_labels[:60],
    )  # fmt: skip


def test_the_demo_learns(demo, digits):
    losses = []
    projection = demo.train(digits, 12, losses.append)
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    answers = demo.read(digits, projection)
    np.testing.assert_allclose(answers.sum(axis=1), 1, rtol=1e-5)
    assert demo.accuracy_of(answers, digits) > 0.8


def test_the_demos_gradient_is_the_slope_of_its_loss(demo, digits):
    """Along a random direction, by central differences; float32 allows some percent."""
    rng = np.random.default_rng(1)
    projection = rng.standard_normal((demo.HEADS, 64, demo.DIM), dtype=np.float32) / 8
    direction = rng.standard_normal(projection.shape, dtype=np.float32)

    def loss(step):
        return demo.training_step(digits, projection + np.float32(step) * direction, np.random.default_rng(2))

    slope = (loss(1e-3)[0] - loss(-1e-3)[0]) / 2e-3
    assert slope == pytest.approx(float((loss(0)[1] * direction).sum()), rel=0.05)


def test_the_demo_draws_its_picture(demo, digits, tmp_path):
    projection = np.random.default_rng(0).standard_normal((demo.HEADS, 64, demo.DIM), dtype=np.float32)
    path = tmp_path / "attention.png"
    demo.draw(path, digits, projection, demo.read(digits, projection), 0.5)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 50_000


def test_the_demo_reports_every_number(demo, tmp_path):
    neighbours = {1: 0.9822, 3: 0.9867}
    report = demo.Report(0.9889, 0.9667, neighbours, 4.4e-7, 5.1e-7, 0.008, 0.024, "3 steps", tmp_path / "p.png")
    told = dict(report.lines())
    assert told["accuracy, attention"].startswith("98.89%")
    assert "98.22% (k=1), 98.67% (k=3)" in told["accuracy, k nearest neighbours"]
    assert "3.0 times ours" in told["time to attend, all at once"]
