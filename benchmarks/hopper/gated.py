"""Bits and times of the bundled forms of SwiGLU on a GPU, beside vLLM's kernels.

    PYTHONPATH=. python3 benchmarks/hopper/gated.py OUT.json   # vLLM 0.33, a Hopper GPU

`bits`: the certificate of each form and type, and elements of random rows that differ. `microseconds`: of a kernel, the
median of 20 by the profiler. A product with the input as its result comes before each call, so the cache holds what it
holds in an engine, and the GPU is as warm.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import steps
import torch

from bi_patch.ops.cuda import activation

SIZES = {
    "Qwen3-8B": (activation.SILU, 12288, 4096, (1, 8, 64, 256, 2048, 8192)),
    "Llama-3-8B": (activation.SILU, 14336, 4096, (1, 64, 2048, 8192)),
    "Qwen3-0.6B": (activation.SILU, 3072, 1024, (1, 64, 2048, 8192)),
    "gpt-oss-20b": (activation.PAIRS, 2880, 2880, (4, 256, 1024, 8192, 32768)),
}
NAMES = "and_mul_kernel", "gated_silu", "clamped_pairs"
ROWS = 1, 2, 3, 7, 8, 9, 63, 64, 65, 256, 1000, 8192


def differ(got, want):
    nan = want.isnan()
    return int(((got.view(torch.int16) != want.view(torch.int16)) & ~nan | (got.isnan() != nan)).sum())


def bits():
    found = {}
    torch.manual_seed(5)
    for dtype in (torch.bfloat16, torch.float16):
        for form in (activation.SILU, activation.PAIRS):
            made = activation.certify(form, dtype, "vllm", Path(tempfile.mkdtemp()))
            wrong = total = 0
            for columns in (2880, 3072, 12288, 14336):
                x = (torch.randn(max(ROWS), 2 * columns, device="cuda") * 3).to(dtype)
                for rows in ROWS:
                    wrong += differ(activation._bundled(form, x[:rows]), activation._vllms(form, x[:rows]))
                    total += rows * columns
            certificate = {"passed": made.passed, "differ": [made.evidence.differing, made.evidence.compared]}
            found[f"{form} {dtype}"] = {"certificate": certificate, "random rows differ": [wrong, total]}
    return found | {"-0 counts as 0": [str(dtype) for dtype, adds in activation._adds_zero.items() if adds]}


def microseconds():
    found = {}
    for name, (form, columns, hidden, sizes) in SIZES.items():
        w = (torch.randn(2 * columns, hidden, device="cuda") / hidden**0.5).bfloat16()
        for rows in sizes:
            h = torch.randn(rows, hidden, device="cuda").bfloat16()
            x = torch.empty(rows, 2 * columns, device="cuda", dtype=torch.bfloat16)
            calls = {"vLLM": activation._vllms, "bundled": activation._bundled}
            found[f"{name}, {rows} rows"] = {kind: timed(h, w, x, form, call) for kind, call in calls.items()}
    return found


def timed(h, w, x, form, call):
    """Microseconds of the kernel of call(form, x), after h w^T was written to x."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(22):
            torch.mm(h, w.t(), out=x)
            call(form, x)
        torch.cuda.synchronize()
    ranges = [e.time_range for e in profiled.events() if any(name in e.name for name in NAMES)]
    return round(statistics.median(held.end - held.start for held in ranges[2:]), 2)


if __name__ == "__main__":
    import vllm._custom_ops  # noqa: F401  defines torch.ops._C

    steps.run({"bits": bits, "microseconds": microseconds}, ("bits", "microseconds"), sys.argv[1])
