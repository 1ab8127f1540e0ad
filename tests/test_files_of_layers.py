"""`from_file` of every kind of layer: it makes what was saved, and refuses by name what it cannot make."""

import json
import pathlib
import pickle
import tracemalloc

import numpy as np
import pytest

import ruvector_numba as rv

safetensors = pytest.importorskip("safetensors.numpy")

CONFIG = rv.AttentionConfig(d_model=4, num_heads=2)
LAYERS = {
    "GAT": lambda: rv.GAT((3, 2), 4, 2, edge_dim=2, fill_value=[1.0, 2.0], concat=False, seed=0),
    "GATv2": lambda: rv.GATv2(3, 4, 2, share_weights=True, residual=True, seed=0),
    "GraphTransformer": lambda: rv.GraphTransformer(3, 4, beta=True, scale=0.5, seed=0),
    "HGT": lambda: rv.HGT(3, 4, (["n"], [("n", "to", "n")]), edge_dim=2, seed=0),
    "MultiHeadAttention": lambda: rv.MultiHeadAttention(CONFIG, kdim=3, seed=0),
    "ScaledDotProductAttention": lambda: rv.ScaledDotProductAttention(CONFIG),
}
kinds = pytest.mark.parametrize("kind", LAYERS)
HEADERS = [
    {}, {"settings": "{}"}, {"settings": "no JSON"}, {"settings": "[]"}, {"settings": "null"}, {"settings": "3"},
    {"settings": '{"in_channels": 3}'}, {"settings": '{"in_channels": {}, "out_channels": 2, "magic": 1}'},
    {"settings": '{"in_channels": 3, "out_channels": 2, "dtype": "int8"}'},
    {"settings": '{"in_channels": 3, "out_channels": 1e99}'}, {"settings": "[" * 9999},
    {"settings": '{"in_channels": 3, "out_channels": 4611686018427387904}'},
    {"settings": '{"in_channels": 3, "out_channels": 2, "metadata": 1, "edge_dim": [[[[]], 1]]}'},
    {"config": "{}", "widths": "[]"}, {"config": '{"d_model": 7}', "widths": "{}"}, {"config": "null"},
]  # fmt: skip


@kinds
@pytest.mark.parametrize("as_path", [str, pathlib.Path])
def test_a_file_is_the_whole_layer(kind, as_path, tmp_path):
    layer, path = LAYERS[kind](), as_path(tmp_path / "layer.safetensors")
    layer.save(path)
    twin = type(layer).from_file(path)
    assert type(twin) is type(layer) and repr(twin) == repr(layer) and twin.parameters == layer.parameters


@kinds
@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_headers_that_describe_no_layer(kind, header, tmp_path):
    path = tmp_path / "foreign.safetensors"
    safetensors.save_file({"weight": np.ones(3, np.float32)}, path, metadata={"kind": kind, **header})
    with pytest.raises(rv.InvalidConfigError, match=f"describes no {kind}|does not fit") as caught:
        getattr(rv, kind).from_file(path)
    assert str(path) in str(caught.value) and caught.value.hint
    safetensors.save_file({"weight": np.ones(3, np.float32)}, path)
    with pytest.raises(rv.InvalidConfigError, match=f"describes no {kind}"):
        getattr(rv, kind).from_file(path)


@kinds
def test_the_file_of_another_kind(kind, tmp_path):
    for other, make in LAYERS.items():
        if other != kind:
            make().save(tmp_path / "layer")
            with pytest.raises(rv.InvalidConfigError, match=f"describes no {kind}|kind differs"):
                getattr(rv, kind).from_file(tmp_path / "layer")


def test_what_is_no_path():
    for wrong in (None, 3, b"\0"):
        with pytest.raises(rv.InvalidInputError, match="path is"):
            rv.GAT.from_file(wrong)


