"""The demo: read handwritten digits by attending to a memory of labelled ones.

Keys are the training digits and values their labels, one-hot. A test digit is a query: it attends to the digits in
memory that it resembles, and what comes out is a mixture of their labels, a probability for each class. What counts as
resembling is learned: queries and keys pass through the same linear projection, trained by gradient descent, whose
gradients come from `attention_backward`. (With one head this is neighbourhood components analysis.)

Four heads look through projections of their own, and their answers are averaged.

`transformer.py` is the second half: a transformer block.
"""

import dataclasses
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import ruvector_numba as rv

MEMORIES, TESTS = 1347, 450
HEADS, DIM, SCALE = 4, 16, 20.0  # projected digits have length 1, so SCALE says how sharply to attend
BATCH, NOISE, LEARNING_RATE = 128, 0.1, 0.01
SEED = 0


@dataclasses.dataclass(frozen=True)
class Digits:
    """Pixels (n, 64) in float32, centred on the memory's mean, and labels (n,)."""

    memory: np.ndarray
    memory_labels: np.ndarray
    tests: np.ndarray
    test_labels: np.ndarray
    mean: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """One-hot labels of the memory for each head, (HEADS, n, 10): one array, seen four times."""
        one_hot = np.eye(10, dtype=np.float32)[self.memory_labels]
        return np.broadcast_to(one_hot, (HEADS, *one_hot.shape))


def load_digits() -> Digits:
    """scikit-learn's 1,797 digits of 8 x 8 pixels: some to remember, the others to read."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    data = load()
    pixels = (data.data / 16).astype(np.float32)
    memory, tests, memory_labels, test_labels = train_test_split(
        pixels, data.target, test_size=TESTS, stratify=data.target, random_state=SEED
    )
    mean = memory.mean(axis=0)
    return Digits(memory - mean, memory_labels, tests - mean, test_labels, mean)


# --- the projection and its training ----------------------------------------------------------------------------------
def project(pixels: np.ndarray, projection: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Digits (n, 64) through each head's projection (HEADS, 64, DIM), scaled to length 1; and the lengths they had."""
    z = pixels @ projection
    lengths = np.linalg.norm(z, axis=-1, keepdims=True)
    return z / lengths, lengths


