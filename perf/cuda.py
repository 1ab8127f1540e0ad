"""The GPU's kernels on a GPU: are they right, and how fast are they beside torch and PyTorch Geometric on the same one?

    python perf/cuda.py [--output perf/cuda.json] [--quick]

needs torch with CUDA, and numba-cuda; torch_geometric for the graph layers. Every check compares with double precision
before anything is timed, and is made twice: the bits must be the same. Compiling takes most of the time, so checks run
in several processes; timings have the GPU alone. A timing is the median of blocks of calls, ours and theirs in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cuda_graph  # first: it takes this folder from the path, where cuda.py hides NVIDIA's package of that name
import numpy as np
import torch
import torch.nn.functional as F

import ruvector_numba as rv

Row = dict[str, Any]
TOLERANCE = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 1.2e-2}  # relative, of norms
TOKENS, CHANNELS = 16384, 2048  # of a batch in all, and of all heads together


# --- checks ------------------------------------------------------------------------------------------------------
CASES: list[Row] = [
    dict(element="bfloat16", D=64),
    dict(element="bfloat16", D=64, causal=True, Hk=2, poison=True),
    dict(element="bfloat16", D=128, causal=True),
    dict(element="bfloat16", D=128, mask="bool", poison=True),
    dict(element="bfloat16", D=256, causal=True),
    dict(element="bfloat16", D=80, Dv=48, mask="float", softcap=3.0),
    dict(element="bfloat16", D=32, dropout=0.2),
    dict(element="float16", D=64, mask="window", alibi=True, causal=True),
    dict(element="float16", D=128, mask="lengths"),
    dict(element="float32", D=64, causal=True, Hk=2, poison=True),
    dict(element="float32", D=128, mask="float", alibi=True),
    dict(element="float32", D=256, softcap=2.0, mask="bool"),
    dict(element="float32", D=33, Dv=17, mask="lengths", dropout=0.3),
    dict(element="bfloat16", D=128, L=1, S=4097, Hk=1),
    dict(element="float16", D=64, L=3, S=2000, causal=True, mask="bottom_right"),
    dict(element="bfloat16", D=64, L=0, S=5),
    dict(element="bfloat16", D=64, L=5, S=0),
    dict(layer=True, element="float32"),
    dict(layer=True, element="bfloat16"),
]


def check(
    element: str, D: int, Dv: int | None = None, H: int = 4, Hk: int = 4, L: int = 333, S: int | None = None,
    B: int = 2, causal: bool = False, mask: str = "", softcap: float | None = None, alibi: bool = False,
    dropout: float = 0.0, poison: bool = False,
) -> Row:  # fmt: skip
    """One case, all its results and gradients, beside the same in double precision."""
    S, Dv = L if S is None else S, D if Dv is None else Dv
    generator = torch.Generator("cuda").manual_seed(L + D)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator).to(getattr(torch, element))

    q, k, v, do = draw(B, H, L, D), draw(B, Hk, S, D), draw(B, Hk, S, Dv), draw(B, H, L, Dv)
    seen, bias, given = torch.ones(B, H, L, S, dtype=torch.bool, device="cuda"), None, None
    i, j = torch.arange(L, device="cuda")[:, None], torch.arange(S, device="cuda")
    if causal:
        seen &= j <= i
    if mask == "bool":
        given = torch.rand(B, 1, L, S, device="cuda", generator=generator) > 0.4
        seen &= given
    if mask == "float":
        given = bias = draw(H, L, S)
    if mask == "window":
        given = rv.masks.Window(50, 7)
        seen &= (j >= i - 50) & (j <= i + 7)
    if mask == "lengths":
        lengths = np.array([S // 3, S])[:B]
        given = rv.masks.Lengths(keys=lengths)
        seen &= j < torch.tensor(lengths, device="cuda")[:, None, None, None]
    if mask == "bottom_right":
        given, causal = rv.masks.Causal("bottom_right"), False
        seen = (j <= i + S - L).expand(B, H, L, S)
    if poison:  # in a key and value that only some queries see, if any
        v[:, :, -1, 3] = math.nan
        k[:, :, -1, 2] = math.nan
        seen[..., -1] = seen[..., -1] & (i[:, 0] % 2 == 0) if mask == "bool" else seen[..., -1]
        if mask == "bool":
            given = seen[:, :1].contiguous()
    options: Row = dict(is_causal=causal, enable_gqa=Hk != H, dropout_p=dropout, seed=7, softcap=softcap)
    slopes = [0.3, 0.1, 0.03, 0.01] if alibi else None
    past = rv.attention_forward(q, k, v, given, alibi_slopes=slopes, **options)
    got = rv.attention_backward(do, past)
    twice = rv.attention_forward(q, k, v, given, alibi_slopes=slopes, **options)
    again = rv.attention_backward(do, twice)
    ours = dict(output=past.output, query=got.query, key=got.key, value=got.value)
    if bias is not None:
        ours["bias"] = got.bias
    pairs: list[tuple[Any, Any]] = [(past.output, twice.output)]
    pairs += [(getattr(got, name), getattr(again, name)) for name in ("query", "key", "value")]
    same = all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in pairs if a.numel()
    )
    theirs = _double(q, k, v, do, seen, bias, softcap, slopes, dropout, H // Hk)
    errors = {}
    for name, x in ours.items():
        y, x = theirs[name], x.double()
        finite = torch.isfinite(y)
        pattern = bool((torch.isfinite(x) == finite).all())
        x, y = torch.where(finite, x, 0), torch.where(finite, y, 0)
        errors[name] = float((x - y).norm() / y.norm().clamp_min(1e-30)) if pattern else math.nan
    limit = TOLERANCE[element] * (3 if "bias" in ours else 1)
    return dict(errors=errors, same_bits=same, right=all(e <= limit for e in errors.values()) and same)


def check_layer(element: str, B: int = 3, L: int = 200, d: int = 96, H: int = 4) -> Row:
    """MultiHeadAttention, causal and padded, and one step of training, beside torch's layer in double precision."""
    layer = rv.MultiHeadAttention(rv.AttentionConfig(d, H, dropout=0.0, causal=True), seed=1)
    theirs = torch.nn.MultiheadAttention(d, H, batch_first=True, device="cuda", dtype=torch.float64)
    generator = torch.Generator("cuda").manual_seed(3)
    x, do = (torch.randn(B, L, d, device="cuda", generator=generator).to(getattr(torch, element)) for _ in range(2))
    padding = torch.arange(L, device="cuda") >= torch.tensor([[L], [L // 2], [3]], device="cuda")[:B]
    causal = torch.triu(torch.ones(L, L, dtype=torch.bool, device="cuda"), 1)
    errors, same = {}, True
    for step in ("first", "second"):
        parameters = layer._parameters
        joined = np.concatenate([parameters[f"w_{name}"].T for name in "qkv"])
        biases = np.concatenate([parameters[f"b_{name}"] for name in "qkv"])
        state = dict(
            in_proj_weight=joined, in_proj_bias=biases, **{"out_proj.weight": parameters["w_o"].T},
            **{"out_proj.bias": parameters["b_o"]},
        )  # fmt: skip
        theirs.load_state_dict({name: torch.tensor(a, dtype=torch.float64) for name, a in state.items()})
        leaf = x.double().requires_grad_()
        wanted, weights = theirs(leaf, leaf, leaf, key_padding_mask=padding, attn_mask=causal)
        (dx,) = torch.autograd.grad(wanted, leaf, do.double())
        output, past = layer.forward_cached(x, x, x, key_padding_mask=padding)
        got: Any = layer.backward(do, past)
        again: Any = layer.backward(do, past)
        same = same and torch.equal(got.query_weights, again.query_weights)
        pairs: Row = dict(output=(output, wanted), weights=(past.weights(), weights))
        pairs["inputs"] = (got.query.double() + got.key.double() + got.value.double(), dx)
        for name, (a, b) in pairs.items():
            errors[f"{step} {name}"] = float((a.double() - b).norm() / b.norm())
        layer.update_parameters(got, learning_rate=1e-3)
    limit = 2 * TOLERANCE[element]
    return dict(errors=errors, same_bits=same, right=all(e <= limit for e in errors.values()) and same)


def _double(
    q: Any, k: Any, v: Any, do: Any, seen: Any, bias: Any, softcap: Any, slopes: Any, dropout: float, group: int
) -> dict[str, torch.Tensor]:
    """The same in double precision, hidden pairs left out of every sum."""
    H, (L, D), S = q.shape[1], q.shape[2:], k.shape[2]
    q, k, v, do = (x.double() for x in (q, k, v, do))
    kk, vv = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    raw = q @ kk.transpose(-1, -2) / math.sqrt(D)
    s = softcap * torch.tanh(raw / softcap) if softcap else raw
    if bias is not None:
        s = s + bias.double()
    if slopes is not None:
        i, j = torch.arange(L, device="cuda")[:, None], torch.arange(S, device="cuda")
        s = s - torch.tensor(slopes, device="cuda", dtype=torch.float64)[:, None, None] * (i - j).abs()
    s = torch.where(seen, s, -math.inf)
    top = s.amax(-1, keepdim=True) if S else s.new_zeros(*s.shape[:-1], 1)
    p = torch.where(seen, torch.exp(s - torch.where(torch.isinf(top), 0, top)), 0)
    total = p.sum(-1, keepdim=True)
    p = torch.where(seen & (total != 0), p / total, 0)
    kept = _kept(q.shape[:3], S, dropout) if dropout else None
    thin = p if kept is None else torch.where(kept, p / (1 - dropout), 0)

    def product(a: Any, b: Any, where: Any) -> Any:
        """a b, over those pairs alone that see each other"""
        clean = a @ torch.where(torch.isfinite(b), b, 0)
        for row in torch.nonzero(~torch.isfinite(b).all(-1).all(0).all(0)).flatten().tolist():
            part = a[..., row : row + 1] * torch.where(torch.isfinite(b), 0, b)[..., row : row + 1, :]
            clean = clean + torch.where(where[..., row : row + 1], part, 0)
        return clean

    out = product(thin, vv, seen)
    dp = do @ vv.transpose(-1, -2)
    if kept is not None:
        dp = torch.where(kept, dp / (1 - dropout), 0)
    delta = (out * do).sum(-1, keepdim=True)
    ds = torch.where(seen, p * (dp - delta), 0)
    db = ds.sum(0) if bias is not None else None
    if softcap:
        ds = ds * (1 - torch.tanh(raw / softcap) ** 2)
        ds = torch.where(seen, ds, 0)
    other, scale = seen.transpose(-1, -2), 1 / math.sqrt(D)

    def joined(x: Any) -> Any:
        return x.reshape(x.shape[0], H // group, group, *x.shape[2:]).sum(2)

    found = dict(
        output=out, query=product(ds, kk, seen) * scale, key=joined(product(ds.transpose(-1, -2), q, other)) * scale,
        value=joined(product(thin.transpose(-1, -2), do, other)),
    )  # fmt: skip
    return found if db is None else {**found, "bias": db}


def _kept(heads: Any, S: int, dropout: float) -> torch.Tensor:
    """Which weights the CPU keeps for seed 7: those of value 1 at one key each come out in the output."""
    B, H, L = heads
    zero, one = np.zeros((B, H, L, 1), np.float32), np.zeros((B, H, S, 1), np.float32)
    values = np.broadcast_to(np.eye(S, dtype=np.float32), (B, H, S, S))
    out = rv.scaled_dot_product_attention(zero, one, values, dropout_p=dropout, seed=7)
    return torch.tensor(out > 0, device="cuda")


def run_checks(numbers: list[int]) -> Iterator[Row]:
    for n in numbers:
        start = time.time()
        try:
            case = dict(CASES[n])
            result = check_layer(**case) if case.pop("layer", False) else check(**case)
        except Exception as error:
            result = dict(right=False, error=repr(error)[:500], trace=traceback.format_exc()[-1500:])
        yield dict(case=CASES[n], **result, seconds=round(time.time() - start, 1))


def checks(processes: int) -> list[Row]:
    """All cases, shared out among processes, for compiling is slow."""
    shares = [list(range(len(CASES)))[i::processes] for i in range(processes)]
    running = [
        subprocess.Popen([sys.executable, __file__, "--cases", json.dumps(share)], stdout=subprocess.PIPE, text=True)
        for share in shares
    ]
    rows = []
    for process in running:
        for line in process.communicate()[0].splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
                report(rows[-1])
    return rows


def report(row: Row) -> None:
    errors = " ".join(f"{name} {e:.1e}" for name, e in row.get("errors", {}).items())
    print(
        "right" if row["right"] else "WRONG",
        row["case"],
        errors,
        row.get("error", ""),
        f"{row['seconds']} s",
        flush=True,
    )
    if "trace" in row:
        print(row["trace"], flush=True)


def races() -> Row:
    """compute-sanitizer's racecheck and memcheck of small calls, if it is there."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(tool):
        return dict(tool=None)
    found: Row = dict(tool=tool)
    for kind in ("racecheck", "memcheck"):
        # numba-cuda asks the driver for functions that it may not have, which is no fault of a kernel.
        command = [tool, "--tool", kind, "--report-api-errors", "no", sys.executable, __file__, "--small"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            found[kind] = [x for x in done.stdout.splitlines() if "SUMMARY" in x or "hazard" in x.lower()][-5:]
            found[kind] = found[kind] or done.stdout[-500:] + done.stderr[-500:]
        except subprocess.TimeoutExpired:
            found[kind] = "not done in 60 s"
        print(kind, found[kind], flush=True)
    return found


def small() -> None:
    """What the sanitizer watches: every kernel of the dense mechanism once, on few numbers."""
    for L, S in ((70, 70), (1, 600)):
        q, k = torch.randn(1, 2, L, 64, device="cuda").bfloat16(), torch.randn(1, 2, S, 64, device="cuda").bfloat16()
        past = rv.attention_forward(q, k, k, is_causal=L > 1)
        rv.attention_backward(q, past)
    torch.cuda.synchronize()


# --- timings -----------------------------------------------------------------------------------------------------
def dense(D: int, L: int, causal: bool) -> Row:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    B, H = max(1, TOKENS // L), CHANNELS // D
    q, k, v, do = (torch.randn(B, H, L, D, device="cuda").bfloat16() for _ in range(4))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def theirs(backend: Any, backward: bool) -> Callable[[], Any]:
        def call() -> Any:
            with sdpa_kernel(backend):
                if not backward:
                    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
                return torch.autograd.grad(F.scaled_dot_product_attention(*leaves, is_causal=causal), leaves, do)

        return call

    def forward() -> Any:
        return rv.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def both() -> Any:
        return rv.attention_backward(do, rv.attention_forward(q, k, v, is_causal=causal))

    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    one = cuda_graph.paired(dict(ours=forward, flash=theirs(flash, False), cudnn=theirs(cudnn, False)))
    two = cuda_graph.paired(dict(ours=both, flash=theirs(flash, True), cudnn=theirs(cudnn, True)))
    work = 4e-9 * B * H * L * L * D * (0.5 if causal else 1)
    row: Row = dict(
        D=D, L=L, causal=causal, forward_ms=one, training_ms=two,
        forward_tflops={n: work / t for n, t in one.items()},
        training_tflops={n: 3.5 * work / t for n, t in two.items()},
        forward_to_flash=one["ours"] / one["flash"], training_to_flash=two["ours"] / two["flash"],
    )  # fmt: skip
    print(
        f"D={D:3} L={L:5} {'causal' if causal else 'full  '}  forward {row['forward_tflops']['ours']:.0f} TFLOP/s, "
        f"{row['forward_to_flash']:.2f}x flash's time; with gradients {row['training_tflops']['ours']:.0f}, "
        f"{row['training_to_flash']:.2f}x; flash {row['forward_tflops']['flash']:.0f}, "
        f"{row['training_tflops']['flash']:.0f}; cudnn {row['forward_tflops']['cudnn']:.0f}, "
        f"{row['training_tflops']['cudnn']:.0f}", flush=True,
    )  # fmt: skip
    return row


def decode(S: int, D: int = 128, H: int = 32, Hk: int = 8, B: int = 8) -> Row:
    """One new query over a long cache, read once: GB/s of keys and values."""
    q = torch.randn(B, H, 1, D, device="cuda").bfloat16()
    k, v = (torch.randn(B, Hk, S, D, device="cuda").bfloat16() for _ in range(2))
    times = cuda_graph.paired(dict(
        ours=lambda: rv.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        torch=lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    ))  # fmt: skip
    moved = 2 * 2 * B * Hk * S * D * 1e-6
    row: Row = dict(S=S, D=D, H=H, Hk=Hk, B=B, ms=times, gigabytes_per_s={n: moved / t for n, t in times.items()})
    print("decode", S, {n: f"{x:.0f} GB/s" for n, x in row["gigabytes_per_s"].items()}, flush=True)
    return row


def host_time() -> float:
    """Microseconds of Python for one small forward call."""
    q = torch.randn(1, 1, 128, 64, device="cuda").bfloat16()
    rv.scaled_dot_product_attention(q, q, q)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(200):
        rv.scaled_dot_product_attention(q, q, q)
    spent = (time.perf_counter() - start) / 200 * 1e6
    torch.cuda.synchronize()
    return spent


def memory(L: int = 16384) -> Row:
    """Bytes beyond inputs and results, of a call with gradients: no array of L x L."""
    q, do = (torch.randn(1, 16, L, 64, device="cuda").bfloat16() for _ in range(2))
    rv.attention_backward(do, rv.attention_forward(q, q, q))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = rv.attention_backward(do, rv.attention_forward(q, q, q))
    torch.cuda.synchronize()
    del kept
    one = q.numel() * 2
    return dict(L=L, bytes=torch.cuda.max_memory_allocated() - before - 4 * one, one_array=one)


def graph(lock: str) -> Row:
    """The graph layers, in processes of their own, timed when the lock is free: see cuda_graph.py."""
    return cuda_graph.measure(seconds=170.0, lock=lock)


def checks_beside_graph(processes: int) -> tuple[list[Row], Row]:
    """Both: the graph layers compile while the checks run, and are timed after them."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        lock = os.path.join(folder, "lock")
        with open(lock, "w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            layers = pool.submit(graph, lock)
            try:
                found = checks(processes)
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)
        return found, layers.result()


def machine() -> Row:
    import numba
    import numba_cuda

    return dict(
        gpu=torch.cuda.get_device_name(), torch=torch.__version__, numba=numba.__version__,
        numba_cuda=numba_cuda.__version__, numpy=np.__version__, python=sys.version.split()[0],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", default="perf/cuda.json", help="where the numbers go")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, no sanitizer")
    parser.add_argument("--only", nargs="+", help="some of: dense decode host_us memory races, 'checks and graph'")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1), help="for checks")
    parser.add_argument("--cases", help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small:
        return small()
    if options.cases:
        for row in run_checks(json.loads(options.cases)):
            print(json.dumps(row), flush=True)
        return None
    found: Row = dict(machine=machine())
    print(found["machine"], flush=True)
    sizes = (4096,) if options.quick else (1024, 4096, 16384)
    steps: list[tuple[str, Callable[[], Any]]] = [
        ("checks and graph", lambda: checks_beside_graph(options.processes)),
        ("dense", lambda: [dense(D, L, causal) for D in (64, 128) for L in sizes for causal in (False, True)]),
        ("decode", lambda: [decode(S) for S in (4096, 16384)]),
        ("host_us", host_time),
        ("memory", memory),
    ]
    if not options.quick:
        steps.append(("races", races))
    for name, step in steps:
        if options.only and name not in options.only:
            continue
        try:
            found[name] = step()
            if name == "checks and graph":
                found["checks"], found["graph"] = found.pop(name)
        except Exception:
            found[name] = traceback.format_exc()[-1500:]
            print(name, found[name], flush=True)
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1, default=str)
    print({name: found.get(name) for name in ("host_us", "memory")}, flush=True)
    wrong = [row for row in found.get("checks", ()) if not row["right"]]
    sys.exit(f"{len(wrong)} of {len(found['checks'])} checks failed" if wrong else 0)


if __name__ == "__main__":
    main()
