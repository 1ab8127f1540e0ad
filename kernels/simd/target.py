"""What Numba compiles for, and how wide its vectors and tiles should be."""

import functools
import os
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


def _assembly(text: str) -> str:
    """What becomes of a module on the target."""
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=1)
    return machine.emit_assembly(llvm.parse_assembly(text))


@functools.cache
def target() -> Target:
    """Ask LLVM what a 16-lane multiply-add becomes (10 ms, once): the list of features may be empty, or the host's.

    4 x 4 vectors spill nothing with 32 registers (AVX-512, NEON); with AVX2's 16 they spill 16 times a step and 4 x 3
    never; 16 lanes on AVX2 would spill 70 times.
    """
    cpu = cpu_target.target_context.codegen().magic_tuple()[1]
    v = "<16 x float>"
    text = _assembly(
        f"declare {v} @llvm.fma.v16f32({v}, {v}, {v})\n"
        f"define {v} @f({v} %a, {v} %b, {v} %c) {{"
        f" %r = call {v} @llvm.fma.v16f32({v} %a, {v} %b, {v} %c)\n ret {v} %r }}"
    )
    if "%zmm" in text:
        return Target(cpu, 64, True, 4, 4)
    if "vfmadd" in text:
        return Target(cpu, 32, True, 4, 3)
    if "fmla" in text:
        return Target(cpu, 16, True, 4, 4)
    return Target(cpu, 16, False, 4, 2)


@dataclass(frozen=True)
class Halves:
    """Which half types the target has instructions for: conversions of float16, products of pairs of bfloat16.

    `packed` says whether bfloat16 goes the way of such products. RUVECTOR_NUMBA_PACKED sends it there (1) without the
    instruction too, by twice as many multiply-adds, or keeps it away (0): to test both ways on any CPU.
    """

    float16: bool
    bfloat16: bool
    packed: bool


@functools.cache
def halves() -> Halves:
    """Ask LLVM what conversions become: both compile everywhere, to calls where there is no instruction.

    avx512_bf16 converts 16 lanes at once and multiplies pairs; AVX-NE-CONVERT has the conversion alone, of 8 lanes.
    Pairs pay on AMD's CPUs alone, which multiply them at the rate of numbers: on Emerald Rapids they made 47, 65, 62
    GFLOP/s where float32 made 61, 95, 83 (one thread; L 128, 1024, and 1024 of 128 channels).
    """
    cpu = cpu_target.target_context.codegen().magic_tuple()[1]
    text = _assembly(
        "define <8 x float> @f(<8 x half> %x) { %r = fpext <8 x half> %x to <8 x float>\n ret <8 x float> %r }\n"
        "define <16 x bfloat> @g(<16 x float> %x) "
        "{ %r = fptrunc <16 x float> %x to <16 x bfloat>\n ret <16 x bfloat> %r }"
    )
    bfloat16 = "vcvtneps2bf16\t%zmm" in text
    wanted = {"0": False, "1": True}.get(os.environ.get("RUVECTOR_NUMBA_PACKED", ""))
    packed = bfloat16 and cpu.startswith("znver") if wanted is None else wanted
    return Halves("vcvtph2ps" in text or "fcvtl" in text, bfloat16, packed)
