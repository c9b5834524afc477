"""Measures weight updates: an engine that got weights against an engine that was started with them, and back.

    PYTHONPATH=. python3 benchmarks/weights.py [--only TEXT] [--results FOLDER]

It runs the axis "weight update" of `bi-patch verify` on small models whose head is their embedding, in bf16, eager and
compiled, with CUDA graphs on a GPU. Models with latent attention or recurrent layers, whose heads are their own, run
eagerly. On CPU, so do models with quantized weights, and compiled. Exit code 1: positions differ.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import sweep

LENGTH = 1024
ARGUMENTS = {"max_model_len": LENGTH, "max_num_seqs": 16, "max_num_batched_tokens": 512}


# Of bi_patch/tools/models/families.py.
FAMILIES = ("DeepSeek V2", "DeepSeek V3", "Qwen3-Next", "Falcon-H1", "Granite 4-H")


def cases(on_gpu: bool):
    """Yield (label, model, eager, whether the head is the embedding)."""
    from bi_patch.tools.models import recipes

    dense = recipes.QWEN3_100M if on_gpu else recipes.QWEN3  # heads of 128 on a GPU
    for eager in (True, False):
        for name in (dense, recipes.MOE):
            yield f"{name} bf16 tied, {'eager' if eager else 'graphs' if on_gpu else 'compiled'}", name, eager, True
    for name in FAMILIES:
        yield f"{name} bf16, eager", name, True, False
    for name in () if on_gpu else (recipes.INT8, recipes.AWQ, recipes.GPTQ, recipes.W4A16, recipes.ZEROS):
        for eager in (True, False):
            yield f"{name} bf16, {'eager' if eager else 'compiled'}", name, eager, False


def measure(only: str, results: Path | None) -> list:
    """Measure the cases whose label contains `only`. Returns their rows. results: None for no file."""
    import torch

    from bi_patch import settings
    from bi_patch.tools.models import families, recipes
    from bi_patch.tools.verify import checkpoint, levels
    from bi_patch.tools.verify.local import local

    on_gpu = torch.cuda.is_available()
    further = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30} if on_gpu else {}
    rows = []
    with tempfile.TemporaryDirectory(prefix="bi_patch-weights-") as root:
        for label, name, eager, tied in cases(on_gpu):
            if only not in label:
                continue
            if name in families.FAMILIES:
                source = families.write(name, Path(root) / "shapes")
            else:
                source = recipes.path(name, cache=settings.read().cache)
            folder = Path(root) / name
            if not folder.is_dir():
                checkpoint.write(str(source), 3, folder, tied=tied)
            system = local(
                str(folder),
                levels.QUICK,
                engine_args=ARGUMENTS | further,
                dtype="bfloat16",
                eager=eager,
                environ={} if on_gpu else sweep.ENVIRON,
            )
            rows += sweep.case(label, system, levels.QUICK, ["weight update"], "weights", results)
    return rows


if __name__ == "__main__":
    sweep.cases(__doc__, measure)
