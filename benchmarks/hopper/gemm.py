"""Times and compares GEMM routes on one GPU: the vendor's with and without split-K, and the bundled Triton kernels.

    PYTHONPATH=. python3 benchmarks/hopper/gemm.py OUT.json

Every mode runs in its own process, since libraries read their settings once. Microseconds a call: a CUDA graph of
calls over weights that together exceed the L2 cache, best of several replays. `differing` counts outputs that differ in
any bit from the bundled reference kernel.
"""

import json
import os
import subprocess
import sys

SHAPES = {
    "8B qkv": (6144, 4096), "8B o": (4096, 4096), "8B gate_up": (24576, 4096), "8B down": (4096, 12288),
    "1.7B qkv": (4096, 2048), "1.7B o": (2048, 2048), "1.7B down": (2048, 6144), "8B head": (151936, 4096),
}  # fmt: skip
ROWS = (1, 8, 16, 64, 128, 256, 512, 2048, 8192)
MODES = {
    "default": ({}, False),
    "masked": ({}, True),
    "starved": ({"CUBLASLT_WORKSPACE_SIZE": "1", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}, False),
    "both": ({"CUBLASLT_WORKSPACE_SIZE": "1", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}, True),
}
CACHE_BYTES = 128 * 2**20


def time_calls(torch, calls) -> float:
    """Microseconds a call, over a graph of all calls."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    best = float("inf")
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return best * 1000 / len(calls)


def mask_split_k(torch) -> None:
    """PyTorch's switch alone, in cuBLASLt."""
    torch.backends.cuda.preferred_blas_library("cublaslt")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = (False, False)


def problems(torch, rows):
    """Each shape and M: name, n, k, x [m, k], and the weights [n, k] that a timed graph goes through in turn."""
    for name, (n, k) in SHAPES.items():
        copies = max(1, CACHE_BYTES // (n * k * 2))
        weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5 for _ in range(copies)]
        for m in rows:
            if n > 100000 and m > 512:
                continue
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            yield name, n, k, x, weights * (max(1, 12 // copies) if m <= 512 else 1)


def child(mode: str) -> None:
    import torch

    if MODES[mode][1]:
        mask_split_k(torch)
    elif mode != "default":
        torch.backends.cuda.preferred_blas_library("cublaslt")
    from bi_patch.orders import cuda_linear as linear

    rows = []
    for name, n, k, x, weights in problems(torch, ROWS):
        want = linear.bundled(x, weights[0], None, False)
        got = torch.nn.functional.linear(x, weights[0])
        row = {"shape": name, "n": n, "k": k, "m": len(x), "mode": mode, "differing": linear.unequal(got, want)}
        row["us"] = time_calls(torch, [lambda x=x, w=w: torch.nn.functional.linear(x, w) for w in weights])
        if mode == "both":
            mine = linear.bundled(x, weights[0], None, True)
            row["bundled_differing"] = linear.unequal(mine, want)
            row["bundled_us"] = time_calls(torch, [lambda x=x, w=w: linear.bundled(x, w, None, True) for w in weights])
        rows.append(row)
    print(json.dumps(rows))


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--child":
        return child(sys.argv[2])
    rows = []
    for mode, (env, _) in MODES.items():
        done = subprocess.run(
            [sys.executable, __file__, "--child", mode],
            env={**os.environ, **env, "BI_PATCH": "0"},
            stdout=subprocess.PIPE,
        )
        if done.returncode:
            sys.exit(f"mode {mode} failed")
        rows += json.loads(done.stdout.splitlines()[-1])
    with open(sys.argv[1], "w") as file:
        json.dump(rows, file)
    table: dict[tuple, dict] = {}
    for row in rows:
        entry = table.setdefault((row["shape"], row["m"]), {})
        entry[row["mode"]] = f"{row['us']:.1f}{'*' if row['differing'] else ''}"
        if "bundled_us" in row:
            entry["bundled"] = f"{row['bundled_us']:.1f}{'*' if row['bundled_differing'] else ''}"
    print("us a call; * differs from the reference kernel")
    print("shape", "M", *MODES, "bundled", sep="\t")
    for (name, m), entry in table.items():
        print(name, m, *(entry[mode] for mode in MODES), entry["bundled"], sep="\t")


if __name__ == "__main__":
    main()
