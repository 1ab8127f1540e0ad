"""The loops of products stay in registers on every kind of CPU; for ARM they are cross-compiled, as none is at hand."""

import json
import os
import subprocess
import sys

import pytest
from ruvector_numba.kernels import simd

COMPILE = """
import json, re, sys
import llvmlite.binding as llvm
import ruvector_numba.kernels.simd
from numba import types

cross = sys.argv[1] == "NEON"
if cross:  # only what depends on the target asks for it, when it is imported
    chosen = sys.modules["ruvector_numba.kernels.simd.target"].Target("neoverse-n1", 16, True, 4, 4)
    for name in ("", ".target", ".kinds", ".emit", ".values"):
        sys.modules["ruvector_numba.kernels.simd" + name].target = lambda: chosen
from ruvector_numba.kernels import decode, dense, dense_backward, jit, jobs

def assembly(library):
    if not cross:
        return library.get_asm_str()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    text = re.sub(r'target datalayout = .*|"target-(cpu|features)"="[^"]*"', "", library.get_llvm_str())
    module = llvm.parse_assembly(re.sub("target triple = .*", 'target triple = "aarch64-unknown-linux-gnu"', text))
    arm = llvm.Target.from_triple("aarch64-unknown-linux-gnu")
    return arm.create_target_machine(cpu="neoverse-n1", opt=3).emit_assembly(module)

loops = []
for kernel, present in ((dense.forward, ()), (dense_backward.backward, ("gradients",)), (decode.forward, ())):
    optional = [jobs.fields(kernel._job_class)[i][0] for i in kernel._optional]
    function, _ = kernel.variant(types.float32, tuple(name not in present for name in optional))
    for block in re.split(r"\\n(?=\\.LBB)", assembly(function._library)):
        label = block.split(":")[0]
        jumps_back = re.search(rf"\\b(j[a-z]+|b\\.[a-z]+|cbn?z \\w+,)\\s+{re.escape(label)}\\b", block)
        loop = block[: jumps_back.end()] if jumps_back else ""  # what follows is behind it
        products = len(re.findall(r"\\bvfmadd|\\bvfnmadd|\\bfmla\\b", loop))
        if products >= 8 and len(loop.splitlines()) < 80:  # longer ones are loops over tiles
            on_stack = re.findall(r"[xyz]mm.*\\(%rsp|\\(%rsp.*[xyz]mm|\\b(?:ldr|str|ldp|stp)\\s+q\\d+.*\\[sp", loop)
            loops.append([kernel.name, products, len(on_stack)])
print(json.dumps(loops))
"""
TARGETS = {
    "this CPU": {},
    "AVX2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""},
    "NEON": {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""},
}


def can_compile_for_arm() -> bool:
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    try:
        llvm.Target.from_triple("aarch64-unknown-linux-gnu")
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("target", TARGETS)
def test_products_do_not_spill(target):
    if target == "this CPU" and not simd.target().fma:
        pytest.skip("no fused multiply-add to look for")
    if target == "AVX2" and simd.target().fma and simd.target().vector_bytes == 32:
        pytest.skip("as this CPU")
    if target == "NEON" and not can_compile_for_arm():
        pytest.skip("this llvmlite knows no ARM")
    environment = {**os.environ, **TARGETS[target], "RUVECTOR_NUMBA_CACHE": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE, target], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loops = json.loads(done.stdout)
    assert {name for name, _, _ in loops} == {"dense.forward", "dense_backward.backward", "decode.forward"}
    assert max(products for _, products, _ in loops) >= 12  # the wide tile of the target
    assert [loop for loop in loops if loop[2]] == []
