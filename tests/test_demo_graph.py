"""The demo on a graph: its gradients against central differences, what it learns, its picture, the command."""

import numpy as np
import pytest

import ruvector_numba as rv
from ruvector_numba import cli
from ruvector_numba.demo import digits as demo
from ruvector_numba.demo import graph as demo_graph

# --- gradients, which need NumPy alone --------------------------------------------------------------------------------
NODES, FEATURES, KNOWN = 7, 5, np.array([0, 3, 4])


@pytest.fixture
def small():
    """A small network in float64 with biases that are not 0, what goes into it, labels, and edges with a hub."""
    rng = np.random.default_rng(3)
    network = demo_graph.Network(FEATURES, channels=2, classes=3, seed=1)
    for layer in (network.first, network.second):
        flat = layer.get_parameters().astype(np.float64)
        layer.set_parameters(flat + 0.2 * rng.standard_normal(flat.shape))
    sources, targets = rng.integers(NODES, size=(2, 12))
    edges = np.stack([np.concatenate([sources, np.arange(NODES)]), np.concatenate([targets, np.zeros(NODES, int)])])
    graph = rv.CSRGraph.from_edge_index(edges, NODES)
    return network, rng.standard_normal((NODES, FEATURES)), rng.integers(3, size=NODES), graph


@pytest.mark.parametrize("training", [False, True])
def test_every_gradient_is_the_slope_of_the_loss(small, training):
    """With dropout too, of features and of attention: the same dice are thrown each time."""
    network, x, labels, graph = small

    def forward():
        return network.forward(x, graph, np.random.default_rng(8) if training else None)

    def loss():
        return demo_graph.labelled_loss(forward()[0], labels, KNOWN)[0]

    logits, trace = forward()
    assert logits.dtype == np.float64
    gradients = network.backward(demo_graph.labelled_loss(logits, labels, KNOWN)[1], trace)
    for layer, gradient in zip((network.first, network.second), gradients):
        start, h = layer.get_parameters(), 1e-6
        slopes = np.empty_like(start)
        for i in range(start.size):
            ends = []
            for sign in (1, -1):
                flat = start.copy()
                flat[i] += sign * h
                layer.set_parameters(flat)
                ends.append(loss())
            slopes[i] = (ends[0] - ends[1]) / (2 * h)
        layer.set_parameters(start)
        wanted = layer.parameters.with_flat(slopes)
        assert set(gradient.parameters) == set(wanted)
        for name, want in wanted.items():
            np.testing.assert_allclose(gradient.parameters[name], want, rtol=1e-5, atol=1e-8, err_msg=name)


