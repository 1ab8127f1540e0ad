"""The peers: who is here, in which version, and whether each gives the right answer.

Their adapters are in `ruvector_numba/bench/peers.py`, where the command `ruvector-numba bench` needs them too; speed is
the business of `run.py`.

    python perf/peers.py
"""

import importlib.metadata
import sys
from collections.abc import Sequence

from cells import SMOKE

from ruvector_numba.bench.comparison import Plan, Score, compare
from ruvector_numba.bench.peers import KINDS, adapters, installed

_PACKAGES = {"torch-flex": "torch"}


def versions(names: Sequence[str]) -> dict[str, str]:
    """The installed version of each named peer."""
    found = {}
    for name in names:
        package = _PACKAGES.get(name, name)
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed from a package"
    return found


def everyone() -> list[str]:
    """The names of all peers that are installed, whatever they do."""
    return installed(dict.fromkeys(name for known in KINDS.values() for name in known))


def verify(threads: int = 2) -> list[Score]:
    """One small piece of work of each kind through every adapter, against the float64 reference."""
    scores = []
    for work in (work for group in SMOKE for work in group.works):
        builds = {name: adapters(work)[name] for name in installed(adapters(work))}
        scores += compare(work, builds, threads, Plan(blocks=0, seconds=0.01))
    return scores


def main() -> int:
    """Print versions and errors; 1 when an adapter is wrong or broken."""
    for package, version in versions(everyone()).items():
        print(f"{package} {version}")
    broken = 0
    for score in verify():
        is_wrong = score.skipped.startswith("wrong") or "Error" in score.skipped or "process" in score.skipped
        broken += is_wrong
        print(f"{score.work:<64} {score.name:<16} {score.skipped or f'error {score.error:.1e}'}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
