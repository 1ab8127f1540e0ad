"""Half precision on other CPUs than this one: which instructions are used, and that what replaces them gives the same.

An instruction that the target lacks ends the process, in LLVM or when it is run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruvector_numba.kernels import simd

INSTRUCTIONS = """
import json, re
from numba import types
from ruvector_numba.kernels import dense, halves, jit, jobs, simd

found = {}
for stored in (simd.bfloat16, types.float16):
    way = "packed" if simd.halves().packed and stored is simd.bfloat16 else "widened"
    text = ""
    kernels = [(halves.widen, ()), (halves.round_off, ())] + THOROUGH * [(dense.forward, ("exact", way))]
    for kernel, present in kernels:
        optional = [jobs.fields(kernel._job_class)[i][0] for i in kernel._optional]
        function, _ = kernel.variant(stored, tuple(name not in present for name in optional))
        text += function._library.get_asm_str()
    spills = 0
    for block in re.split(r"\\n(?=\\.LBB)", text):
        label = block.split(":")[0]
        if len(re.findall(r"\\bvdpbf16ps", block)) >= 16 and re.search(rf"\\bj[a-z]+\\s+{re.escape(label)}\\b", block):
            spills += len(re.findall(r"zmm.*\\(%rsp|\\(%rsp.*zmm", block))
    names = r"\\bvdpbf16ps|\\bvcvtne2?ps2bf16|\\bvcvtph2ps|\\bvcvtps2ph|__\\w+[hb]f2?\\b"
    found[str(stored)] = sorted(set(re.findall(names, text))), spills
print(json.dumps(found))
"""
KNOWN = "from ruvector_numba.kernels.simd import halves; h = halves(); print(h.float16, h.bfloat16, h.packed)"
F16C, BF16 = ["vcvtph2ps", "vcvtps2ph"], ["vcvtne2ps2bf16", "vcvtneps2bf16", "vdpbf16ps"]
CPUS = {  # and whether to compile the large kernel, which takes 10 s for each type
    "x86-64": ([], [], False),
    "haswell": ([], F16C, True),
    "skylake-avx512": ([], F16C, False),
    "znver4": (BF16, F16C, True),
}


of_x86 = pytest.mark.skipif(not hasattr(os, "uname") or os.uname().machine != "x86_64", reason="of x86 alone")


def run(code, **variables):
    environment = {**os.environ, "RUVECTOR_NUMBA_CACHE": "0", **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@of_x86
@pytest.mark.parametrize("cpu", CPUS)
def test_only_instructions_that_the_cpu_has(cpu):
    bfloat16, float16, thorough = CPUS[cpu]
    code = INSTRUCTIONS.replace("THOROUGH", str(thorough))
    found = json.loads(run(code, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES="", RUVECTOR_NUMBA_PACKED=""))
    assert found == {"bfloat16": [bfloat16, 0], "float16": [float16, 0]}


@of_x86
@pytest.mark.parametrize(
    ("cpu", "has", "pays"),
    [("znver5", True, True), ("sapphirerapids", True, False), ("sierraforest", False, False)],
)
def test_products_need_more_than_conversions(cpu, has, pays):
    """Sierra Forest converts bfloat16, 8 lanes at a time, and multiplies none; Intel's others multiply it slowly."""
    known = run(KNOWN, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES="", RUVECTOR_NUMBA_PACKED="").split()
    assert known == ["True", str(has), str(pays)]


BITS = """
import numpy as np, ml_dtypes
from ruvector_numba import halves as by_numpy
from ruvector_numba.plan import halves

every = np.arange(1 << 16).astype(np.uint16).reshape(256, 256)
rng = np.random.default_rng(0)
near = every.astype(np.uint32) << 16 | rng.choice([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], every.shape).astype(np.uint32)
near_half = every.view(np.float16).astype(np.float32)
near_half = np.nextafter(near_half, rng.choice([-np.inf, np.inf], every.shape).astype(np.float32))
middle = (near_half + np.roll(every.view(np.float16).astype(np.float32), 1)) / 2
for kind, bits in ((np.float16, np.float16), (ml_dtypes.bfloat16, np.uint16)):
    x = every.view(kind)
    wide = halves.copied(x.view(bits), "every number")
    np.testing.assert_array_equal(wide, x.astype(np.float32))
    np.testing.assert_array_equal(by_numpy.widened(x), wide)
    for given in (wide, near.view(np.float32), near_half, middle):
        with np.errstate(all="ignore"):
            wanted = given.astype(kind)
        normal = np.abs(given) >= 2.0**-126  # an instruction may take less than float32's normal numbers for 0
        for got in (halves.rounded(given, np.dtype(bits)).view(kind), by_numpy.rounded(given, np.dtype(kind))):
            np.testing.assert_array_equal(got[normal].astype(np.float32), wanted[normal].astype(np.float32))
            assert np.isnan(got[np.isnan(given)].astype(np.float32)).all()
            assert (np.abs(got[~normal & ~np.isnan(given)].astype(np.float64)) <= 2.0**-126).all()
"""


@pytest.mark.parametrize("cpu", ["", pytest.param("x86-64", marks=of_x86)])
def test_every_number_is_widened_and_rounded_as_numpy_does(cpu):
    run(BITS, **({"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""} if cpu else {}))


def test_bfloat16_goes_the_other_way_too():
    """Products of pairs where this CPU has no instruction for them, and none where it has."""
    other = "0" if simd.halves().packed else "1"
    chosen = "bfloat16 and (intervals or late)"
    command = [
        "-m",
        "pytest",
        "-q",
        str(Path(__file__).with_name("test_half.py")),
        "-k",
        chosen,
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, "RUVECTOR_NUMBA_PACKED": other}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
