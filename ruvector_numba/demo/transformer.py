"""The demo's second half: a transformer block that learns to read digits, with every gradient by hand.

A digit of 8 x 8 pixels is cut into 16 patches of 2 x 2. Each becomes a vector, a learned one that says where the patch
lies is added, and one block of a transformer (Vaswani et al., 2017; norms first, as in Xiong et al., 2020) follows:

    x = patches w_embed + b_embed + positions
    x = x + attention(norm1(x))
    x = x + relu(norm2(x) w_up + b_up) w_down + b_down
    logits = mean over the patches of norm3(x), w_class + b_class

`rv.MultiHeadAttention` does the attention, forward and backward; `rv.optim.AdamW` the steps. The rest is NumPy: below,
each piece is followed by its backward pass, which takes the gradient of the loss by what the piece returned (`d` and
its name) and gives those by what it was given. In shapes, B is the batch, L the patches, d the channels.
"""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import ruvector_numba as rv

from .digits import INK, PAPER, RIGHT, SEED, TESTS, WRONG, Digits, load_digits

SIDE, PATCH = 8, 2  # pixels
GRID = SIDE // PATCH  # patches in a row, and in a column
D_MODEL, HEADS, HIDDEN, DROPOUT = 32, 4, 64, 0.1
STEPS, QUICK_STEPS, WARM_UP = 400, 150, 30
BATCH, NOISE, LEARNING_RATE, WEIGHT_DECAY = 128, 0.2, 0.01, 0.05


def cut(pixels: np.ndarray) -> np.ndarray:
    """Digits (B, 64) as patches (B, 16, 4), row by row."""
    rows = pixels.reshape(-1, GRID, PATCH, GRID, PATCH)  # B, row of patches, row in it, column of patches, column in it
    return rows.swapaxes(2, 3).reshape(-1, GRID * GRID, PATCH * PATCH)


