"""Measures LoRA: adapters of several ranks side by side; requests without an adapter against an engine without LoRA.

    PYTHONPATH=. python3 benchmarks/lora.py [--only TEXT] [--results FOLDER]

It runs the axes "LoRA" and "LoRA off" of `bi-patch verify` on small models. Exit code 1: positions differ.
"""

from __future__ import annotations

from pathlib import Path

import sweep

ARGUMENTS = {"max_model_len": 1024, "max_num_seqs": 64, "max_num_batched_tokens": 512}
AXES = ["LoRA", "LoRA off"]


def measure(only: str, results: Path | None) -> list:
    """Measure the cases whose label contains `only`. Returns their rows. results: None for no file."""
    import torch

    from bi_patch import settings
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
            environ={} if on_gpu else sweep.ENVIRON,
        )
        rows += sweep.case(label, system, levels.DEFAULT, AXES, "lora", results)
    return rows


if __name__ == "__main__":
    sweep.cases(__doc__, measure)