def test_dropout_is_of_training_alone(small):
    network, x, _, graph = small
    twice = [network.forward(x, graph)[0] for _ in range(2)]
    np.testing.assert_array_equal(*twice)
    dropped = [network.forward(x, graph, np.random.default_rng(seed))[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(*dropped[:2])
    assert (dropped[0] != dropped[2]).any()
    kept = demo_graph.dropout(np.ones((100, 100), np.float32), np.random.default_rng(0))
    assert kept.dtype == np.float32
    assert kept.mean() == pytest.approx(1, abs=0.05)


def test_the_loss_is_of_the_labelled_nodes_alone():
    logits = np.random.default_rng(0).standard_normal((NODES, 3)).astype(np.float32)
    labels = np.arange(NODES) % 3
    loss, gradient = demo_graph.labelled_loss(logits, labels, KNOWN)
    assert gradient.dtype == np.float32
    others = np.setdiff1d(np.arange(NODES), KNOWN)
    assert (gradient[others] == 0).all()
    assert (gradient[KNOWN] != 0).all()
    logits[others] = 9
    labels[others] = 0
    assert demo_graph.labelled_loss(logits, labels, KNOWN)[0] == loss


def test_elu_is_smooth_and_never_overflows():
    x = np.array([-1e4, -1, 0, 2, 1e4], np.float32)
    y = demo_graph.elu(x)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, [-1, np.expm1(-1), 0, 2, 1e4], rtol=1e-6)
    np.testing.assert_allclose(demo_graph.elu_backward(np.full(5, 3.0), y), [0, 3 * np.exp(-1), 3, 3, 3], rtol=1e-6)


def test_attention_is_of_each_targets_edges(small):
    network, x, _, graph = small
    seen = demo_graph.attention_of(network.forward(x, graph)[1].first)
    assert (seen.sources == seen.targets).sum() == NODES  # self-loops replaced: one each
    np.testing.assert_allclose(np.bincount(seen.targets, seen.weights), 1)
    np.testing.assert_allclose(np.bincount(seen.targets, seen.shares), np.bincount(seen.targets))


# --- digits, which come from scikit-learn -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def digits():
    for package in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(package)
    return demo_graph.load_graph()


@pytest.fixture(scope="module")
def trained(digits):
    """As the demo does it, on its first drawing: the network, the labelled nodes, the others, the losses on the way."""
    import threadpoolctl

    network, losses = demo_graph.Network(), []
    known, others = digits.draw_labels(demo.SEED)
    with rv.threads(1), threadpoolctl.threadpool_limits(1, "blas"):
        demo_graph.train(network, digits, known, demo_graph.STEPS, losses.append)
    return network, known, others, losses


def test_the_graph_ties_each_digit_to_its_nearest(digits):
    ties = digits.graph.to_scipy()
    assert (ties != ties.T).nnz == 0
    assert ties.diagonal().max() == 0
    assert digits.graph.in_degrees.min() >= demo_graph.NEIGHBOURS
    distances = np.linalg.norm(digits.pixels - digits.pixels[17], axis=1)
    nearest = np.argsort(distances)[1 : demo_graph.NEIGHBOURS + 1]
    assert ties[[17]].toarray()[0, nearest].min() == 1


def test_labels_are_drawn_alike_from_each_class(digits):
    known, others = digits.draw_labels(0)
    assert (np.bincount(digits.labels[known]) == demo_graph.PER_CLASS).all()
    np.testing.assert_array_equal(np.sort(np.concatenate([known, others])), np.arange(1797))
    np.testing.assert_array_equal(digits.draw_labels(0)[0], known)
    assert set(digits.draw_labels(1)[0]) != set(known)


def test_it_learns_from_few_labels_and_the_graph_helps(digits, trained):
    network, known, others, losses = trained
    assert len(losses) == demo_graph.STEPS
    assert np.mean(losses[-10:]) < 0.3 * losses[0]
    found = {demo_graph.OURS: network.read(digits)[0], **demo_graph.answers_of_others(digits, known)}
    accuracies = {name: (answers[others] == digits.labels[others]).mean() for name, answers in found.items()}
    assert accuracies["graph attention"] >= 0.94
    assert accuracies["graph attention"] > accuracies["logistic regression"] + 0.02
    assert min(accuracies["label spreading"], accuracies["label propagation"]) >= 0.94


def test_the_seed_decides_everything_and_the_threads_nothing(digits):
    import threadpoolctl

    known, results = digits.draw_labels(0)[0], []
    for threads, seed in ((1, 0), (min(2, rv.get_num_threads()), 0), (1, 1)):
        network = demo_graph.Network(seed=seed)
        with rv.threads(threads), threadpoolctl.threadpool_limits(1, "blas"):
            demo_graph.train(network, digits, known, 3, lambda loss: None)
        results.append(np.concatenate([network.first.get_parameters(), network.second.get_parameters()]))
    np.testing.assert_array_equal(results[0], results[1])
    assert (results[0] != results[2]).mean() > 0.9


def test_the_picture_is_drawn(digits, trained, tmp_path):
    network, known, _, _ = trained
    path = tmp_path / "graph.png"
    demo_graph.draw(path, digits, network, known)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 50_000


def test_hard_nodes_are_shown_of_different_classes():
    logits = np.array([[5.0, 4.9, 0], [5, 4, 0], [0, 5, 4.8], [5, 0, 0], [0, 0, 5]])
    labels = np.array([1, 0, 1, 1, 2])  # the first and the fourth are read wrongly, both of class 1
    assert demo_graph._choose_nodes(logits, labels, np.arange(5)) == [0, 2, 1, 4]


def test_the_report_tells_mean_and_range(tmp_path):
    accuracies = {demo_graph.OURS: [0.95, 0.96], **{name: [0.9, 0.92] for name in demo_graph.OTHERS}}
    report = demo_graph.Report(1797, 19856, 0.96, 4958, accuracies, (0.9, 1.1), 0.97, "3 steps", tmp_path / "p.png")
    told = dict(report.lines())
    assert told["accuracy, graph attention"] == "95.50% (95.00% to 96.00%): pixels and graph"
    assert told["accuracy, label propagation"] == "91.00% (90.00% to 92.00%): the same graph alone"
    assert "1,697, mean (and range) of 2 drawings" in told["labels"]
    assert "0.90 to 1.10 times an equal share" in told["attention"]


def test_the_command_runs_the_graph_alone(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "run", None)
    monkeypatch.setattr(demo_graph, "STEPS", 3)
    folder = tmp_path / "new" / "folder"
    assert cli.main(["demo", "graph", "--quick", "--output", str(folder)]) == 0
    told = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert told["training"].strip().startswith("3 steps of Adam over the whole graph, in ")
    assert "one drawing of labels" in told["labels"]
    assert {f"accuracy, {name}" for name in (demo_graph.OURS, *demo_graph.OTHERS)} < set(told)
    assert told["picture"].strip() == str(folder / "graph.png")
    assert (folder / "graph.png").stat().st_size > 50_000
