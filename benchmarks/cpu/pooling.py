"""Runs `bi-patch verify` for one tiny model of each kind that pools on CPU, with random weights.

    PYTHONPATH=. python3 benchmarks/cpu/pooling.py [KIND ...] [--level full] [--dtype float32] [--compiled]

Kinds are names in bi_patch/tools/models/pooling.py. The rows join one result file of the day. The exit code is 1 if a
vector or a score differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import bi_patch_entry

SEED = 7
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def measure(kind: str, args: argparse.Namespace, root: str) -> int:
    """Measure one kind and write its rows. Returns the number of differing numbers."""
    from bi_patch.tools import evidence
    from bi_patch.tools.bench import invariance
    from bi_patch.tools.models import pooling
    from bi_patch.tools.verify import levels, local

    # No limit of time: every axis of the level is measured.
    level = replace(levels.LEVELS[args.level], seconds=None, cpu_seconds=None)
    most = int(str(pooling.POOLING[kind]["max_position_embeddings"])) - 2
    system = local.local(
        pooling.write(kind, root),
        level,
        engine_args={**pooling.ARGUMENTS.get(kind, {}), "max_model_len": min(level.max_model_len, most)},
        dtype=args.dtype,
        eager=not args.compiled,
        random_weights=SEED,
    )
    label = f"{kind}, tiny, {_SHORT[args.dtype]}{' compiled' if args.compiled else ''}"
    rows, report = invariance.measure(label, system, level)
    found = evidence.new(evidence.Invariance, report)
    found.rows = rows
    # The kinds of one sweep share a file: the list of kinds is left out of the command.
    found.command = "python3 benchmarks/cpu/pooling.py"
    evidence.write(found, args.results)
    return evidence.total_differing(rows)


def main() -> None:
    bi_patch_entry.without_arming()
    from bi_patch.tools.models import pooling

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=list(pooling.TINY))
    parser.add_argument("--level", choices=("quick", "default", "full"), default="quick")
    parser.add_argument("--dtype", choices=list(_SHORT), default="bfloat16")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    differ = False
    with tempfile.TemporaryDirectory() as root:
        for kind in args.kinds:
            start = time.perf_counter()
            try:
                differing = measure(kind, args, root)
            except Exception as error:  # the sweep goes on: the next kind has its own engine
                print(f"{kind}: {type(error).__name__}: {error}", flush=True)
                differ = True
                continue
            differ |= differing > 0
            print(f"{kind}: {differing} differ ({time.perf_counter() - start:.0f} s)", flush=True)
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
