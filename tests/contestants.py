"""Contestants for the tests of the bench. The processes that hold them must be able to import this by name."""

import time

from ruvector_numba.bench import comparison
from ruvector_numba.bench.works import Runner, Unsupported


def answer(error, pause, work, threads):
    output = comparison.reference(work)[0] + error

    def call():
        time.sleep(pause)
        return [output]

    return Runner(call)


def refuse(work, threads):
    raise Unsupported("not on Sundays")


def fail(work, threads):
    raise RuntimeError("no such\nluck")


def die(work, threads):
    raise SystemExit(3)


def rate(work, threads):
    return Runner(lambda: 42.0 * threads, measures=True)
