"""Files hold what was saved, bit for bit; whatever else lies at a path is refused by name and changes nothing."""

import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from toy import Line, state

from ruvector_numba import AttentionError, DimensionMismatchError, InvalidConfigError, InvalidInputError
from ruvector_numba import files as files_module
from ruvector_numba.parameters import ParameterSet, Trainable

safetensors = pytest.importorskip("safetensors")
pytest.importorskip("safetensors.numpy")

F32, F64 = np.float32, np.float64


class Configured(Line):
    """A layer with a configuration."""

    def __init__(self, rate=0.5, **options):
        super().__init__(**options)
        self.rate = rate

    def _file_header(self):
        return {"kind": "Configured", "config": json.dumps({"rate": self.rate})}


class Made(Trainable):
    def __init__(self, arrays):
        self._parameters = ParameterSet(arrays)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("as_path", [str, pathlib.Path])
def test_what_was_saved_is_loaded(tmp_path, dtype, as_path):
    path = as_path(tmp_path / "läyer.safetensors")
    layer, other = Line(dtype, seed=1), Line(F32, seed=2)
    layer.save(path)
    other.load(path)  # takes the dtype of the file
    assert state(other) == state(layer) and os.listdir(tmp_path) == ["läyer.safetensors"]
    with pytest.raises(ValueError, match="read-only"):
        other.parameters["w"][...] = 0


def test_any_names_and_shapes(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"z": rng.standard_normal((3, 1, 2)), "a ü": np.array(1.5), "none": np.zeros((0, 4)), "b": np.ones(1)}
    for given in (arrays, {}):
        layer, other = Made(given), Made({name: np.zeros_like(x) for name, x in given.items()})
        layer.save(tmp_path / "file")
        other.load(tmp_path / "file")
        assert other.parameters == layer.parameters and list(other.parameters) == list(given)


def test_the_file_is_plain_safetensors_with_the_configuration_in_its_header(tmp_path):
    Configured(rate=0.25, dtype=F64).save(tmp_path / "file")
    with safetensors.safe_open(tmp_path / "file", "np") as file:
        assert file.metadata() == {"kind": "Configured", "config": '{"rate": 0.25}'}
        assert sorted(file.keys()) == ["b", "w"]
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "file")["w"], Line(F64).parameters["w"])


def test_a_layer_loads_only_what_its_like_saved(tmp_path):
    Configured(rate=0.25).save(tmp_path / "file")
    Configured(rate=0.25, seed=3).load(tmp_path / "file")
    for layer, words in (
        (Configured(), 'config differs\n  in the file   : {"rate": 0.25}\n  in this object: {"rate": 0.5}\nHINT'),
        (Line(), "kind differs\n  in the file   : Configured\n  in this object: Line"),
    ):
        refused(layer, tmp_path / "file", InvalidConfigError, re.escape(words))
    safetensors.numpy.save_file(dict(Line().parameters), tmp_path / "plain")
    refused(Line(), tmp_path / "plain", InvalidConfigError, "in the file   : nothing")


# --- what is refused -----------------------------------------------------------------------------------------------
def refused(layer, path, kind, words):
    """Loading raises this kind with these words and the path, and the layer is what it was."""
    before = layer.parameters
    with pytest.raises(kind, match=words) as caught:
        layer.load(path)
    assert type(caught.value) is kind and str(path) in str(caught.value)
    assert caught.value.hint and len(str(caught.value)) < 2500
    assert layer.parameters is before


W, B = (
    {"dtype": "F64", "shape": [2, 2], "data_offsets": [0, 32]},
    {"dtype": "F64", "shape": [1], "data_offsets": [32, 40]},
)
KIND = {"kind": "Line"}


