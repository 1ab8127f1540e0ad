"""The same cells as a plain pyperf script, for those who know pyperf and its `compare_to`.

    python perf/bench_attention.py --peer torch -o torch.json
    python perf/bench_attention.py --peer ruvector-numba -o ours.json
    python -m pyperf compare_to torch.json ours.json --table

Each run holds one library, so its threads spin beside nobody else's; but runs are minutes apart, and the machine drifts
between them: for ratios trust `run.py`.
"""

import argparse
import functools

import pyperf
from cells import GROUPS

from ruvector_numba.bench.peers import KINDS, adapters
from ruvector_numba.bench.works import Runner, Task, Unsupported


def _pass_on(command: list[str], options: argparse.Namespace) -> None:
    """pyperf's worker processes are started with these arguments as well."""
    command += ["--peer", options.peer, "--work-threads", str(options.work_threads)]
    if options.groups:
        command += ["--groups", *options.groups]


@functools.cache
def _runner(peer: str, work: Task, threads: int) -> Runner:
    """Set up in the worker process that needs it, and only there."""
    return adapters(work)[peer](work, threads)


def _time(loops: int, peer: str, work: Task, threads: int) -> float:
    call = _runner(peer, work, threads).call
    start = pyperf.perf_counter()
    for _ in range(loops):
        call()
    return pyperf.perf_counter() - start


def _can(peer: str, work: Task) -> bool:
    """Cheap for all but the work itself: adapters refuse before they set anything up."""
    if peer not in adapters(work):
        return False
    try:
        _runner(peer, work.tiny(), 1)
    except Unsupported:
        return False
    return True


def main() -> None:
    """Time every cell with one library."""
    runner = pyperf.Runner(add_cmdline_args=_pass_on)
    runner.argparser.add_argument(
        "--peer", choices=sorted({name for known in KINDS.values() for name in known}), default="ruvector-numba"
    )
    runner.argparser.add_argument("--work-threads", type=int, default=1)
    runner.argparser.add_argument("--groups", nargs="+", choices=[g.name for g in GROUPS])
    options = runner.parse_args()
    for group in GROUPS:
        if options.groups and group.name not in options.groups:
            continue
        for work in group.works:
            if _can(options.peer, work):
                runner.bench_time_func(work.name, _time, options.peer, work, options.work_threads)


if __name__ == "__main__":
    main()
