"""What ptxas makes of every GPU kernel, for one compute capability: a process that test_gpu_assembly.py starts.

    python tests/gpu_assembly.py 9 0

prints a line of JSON for each variant of each kernel, and for (9, 0), whose budgets are kept, tries more variants. It
needs the toolkit of the `cuda` extra, and no GPU.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

NO_TERMS = (False, False, False, False, False)
ALL_TERMS = (False, True, True, True, True)  # that go with any other
HOPPER = (9, 0)


def ptxas():
    """The assembler's path; None if there is none."""
    import importlib.util

    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else list(spec.submodule_search_locations or ())
    found = [p for root in roots for p in Path(root).glob("cu*/bin/ptxas")]
    return str(found[0]) if found else shutil.which("ptxas")


def dense(thorough):
    """The variants that the plan picks for the common element types and widths, and one with every term."""
    from ruvector_numba.kernels.cuda import blocks, dense, dense_backward, pairs

    from ruvector_numba.plan import cuda_dense as plan

    kernels = {"forward": dense.forward, "to_query": dense_backward.to_query, "to_key": dense_backward.to_key}
    for name, kernel in kernels.items():
        for element, width in (("bfloat16", 64), ("bfloat16", 128), ("bfloat16", 256), ("float32", 64)):
            if thorough or width < 256:
                v = plan.variant(name, element, width, plan.Terms(*NO_TERMS))
                yield kernel, v._replace(makes=plan.makes(width)[0])
        if thorough:
            yield kernel, plan.variant(name, "float16", 32, plan.Terms(*ALL_TERMS))
    few = plan.packed(plan.variant("forward", "bfloat16", 128, plan.Terms(*NO_TERMS)), 4)
    yield dense.forward, few
    one = blocks.Variant("bfloat16", 64, 16, 1, 128, 1, 2, *NO_TERMS)
    for kernel in (dense.merge, dense_backward.prepare, pairs.weights, pairs.bias_gradient):
        yield kernel, one


def copying(thorough):
    from ruvector_numba.kernels.cuda import copying

    for kernel in (copying.pack, copying.fill):
        yield kernel, copying.Variant("bfloat16")


FAMILIES = [dense, copying]


def assembled(kernel, v, capability):
    """Registers and bytes of stack of one variant, and which instructions it is made of."""
    text = kernel.ptx(v, capability)
    found = dict(mma=text.count("mma.sync"), local=len(re.findall(r"\.local\s+\.align", text)))
    tool = ptxas()
    if tool is None:
        return found
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text)
        file.flush()
        command = [tool, "-v", f"-arch=sm_{capability[0]}{capability[1]}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found["registers"] = int(re.search(r"Used (\d+) registers", said)[1])
    found["stack"] = sum(int(n) for n in re.findall(r"(\d+) bytes stack frame", said))
    return found


def main(capability):
    for family in FAMILIES:
        for kernel, v in family(capability == HOPPER):
            row = dict(kernel=kernel.name, variant=str(v), element=v.element)
            row.update(budget=kernel.registers, stack_budget=kernel.stack.get(getattr(v, "width", 0), 0))
            try:
                row.update(assembled(kernel, v, capability))
            except Exception:
                row["error"] = traceback.format_exc()[-2000:]
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(tuple(map(int, sys.argv[1:])))
