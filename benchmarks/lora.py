"""Measures LoRA: adapters of several ranks side by side; requests without an adapter against an engine without LoRA.

    PYTHONPATH=. python3 benchmarks/lora.py [--only TEXT] [--results FOLDER]

It runs the axes "LoRA" and "LoRA off" of `bi-patch verify` on small models. Exit code 1: positions differ.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import sweep

import bi_patch_entry

# Two threads, because one hides variance.
ENVIRON = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
ARGUMENTS = {"max_model_len": 1024, "max_num_seqs": 64, "max_num_batched_tokens": 512}
AXES = ["LoRA", "LoRA off"]


def measure(only: str, results: Path | None) -> int:
    """Measure the cases whose label contains `only`. Returns how many positions differ. results: None for no file."""
    import torch

    from bi_patch import settings
    from bi_patch.tools import evidence
    from bi_patch.tools.bench import invariance
    from bi_patch.tools.models import recipes
    from bi_patch.tools.verify import levels
    from bi_patch.tools.verify.local import local

    on_gpu = torch.cuda.is_available()
    cpu = [
        (recipes.LLAMA, "bfloat16"),
        (recipes.LLAMA, "float32"),
        (recipes.QWEN3, "bfloat16"),
    ]
    further = {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 1 << 30} if on_gpu else {}
    rows = []
    for name, dtype in [(recipes.QWEN3_100M, "bfloat16")] if on_gpu else cpu:
        label = f"{name} {'bf16' if dtype == 'bfloat16' else 'fp32'} LoRA"
        if only not in label:
            continue
        system = local(
            str(recipes.path(name, cache=settings.read().cache)),
            levels.DEFAULT,
            engine_args=ARGUMENTS | further,
            dtype=dtype,
            environ={} if on_gpu else ENVIRON,
        )
        made, report = invariance.measure(
            label, system, levels.DEFAULT, only=AXES, tell=lambda text: print(text, flush=True)
        )
        rows += made
        if results is not None:  # after each case: the next one may fail
            found = evidence.new(sweep.kind("lora"), report)
            found.rows = made
            print(evidence.write(found, results), flush=True)
    if not rows:
        raise SystemExit(f"no case has {only!r} in its label")
    return evidence.total_differing(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure only cases with this text in their label")
    parser.add_argument("--results", type=Path, help="the folder of a result file; by default, none is written")
    given = parser.parse_args()
    bi_patch_entry.without_arming()
    sys.exit(1 if measure(given.only, given.results) else 0)


if __name__ == "__main__":
    main()
