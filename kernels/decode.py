"""Attention of a few queries: memory-bound, so each key and value is read once, whole vectors at a time."""

from .blocks import AttentionJob
from .jit import kernel


def scratch_elements(rows: int, D: int, Dv: int) -> int:
    return 0


@kernel
def forward(job: AttentionJob, slot, task):
    pass