def test_settings_stay_as_they_were(tmp_path):
    rv.GAT(3, 4, seed=0).save(tmp_path / "layer")
    found = safetensors.load_file(tmp_path / "layer")
    with open(tmp_path / "layer", "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        settings = json.loads(json.loads(file.read(length))["__metadata__"]["settings"])
    for change, words in (({"heads": 2}, "describes no GAT"), ({"out_channels": 3}, "expected")):
        metadata = {"kind": "GAT", "settings": json.dumps(settings | change)}
        safetensors.save_file(found, tmp_path / "layer", metadata=metadata)
        with pytest.raises(rv.AttentionError, match=words):
            rv.GAT.from_file(tmp_path / "layer")


BIG = 3000
LARGER = {  # a small layer, and what a header says of it that would be some 100 MB of parameters
    "GAT": ("GAT", '"out_channels": 4', f'"out_channels": {BIG**2}'),
    "HGT": ("HGT", '"out_channels": 4', f'"out_channels": {BIG}'),
    "d_model": ("MultiHeadAttention", '"d_model": 4', f'"d_model": {BIG}'),
    "kdim": ("MultiHeadAttention", '"kdim": 3', f'"kdim": {BIG**2}'),
}


def with_header(path, change):
    """Rewrite what a file says of the layer; the arrays stay as they are."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


@pytest.mark.parametrize("what", LARGER)
def test_settings_of_more_parameters_than_the_file_has_are_refused_before_they_are_drawn(what, tmp_path):
    kind, theirs, larger = LARGER[what]
    path = tmp_path / "layer"
    LAYERS[kind]().save(path)
    if kind == "GAT":
        rv.GAT(3, 4, seed=0).save(path)

    def change(header):
        texts = header["__metadata__"]
        name = "config" if theirs in texts.get("config", "") else "widths" if "widths" in texts else "settings"
        assert theirs in texts[name]
        texts[name] = texts[name].replace(theirs, larger)

    with_header(path, change)
    tracemalloc.start()
    try:
        with pytest.raises(rv.InvalidConfigError, match=f"describes no {kind}\n.*arrays of these settings"):
            getattr(rv, kind).from_file(path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    LAYERS["MultiHeadAttention"]()  # what is made after that draws as it likes


def test_a_layer_from_a_file_is_copied_and_drops_as_others_do(tmp_path):
    rv.GAT(3, 4, dropout=0.5, seed=0).save(tmp_path / "layer")
    layer = rv.GAT.from_file(tmp_path / "layer")
    twin = pickle.loads(pickle.dumps(layer))
    x, edge_index = np.ones((3, 3), np.float32), [[0, 1, 2], [1, 2, 0]]
    for _ in range(3):
        found = [one.forward_cached(x, edge_index)[0] for one in (layer, twin)]
        assert np.array_equal(*found)


@pytest.mark.parametrize(
    "kind", [kind for kind in LAYERS if kind != "ScaledDotProductAttention"]
)  # which has no arrays
def test_a_file_that_was_cut_is_damaged(kind, tmp_path):
    path = tmp_path / "layer"
    LAYERS[kind]().save(path)
    data = path.read_bytes()
    for broken, words in ((data[:-3], "3 bytes are missing at its end"), (data + b"0", "more follows its arrays")):
        path.write_bytes(broken)
        with pytest.raises(rv.InvalidInputError, match=f"is damaged, .*{words}"):
            getattr(rv, kind).from_file(path)


def test_places_that_make_no_sense(tmp_path):
    path = tmp_path / "layer"
    for odd in (None, 3, [], [0], [0, "1"], [0, 1.5]):
        rv.GAT(3, 4, seed=0).save(path)
        with_header(path, lambda header, odd=odd: header["bias"].update(data_offsets=odd))
        with pytest.raises(rv.InvalidInputError, match="does not say where its arrays are"):
            rv.GAT.from_file(path)
    with_header(path, lambda header: header.update(bias=7))
    with pytest.raises(rv.InvalidInputError, match="does not say where its arrays are"):
        rv.GAT.from_file(path)
