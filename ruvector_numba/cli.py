"""The command `ruvector-numba`: demo, attend, bench, info, warmup.

What a command needs is imported when it runs, so that `--help` is quick and a missing extra troubles only those who
want it. Errors that a user can correct are printed in a line or two, without a traceback, and end the command with 2.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from . import masks

__all__ = ["main"]

PROGRAM = "ruvector-numba"

# What an error of the function says, and what it is called here.
FLAGS = {
    "pass enable_gqa=True": "pass --gqa",
    "or None for no cap": "or leave --softcap out",
    "or None for 1 / sqrt(D)": "or leave --scale out",
    "None means no limit": "none means no limit",
    ', or pass dtype="bfloat16" if': ": the command does not know whether",
    ", or one of rv.masks, such as rv.masks.Causal()": "",
    "attn_mask": "mask",
}


class Refusal(Exception):
    """What the user asked for cannot be done; the text says why and what would help."""


# --- progress and tables, with rich where it is installed -------------------------------------------------------------
def _need(packages: Sequence[str], extra: str, purpose: str) -> None:
    missing = [n for n in packages if importlib.util.find_spec(n) is None]
    if missing:
        raise Refusal(
            f"{purpose} needs {', '.join(missing)}, not installed here.\n"
            f'Install with: pip install ".[{extra}]", in a clone of {PROGRAM}'
        )


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A function `(what is being done, share of the whole)` that draws a bar, or prints lines where rich is missing."""
    if importlib.util.find_spec("rich") is None:
        last = ""

        def tell(text: str, _: float) -> None:
            nonlocal last
            subject = text.partition(",")[0]
            if subject != last:
                print(subject, file=sys.stderr, flush=True)
                last = subject

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<34}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda text, share: bar.update(task, description=text, completed=share)


def _print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    width = max(len(subject) for subject, _ in pairs)
    for subject, text in pairs:
        print(f"{subject:<{width}}  {text}")


def _print_table(table: Sequence[Sequence[str]], title: str) -> None:
    """The first row is the heading; all columns but the first hold numbers."""
    if importlib.util.find_spec("rich") is None:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        print(title)
        for row in table:
            cells = [t.ljust(w) if i == 0 else t.rjust(w) for i, (t, w) in enumerate(zip(row, widths, strict=True))]
            print("  ".join(cells))
        return
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left")
    for index, heading in enumerate(table[0]):
        drawn.add_column(heading, justify="right" if index else "left", overflow="fold", no_wrap=bool(index))
    for row in table[1:]:
        drawn.add_row(*row)
    Console().print(drawn)


# --- the commands -----------------------------------------------------------------------------------------------------
def _demo(options: argparse.Namespace) -> None:
    _need(("rich", "sklearn", "matplotlib"), "demo", "the demo")
    from .demo import digits, graph, transformer

    folder = pathlib.Path(options.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"the folder {folder} cannot be made: {error.strerror or error}") from None
    if options.what == "graph":
        with _progress() as advance:
            report = graph.run(folder, options.quick, advance)
        _print_pairs(report.lines())
        return
    with _progress() as advance:
        memory = digits.run(folder, options.quick, lambda text, share: advance(text, 0.7 * share))
        block = transformer.run(folder, options.quick, lambda text, share: advance(text, 0.7 + 0.3 * share))
    _print_pairs([*memory.lines(), *block.lines()])


def _load(path: str, name: str) -> "np.ndarray":
    """A memory map of an array on disk: what is not attended to is not read."""
    import numpy as np

    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise Refusal(f"{name}: there is no file {path}") from None
    except OSError as error:
        raise Refusal(f"{name}: {path} cannot be read: {error.strerror or error}") from None
    except Exception:  # whatever NumPy, zipfile and the parser of its header make of what they cannot read
        hint = "Save an array of numbers with numpy.save(path, array)."
        raise Refusal(f"{name}: {path} is not an .npy file of numbers\n{hint}") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise Refusal(f"{name}: {path} holds several arrays (.npz); save the one to use with numpy.save")
    return array


def _mask(options: argparse.Namespace, array: "np.ndarray | None") -> "masks.Mask":
    """The window and the mask's array, whichever were given, as one mask."""
    from . import masks

    window = masks.Full() if options.window is None else masks.Window(*options.window)
    return window if array is None else window & array


