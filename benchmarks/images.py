"""Measures models that take images: axes of `bi-patch verify` on a model with made images and random weights.

    PYTHONPATH=. python3 benchmarks/images.py [KIND ...] [--dtype float32] [--compiled] [--across] [--results FOLDER]
        [--beside FEATURE ...]

Without `--across`, the axes within one engine; with it, those across engines. Kinds are names in
bi_patch/tools/models/vision.py; all but Idefics3 need torchvision. `--beside`: the engine also has a feature of BESIDE.
With "LoRA", each request gets an adapter by its first token, or none; with "grammars", a grammar in the same way. An
interrupt (Ctrl-C) ends a kind, and keeps the axes that were complete. Exit code 1: positions differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import bi_patch_entry
from bi_patch.tools.models import quantize, vision
from bi_patch.tools.verify.probes import adapters

# Two threads, because one hides variance.
ENVIRON = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
AXES = (
    "images",
    "batch size",
    "co-batch contents",
    "prefix cache",
    "chunk budget",
    "kinds of sampling",
)
ACROSS = ("preemption", "restart", "prefix cache off", "thread count")
_DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
# The feature's name in a label: what the checkpoint's language model has, and what the engine has.
SCHEMES = {
    "INT8": quantize.INT8,
    "AWQ": quantize.AWQ,
    "GPTQ": quantize.GPTQ,
    "W4A16": quantize.W4A16,
    "FP8 blocks": quantize.FP8_BLOCKS,
    "FP8 channels": vision.FP8_CHANNELS,
}
BESIDE: dict[str, dict[str, object]] = {
    **dict.fromkeys(SCHEMES, {}),
    "TP 2": {"tensor_parallel_size": 2},
    "TP 2, whole images": {"tensor_parallel_size": 2, "mm_encoder_tp_mode": "data"},
    "n-grams": {"speculative_config": _DRAFTS},
    "LoRA": {"enable_lora": True, "max_lora_rank": max(adapters.RANKS), "max_loras": adapters.SLOTS},
    "grammars": {},
    "language model only": {"language_model_only": True},
    "encoder on FLASH_ATTN": {"mm_encoder_attn_backend": "FLASH_ATTN"},
    "encoder on TORCH_SDPA": {"mm_encoder_attn_backend": "TORCH_SDPA"},
}
_RANKS = {name for name, given in BESIDE.items() if "tensor_parallel_size" in given}
_GRAMMARS = ("", json.dumps({"regex": "[a-f]{3,9}[0-9]+x"}), json.dumps({"choice": ["alpha", "beta", "gamma delta"]}))
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def measure(kind: str, args: argparse.Namespace, root: str) -> int:
    """Measure one kind and write its rows. Returns how many positions differ."""
    import torch

    from bi_patch.tools import evidence
    from bi_patch.tools.bench import invariance
    from bi_patch.tools.verify import checkpoint, child, levels, local
    from bi_patch.tools.verify import system as systems

    class Changed(child.ChildEngine):
        """An engine whose requests get adapters or grammars."""

        def generate(self, requests):
            if "LoRA" in args.beside:
                folders = ("", *adapters.adapters(self))
                requests = [r.but(lora=r.lora or folders[r.prompt[0] % len(folders)]) for r in requests]
            if "grammars" in args.beside:
                requests = [r.but(grammar=r.grammar or _GRAMMARS[r.prompt[0] % len(_GRAMMARS)]) for r in requests]
            return super().generate(requests)

    class Changing(systems.LocalEngines):
        def start(self, options, *, fresh=False, kind=Changed):
            return super().start(options, fresh=fresh, kind=kind)

    class Found(evidence.Invariance, kw_only=True):
        variant = property(lambda self: "images")

    on_gpu = torch.cuda.is_available()
    level = replace(
        levels.FULL, seconds=None, cpu_seconds=None, lengths=(3, 40, 290), generate=args.generate, sizes=(2, 5, 17, 64)
    )
    arguments = {"max_model_len": 4096 if on_gpu else 1024, "max_num_seqs": args.seqs}
    if on_gpu:
        arguments |= {"gpu_memory_utilization": args.memory, "kv_cache_memory_bytes": 2 << 30}
    arguments |= vision.ARGUMENTS.get(kind, {})
    for name in args.beside:
        arguments |= BESIDE[name]
    scheme = "".join(SCHEMES.get(name, "") for name in args.beside)
    folder, seed = vision.write(kind, root, "" if _RANKS & set(args.beside) else scheme), 7
    if _RANKS & set(args.beside):  # workers of several ranks load weights from files only
        written = checkpoint.write(folder, seed, Path(root) / f"{kind} weights")
        if scheme:
            quantize.convert(written, scheme, left_out=vision.outside(kind))
        folder, seed = str(written), None
    system = local.local(
        folder,
        level,
        engine_args=arguments,
        dtype=args.dtype,
        eager=not args.compiled,
        random_weights=seed,
        environ={} if on_gpu else ENVIRON,
    )
    if {"LoRA", "grammars"} & set(args.beside):
        system = Changing(system.mode, system.options, environ={} if on_gpu else ENVIRON)
    label = f"{kind}, {_SHORT[args.dtype]}{' compiled' if args.compiled else ''}"
    label += "".join(f", {name}" for name in args.beside)
    label += ", across engines" if args.across else ""
    axes = args.axis or (ACROSS if args.across else AXES)
    rows, report = invariance.measure(label, system, level, only=axes, tell=lambda t: print(t, flush=True), cut=True)
    found = evidence.new(Found, report)
    found.rows = rows
    found.command = "python3 benchmarks/images.py"  # kinds share a file
    if args.results is not None:
        print(evidence.write(found, args.results), flush=True)
    return evidence.total_differing(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=["Idefics3"])
    parser.add_argument("--dtype", choices=list(_SHORT), default="bfloat16")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--beside", action="append", default=[], choices=list(BESIDE), help="a feature of the engine")
    parser.add_argument("--across", action="store_true", help="the axes across engines")
    parser.add_argument("--axis", action="append", help="an axis of verify; by default, those above")
    parser.add_argument("--generate", type=int, default=6, help="tokens of an answer")
    parser.add_argument("--seqs", type=int, default=64, help="requests at once; preemption on a GPU needs 160")
    parser.add_argument("--memory", type=float, default=0.3, help="the share of a GPU's memory")
    parser.add_argument("--results", type=Path, help="the folder of a result file; by default, none is written")
    args = parser.parse_args()
    bi_patch_entry.without_arming()
    with tempfile.TemporaryDirectory() as root:
        sys.exit(1 if sum(measure(kind, args, root) for kind in args.kinds) else 0)


if __name__ == "__main__":
    main()
