"""Measures models that take images: axes of `bi-patch verify` on a model with made images and random weights.

    PYTHONPATH=. python3 benchmarks/images.py [KIND ...] [--dtype float32] [--compiled] [--across] [--results FOLDER]

Without `--across`, the axes within one engine; with it, those across engines. Kinds are names in
bi_patch/tools/models/vision.py; all but Idefics3 need torchvision. An interrupt (Ctrl-C) ends a kind, and
keeps the axes that were complete. Exit code 1: positions differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import bi_patch_entry

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
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def measure(kind: str, args: argparse.Namespace, root: str) -> int:
    """Measure one kind and write its rows. Returns how many positions differ."""
    import torch

    from bi_patch.tools import evidence
    from bi_patch.tools.bench import invariance
    from bi_patch.tools.models import vision
    from bi_patch.tools.verify import levels, local

    class Found(evidence.Invariance, kw_only=True):
        variant = property(lambda self: "images")

    on_gpu = torch.cuda.is_available()
    level = replace(levels.FULL, seconds=None, cpu_seconds=None, lengths=(3, 40, 290), generate=6, sizes=(2, 5, 17, 64))
    arguments = {"max_model_len": 4096 if on_gpu else 1024, "max_num_seqs": args.seqs}
    if on_gpu:
        arguments |= {"gpu_memory_utilization": args.memory, "kv_cache_memory_bytes": 2 << 30}
    arguments |= vision.ARGUMENTS.get(kind, {})
    system = local.local(
        vision.write(kind, root),
        level,
        engine_args=arguments,
        dtype=args.dtype,
        eager=not args.compiled,
        random_weights=7,
        environ={} if on_gpu else ENVIRON,
    )
    label = f"{kind}, {_SHORT[args.dtype]}{' compiled' if args.compiled else ''}"
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
    parser.add_argument("--across", action="store_true", help="the axes across engines")
    parser.add_argument("--axis", action="append", help="an axis of verify; by default, those above")
    parser.add_argument("--seqs", type=int, default=64, help="requests at once; preemption on a GPU needs 160")
    parser.add_argument("--memory", type=float, default=0.3, help="the share of a GPU's memory")
    parser.add_argument("--results", type=Path, help="the folder of a result file; by default, none is written")
    args = parser.parse_args()
    bi_patch_entry.without_arming()
    with tempfile.TemporaryDirectory() as root:
        sys.exit(1 if sum(measure(kind, args, root) for kind in args.kinds) else 0)


if __name__ == "__main__":
    main()