def _save(path: str, array: "np.ndarray") -> None:
    """Under exactly this name, and only once it is complete."""
    import numpy as np

    from . import errors, files

    try:
        files.replace(path, lambda file: np.save(file, array))
    except errors.InvalidInputError as error:
        raise Refusal(f"{error.details}\n{error.hint}") from None


def _target(path: str) -> pathlib.Path:
    """Where the output goes, links followed: a file, or nothing yet, in a folder that is there."""
    from . import errors, files

    given = pathlib.Path(path)
    if os.path.isdir(path):  # pathlib's is_dir raises for a name that is too long
        raise Refusal(f"{path} is a folder; give the name of a file in it")
    try:
        target = pathlib.Path(files.place(path, "out.npy"))
    except errors.InvalidInputError as error:
        raise Refusal(f"{error.details}\n{error.hint}") from None
    for end in (given, target):
        if not os.path.isdir(end.parent):
            raise Refusal(f"there is no folder {end.parent} to write {end.name} to")
    try:
        target.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise Refusal(f"{path} cannot be written: {error.strerror or error}") from None
    return target


def _attend(options: argparse.Namespace) -> None:
    import ruvector_numba as rv

    names = ("query", "key", "value")
    paths = {name: path for name in (*names, "mask") if (path := getattr(options, name)) is not None}
    arrays = {name: _load(path, name) for name, path in paths.items()}
    query, key, value = (arrays[name] for name in names)
    target = _target(options.output)
    for name, path in paths.items():
        if target.exists() and target.samefile(path):
            raise Refusal(f"the output would replace the {name}, {path}; give it another name")
    start = time.perf_counter()
    try:
        output = rv.scaled_dot_product_attention(
            query,
            key,
            value,
            _mask(options, arrays.get("mask")),
            is_causal=options.causal,
            scale=options.scale,
            enable_gqa=options.gqa,
            softcap=options.softcap,
        )
    except rv.AttentionError as error:
        text = str(error)
        for of_function, of_command in FLAGS.items():
            text = text.replace(of_function, of_command)
        raise Refusal(text) from None
    seconds = time.perf_counter() - start
    _save(str(target), output)
    shapes = [(name, f"{x.shape} {x.dtype}") for name, x in zip(names, (query, key, value), strict=True)]
    if options.mask is not None:
        shapes.append(("mask", options.mask))
    written = f"{output.shape} {output.dtype}, written to {options.output}"
    taken = f"{seconds:.3f} s on {rv.get_num_threads()} threads, reading and any compiling included"
    _print_pairs([*shapes, ("output", written), ("time", taken)])


def _bench(options: argparse.Namespace) -> None:
    import ruvector_numba as rv

    from .bench import comparison

    try:
        builds = comparison.choose(options.peers)
    except ValueError as error:
        raise Refusal(str(error)) from None
    threads = rv.get_num_threads() if options.threads is None else options.threads
    with rv.threads(threads):  # a number that cannot be had is refused here, not in the processes that measure
        pass
    plan = comparison.Plan(blocks=3, seconds=0.1) if options.quick else comparison.Plan()
    rows = []
    with _progress() as advance:
        for done, work in enumerate(comparison.QUICK_WORKS):
            advance(work.name, done / len(comparison.QUICK_WORKS))
            rows.append(comparison.compare(work, builds, threads, plan))
        advance("done", 1.0)
    title = f"GFLOP/s (GB/s for 1 query), float32, {threads} threads; in brackets: how many times faster we are"
    _print_table(comparison.format_table(rows, list(builds)), title)
    for name, reason in dict.fromkeys((s.name, s.skipped) for scores in rows for s in scores if s.skipped):
        print(f"{name}: {reason}")
    if any(scores[0].skipped for scores in rows):
        raise Refusal("some of our own answers were wrong or missing: see above")


def _info(options: argparse.Namespace) -> None:
    import ruvector_numba as rv

    found = rv.info(measure=not options.no_peak)
    if options.json:
        print(json.dumps(found, indent=2, default=str))
        return
    peak = found.get("peak_gflops")
    found.pop("compiled")  # by this very process: nothing yet
    texts = {
        "tile": f"{found['tile']} vectors",
        "features": " ".join(found["features"]),
        "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        "peak_gflops": "not measured" if peak is None else f"{peak:.0f} GFLOP/s, float32, one thread",
        "cache_folder": str(found["cache_folder"] or "none: every process compiles anew"),
    }
    _print_pairs([(k.removesuffix("_gflops").replace("_", " "), texts.get(k, str(v))) for k, v in found.items()])