# --- the pieces, each with its backward pass --------------------------------------------------------------------------
def linear(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x (..., n), w (n, m), b (m,) -> (..., m)"""
    return x @ w + b


def linear_backward(dy: np.ndarray, x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gradients of x, w and b."""
    rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return dy @ w.T, rows.T @ drows, drows.sum(axis=0)


class Normed(NamedTuple):
    """What `layer_norm` leaves for its backward pass."""

    z: np.ndarray  # (..., d), of mean 0 and variance 1
    rate: np.ndarray  # (..., 1): z = (x - mean) * rate


def layer_norm(x: np.ndarray, gain: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, Normed]:
    """x (..., d) with mean 0 and variance 1 in each row, then scaled and shifted by the learned gain, shift (d,)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    rate = 1 / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    z = centred * rate
    return z * gain + shift, Normed(z, rate)


def layer_norm_backward(dy: np.ndarray, normed: Normed, gain: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gradients of x, gain and shift. That of x has no part along 1 or along z: there x does not change y."""
    z, rate = normed
    dz = dy * gain
    dx = rate * (dz - dz.mean(axis=-1, keepdims=True) - z * (dz * z).mean(axis=-1, keepdims=True))
    others = tuple(range(dy.ndim - 1))
    return dx, (dy * z).sum(axis=others), dy.sum(axis=others)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean of -log softmax(logits) at the labels (B,), and its gradient by the logits (B, classes)."""
    rows = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    dlogits = np.exp(log_p)
    dlogits[rows, labels] -= 1
    return float(-log_p[rows, labels].mean()), dlogits / len(labels)


# --- the block --------------------------------------------------------------------------------------------------------
class Trace(NamedTuple):
    """What `Transformer.forward` leaves for `Transformer.backward`."""

    parameters: rv.ParameterSet
    patches: np.ndarray  # (B, L, n)
    norm1: Normed
    attention: rv.AttentionCache
    norm2: Normed
    up: np.ndarray  # (B, L, d): what goes into the MLP
    hidden: np.ndarray  # (B, L, hidden)
    norm3: Normed
    mean: np.ndarray  # (B, d)


class Transformer(rv.Trainable):
    """The block. Its own parameters are one set, those of `attention` another; both start from `seed`.

    `patches` (L, n) is how many there are, and of how many numbers each.
    """

    def __init__(
        self,
        patches: tuple[int, int] = (GRID * GRID, PATCH * PATCH),
        d_model: int = D_MODEL,
        heads: int = HEADS,
        hidden: int = HIDDEN,
        classes: int = 10,
        dropout: float = DROPOUT,
        seed: int = SEED,
    ):
        config = rv.AttentionConfig(d_model=d_model, num_heads=heads, dropout=dropout)
        self.attention = rv.MultiHeadAttention(config, seed)
        rng = np.random.default_rng(seed)
        (L, n), d = patches, d_model

        def weights(fan_in: int, fan_out: int) -> np.ndarray:
            return rng.standard_normal((fan_in, fan_out)) / math.sqrt(fan_in)

        start = {"w_embed": weights(n, d), "b_embed": np.zeros(d), "positions": 0.3 * rng.standard_normal((L, d))}
        start |= {"w_up": weights(d, hidden), "b_up": np.zeros(hidden)}
        start |= {"w_down": weights(hidden, d), "b_down": np.zeros(d)}
        start |= {"w_class": weights(d, classes), "b_class": np.zeros(classes)}
        for i in (1, 2, 3):
            start |= {f"gain{i}": np.ones(d), f"shift{i}": np.zeros(d)}
        self._parameters = rv.ParameterSet(start).as_type(np.float32)

    def forward(self, patches: np.ndarray, training: bool = False) -> tuple[np.ndarray, Trace]:
        """patches (B, L, n) -> logits (B, classes)"""
        p = self.parameters
        x = linear(patches, p["w_embed"], p["b_embed"]) + p["positions"]  # (B, L, d)

        y, norm1 = layer_norm(x, p["gain1"], p["shift1"])
        attended, attention = self.attention.forward_cached(y, y, y, training=training)
        x = x + attended

        up, norm2 = layer_norm(x, p["gain2"], p["shift2"])
        hidden = np.maximum(linear(up, p["w_up"], p["b_up"]), 0)  # (B, L, hidden)
        x = x + linear(hidden, p["w_down"], p["b_down"])

        y, norm3 = layer_norm(x, p["gain3"], p["shift3"])
        mean = y.mean(axis=1)  # (B, d)
        logits = linear(mean, p["w_class"], p["b_class"])  # (B, classes)
        return logits, Trace(p, patches, norm1, attention, norm2, up, hidden, norm3, mean)

    def backward(self, dlogits: np.ndarray, t: Trace) -> tuple[dict[str, np.ndarray], rv.AttentionGradients]:
        """The gradients of the block's own parameters, and those of `attention`: `forward`, from its end to its start.

        Where x = x + f(x), the gradient arrives twice: past f as it is, and through f.
        """
        p, d = t.parameters, dict[str, np.ndarray]()
        dmean, d["w_class"], d["b_class"] = linear_backward(dlogits, t.mean, p["w_class"])
        L = t.patches.shape[1]
        dy = np.broadcast_to(dmean[:, None] / L, t.norm3.z.shape)
        dx, d["gain3"], d["shift3"] = layer_norm_backward(dy, t.norm3, p["gain3"])

        dhidden, d["w_down"], d["b_down"] = linear_backward(dx, t.hidden, p["w_down"])
        drelu = np.where(t.hidden > 0, dhidden, 0)
        dup, d["w_up"], d["b_up"] = linear_backward(drelu, t.up, p["w_up"])
        through, d["gain2"], d["shift2"] = layer_norm_backward(dup, t.norm2, p["gain2"])
        dx = dx + through

        attention: Any = self.attention.backward(dx, t.attention)
        dy = attention.query + attention.key + attention.value  # y was all three
        through, d["gain1"], d["shift1"] = layer_norm_backward(dy, t.norm1, p["gain1"])
        dx = dx + through

        d["positions"] = dx.sum(axis=0)
        _, d["w_embed"], d["b_embed"] = linear_backward(dx, t.patches, p["w_embed"])
        return d, attention

    def head_weights(self, t: Trace) -> np.ndarray:
        """How much each patch attended to each, in each head: (B, heads, L, L)."""
        return self.attention.head_weights(t.attention.query, t.attention.key, t.attention.value)


# --- training ---------------------------------------------------------------------------------------------------------
def train(model: Transformer, digits: Digits, steps: int, progress: Callable[[float], None]) -> None:
    """Minimise the cross-entropy of the memory's digits, a batch at a time. `progress` hears the loss of each step."""
    rng = np.random.default_rng(SEED)
    own, inner = (rv.optim.AdamW(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY) for _ in range(2))
    for step in range(steps):
        warm_up, cool_down = min(1, (step + 1) / WARM_UP), 0.5 + 0.5 * math.cos(math.pi * step / steps)
        own.lr = inner.lr = LEARNING_RATE * warm_up * cool_down

        batch = rng.choice(len(digits.memory), min(BATCH, len(digits.memory)), replace=False)
        pixels = digits.memory[batch]
        noisy = pixels + NOISE * rng.standard_normal(pixels.shape, dtype=np.float32)  # so that none is learned by heart
        logits, trace = model.forward(cut(noisy), training=True)
        loss, dlogits = cross_entropy(logits, digits.memory_labels[batch])
        gradients, attention = model.backward(dlogits, trace)
        own.update(model, gradients)
        inner.update(model.attention, attention)
        progress(loss)


def read(model: Transformer, digits: Digits) -> np.ndarray:
    """What each test digit is taken for."""
    return model.forward(cut(digits.tests))[0].argmax(axis=1)


# --- the picture ------------------------------------------------------------------------------------------------------
GLOW, INKED = (1.0, 0.62, 0.11), 0.75  # the glow shows through the ink
SHOWN = (2, 3, 4, 5, 7, 8)  # one test digit of each of these classes on the left, the first of them on the right


def _glowing(pixels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A digit (64,) in ink, on paper that glows where a patch has a large share of the weights (16,): (8, 8, 3)."""
    light = np.kron((weights / weights.max()).reshape(GRID, GRID), np.ones((PATCH, PATCH)))[..., None]
    paper = 1 + light * (np.array(GLOW) - 1)
    return paper * (1 - INKED * pixels.reshape(SIDE, SIDE, 1))


def _show(axes: Any, image: np.ndarray, title: str, color: str = INK) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9, color=color, pad=3)
    for spine in axes.spines.values():
        spine.set(edgecolor="#d8d4cb", linewidth=0.8)


def _draw_digits(figure: Any, pixels: np.ndarray, labels: np.ndarray, answers: np.ndarray, seen: np.ndarray) -> None:
    """Left: digits (n, 64), what they are read as, and what all patches together see of them, `seen` (n, heads, 16)."""
    grid = figure.subplots(len(pixels), HEADS + 1, gridspec_kw={"wspace": 0.08, "hspace": 0.28})
    for axes, digit, label, answer, weights in zip(grid, pixels, labels, answers, seen, strict=True):
        verdict, color = (f"read as {answer}", RIGHT) if answer == label else (f"read as {answer}, is {label}", WRONG)
        _show(axes[0], 1 - INKED * digit.reshape(SIDE, SIDE), verdict, color)
        for h in range(HEADS):
            _show(axes[1 + h], _glowing(digit, weights[h]), f"head {h + 1}")


def _draw_patches(figure: Any, digit: np.ndarray, weights: np.ndarray) -> None:
    """Right: a digit (64,) once for each patch, which has a frame, and what it sees in each head, (heads, 16, 16)."""
    from matplotlib.patches import Rectangle

    pitch = SIDE + 1
    for h, axes in enumerate(figure.subplots(2, HEADS // 2, gridspec_kw={"wspace": 0.05, "hspace": 0.1}).flat):
        sheet = np.full((GRID * pitch - 1, GRID * pitch - 1, 3), 0.85)
        for i in range(GRID * GRID):
            row, column = divmod(i, GRID)
            sheet[pitch * row :, pitch * column :][:SIDE, :SIDE] = _glowing(digit, weights[h, i])
            corner = ((pitch + PATCH) * column - 0.5, (pitch + PATCH) * row - 0.5)
            axes.add_patch(Rectangle(corner, PATCH, PATCH, fill=False, edgecolor=WRONG, linewidth=1.4, clip_on=False))
        _show(axes, sheet, f"head {h + 1}")


def draw(path: pathlib.Path, model: Transformer, digits: Digits, accuracy: float) -> None:
    """Save the picture of what the patches of some test digits attend to."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [int(np.argmax(digits.test_labels == label)) for label in SHOWN]
    logits, trace = model.forward(cut(digits.tests[rows]))
    weights = model.head_weights(trace)  # (6, heads, 16, 16)
    pixels = digits.tests[rows] + digits.mean

    figure = Figure(figsize=(13.6, 8.6), facecolor=PAPER)
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(1, 2, width_ratios=[0.86, 1], wspace=0.0)
    left, right = parts
    for part in parts:
        part.set_facecolor(PAPER)
    _draw_digits(left, pixels, digits.test_labels[rows], logits.argmax(axis=1), weights.mean(axis=2))
    left.subplots_adjust(left=0.06, right=0.97, top=0.83, bottom=0.03)
    _draw_patches(right, pixels[0], weights[0])
    right.subplots_adjust(left=0.02, right=0.96, top=0.83, bottom=0.03)
    title = "Reading digits with a transformer block: what its patches attend to"
    figure.suptitle(title, x=0.028, y=0.975, ha="left", fontsize=17, color=INK, weight="bold")
    text = (
        f"{accuracy:.1%} of {len(digits.tests)} test digits are read rightly. Left: the share of each patch of 2 x 2 "
        "pixels in the attention of all patches together, by head.\n"
        f"Right: the {SHOWN[0]} once for each of its patches: what the patch in the red frame attends to."
    )
    figure.text(0.028, 0.925, text, fontsize=10.5, color=INK, va="top", linespacing=1.5)
    figure.savefig(path, dpi=140)


# --- the command ------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Report:
    """What this half of the demo found."""

    parameters: int
    accuracy: float
    untrained: float
    training: str
    picture: pathlib.Path

    def lines(self) -> list[tuple[str, str]]:
        """Pairs of a subject and what is to be said of it."""
        block = f"{GRID * GRID} patches of {PATCH} x {PATCH} pixels, {HEADS} heads, {self.parameters:,} parameters"
        return [
            ("a transformer block", f"{block}, all gradients by hand"),
            ("its training", self.training),
            ("its accuracy", f"{self.accuracy:.2%} of the same {TESTS}; before training {self.untrained:.2%}"),
            ("its picture", str(self.picture)),
        ]


def run(output: pathlib.Path, quick: bool, advance: Callable[[str, float], None]) -> Report:
    """This half of the demo. `output` is a folder; `advance` hears what is being done and the share that is done."""
    import threadpoolctl  # scikit-learn requires it

    # Arrays this small are done before a second thread has begun.
    with rv.threads(1), threadpoolctl.threadpool_limits(1, "blas"):
        return _run(output, QUICK_STEPS if quick else STEPS, advance)


def _run(output: pathlib.Path, steps: int, advance: Callable[[str, float], None]) -> Report:
    digits, model = load_digits(), Transformer()
    advance("compiling again, on a first run", 0.0)
    train(Transformer(), digits, 1, lambda _: None)
    untrained = float((read(model, digits) == digits.test_labels).mean())
    done = 0

    def after_step(loss: float) -> None:
        nonlocal done
        done += 1
        advance(f"training a block, loss {loss:.3f}", 0.3 + 0.55 * done / steps)

    start = time.perf_counter()
    train(model, digits, steps, after_step)
    training = f"{steps} steps of AdamW in {time.perf_counter() - start:.1f} s, one thread, through MultiHeadAttention"
    accuracy = float((read(model, digits) == digits.test_labels).mean())
    advance("drawing what patches attend to", 0.85)
    picture = output / "patches.png"
    draw(picture, model, digits, accuracy)
    advance("done", 1.0)
    parameters = model.parameter_count() + model.attention.parameter_count()
    return Report(parameters, accuracy, untrained, training, picture)
