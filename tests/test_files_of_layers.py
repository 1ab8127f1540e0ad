"""`from_file` of every kind of layer: it makes what was saved, and refuses by name what it cannot make."""

import json
import pathlib

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
    settings["heads"] = 2
    safetensors.save_file(found, tmp_path / "layer", metadata={"kind": "GAT", "settings": json.dumps(settings)})
    with pytest.raises(rv.AttentionError, match="expected"):
        rv.GAT.from_file(tmp_path / "layer")
