"""The demo's transformer block: its gradients against central differences, what it learns, its picture.

The half with the memory is tested in test_cli.py.
"""

import numpy as np
import pytest

import ruvector_numba as rv
from ruvector_numba import cli
from ruvector_numba.demo import transformer

# --- gradients, which need NumPy alone --------------------------------------------------------------------------------
SIZES = {"patches": (5, 3), "d_model": 4, "heads": 2, "hidden": 6, "classes": 3, "dropout": 0.0}


@pytest.fixture
def block():
    """A small block in float64, with gains, shifts and biases that are not 1 and 0 as at the start."""
    rng = np.random.default_rng(3)
    model = transformer.Transformer(**SIZES)
    for layer in (model, model.attention):
        flat = layer.get_parameters().astype(np.float64)
        layer.set_parameters(flat + 0.2 * rng.standard_normal(flat.shape))
    return model


@pytest.fixture
def batch():
    rng = np.random.default_rng(4)
    return rng.standard_normal((3, *SIZES["patches"])), np.array([2, 0, 2])


def loss_of(model, patches, labels):
    return transformer.cross_entropy(model.forward(patches)[0], labels)[0]


def slopes(layer, loss):
    """The derivative of the loss by each of the layer's parameters, by central differences."""
    start, h = layer.get_parameters(), 1e-6
    found = np.empty_like(start)
    for i in range(start.size):
        ends = []
        for sign in (1, -1):
            flat = start.copy()
            flat[i] += sign * h
            layer.set_parameters(flat)
            ends.append(loss())
        found[i] = (ends[0] - ends[1]) / (2 * h)
    layer.set_parameters(start)
    return layer.parameters.with_flat(found)


def test_every_gradient_of_the_block_is_the_slope_of_its_loss(block, batch):
    patches, labels = batch
    logits, trace = block.forward(patches, training=True)
    assert logits.dtype == np.float64
    own, attention = block.backward(transformer.cross_entropy(logits, labels)[1], trace)
    for layer, gradients in ((block, own), (block.attention, attention.parameters)):
        wanted = slopes(layer, lambda: loss_of(block, patches, labels))
        assert set(gradients) == set(wanted)
        for name, want in wanted.items():
            np.testing.assert_allclose(gradients[name], want, rtol=1e-5, atol=1e-8, err_msg=name)


def test_cross_entropy_takes_logits_of_any_size():
    loss, grad = transformer.cross_entropy(np.array([[1000.0, 0.0], [0.0, -1000.0]]), np.array([0, 1]))
    assert loss == 500
    np.testing.assert_array_equal(grad, [[0, 0], [0.5, -0.5]])


def test_patches_are_squares_of_pixels_row_by_row():
    image = np.arange(64)
    patches = transformer.cut(np.stack([image, image + 100]))
    assert patches.shape == (2, 16, 4)
    np.testing.assert_array_equal(patches[0, 1], [2, 3, 10, 11])
    np.testing.assert_array_equal(patches[1, 4], [116, 117, 124, 125])


# --- digits, which come from scikit-learn -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def digits():
    for package in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(package)
    return transformer.load_digits()


@pytest.fixture(scope="module")
def trained(digits):
    """As the demo does it, with the losses on the way."""
    import threadpoolctl

    model, losses = transformer.Transformer(), []
    with rv.threads(1), threadpoolctl.threadpool_limits(1, "blas"):
        transformer.train(model, digits, transformer.STEPS, losses.append)
    return model, losses


def test_the_block_learns_to_read(digits, trained):
    model, losses = trained
    assert len(losses) == transformer.STEPS
    assert np.mean(losses[-20:]) < 0.1 * np.mean(losses[:20])
    assert (transformer.read(model, digits) == digits.test_labels).mean() >= 0.96


def test_the_seed_decides_everything_and_the_threads_nothing(digits):
    import threadpoolctl

    results = []
    for threads, seed in ((1, 0), (min(2, rv.get_num_threads()), 0), (1, 1)):
        model = transformer.Transformer(seed=seed)
        with rv.threads(threads), threadpoolctl.threadpool_limits(1, "blas"):
            transformer.train(model, digits, 5, lambda loss: None)
        results.append(np.concatenate([model.get_parameters(), model.attention.get_parameters()]))
    np.testing.assert_array_equal(results[0], results[1])
    assert (results[0] != results[2]).mean() > 0.99


def test_the_weights_of_each_head_sum_to_1(digits, trained):
    model, _ = trained
    _, trace = model.forward(transformer.cut(digits.tests[:3]))
    weights = model.head_weights(trace)
    assert weights.shape == (3, transformer.HEADS, 16, 16)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-4)
    np.testing.assert_allclose(weights.mean(axis=1), trace.attention.weights(), atol=1e-6)


def test_the_block_draws_its_picture(digits, trained, tmp_path):
    path = tmp_path / "patches.png"
    transformer.draw(path, trained[0], digits, 0.97)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 50_000


def test_the_command_runs_both_halves(digits, tmp_path, capsys, monkeypatch):
    """With the memory's half left out, which takes its time."""
    from ruvector_numba.demo import digits as demo

    class Memory:
        def lines(self):
            return [("data", "some digits")]

    monkeypatch.setattr(demo, "run", lambda output, quick, advance: advance("done", 1.0) or Memory())
    monkeypatch.setattr(transformer, "QUICK_STEPS", 3)
    folder = tmp_path / "new" / "folder"
    assert cli.main(["demo", "--quick", "--output", str(folder)]) == 0
    told = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert told["data"].strip() == "some digits"
    assert "all gradients by hand" in told["a transformer block"]
    assert told["its training"].strip().startswith("3 steps of AdamW")
    assert "% of the same 450; before training " in told["its accuracy"]
    assert told["its picture"].strip() == str(folder / "patches.png")
    assert (folder / "patches.png").stat().st_size > 50_000
