"""The demo of attention on a graph: read 1,797 handwritten digits when only 10 of each class are labelled.

Each digit is a node, tied to the digits whose pixels are nearest to its own. Two layers of graph attention (Veličković
et al., 2018) read them all at once; a node sees its neighbours in the first layer, and theirs through the second:

    hidden = elu(attention of 8 heads over the neighbours of x)
    logits = attention of 1 head over the neighbours of hidden

`rv.GAT` is a layer, forward and backward; `rv.optim.Adam` does the steps. The loss is the cross-entropy of the labelled
nodes alone, but its gradient reaches all that they see, which is how the others take part in the training.

Beside it stand what has the pixels and no graph (logistic regression), and what has the graph and no pixels (label
spreading and label propagation), on the same labels. In shapes, N is the nodes, E the edges.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import ruvector_numba as rv

from .digits import INK, PAPER, RIGHT, SEED, WRONG
from .transformer import cross_entropy

NEIGHBOURS, PER_CLASS, CLASSES = 8, 10, 10
HEADS, CHANNELS = 8, 8
# Chosen, as the settings of the others were, on drawings of labels that are not reported (seeds from 100 on).
STEPS, LEARNING_RATE, WEIGHT_DECAY = 100, 0.01, 5e-4
DROPOUT, ATTENTION_DROPOUT = 0.6, 0.3
SPREADING = 0.95  # how much a node takes from its neighbours; the rest is its own label
SPLITS, QUICK_SPLITS = 5, 1


@dataclasses.dataclass(frozen=True)
class DigitGraph:
    """Pixels (N, 64) in float32, centred on their mean, labels (N,), and who is near to whom."""

    pixels: np.ndarray
    labels: np.ndarray
    mean: np.ndarray
    graph: rv.CSRGraph

    def draw_labels(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The nodes whose label is known, `PER_CLASS` of each class, and all the others."""
        rng = np.random.default_rng(seed)
        of_class = [np.flatnonzero(self.labels == label) for label in range(CLASSES)]
        known = np.concatenate([rng.choice(nodes, PER_CLASS, replace=False) for nodes in of_class])
        return known, np.setdiff1d(np.arange(len(self.labels)), known)


def load_graph() -> DigitGraph:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, tied to their nearest and to those that they are nearest to."""
    from sklearn.datasets import load_digits
    from sklearn.neighbors import kneighbors_graph

    data = load_digits()
    pixels = (data.data / 16).astype(np.float32)
    nearest = kneighbors_graph(pixels, NEIGHBOURS)
    mean = pixels.mean(axis=0)
    return DigitGraph(pixels - mean, data.target, mean, rv.CSRGraph.from_scipy(nearest.maximum(nearest.T)))


# --- the network ------------------------------------------------------------------------------------------------------
def elu(x: np.ndarray) -> np.ndarray:
    """x where it is positive, exp(x) - 1 elsewhere"""
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def elu_backward(dy: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The gradient of x, from what `elu` returned: the slope is 1, and exp(x) = y + 1 where x is negative."""
    return dy * (1 + np.minimum(y, 0))


