"""What ptxas makes of every GPU kernel, for one compute capability: a process that test_gpu_assembly.py starts.

    python tests/gpu_assembly.py 9 0

prints a line of JSON for each variant of each kernel; for others than (9, 0), of one variant of each. It needs the
toolkit of the `cuda` extra, and no GPU.
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


def dense():
    """The variants that the plan picks for the common element types and widths, and one with every term."""
    from ruvector_numba.kernels.cuda import dense, dense_backward, pairs

    from ruvector_numba.plan import cuda_dense as plan

    kernels = {"forward": dense.forward, "to_query": dense_backward.to_query, "to_key": dense_backward.to_key}
    for name, kernel in kernels.items():
        for element, width in (("bfloat16", 64), ("bfloat16", 128), ("bfloat16", 256), ("float32", 64)):
            v = plan.variant(name, element, width, plan.HasTerms(*NO_TERMS))
            yield kernel, v._replace(makes=plan.makes(width)[0])
        yield kernel, plan.variant(name, "float16", 32, plan.HasTerms(*ALL_TERMS))
        yield kernel, plan.variant(name, "bfloat16", 64, plan.HasTerms(True, False, False, False, False))
    few = plan.packed(plan.variant("forward", "bfloat16", 128, plan.HasTerms(*NO_TERMS)), 4)
    yield dense.forward, few
    yield dense.merge, plan.merging("bfloat16", 64)
    yield dense_backward.prepare, plan.preparing("bfloat16", 64)
    for kernel in (pairs.weights, pairs.bias_gradient):
        yield kernel, plan.in_pairs("bfloat16", plan.HasTerms(*NO_TERMS))


def copying():
    from ruvector_numba.kernels.cuda import copying

    from ruvector_numba.plan import cuda_copying as plan

    for kernel in (copying.pack, copying.fill):
        yield kernel, plan.variant("bfloat16")
    yield copying.pack, plan.variant("bool", inverted=True)


def projections():
    from ruvector_numba.kernels.cuda import folding, gate, jit, projection, projection_halves

    def plain(element, threads=128, wide=True, paired=False, cut=False, over_rows=False):
        resident = (3 if wide and not over_rows else 2) * 128 // threads
        return projection.Variant(element, threads, wide, paired, cut, over_rows, resident)

    yield projection.project, plain("float32")
    yield projection.project, plain("float32", cut=True, over_rows=True)
    yield projection.join, plain("float32", cut=True, over_rows=True)
    yield projection.project, plain("float32", 64, cut=True, over_rows=True)
    yield projection.project, plain("bfloat16", paired=True)
    by_rows = plain("bfloat16")._replace(resident=2)
    yield projection_halves.project_halves, by_rows
    yield projection_halves.project_halves, by_rows._replace(right_rows=False, paired=True)
    yield projection_halves.project_halves, by_rows._replace(left_rows=False, cut=True, selects=True)
    yield projection.project, plain("float16", wide=False, paired=True, cut=True, over_rows=True)
    for kernel in (gate.forward, gate.backward):
        yield kernel, jit.Flat("bfloat16", 128)
    yield folding.fold_back, jit.Flat("bfloat16", 128)


def neighbors():
    """GAT, GATv2 and the graph transformer of four heads of 16 channels; and all terms, wide heads, single elements."""
    from ruvector_numba.kernels.cuda import csr, csr_backward, jit, sums

    from ruvector_numba.plan import cuda_csr as plan

    plain = plan.Options(False, False, False, False, False, True)
    every = plan.Options(True, True, True, True, False, True)
    kinds = [plan.variant("float32", rule, 4, 16, True, plain) for rule in (plan.SUM, plan.JOINT, plan.DOT)]
    kinds += [
        plan.variant("float32", plan.DOT, 4, 16, True, every),
        plan.variant("float32", plan.DOT, 2, 256, True, plain),
        plan.variant("bfloat16", plan.JOINT, 3, 7, False, every._replace(bias=False, maximum=True)),
    ]
    for v in kinds:
        yield csr.forward, v
        yield csr_backward.backward_sources, v
        yield csr_backward.backward_targets, v
    yield csr.coefficients, kinds[-1]
    yield csr_backward.prepare, kinds[-1]
    flat = jit.Flat("float32", 256)
    for kernel in (csr.lse, sums.add_heads, csr_backward.softmax_backward, sums.add_up):
        yield kernel, flat


FAMILIES = [dense, copying, projections, neighbors]


def assembled(kernel, v, capability):
    """Registers and bytes of stack of one variant, and which instructions it is made of."""
    text = kernel.ptx(v, capability)
    doubles = re.findall(r"\S+\.f64\s.*", text)
    found = dict(mma=text.count("mma.sync"), local=len(re.findall(r"\.local\s+\.align", text)), doubles=doubles[:3])
    tool = ptxas()
    if tool is None:
        return found
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text)
        file.flush()
        command = [tool, "-v", f"-arch=sm_{capability[0]}{capability[1]}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found["registers"] = int(re.search(r"Used (\d+) registers", said)[1])
    for name, said_as in dict(stack="bytes stack frame", spills="bytes spill stores", shared="bytes smem").items():
        found[name] = sum(int(n) for n in re.findall(rf"(\d+) {said_as}", said))
    return found


def main(capability):
    seen = set()
    for family in FAMILIES:
        for kernel, v in family():
            if capability != HOPPER and kernel.name in seen:
                continue  # compiling is slow: elsewhere one variant of each kernel
            seen.add(kernel.name)
            row = dict(kernel=kernel.name, variant=str(v), element=v.element)
            row.update(budget=kernel.registers, stack_budget=kernel.stack.get(getattr(v, "width", 0), 0))
            try:
                row.update(assembled(kernel, v, capability))
            except Exception:
                row["error"] = traceback.format_exc()[-2000:]
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(tuple(map(int, sys.argv[1:])))