def file_of(header, data=None, length=None):
    """The bytes of a file with this header, a mapping or raw, and 5 ones unless other data are given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = np.ones(5).tobytes() if data is None else data
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entries(w=W, b=B, **more):
    return {"__metadata__": KIND, "w": w, "b": b, **more}


def raw(*pairs):
    return ("{" + ",".join(f'"{name}":{json.dumps(x)}' for name, x in pairs) + "}").encode()


GOOD = file_of(entries())
DAMAGED = "is damaged, or no safetensors file: "
HOSTILE = {
    # cut short, or longer
    "empty": (b"", DAMAGED + "it has no header"),
    "short": (GOOD[:7], DAMAGED + "it has no header"),
    "length only": (GOOD[:8], DAMAGED + "its header ends early"),
    "in the header": (GOOD[:50], DAMAGED + "its header ends early"),
    "no data": (GOOD[:-40], DAMAGED + "40 bytes are missing at its end"),
    "one byte less": (GOOD[:-1], DAMAGED + "1 bytes are missing at its end"),
    "one byte more": (GOOD + b"\0", DAMAGED + "more follows its arrays"),
    # not such a file at all
    "pickle": (pickle.dumps({"w": np.ones((2, 2)), "b": np.ones(1)}), DAMAGED + r"its header would have \d+ bytes"),
    "zip": (b"PK\x03\x04" + bytes(200), r"is a zip archive.*\nHINT: .*set_parameters\(numpy.load"),
    "text": (b"these are no parameters, are they?\n", DAMAGED + "its header would have"),
    "zeros": (bytes(1000), DAMAGED + "its header cannot be read"),
    "ones": (b"\xff" * 1000, DAMAGED + f"its header would have {2**64 - 1} bytes"),
    # headers
    "huge header": (file_of(entries(), length=1 << 62), f"its header would have {1 << 62} bytes"),
    "large header": (file_of(b"{" + b" " * (1 << 20) + b"}"), "its header would have 1048578 bytes"),
    "header of a list": (file_of(b"[1, 2]"), "its header is no JSON object"),
    "header cut": (file_of(b'{"w": '), "its header cannot be read"),
    "header of latin-1": (file_of('{"w": "ä"}'.encode("latin-1")), "its header cannot be read"),
    "header of utf-16": (file_of(json.dumps(entries()).encode("utf-16")), "its header cannot be read"),
    "deep header": (file_of(b"[" * 500_000), "its header cannot be read"),
    "duplicate name": (file_of(raw(("__metadata__", KIND), ("w", W), ("w", W), ("b", B))), "'w' is there twice"),
    "duplicate field": (file_of(entries()).replace(b'"F64", ', b'"F64", "dtype": "F64", ', 1), DAMAGED),
    "metadata of a list": (file_of({**entries(), "__metadata__": ["kind"]}), "its metadata are not texts by name"),
    "metadata of numbers": (file_of({**entries(), "__metadata__": {"kind": 1}}), "its metadata are not texts by name"),
    # names
    "no arrays": (
        file_of({"__metadata__": KIND}, b""), "holds other arrays\n  in the file: none\n  expected   : w, b\nHINT"
    ),
    "one missing": (file_of({"__metadata__": KIND, "w": W}, bytes(32)), "holds other arrays\n  in the file: w\n"),
    "one too many": (file_of(entries(v=B)), "holds other arrays\n  in the file: w, b, v"),
    "long name": (file_of({"__metadata__": KIND, "x" * 100_000: W}), "holds other arrays"),
    # shapes
    "no entry": (file_of(entries(w=[2, 2])), "what it says of w makes no sense"),
    "no shape": (file_of(entries(w={"dtype": "F64"})), "what it says of w makes no sense"),
    "bool shape": (file_of(entries(b={**B, "shape": [True]})), DAMAGED),
    "float shape": (file_of(entries(b={**B, "shape": [1.0]})), DAMAGED),
    # dtypes
    "half": (file_of(entries(w={**W, "dtype": "F16"}, b={**B, "dtype": "F16"}), bytes(10)), "is F16, neither F32 nor"),
    "bfloat": (file_of(entries(w={**W, "dtype": "BF16"}, b={**B, "dtype": "BF16"}), bytes(10)), "is BF16, neither"),
    "whole numbers": (file_of(entries(w={**W, "dtype": "I64"}, b={**B, "dtype": "I64"})), "is I64, neither"),
    "unknown": (file_of(entries(w={**W, "dtype": "X" * 9000}, b={**B, "dtype": 7})), "is 7 and XXX"),
    "no dtype": (file_of(entries(w={"shape": [2, 2]}, b={"shape": [1]})), "is None, neither"),
    "mixed": (file_of(entries(b={**B, "dtype": "F32"})), "is F32 and F64"),
    "the other dtype": (file_of(entries(w={**W, "dtype": "F32"}, b={**B, "dtype": "F32"}), bytes(20)), DAMAGED),
    # offsets
    "overlap": (file_of(entries(b={**B, "data_offsets": [24, 32]})), DAMAGED),
    "hole": (file_of(entries(b={**B, "data_offsets": [40, 48]})), DAMAGED),
    "backwards": (file_of(entries(b={**B, "data_offsets": [40, 32]})), DAMAGED),
    "negative": (file_of(entries(w={**W, "data_offsets": [-32, 0]})), DAMAGED),
    "far": (file_of(entries(b={**B, "data_offsets": [1 << 62, (1 << 62) + 8]})), DAMAGED),
    "overflow": (file_of(entries(b={**B, "data_offsets": [(1 << 64) - 8, 1 << 64]})), DAMAGED),
    "no offsets": (file_of(entries(b={"dtype": "F64", "shape": [1]})), DAMAGED),
    # numbers
    "nan": (file_of(entries(), np.array([1, 2, 3, np.nan, 5]).tobytes()), "w is not finite\nHINT: .*diverged"),
    "infinity": (file_of(entries(), np.array([1, 2, 3, 4, -np.inf]).tobytes()), "b is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_files_that_are_refused(tmp_path, what):
    data, words = HOSTILE[what]
    path = tmp_path / "file"
    path.write_bytes(data)
    refused(Line(), path, InvalidInputError, words)


def test_the_file_the_hostile_ones_are_made_from_is_good(tmp_path):
    (tmp_path / "file").write_bytes(GOOD)
    layer = Line()
    layer.load(tmp_path / "file")
    assert layer.parameters.dtype == F64 and np.all(layer.get_parameters() == 1)


@pytest.mark.parametrize("shape", [[4], [2, 3], [], [1 << 40, 1 << 40], [[2], 2], ["2", 2], [10**4000], [-2, -2]])
def test_files_of_other_shapes(tmp_path, shape):
    (tmp_path / "file").write_bytes(file_of(entries(w={**W, "shape": shape})))
    refused(
        Line(), tmp_path / "file", DimensionMismatchError, r"expected \(2, 2\), got \(.*\n.*\n  expected .*\(2, 2\)"
    )


def test_every_way_to_cut_a_file_or_to_flip_a_byte_of_its_header(tmp_path):
    Line(F64).save(tmp_path / "file")
    good, layer = (tmp_path / "file").read_bytes(), Line()
    before = layer.parameters
    head = len(good) - 40
    for n in range(len(good)):
        broken = [good[:n]] + ([good[:n] + bytes([good[n] ^ 1 << n % 8]) + good[n + 1 :]] if n < head else [])
        for data in broken:
            (tmp_path / "broken").write_bytes(data)
            try:
                layer.load(tmp_path / "broken")
            except AttentionError as error:
                assert str(tmp_path / "broken") in str(error) and layer.parameters is before
            else:  # what was changed means the same
                assert len(data) == len(good) and layer.parameters == Line(F64).parameters
                layer.set_parameters(before)
                before = layer.parameters


def test_a_file_of_a_terabyte_is_refused_unread(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(GOOD)
    try:
        os.truncate(path, 1 << 40)  # a hole: no disk is used
    except OSError:
        pytest.skip("no sparse files here")
    refused(Line(), path, InvalidInputError, "more follows its arrays")


def test_paths_that_are_refused(tmp_path):
    layer = Line()
    refused(
        layer, tmp_path / "missing", InvalidInputError, "cannot read .*missing: No such file.*\nHINT: is the path right"
    )
    refused(layer, tmp_path, InvalidInputError, "is not a file\nHINT")
    refused(layer, tmp_path / "missing" / "file", InvalidInputError, "cannot read")
    before = layer.parameters
    for method in (layer.save, layer.load):
        for bad in (3, None, b"file", ["file"], 1.5):
            with pytest.raises(InvalidInputError, match=r"path is a .*\nHINT: give a str or a pathlib.Path"):
                method(bad)
        for bad in ("a\0b", "a\ud800b"):
            with pytest.raises(InvalidInputError, match="path is '"):
                method(bad)
        for bad in ("", tmp_path, os.devnull):
            with pytest.raises(InvalidInputError, match="is not a file"):
                method(bad)
    with pytest.raises(
        InvalidInputError, match=r"cannot write .*file: No such file.*\nHINT: is the folder there"
    ) as caught:
        layer.save(tmp_path / "missing" / "file")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert layer.parameters is before and os.listdir(tmp_path) == [] and not os.path.isfile(os.devnull)


def test_archives_of_numpy_are_numpys_own(tmp_path):
    layer, other = Line(), Line()
    with pytest.raises(
        InvalidInputError, match=r"HINT: name it .safetensors; .*numpy.savez\(path, \*\*layer.parameters"
    ):
        layer.save(tmp_path / "layer.NPZ")
    layer.set_parameters(layer.get_parameters() + 1)
    np.savez(tmp_path / "layer.npz", **layer.parameters)
    refused(other, tmp_path / "layer.npz", InvalidInputError, "is a zip archive")
    other.set_parameters(np.load(tmp_path / "layer.npz"))  # as the hint says
    assert other.parameters == layer.parameters


# --- whole or not at all -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    path, layer = tmp_path / "file", Line(seed=1)
    layer.save(path)
    before = path.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(files_module.os, step, fail)
    with pytest.raises(InvalidInputError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        Line(seed=2).save(path)
    monkeypatch.undo()
    if isinstance(error, OSError):
        assert f"cannot write {path}: No space left on device" in str(caught.value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["file"]


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    path, done = tmp_path / "file", threading.Event()
    layer = Made({"w": np.zeros(20_000)})
    layer.save(path)
    reader, torn, count = Made({"w": np.zeros(20_000)}), [], 0

    def write():
        for k in range(40):
            layer.set_parameters(np.full(20_000, float(k)))
            layer.save(path)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        reader.load(path)
        flat = reader.get_parameters()
        torn += [flat] if flat.min() != flat.max() else []
        count += 1
    writer.join()
    assert not torn and count > 1


@pytest.mark.skipif(os.name != "posix", reason="links and permissions as on POSIX")
def test_links_are_followed_and_permissions_are_the_usual(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    Line().save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "folder") == ["file"]
    (tmp_path / "usual").write_bytes(b"")
    assert (tmp_path / "folder" / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


# --- the extra -----------------------------------------------------------------------------------------------------
def test_without_safetensors_the_error_says_what_to_install(tmp_path, monkeypatch):
    layer = Line()
    layer.save(tmp_path / "file")
    for name in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    before = layer.parameters
    for method in (layer.save, layer.load):
        with pytest.raises(InvalidConfigError, match="safetensors is needed") as caught:
            method(tmp_path / "file")
        assert caught.value.hint == 'pip install ".[files]", in a clone of ruvector-numba'
        assert isinstance(caught.value.__cause__, ImportError)
    assert layer.parameters is before


def test_safetensors_is_imported_only_when_it_is_used():
    code = "import sys, ruvector_numba.parameters, ruvector_numba.optim; print('safetensors' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"