def dropout(x: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    """What x is multiplied by, of its shape: 0 for what is dropped, more than 1 for the rest; 1 without `rng`."""
    if rng is None:
        return np.ones_like(x)
    return (rng.random(x.shape) >= DROPOUT).astype(x.dtype) / (1 - DROPOUT)


class Trace(NamedTuple):
    """What `Network.forward` leaves for `Network.backward`, and for those who ask what was attended to."""

    first: Any  # the caches of the two layers
    second: Any
    hidden: np.ndarray  # (N, HEADS * CHANNELS)
    kept: np.ndarray  # likewise: what dropout multiplied it by


class Network:
    """Two layers of graph attention, which start from `seed`."""

    def __init__(self, features: int = 64, channels: int = CHANNELS, classes: int = CLASSES, seed: int = SEED):
        layer = functools.partial(rv.GAT, dropout=ATTENTION_DROPOUT)
        self.first = layer(features, channels, HEADS, seed=2 * seed)
        self.second = layer(HEADS * channels, classes, concat=False, seed=2 * seed + 1)

    def forward(
        self, x: np.ndarray, graph: rv.CSRGraph, rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, Trace]:
        """x (N, features) -> logits (N, classes). In training, `rng` says what is dropped."""
        training = rng is not None
        seeds = (None, None) if rng is None else tuple(map(int, rng.integers(2**31, size=2)))
        attended, first = self.first.forward_cached(x * dropout(x, rng), graph, training=training, seed=seeds[0])
        hidden = elu(attended)
        kept = dropout(hidden, rng)
        logits, second = self.second.forward_cached(hidden * kept, graph, training=training, seed=seeds[1])
        return logits, Trace(first, second, hidden, kept)

    def backward(self, dlogits: np.ndarray, trace: Trace) -> tuple[Any, Any]:
        """The gradients of the two layers: `forward`, from its end to its start."""
        second: Any = self.second.backward(dlogits, trace.second)
        dattended = elu_backward(second.node_features * trace.kept, trace.hidden)
        return self.first.backward(dattended, trace.first), second

    def read(self, digits: DigitGraph) -> tuple[np.ndarray, Trace]:
        """What each node is taken for, (N,), and the trace of it."""
        logits, trace = self.forward(digits.pixels, digits.graph)
        return logits.argmax(axis=1), trace

    def parameter_count(self) -> int:
        return self.first.parameter_count() + self.second.parameter_count()


def labelled_loss(logits: np.ndarray, labels: np.ndarray, known: np.ndarray) -> tuple[float, np.ndarray]:
    """The cross-entropy of the nodes `known`, and its gradient by the logits (N, classes): 0 for all other nodes."""
    loss, dknown = cross_entropy(logits[known], labels[known])
    dlogits = np.zeros_like(logits)
    dlogits[known] = dknown
    return loss, dlogits


def train(
    network: Network, digits: DigitGraph, known: np.ndarray, steps: int, progress: Callable[[float], None]
) -> None:
    """Minimise the loss of the labelled nodes, over the whole graph. `progress` hears the loss of each step."""
    rng = np.random.default_rng(SEED)
    optimizers = [rv.optim.Adam(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY) for _ in range(2)]
    for _ in range(steps):
        logits, trace = network.forward(digits.pixels, digits.graph, rng)
        loss, dlogits = labelled_loss(logits, digits.labels, known)
        gradients = network.backward(dlogits, trace)
        for optimizer, layer, gradient in zip(optimizers, (network.first, network.second), gradients, strict=True):
            optimizer.update(layer, gradient)
        progress(loss)


# --- what it is compared with -----------------------------------------------------------------------------------------
OURS, OTHERS = "graph attention", ("logistic regression", "label spreading", "label propagation")


def answers_of_others(digits: DigitGraph, known: np.ndarray) -> dict[str, np.ndarray]:
    """What scikit-learn takes each node for, (N,): from pixels alone, and twice from the graph alone."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.semi_supervised import LabelPropagation, LabelSpreading

    ties = digits.graph.to_scipy().toarray()  # its LabelPropagation does not normalise a sparse matrix by its rows
    partly = np.full(len(digits.labels), -1)
    partly[known] = digits.labels[known]
    regression = LogisticRegression(max_iter=1000).fit(digits.pixels[known], digits.labels[known])
    spreading = LabelSpreading(lambda x, y: ties, alpha=SPREADING, max_iter=300)
    propagation = LabelPropagation(lambda x, y: ties, max_iter=3000)
    walks = [model.fit(digits.pixels, partly).transduction_ for model in (spreading, propagation)]
    return dict(zip(OTHERS, [regression.predict(digits.pixels), *walks], strict=True))


class Attended(NamedTuple):
    """Edges and how much their target attends to their source; the loops of nodes to themselves are among them."""

    sources: np.ndarray  # (E,)
    targets: np.ndarray  # (E,)
    weights: np.ndarray  # (E,): those of one target sum to 1
    shares: np.ndarray  # (E,): 1 if the target attends to all of its sources alike


def attention_of(cache: Any) -> Attended:
    """The mean over the heads of a layer."""
    sources, targets = cache.graph.to_edge_index()
    weights = cache.coefficients().mean(axis=1)
    return Attended(sources, targets, weights, weights * cache.graph.in_degrees[targets])


# --- the picture ------------------------------------------------------------------------------------------------------
STARS, RAYS = (3, 2), 8  # rows and columns of neighbourhoods; the neighbours shown in each


def _palette() -> np.ndarray:
    import matplotlib.pyplot as plt

    return np.asarray(plt.get_cmap("tab10")(np.arange(CLASSES)))


def _lay_out(pixels: np.ndarray) -> np.ndarray:
    """Places in the plane (N, 2)."""
    import threadpoolctl
    from sklearn.manifold import TSNE

    with threadpoolctl.threadpool_limits(1):  # on a busy machine two wait for each other
        return np.asarray(TSNE(max_iter=500, random_state=SEED).fit_transform(pixels))


def _draw_edges(axes: Any, places: np.ndarray, edges: Attended) -> None:
    """The more of its target's attention an edge has, the wider and darker; at half an equal share it is all but gone.

    An edge in each direction joins two nodes; the one with more attention lies on top.
    """
    from matplotlib.collections import LineCollection

    order = np.argsort(edges.shares)
    order = order[edges.sources[order] != edges.targets[order]]
    strength = np.clip(edges.shares[order] - 0.5, 0, 1)
    colors = np.zeros((len(order), 4))
    colors[:, :3] = np.array([int(INK[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    colors[:, 3] = 0.03 + 0.8 * strength**2
    lines = places[np.stack([edges.sources[order], edges.targets[order]], axis=1)]
    axes.add_collection(LineCollection(lines, colors=colors, linewidths=0.15 + 1.8 * strength**2, zorder=1))


def _draw_map(axes: Any, digits: DigitGraph, known: np.ndarray, answers: np.ndarray, edges: Attended) -> None:
    """Left: the whole graph, the nodes in the colour of what they are read as."""
    places, colors = _lay_out(digits.pixels), _palette()
    _draw_edges(axes, places, edges)
    wrong = np.flatnonzero(answers != digits.labels)
    axes.scatter(*places.T, c=colors[answers], s=11, linewidths=0, zorder=2)
    axes.scatter(
        *places[known].T, c=colors[answers[known]], s=34, marker="s", edgecolor=INK, linewidths=0.9, zorder=3,
        label=f"label known ({len(known)})",
    )  # fmt: skip
    axes.scatter(
        *places[wrong].T, s=46, facecolor="none", edgecolor=WRONG, linewidths=1.3, zorder=4,
        label=f"read wrongly ({len(wrong)})",
    )  # fmt: skip
    for label in range(CLASSES):
        x, y = np.median(places[answers == label], axis=0)
        halo = {"boxstyle": "circle,pad=0.25", "facecolor": PAPER, "edgecolor": colors[label], "linewidth": 1.5}
        style = {"fontsize": 12, "fontweight": "bold", "bbox": halo, "ha": "center", "va": "center", "zorder": 5}
        axes.text(x, y, str(label), color=colors[label], **style)
    axes.legend(loc="lower left", fontsize=8.5, frameon=True, facecolor=PAPER, edgecolor="#d8d4cb", labelcolor=INK)
    axes.set(xticks=[], yticks=[], facecolor=PAPER)
    for spine in axes.spines.values():
        spine.set(edgecolor="#d8d4cb")


def _choose_nodes(logits: np.ndarray, labels: np.ndarray, candidates: np.ndarray) -> list[int]:
    """The least certain of the candidates: half of them read wrongly, half rightly, each of a class of its own."""
    ordered = np.sort(logits[candidates], axis=1)
    hardest = candidates[np.argsort(ordered[:, -1] - ordered[:, -2])]
    right = logits[hardest].argmax(axis=1) == labels[hardest]
    chosen: list[int] = []
    for nodes in (hardest[~right], hardest[right]):
        firsts = np.sort(np.unique(labels[nodes], return_index=True)[1])  # the hardest of each class
        chosen += map(int, nodes[firsts][: STARS[0] * STARS[1] // 2])
    return chosen


def _draw_star(axes: Any, digits: DigitGraph, node: int, answers: np.ndarray, edges: Attended) -> None:
    """A digit amid the neighbours that it attends to most; frames have the colour of what each is read as."""
    from matplotlib.patches import Rectangle

    colors, half = _palette(), 0.27
    into = np.flatnonzero(edges.targets == node)
    itself = into[edges.sources[into] == node]
    rays = into[edges.sources[into] != node]
    rays = rays[np.argsort(-edges.weights[rays])][:RAYS]
    angles = np.pi / 2 - 2 * np.pi * np.arange(len(rays)) / len(rays)
    ends = np.stack([1.25 * np.cos(angles), np.sin(angles)], axis=1)
    for end, edge in zip(ends, rays, strict=True):
        width = 2.5 * float(edges.shares[edge]) ** 2
        axes.plot(*np.stack([np.zeros(2), end]).T, color=INK, linewidth=width, alpha=0.55, zorder=1)
        halo = {"boxstyle": "round,pad=0.12", "facecolor": PAPER, "edgecolor": "none"}
        style = {"fontsize": 6.5, "color": INK, "ha": "center", "va": "center", "bbox": halo, "zorder": 4}
        axes.text(*(0.62 * end), f"{100 * edges.weights[edge]:.1f} %", **style)
    for (x, y), shown in zip([(0.0, 0.0), *ends], [node, *edges.sources[rays]], strict=True):
        image = (digits.pixels[shown] + digits.mean).reshape(8, 8)
        box = (x - half, x + half, y - half, y + half)
        axes.imshow(image, cmap="bone_r", vmin=0, vmax=1, interpolation="nearest", extent=box, zorder=2)
        frame = {"fill": False, "edgecolor": colors[answers[shown]], "linewidth": 2.6 if shown == node else 1.8}
        axes.add_patch(Rectangle((x - half, y - half), 2 * half, 2 * half, zorder=3, **frame))
    label, answer = int(digits.labels[node]), int(answers[node])
    verdict = f"read as {answer}" + ("" if answer == label else f", is {label}")
    title = f"{verdict}; to itself {100 * float(edges.weights[itself].sum()):.1f} %"
    axes.set_title(title, fontsize=9, color=RIGHT if answer == label else WRONG, fontweight="bold", pad=2)
    axes.set(xlim=(-1.6, 1.6), ylim=(-1.32, 1.32), aspect="equal")
    axes.axis("off")


def draw(path: pathlib.Path, digits: DigitGraph, network: Network, known: np.ndarray) -> None:
    """Save the picture of the graph and of what its nodes attend to in the last layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logits, trace = network.forward(digits.pixels, digits.graph)
    answers, edges = logits.argmax(axis=1), attention_of(trace.second)
    others = np.setdiff1d(np.arange(len(answers)), known)
    accuracy = (answers[others] == digits.labels[others]).mean()
    figure = Figure(figsize=(15.5, 8.6), facecolor=PAPER)
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(1, 2, width_ratios=[1.42, 1], wspace=0.0)
    left, right = parts
    for part in parts:
        part.set_facecolor(PAPER)
    axes = left.subplots()
    left.subplots_adjust(left=0.03, right=0.98, top=0.86, bottom=0.03)
    _draw_map(axes, digits, known, answers, edges)
    stars = right.subplots(*STARS, gridspec_kw={"wspace": 0.02, "hspace": 0.1}, squeeze=False)
    right.subplots_adjust(left=0.01, right=0.98, top=0.84, bottom=0.02)
    for place in stars.flat:
        place.axis("off")
    for place, node in zip(stars.flat, _choose_nodes(logits, digits.labels, others), strict=False):
        _draw_star(place, digits, node, answers, edges)
    title = "Reading digits by attention to their neighbours in a graph"
    figure.suptitle(title, x=0.018, y=0.975, ha="left", fontsize=17, color=INK, weight="bold")
    text = (
        f"{accuracy:.1%} of {len(others):,} digits are read rightly from {len(known)} labels, as coloured; places are "
        "by t-SNE of the pixels. Lines: the neighbours, wider and darker with more than an equal share of attention.\n"
        "Right: some of the least certain, and the shares that neighbours have of their attention, in the last layer; "
        "frames: what each is read as."
    )
    figure.text(0.018, 0.928, text, fontsize=10.5, color=INK, va="top", linespacing=1.5)
    figure.savefig(path, dpi=140)


# --- the command ------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Report:
    """What the demo found."""

    nodes: int
    edges: int
    alike: float  # the share of edges that join digits of one class
    parameters: int
    accuracies: dict[str, list[float]]  # by method, one for each drawing of labels
    middle: tuple[float, float]  # 90 % of the edges have shares of attention between these; 1 is an equal share
    between: float  # the mean share of those that join two classes
    training: str
    picture: pathlib.Path

    def lines(self) -> list[tuple[str, str]]:
        """Pairs of a subject and what is to be said of it."""
        drawings = len(self.accuracies[OURS])
        known = PER_CLASS * CLASSES
        of = "one drawing of labels" if drawings == 1 else f"mean (and range) of {drawings} drawings of labels"
        uses = ("pixels and graph", "pixels alone", *2 * ("the same graph alone",))

        def told(found: list[float]) -> str:
            return f"{np.mean(found):.2%}" + (f" ({min(found):.2%} to {max(found):.2%})" if drawings > 1 else "")

        return [
            (
                "graph",
                f"{self.nodes:,} digits from scikit-learn, {self.edges:,} edges to those nearest in pixels; "
                f"{self.alike:.1%} of them join digits of one class",
            ),
            ("labels", f"{known}, {PER_CLASS} of each class; accuracies are of the other {self.nodes - known:,}, {of}"),
            ("network", f"two layers of rv.GAT, {self.parameters:,} parameters, all gradients from their backward"),
            ("training", self.training),
            *((f"accuracy, {name}", f"{told(self.accuracies[name])}: {use}")
              for name, use in zip((OURS, *OTHERS), uses, strict=True)),
            ("", "two layers see two edges far; propagation follows edges as far as they go"),
            (
                "attention",
                f"in the last layer, 90 % of the edges have {self.middle[0]:.2f} to {self.middle[1]:.2f} times "
                f"an equal share; those between classes {self.between:.2f} times on average",
            ),
            ("picture", str(self.picture)),
        ]  # fmt: skip


def run(output: pathlib.Path, quick: bool, advance: Callable[[str, float], None]) -> Report:
    """All of the demo. `output` is a folder; `advance` hears what is being done and the share of all that is done."""
    import threadpoolctl  # scikit-learn requires it

    # So small a graph is done before a second thread gains much, and beside other work two would wait for each other.
    with rv.threads(1), threadpoolctl.threadpool_limits(1, "blas"):
        return _run(output, QUICK_SPLITS if quick else SPLITS, advance)


def _run(output: pathlib.Path, splits: int, advance: Callable[[str, float], None]) -> Report:
    advance("tying digits to their neighbours", 0.0)
    digits = load_graph()
    accuracies: dict[str, list[float]] = {name: [] for name in (OURS, *OTHERS)}
    drawn = [digits.draw_labels(SEED + i) for i in range(splits)]
    networks = [Network(seed=SEED + i) for i in range(splits)]
    advance("compiling, on a first run", 0.02)
    train(Network(), digits, drawn[0][0], 1, lambda _: None)
    done = 0

    def after_step(loss: float) -> None:
        nonlocal done
        done += 1
        advance(f"training, loss {loss:.3f}", 0.4 + 0.2 * done / (splits * STEPS))

    start = time.perf_counter()
    for network, (known, _) in zip(networks, drawn, strict=True):
        train(network, digits, known, STEPS, after_step)
    seconds = time.perf_counter() - start
    for i, (network, (known, others)) in enumerate(zip(networks, drawn, strict=True)):
        advance("asking the others", 0.6 + 0.15 * i / splits)
        found = {OURS: network.read(digits)[0], **answers_of_others(digits, known)}
        for name, answers in found.items():
            accuracies[name].append(float((answers[others] == digits.labels[others]).mean()))
    advance("drawing", 0.75)
    picture = output / "graph.png"
    draw(picture, digits, networks[0], drawn[0][0])
    advance("done", 1.0)

    each = "" if splits == 1 else f" for each of the {splits} drawings"
    training = (
        f"{STEPS} steps of Adam over the whole graph{each}, in {seconds:.1f} s, "
        f"{1e3 * seconds / (splits * STEPS):.1f} ms a step, one thread"
    )
    edges = attention_of(networks[0].read(digits)[1].second)
    loops, alike = edges.sources == edges.targets, digits.labels[edges.sources] == digits.labels[edges.targets]
    low, high = np.quantile(edges.shares[~loops], (0.05, 0.95))
    return Report(
        nodes=len(digits.labels),
        edges=digits.graph.num_edges,
        alike=float(alike[~loops].mean()),
        parameters=networks[0].parameter_count(),
        accuracies=accuracies,
        middle=(float(low), float(high)),
        between=float(edges.shares[~alike].mean()),
        training=training,
        picture=picture,
    )
