"""Runs `bi-patch verify` for one tiny model of each kind that pools, with random weights.

    PYTHONPATH=. python3 benchmarks/pooling.py [KIND ...] [--level full] [--dtype float32] [--compiled]

Kinds are names in bi_patch/tools/models/pooling.py; on a GPU, name those with the sizes of published models. The rows
join one result file of the day. The exit code is 1 if a vector or a score differs.
"""

from __future__ import annotations

import argparse

import sweep

import bi_patch_entry


def measure(kind: str, args: argparse.Namespace, root: str) -> int:
    """Measure one kind and write its rows. Returns the number of differing numbers."""
    import torch

    from bi_patch.tools.models import pooling
    from bi_patch.tools.verify import local

    on_gpu = torch.cuda.is_available()
    level = sweep.level(args)
    most = int(str(pooling.POOLING[kind]["max_position_embeddings"])) - 2
    given = {**pooling.ARGUMENTS.get(kind, {}), "max_model_len": min(level.max_model_len, most)}
    if on_gpu:
        given |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30}
    system = local.local(
        pooling.write(kind, root),
        level,
        engine_args=given,
        dtype=args.dtype,
        eager=not args.compiled,
        random_weights=sweep.SEED,
    )
    label = f"{kind}, tiny" if kind in pooling.TINY else kind
    command = "python3 benchmarks/pooling.py" + " --compiled" * args.compiled
    return sweep.measure(label, system, args, command, variant="pooling")


def main() -> None:
    bi_patch_entry.without_arming()
    from bi_patch.tools.models import pooling

    args = sweep.arguments(__doc__, "kinds", pooling.TINY).parse_args()
    sweep.run(args.kinds, lambda kind, root: measure(kind, args, root), errors=True)


if __name__ == "__main__":
    main()
