"""Side-by-side timing that can be believed: verified first, each contestant in its own process, in paired blocks.

The threads of an OpenMP runtime spin for a while after each call, and steal the processor from whoever is timed next:
alternating single calls showed half of the true speed. So each contestant lives in a process of its own, and calls are
timed in blocks with a pause between them: A...A, pause, B...B, pause, A...A, and so on. A block counts by its median,
a contestant by the median of its blocks, and a ratio is the median of the ratios of the blocks timed next to each
other: the machine's drift falls on both alike.

What is timed, and against whom, is in `peers.py`.
"""

import contextlib
import dataclasses
import functools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from .peers import PEERS, installed
from .works import OURS, Build, Runner, Task, Unsupported, Work

__all__ = ["QUICK_WORKS", "Plan", "Score", "choose", "compare", "format_table", "reference", "relative_error"]

TOLERANCE = 1e-4  # of a result against float64, relative to the largest magnitude, unless its work says otherwise
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


# --- what is right ----------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=1)
def reference(work: Task) -> list[np.ndarray]:
    """The right answer. The last one is kept, since work is often measured on one thread and then on several."""
    return work.reference()


def relative_error(results: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The largest difference, relative to the largest magnitude of its array. Infinite for a wrong shape or NaN."""
    worst = 0.0
    for result, right in zip(results, expected, strict=True):
        if result.shape != right.shape or not np.isfinite(result).all():
            return math.inf
        worst = max(worst, float(abs(result - right).max() / (abs(right).max() or 1.0)))
    return worst


# --- how long, and what is found --------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Plan:
    """How long to measure. Each contestant is timed in `blocks` blocks of about `seconds`, `pause` seconds apart."""

    blocks: int = 5
    seconds: float = 0.2
    pause: float = 0.15
    patience: float = 600.0  # seconds that a contestant may take to start, compile and answer once


@dataclasses.dataclass
class Score:
    """What was measured of one contestant on one piece of work, or why nothing was."""

    name: str
    work: str
    threads: int
    blocks: list[float] = dataclasses.field(default_factory=list)  # median seconds of a call, or the rate it measured
    rate: float = math.nan  # in the unit of the work
    error: float = math.nan  # largest, against float64
    ratio: float = math.nan  # seconds of a call over ours: above 1, we are faster
    ratios: list[float] = dataclasses.field(default_factory=list)  # of each pair of blocks
    skipped: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without what was not measured."""
        fields = dataclasses.asdict(self)
        return {k: v for k, v in fields.items() if not (v in ("", []) or (isinstance(v, float) and math.isnan(v)))}


# --- a contestant's process -------------------------------------------------------------------------------------------
def _prepare(build: Build, work: Task, threads: int, seconds: float) -> tuple[Runner, list[np.ndarray] | None, int]:
    """The runner, its first answer, and how many calls make a block of so many seconds."""
    runner = build(work, threads)
    found = runner.call()
    if runner.measures:
        return runner, None, 1
    results = [np.array(x) for x in runner.results(found)]  # copies: the next call may write to the same memory
    runner.call()
    start = time.perf_counter()
    runner.call()
    return runner, results, min(1000, max(1, round(seconds / (time.perf_counter() - start))))


def _serve(pipe: Connection, build: Build, work: Task, threads: int, seconds: float) -> None:
    """Set up, answer ("ready", results), then time one block for each message until the pipe closes."""
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        try:
            runner, results, calls = _prepare(build, work, threads, seconds)
        except Unsupported as reason:
            pipe.send(("skipped", str(reason)))
            return
        except Exception as error:  # a peer that fails is left out, not fatal
            pipe.send(("skipped", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))
            return
        pipe.send(("ready", results))
        while pipe.recv() == "block":
            pipe.send(("block", runner.time(calls)))


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """These variables for the processes that are started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Contestant:
    """A process that holds one library, ready to be timed."""

    def __init__(self, name: str, build: Build, work: Task, threads: int, plan: Plan):
        self.score = Score(name, work.name, threads)
        self.results: list[np.ndarray] | None = None
        self._patience = plan.patience
        context = multiprocessing.get_context("spawn")
        self._pipe, far_end = context.Pipe()
        arguments = (far_end, build, work, threads, plan.seconds)
        self._process = context.Process(target=_serve, args=arguments, name=name)
        with _environment(dict.fromkeys(_THREAD_VARIABLES, str(threads))):
            self._process.start()
        far_end.close()

    def receive(self) -> None:
        """Wait for the answer, and take it down: results, the seconds of a block, or why there are none."""
        try:
            if not self._pipe.poll(self._patience):
                self.score.skipped = f"no answer within {self._patience:g} s"
                return
            answer, content = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(5)
            answer, content = "skipped", f"its process ended with code {self._process.exitcode}"
        if answer == "ready":
            self.results = content
        elif answer == "block":
            self.score.blocks.append(content)
        else:
            self.score.skipped = content

    def time_block(self) -> None:
        """Time one block."""
        with contextlib.suppress(OSError):  # a process that has ended: `receive` says so
            self._pipe.send("block")
        self.receive()

    def close(self) -> None:
        """End the process, gently first."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


# --- the comparison ---------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _contestants(builds: dict[str, Build], work: Task, threads: int, plan: Plan) -> Iterator[list[_Contestant]]:
    started: list[_Contestant] = []
    try:
        for name, build in builds.items():
            started.append(_Contestant(name, build, work, threads, plan))
            started[-1].receive()  # one after the other: some choose by a short timing how to work
        yield started
    finally:
        for contestant in started:
            contestant.close()


def _verify(contestant: _Contestant, expected: list[np.ndarray], tolerance: float) -> None:
    """A wrong answer is never timed."""
    score = contestant.score
    if score.skipped or contestant.results is None:
        return
    score.error = relative_error(contestant.results, expected)
    contestant.results = None
    if not score.error <= tolerance:
        score.skipped = f"wrong: its largest relative error is {score.error:.1e}"


def _settle(scores: list[Score], work: Task, measuring: set[str]) -> None:
    """From blocks to rates, and to ratios with the first contestant's blocks of the same rounds."""
    base = scores[0]
    for score in scores:
        if score.skipped or not score.blocks:
            continue
        middle = statistics.median(score.blocks)
        score.rate = middle if score.name in measuring else work.rate(middle)
        if score.name not in measuring and not base.skipped:
            score.ratios = [theirs / ours for theirs, ours in zip(score.blocks, base.blocks, strict=True)]
            score.ratio = statistics.median(score.ratios)


def compare(
    work: Task,
    builds: dict[str, Build],
    threads: int,
    plan: Plan = Plan(),
    measuring: Sequence[str] = (),
) -> list[Score]:
    """Verify and time every contestant on one piece of work. Ratios are to the first one.

    Those named in `measuring` return a rate of the machine that they measure themselves (its peak, its bandwidth) in
    the same rounds, and are not verified.
    """
    expected = reference(work)
    with _contestants(builds, work, threads, plan) as contestants:
        for contestant in contestants:
            _verify(contestant, expected, getattr(work, "tolerance", TOLERANCE))
        for round_ in range(plan.blocks):
            turn = round_ % len(contestants)  # nobody always follows the same one
            for contestant in contestants[turn:] + contestants[:turn]:
                if not contestant.score.skipped:
                    time.sleep(plan.pause)
                    contestant.time_block()
        scores = [c.score for c in contestants]
    _settle(scores, work, set(measuring))
    return scores


# --- the command ------------------------------------------------------------------------------------------------------
QUICK_WORKS = (
    Work(8, 8, 128, 128, 64),
    Work(2, 8, 1024, 1024, 64),
    Work(2, 8, 1024, 1024, 64, causal=True),
    Work(2, 8, 1024, 1024, 64, backward=True),
    Work(2, 8, 1024, 1024, 64, causal=True, backward=True),
    Work(1, 8, 1, 32768, 64),
)


def choose(peers: Sequence[str] | None) -> dict[str, Build]:
    """Ours first, then the named peers, or all that are installed. A name that cannot be had is an error."""
    here = installed()
    for name in peers or ():
        if name not in PEERS:
            raise ValueError(f"there is no peer named {name!r}; choose from {', '.join(PEERS)}")
        if name not in here:
            raise ValueError(f"{name} is not installed here; found: {', '.join(here)}")
    wanted = [n for n in here if n not in (OURS, "torch-flex")] if peers is None else [n for n in peers if n != OURS]
    return {name: PEERS[name] for name in (OURS, *wanted)}


def _cell(score: Score | None, first: bool) -> str:
    if score is None or score.skipped or math.isnan(score.rate):
        return "-"
    rate = f"{score.rate:.0f}"
    if score.rate < 9.95:  # two digits at least
        rate = f"{score.rate:.1f}" if score.rate >= 0.995 else f"{score.rate:.2g}"
    return rate if first else f"{rate} ({score.ratio:.2f}x)"


def format_table(rows: Sequence[Sequence[Score]], names: Sequence[str]) -> list[list[str]]:
    """Headings and cells as text: GFLOP/s (GB/s for a decode) and, for peers, how many times faster we are."""
    table = [["work (batch, heads, length, dim)", *names]]
    for scores in rows:
        found = {s.name: s for s in scores}
        table.append([scores[0].work, *(_cell(found.get(n), n == names[0]) for n in names)])
    return table
