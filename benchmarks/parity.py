"""Runs `bi-patch parity` for several models on this device, and writes parity-DATE-DEVICE-vllm-RELEASE.json.

    PYTHONPATH=. python3 benchmarks/parity.py [--only LABEL ...] [--results FOLDER] [--cache-gib N]

--cache-gib: of the sampler's keys and values, for a GPU that others use too. vLLM then looks at no free memory.

Exit code 1: a value differs. 2: something could not be compared.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import bi_patch_entry

# label -> (model of bi_patch.tools.models.recipes, dtype, eager, GRPO steps of each of two runs[, the sampler's ranks])
CPU = {
    "tiny-llama-tied bf16": ("tiny-llama-tied", "bfloat16", True, 6),
    "tiny-llama-tied fp32": ("tiny-llama-tied", "float32", True, 6),
    "tiny-llama-tied bf16 compiled": ("tiny-llama-tied", "bfloat16", False, 6),
    "tiny-llama-tied fp32 compiled": ("tiny-llama-tied", "float32", False, 6),
    "tiny-qwen3 bf16": ("tiny-qwen3", "bfloat16", True, 6),
    "tiny-qwen3 fp32": ("tiny-qwen3", "float32", True, 6),
    "tiny-qwen3 bf16 compiled": ("tiny-qwen3", "bfloat16", False, 6),
    "tiny-qwen3 fp32 compiled": ("tiny-qwen3", "float32", False, 6),
    "tiny-qwen3-moe bf16": ("tiny-qwen3-moe", "bfloat16", True, 3),
    "SmolLM2-135M bf16": ("smollm2-135m-instruct", "bfloat16", True, 4),
    "tiny-qwen3 bf16, sampler TP 2": ("tiny-qwen3", "bfloat16", True, 3, 2),
    "tiny-llama-tied fp32, sampler TP 4": ("tiny-llama-tied", "float32", True, 3, 4),
    "tiny-qwen3 bf16, sampler TP 2, compiled": ("tiny-qwen3", "bfloat16", False, 3, 2),
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # for each rank on CPU
CUDA = {
    "qwen3-100m bf16": ("qwen3-100m", "bfloat16", True, 6),
    "qwen3-100m bf16 graphs": ("qwen3-100m", "bfloat16", False, 6),
    "tiny-llama-tied bf16": ("tiny-llama-tied", "bfloat16", True, 6),
    "tiny-llama-tied bf16 graphs": ("tiny-llama-tied", "bfloat16", False, 6),
    "tiny-qwen3-moe bf16": ("tiny-qwen3-moe", "bfloat16", True, 3),
}


def main() -> int:
    import torch

    from bi_patch.tools import evidence
    from bi_patch.tools.evidence import InvarianceRow, Parity
    from bi_patch.tools.parity import run
    from bi_patch.tools.parity.plan import Plan
    from bi_patch.tools.verify import levels, terminal
    from bi_patch.tools.verify.local import local

    cases = CUDA if torch.cuda.is_available() else CPU
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=cases, default=list(cases))
    parser.add_argument("--results", type=Path, default=evidence.RESULTS)
    parser.add_argument("--cache-gib", type=int, default=0)
    given = parser.parse_args()
    codes = []
    for label in given.only:
        model, dtype, eager, steps, *ranks = cases[label]
        options = {"logprobs_mode": "processed_logprobs", "max_num_seqs": 64} | run.shared()
        if given.cache_gib:
            options |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": given.cache_gib << 30}
        options |= {"tensor_parallel_size": ranks[0]} if ranks else {}
        environ = dict(os.environ) | (ONE_THREAD if ranks and cases is CPU else {})
        system = local(model, levels.QUICK, dtype=dtype, eager=eager, engine_args=options, environ=environ)
        report = run.measure(system, Plan(steps=steps))
        print(f"{label}\n{terminal.plain(report)}", flush=True)
        codes.append(report.exit_code)
        if report.exit_code == 2:
            continue
        made = evidence.new(Parity, report, report.provenance)
        made.rows = [
            InvarianceRow(label, axis.name, axis.compared, axis.differing, axis.shown[0].first if axis.shown else "")
            for axis in report.axes
            if axis.compared
        ]
        print(evidence.write(made, given.results), flush=True)
    return 1 if 1 in codes else max(codes, default=0)


if __name__ == "__main__":
    bi_patch_entry.without_arming()
    sys.exit(main())
