"""What Numba compiles for, and how wide its vectors and tiles should be."""

import functools
from dataclasses import dataclass

import llvmlite.binding as llvm
from numba import config
from numba.core.registry import cpu_target

CHECKED = bool(config.BOUNDSCHECK)


@dataclass(frozen=True)
class Target:
    """What Numba compiles for: bytes in a vector, whether x * y + z is one instruction, the largest tile that fits."""

    cpu: str
    vector_bytes: int
    fma: bool
    rows: int
    cols: int

    def lanes(self, itemsize: int) -> int:
        return self.vector_bytes // itemsize

    def width(self, itemsize: int) -> int:
        """Queries in a block: the lanes of one tile row."""
        return self.cols * self.lanes(itemsize)


@functools.cache
def target() -> Target:
    """Ask LLVM what a 16-lane multiply-add becomes (10 ms, once): the list of features may be empty, or the host's.

    4 x 4 vectors spill nothing with 32 registers (AVX-512, NEON); with AVX2's 16 they spill 16 times a step and 4 x 3
    never; 16 lanes on AVX2 would spill 70 times.
    """
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=1)
    v = "<16 x float>"
    text = machine.emit_assembly(
        llvm.parse_assembly(
            f"declare {v} @llvm.fma.v16f32({v}, {v}, {v})\n"
            f"define {v} @f({v} %a, {v} %b, {v} %c) {{"
            f" %r = call {v} @llvm.fma.v16f32({v} %a, {v} %b, {v} %c)\n ret {v} %r }}"
        )
    )
    if "%zmm" in text:
        return Target(cpu, 64, True, 4, 4)
    if "vfmadd" in text:
        return Target(cpu, 32, True, 4, 3)
    if "fmla" in text:
        return Target(cpu, 16, True, 4, 4)
    return Target(cpu, 16, False, 4, 2)