def project_backward(grad: np.ndarray, z: np.ndarray, lengths: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """The gradient of the projection from that of the projected digits."""
    return pixels.T @ ((grad - z * (grad * z).sum(axis=-1, keepdims=True)) / lengths)


def training_step(digits: Digits, projection: np.ndarray, rng: np.random.Generator) -> tuple[float, np.ndarray]:
    """The loss of a batch of remembered digits, each hidden from itself, and the gradient of the projection."""
    batch = rng.choice(len(digits.memory), BATCH, replace=False)
    noise = NOISE * rng.standard_normal((BATCH, 64), dtype=np.float32)
    pixels, labels = digits.memory[batch] + noise, digits.memory_labels[batch]
    query, query_lengths = project(pixels, projection)
    key, key_lengths = project(digits.memory, projection)
    others = np.arange(len(digits.memory)) != batch[:, None]

    cache = rv.attention_forward(query, key, digits.values, others, scale=SCALE)
    rows = np.arange(BATCH)
    right = cache.output.mean(axis=0)[rows, labels] + 1e-3  # the probability of the right class, kept off 0
    grad_output = np.zeros_like(cache.output)
    grad_output[:, rows, labels] = -1 / (right * BATCH * HEADS)  # of the mean of -log(right)
    grad = rv.attention_backward(grad_output, cache)

    gradient = project_backward(grad.query, query, query_lengths, pixels)
    gradient += project_backward(grad.key, key, key_lengths, digits.memory)
    return float(-np.log(right).mean()), gradient


def train(digits: Digits, steps: int, progress: Callable[[float], None]) -> np.ndarray:
    """The learned projection. `progress` hears the loss after each step."""
    rng = np.random.default_rng(SEED)
    learned = {"projection": rng.standard_normal((HEADS, 64, DIM), dtype=np.float32) / 8}
    optimizer = rv.optim.Adam(lr=LEARNING_RATE, betas=(0.9, 0.99))
    for _ in range(steps):
        loss, gradient = training_step(digits, learned["projection"], rng)
        learned = optimizer.step(learned, {"projection": gradient})
        progress(loss)
    return learned["projection"]


# --- what is reported -------------------------------------------------------------------------------------------------
def plain_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The formula as one writes it in NumPy, in the precision of its inputs."""
    s = query.dtype.type(SCALE) * (query @ key.swapaxes(-1, -2))
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return (p / p.sum(axis=-1, keepdims=True)) @ value


def largest_errors(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> tuple[float, float]:
    """Largest error against the formula in float64: ours, and the float32 formula's."""
    exact = plain_attention(*(x.astype(np.float64) for x in (query, key, value)))
    ours = rv.scaled_dot_product_attention(query, key, value, scale=SCALE)
    return float(abs(ours - exact).max()), float(abs(plain_attention(query, key, value) - exact).max())


def paired_times(calls: list[Callable[[], Any]], blocks: int, seconds: float = 0.1) -> list[float]:
    """The median time of each call, in blocks taken in turn with a pause between: spinning threads must not overlap."""
    medians: list[list[float]] = [[] for _ in calls]
    for _ in range(blocks):
        for call, found in zip(calls, medians, strict=True):
            time.sleep(0.1)
            call()
            taken: list[float] = []
            end = time.perf_counter() + seconds
            while not taken or time.perf_counter() < end:
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
            found.append(statistics.median(taken))
    return [statistics.median(found) for found in medians]


def compare_with_numpy(query: np.ndarray, key: np.ndarray, value: np.ndarray, blocks: int) -> tuple[float, float]:
    """Seconds of a call, ours and plain NumPy's, both with the same number of threads."""
    import threadpoolctl  # scikit-learn requires it

    with threadpoolctl.threadpool_limits(rv.get_num_threads(), "blas"):
        ours, theirs = paired_times(
            [
                lambda: rv.scaled_dot_product_attention(query, key, value, scale=SCALE),
                lambda: plain_attention(query, key, value),
            ],
            blocks,
        )
    return ours, theirs


def neighbours_accuracy(digits: Digits, k: int) -> float:
    """scikit-learn's k nearest neighbours on the same split, by the distance of pixels."""
    from sklearn.neighbors import KNeighborsClassifier

    fitted = KNeighborsClassifier(k).fit(digits.memory, digits.memory_labels)
    return float(fitted.score(digits.tests, digits.test_labels))


# --- the picture ------------------------------------------------------------------------------------------------------
INK, RIGHT, WRONG, PAPER = "#1f2430", "#2a9d62", "#d1495b", "#fbfaf7"
ROWS, COLUMNS = 8, 7


def _choose_rows(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Up to half of the rows misread, then the least certain ones that were read well, one of each class at most."""
    certainty = probabilities.max(axis=1)
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    chosen = list(wrong[np.argsort(certainty[wrong])][: ROWS // 2])
    seen = {int(labels[i]) for i in chosen}
    for i in np.argsort(certainty):
        if len(chosen) < ROWS and i not in chosen and int(labels[i]) not in seen:
            chosen.append(i)
            seen.add(int(labels[i]))
    return np.array(sorted(chosen, key=lambda i: labels[i]))


def _draw_digit(axes: Any, pixels: np.ndarray, color: str, width: float) -> None:
    axes.imshow(pixels.reshape(8, 8), cmap="bone_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(edgecolor=color, linewidth=width)


def _draw_rows(figure: Any, digits: Digits, rows: np.ndarray, weights: np.ndarray, answers: np.ndarray) -> None:
    """Left: each chosen test digit, what it was read as, and the memories it attends to most, with their weights."""
    spacing = {"wspace": 0.12, "hspace": 0.45, "width_ratios": [1.3] + [1.0] * COLUMNS}
    grid = figure.subplots(len(rows), COLUMNS + 1, gridspec_kw=spacing)
    for axes, i, weight in zip(grid, rows, weights, strict=True):
        label, answer = int(digits.test_labels[i]), int(answers[i].argmax())
        color = RIGHT if answer == label else WRONG
        _draw_digit(axes[0], digits.tests[i] + digits.mean, color, 3.2)
        verdict = f"read as {answer}" + ("" if answer == label else f", is {label}")
        axes[0].set_title(verdict, fontsize=8.5, color=color, fontweight="bold", pad=3)
        for place, j in enumerate(np.argsort(-weight)[:COLUMNS], start=1):
            remembered = int(digits.memory_labels[j])
            shade = RIGHT if remembered == label else WRONG
            _draw_digit(axes[place], digits.memory[j] + digits.mean, shade, 0.5 + 5 * math.sqrt(weight[j]))
            axes[place].set_title(f"{remembered}:  {100 * weight[j]:.1f} %", fontsize=8, color=INK, pad=3)


def _draw_map(axes: Any, digits: Digits, projection: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> None:
    """Right: all that is remembered, as the heads see it: what is close to each other in the projection lies together.

    Lines go from a test digit to the memories that it attends to.
    """
    import matplotlib.pyplot as plt
    import threadpoolctl
    from sklearn.manifold import TSNE

    pixels = np.concatenate([digits.memory, digits.tests[rows]])
    seen = np.concatenate(project(pixels, projection)[0], axis=1)
    with threadpoolctl.threadpool_limits(1):  # on a busy machine two wait for each other
        places = TSNE(max_iter=500, random_state=SEED).fit_transform(seen)
    points, ends = np.split(places, [len(digits.memory)])
    colors = plt.get_cmap("tab10")(np.arange(10))
    axes.scatter(*points.T, c=colors[digits.memory_labels], s=12, alpha=0.55, linewidths=0)
    for end, weight in zip(ends, weights, strict=True):
        for j in np.argsort(-weight)[:COLUMNS]:
            line = np.stack([end, points[j]])
            axes.plot(*line.T, color=INK, alpha=float(min(1, 0.15 + weight[j])), linewidth=0.4 + 3 * weight[j])
    for label in range(10):
        x, y = np.median(points[digits.memory_labels == label], axis=0)
        halo = {"boxstyle": "circle,pad=0.25", "facecolor": PAPER, "edgecolor": colors[label], "linewidth": 1.5}
        axes.text(
            x, y, str(label), color=colors[label], fontsize=12, fontweight="bold", bbox=halo, ha="center", va="center"
        )
    axes.scatter(*ends.T, marker="*", s=420, color="white", edgecolor=INK, linewidth=1.1, zorder=5)
    for end, label in zip(ends, digits.test_labels[rows], strict=True):
        axes.text(*end, str(label), fontsize=7.5, color=INK, ha="center", va="center_baseline", zorder=6)
    axes.set(xticks=[], yticks=[], facecolor=PAPER)
    title = "The memories as the heads see them, laid out by t-SNE; stars: the digits on the left"
    axes.set_title(title, fontsize=10, color=INK)
    for spine in axes.spines.values():
        spine.set(edgecolor="#d8d4cb")


def draw(path: pathlib.Path, digits: Digits, projection: np.ndarray, answers: np.ndarray, accuracy: float) -> None:
    """Save the picture of which memories some of the test digits attend to. The hardest ones are shown."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _choose_rows(answers, digits.test_labels)
    query, key = project(digits.tests[rows], projection)[0], project(digits.memory, projection)[0]
    weights = rv.attention_forward(query, key, digits.values, scale=SCALE).weights().mean(axis=0)
    figure = Figure(figsize=(15.5, 8.6), facecolor=PAPER)
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(1, 2, width_ratios=[1.12, 1], wspace=0.0)
    left, right = parts
    for part in parts:
        part.set_facecolor(PAPER)
    _draw_rows(left, digits, rows, weights, answers)
    left.subplots_adjust(left=0.05, right=0.97, top=0.86, bottom=0.03)
    axes = right.subplots()
    right.subplots_adjust(left=0.02, right=0.97, top=0.86, bottom=0.03)
    _draw_map(axes, digits, projection, rows, weights)
    figure.suptitle(
        "Reading digits by attention to a memory", x=0.024, y=0.975, ha="left", fontsize=17, color=INK, weight="bold"
    )
    figure.text(
        0.024,
        0.917,
        f"{accuracy:.1%} of {len(digits.tests)} test digits are read rightly from {len(digits.memory)} memories. "
        "Left: the hardest ones, and the memories that each attends to most, with their weights. "
        "Green frames: of the right class; red: of another.",
        fontsize=10.5,
        color=INK,
    )
    figure.savefig(path, dpi=140)


# --- the command ------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Report:
    """What the demo found."""

    accuracy: float
    untrained: float
    neighbours: dict[int, float]
    error: float
    numpy_error: float
    seconds: float
    numpy_seconds: float
    training: str
    picture: pathlib.Path

    def lines(self) -> list[tuple[str, str]]:
        """Pairs of a subject and what is to be said of it."""
        neighbours = ", ".join(f"{share:.2%} (k={k})" for k, share in self.neighbours.items())
        ours, theirs = 1e3 * self.seconds, 1e3 * self.numpy_seconds
        return [
            ("data", f"{MEMORIES:,} digits to remember, {TESTS} others to read, from scikit-learn; nothing downloaded"),
            ("training", self.training),
            ("accuracy, attention", f"{self.accuracy:.2%} of those {TESTS}; before training {self.untrained:.2%}"),
            ("accuracy, k nearest neighbours", f"{neighbours}: scikit-learn's, of the pixels, same split"),
            ("", f"one digit is {1 / TESTS:.2%}; on other splits either of the two may come out ahead"),
            ("largest error", f"{self.error:.1e} against the formula in float64; plain float32 {self.numpy_error:.1e}"),
            (
                "time to attend, all at once",
                f"{ours:.2f} ms; plain NumPy {theirs:.2f} ms, {theirs / ours:.1f} times ours "
                f"(medians; float32, {rv.get_num_threads()} threads each)",
            ),
            ("picture", str(self.picture)),
        ]


def read(digits: Digits, projection: np.ndarray) -> np.ndarray:
    """The probability of each class, for each test digit."""
    query, key = project(digits.tests, projection)[0], project(digits.memory, projection)[0]
    return rv.scaled_dot_product_attention(query, key, digits.values, scale=SCALE).mean(axis=0)


def accuracy_of(answers: np.ndarray, digits: Digits) -> float:
    """The share of test digits whose likeliest class is the right one."""
    return float((answers.argmax(axis=1) == digits.test_labels).mean())


def run(output: pathlib.Path, quick: bool, advance: Callable[[str, float], None]) -> Report:
    """All of the demo. `output` is a folder; `advance` hears what is being done and the share of all that is done."""
    import threadpoolctl  # scikit-learn requires it

    steps, blocks = (60, 2) if quick else (200, 7)
    advance("loading digits", 0.0)
    digits = load_digits()
    advance("compiling, on a first run", 0.02)
    rng = np.random.default_rng(SEED)
    first = rng.standard_normal((HEADS, 64, DIM), dtype=np.float32) / 8
    training_step(digits, first, rng)
    untrained = accuracy_of(read(digits, first), digits)

    done = 0

    def after_step(loss: float) -> None:
        nonlocal done
        done += 1
        advance(f"training, loss {loss:.3f}", 0.3 + 0.3 * done / steps)

    start = time.perf_counter()
    with threadpoolctl.threadpool_limits(1, "blas"):  # small products: its threads would only get in the way of ours
        projection = train(digits, steps, after_step)
    training = f"{steps} steps of gradient descent in {time.perf_counter() - start:.1f} s, through attention_backward"
    answers = read(digits, projection)
    accuracy = accuracy_of(answers, digits)
    query, key = project(digits.tests, projection)[0], project(digits.memory, projection)[0]
    advance("checking against float64", 0.62)
    error, numpy_error = largest_errors(query, key, digits.values)
    advance("timing beside NumPy", 0.65)
    seconds, numpy_seconds = compare_with_numpy(query, key, digits.values, blocks)
    advance("asking the nearest neighbours", 0.78)
    neighbours = {k: neighbours_accuracy(digits, k) for k in (1, 3, 5)}
    advance("drawing", 0.8)
    picture = output / "attention.png"
    draw(picture, digits, projection, answers, accuracy)
    advance("done", 1.0)
    return Report(accuracy, untrained, neighbours, error, numpy_error, seconds, numpy_seconds, training, picture)