def _warmup(options: argparse.Namespace) -> None:
    import ruvector_numba as rv

    start = time.perf_counter()
    with _progress() as advance:
        advance("compiling", 0.0)
        rv.warmup(options.dtypes, progress=lambda done, total, name: advance(name, done / total))
    folder = rv.info()["cache_folder"]
    where = f"kept in {folder}" if folder else "not cached: no cache folder is writable"
    print(f"compiled in {time.perf_counter() - start:.1f} s; {where}")


# --- the parser -------------------------------------------------------------------------------------------------------
def _reach(text: str) -> int | None:
    try:
        return None if text.lower() == "none" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor none") from None


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(prog=PROGRAM, description="Exact attention on NumPy arrays, compiled by Numba.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, function: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(function=function)
        return command

    demo = add("demo", _demo, "read handwritten digits by attention, and draw what is attended to")
    demo.add_argument(
        "what",
        nargs="?",
        choices=("digits", "graph"),
        default="digits",
        help="digits, unless given: one by one, with a memory and in a transformer (attention.png and patches.png); "
        "graph: all at once, as neighbours in a graph, from 100 labels (graph.png)",
    )
    demo.add_argument("--quick", action="store_true", help="less training, shorter timing")
    demo.add_argument("--output", default="demo-output", metavar="FOLDER", help="where to save the pictures")

    attend = add("attend", _attend, "attend with arrays on disk: .npy files of shape (..., heads, length, dim)")
    for name in ("query", "key", "value"):
        attend.add_argument(name, metavar=f"{name}.npy")
    attend.add_argument("-o", "--output", required=True, metavar="out.npy")
    attend.add_argument("--causal", action="store_true", help="query i sees keys 0 .. i")
    attend.add_argument(
        "--window",
        nargs=2,
        type=_reach,
        metavar=("L", "R"),
        help="query i sees keys i - L .. i + R; none in place of a number is no limit on that side",
    )
    attend.add_argument("--mask", metavar="mask.npy", help="boolean, True attends; or float, added to the scores")
    attend.add_argument("--scale", type=float, metavar="S", help="of the scores; 1 / sqrt(dim) unless given")
    attend.add_argument("--softcap", type=float, metavar="C", help="scores become C * tanh(score / C)")
    attend.add_argument("--gqa", action="store_true", help="groups of query heads share a key head")

    bench = add("bench", _bench, "measure against the libraries that are installed here, verified before timed")
    bench.add_argument("--threads", type=int, metavar="N", help="of every contestant; all processors unless given")
    bench.add_argument("--peers", nargs="+", metavar="NAME", help="only these (default: all that are installed)")
    bench.add_argument("--quick", action="store_true", help="fewer, shorter blocks: rougher numbers")

    info = add("info", _info, "say what this machine and this build can do")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.add_argument("--no-peak", action="store_true", help="do not measure the peak")

    warmup = add("warmup", _warmup, "compile ahead, so that first calls are quick")
    warmup.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32"],
        choices=("float32", "float64", "float16", "bfloat16"),
        help="the element types to compile for, one to three minutes each (default: float32 alone)",
    )
    return parser


def _refuse(text: str) -> int:
    """Two lines at most: what is wrong, then what there is to know of it."""
    first, *rest = text.splitlines() or [""]
    print(f"{PROGRAM}: {first}", file=sys.stderr)
    if rest:
        print("; ".join(" ".join(line.split()).replace(" :", ":") for line in rest), file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status is returned."""
    options = _parser().parse_args(arguments)
    from numba import config

    import ruvector_numba as rv

    try:
        if config.DISABLE_JIT:
            raise Refusal("NUMBA_DISABLE_JIT is set, and nothing here runs without Numba's compiler: unset it")
        rv.get_num_threads()  # an environment variable that makes no sense is refused before any work
        options.function(options)
    except (Refusal, rv.AttentionError, MemoryError) as error:
        return _refuse(str(error))
    except BrokenPipeError:  # `ruvector-numba info | head`: nobody reads on
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        _refuse("interrupted")
        return 130
    return 0
