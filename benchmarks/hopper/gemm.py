"""Times and compares GEMMs on one GPU: the vendor's with and without split-K, and the bundled Triton kernels.

    PYTHONPATH=. python3 benchmarks/hopper/gemm.py OUT.json [--shapes 1B] [--modes default,served]

Mode "served" is the GEMM that an armed engine calls: the fastest certified algorithm. In the same process, "first" is
cuBLASLt's first offer and "bundled" the bundled kernels. The other modes are the vendor's GEMM: "default" as PyTorch
calls it, "masked" with PyTorch's switch against split-K, "starved" with a workspace too small for split-K, and "both".
--shapes selects the shapes whose names begin with the given text.

Every mode runs in its own process, because libraries read their environment variables once. Times are microseconds per
call, in a CUDA graph of calls over weights that together exceed the L2 cache: the best of several replays, back to
back. `differing` counts the outputs that differ in any bit from the bundled reference kernel.
"""

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import stamp

SHAPES = {
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate_up": (24576, 4096),
    "8B down": (4096, 12288),
    "1.7B qkv": (4096, 2048),
    "1.7B o": (2048, 2048),
    "1.7B down": (2048, 6144),
    "8B head": (151936, 4096),
    "1B qkv": (3072, 2048),
    "1B gate_up": (16384, 2048),
    "1B down": (2048, 8192),
    "1B head": (128256, 2048),
}
ROWS = (1, 8, 16, 64, 128, 192, 256, 384, 512, 1024, 2048, 8192)
MAX_ROWS = 16384
STARVED = {"CUBLASLT_WORKSPACE_SIZE": "1", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
# What each mode adds to its process's environment.
MODES = {"default": {}, "masked": {}, "starved": STARVED, "both": STARVED, "served": {}}
CACHE_BYTES = 128 * 2**20


def time_calls(calls) -> float:
    """Microseconds per call, in a graph of all calls."""
    from bi_patch.ops.cuda import timing

    return timing.microseconds([calls])[0]


def mask_split_k(torch) -> None:
    """Switch split-K off in cuBLASLt by PyTorch's switch alone."""
    torch.backends.cuda.preferred_blas_library("cublaslt")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = (False, False)


def serve(torch, shapes: dict):
    """Certify `shapes` as an armed engine does; returns the served product (x [m, k], weight [n, k]) -> y [m, n]."""
    import tempfile

    from bi_patch.ops.cuda import linear, machine

    machine.forbid_split_k()
    linear.define_op()
    wanted = [linear.Problem(n, k, torch.bfloat16, False) for n, k in shapes.values()]
    with tempfile.TemporaryDirectory() as cache:
        for made in linear.certify(wanted, MAX_ROWS, Path(cache)):
            print(f"certificate of {made.key.problem}: {made.seconds} s, passed: {made.passed}", file=sys.stderr)
    return lambda x, weight: torch.ops.bi_patch.linear(x, weight, None)


def problems(torch, rows, shapes=SHAPES):
    """For each shape and M: name, n, k, x [m, k], and the weights [n, k] that a timed graph uses in turn."""
    for name, (n, k) in shapes.items():
        copies = max(1, CACHE_BYTES // (n * k * 2))
        weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5 for _ in range(copies)]
        for m in rows:
            if n > 100000 and m > 512:
                continue
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            yield name, n, k, x, weights * (max(1, 12 // copies) if m <= 512 else 1)


def child(mode: str, beginning: str) -> None:
    import torch

    shapes = {name: shape for name, shape in SHAPES.items() if name.startswith(beginning)}
    product = serve(torch, shapes) if mode == "served" else torch.nn.functional.linear
    if mode in ("masked", "both"):
        mask_split_k(torch)
    elif mode == "starved":
        torch.backends.cuda.preferred_blas_library("cublaslt")
    from bi_patch.ops import bits
    from bi_patch.ops.cuda import linear

    rows = []
    for name, n, k, x, weights in problems(torch, ROWS, shapes):
        want = linear.bundled(x, weights[0], None, False)
        got = product(x, weights[0])
        row = {"shape": name, "n": n, "k": k, "m": len(x), "mode": mode, "differing": bits.differing(got, want)}
        row["us"] = time_calls([lambda x=x, w=w: product(x, w) for w in weights])
        if mode == "served":
            route = linear.routes()[linear.Problem(n, k, x.dtype, False)]
            first = route.gemm.offers(len(x))[0]
            row["first_us"] = time_calls([partial(linear._vendor, route.gemm, first, x, w, None) for w in weights])
            mine = linear.bundled(x, weights[0], None, True)
            row["bundled_differing"] = bits.differing(mine, want)
            row["bundled_us"] = time_calls([lambda x=x, w=w: linear.bundled(x, w, None, True) for w in weights])
        rows.append(row)
    print(json.dumps(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--shapes", default="", help="run the shapes whose names begin with this text")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        return child(a.modes, a.shapes)
    rows, modes = [], a.modes.split(",")
    for mode in modes:
        done = subprocess.run(
            [sys.executable, __file__, a.out, "--child", "--modes", mode, "--shapes", a.shapes],
            env={**os.environ, **MODES[mode], "BI_PATCH": "0"},
            stdout=subprocess.PIPE,
        )
        if done.returncode:
            sys.exit(f"mode {mode} failed")
        rows += json.loads(done.stdout.splitlines()[-1])
    os.environ["BI_PATCH"] = "0"  # this process only writes the file
    lines = ",\n".join(json.dumps(row) for row in rows)
    Path(a.out).write_text(f'{json.dumps(stamp.head())[:-1]}, "rows": [\n{lines}\n]}}\n')
    table: dict[tuple, dict] = {}
    for row in rows:
        entry = table.setdefault((row["shape"], row["m"]), {})
        entry[row["mode"]] = f"{row['us']:.1f}{'*' if row['differing'] else ''}"
        if "bundled_us" in row:
            entry["first"] = f"{row['first_us']:.1f}"
            entry["bundled"] = f"{row['bundled_us']:.1f}{'*' if row['bundled_differing'] else ''}"
    print("us per call; * marks outputs that differ from the reference kernel's")
    print("shape", "M", *modes, "first", "bundled", sep="\t")
    for (name, m), entry in table.items():
        print(name, m, *(entry[mode] for mode in modes), entry.get("first", "-"), entry.get("bundled", "-"), sep="\t")


if __name__ == "__main__":
    main()
