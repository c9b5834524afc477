"""Runs `bi-patch verify` for one tiny model of each family on CPU, with random weights.

    PYTHONPATH=. python3 benchmarks/cpu/families.py [FAMILY ...] [--level full] [--dtype float32] [--compiled]

Families are names in bi_patch/tools/models/families.py. The rows join one result file of the day. A family that
bi_patch refuses gets no row; its refusal is printed. A family that differs gets its rows, and the exit code is 1.
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


def measure(family: str, args: argparse.Namespace, root: str) -> int:
    """Measure one family and write its rows. Returns the number of positions that differ."""
    from bi_patch.tools import evidence
    from bi_patch.tools.bench import invariance
    from bi_patch.tools.models import families
    from bi_patch.tools.verify import levels, local

    # No limit of time: every axis of the level is measured.
    level = replace(levels.LEVELS[args.level], seconds=None, cpu_seconds=None)
    folder = families.write(family, root)
    system = local.local(folder, level, dtype=args.dtype, eager=not args.compiled, random_weights=SEED)
    compiled = " compiled" if args.compiled else ""
    more = "" if args.level == "quick" else f", --{args.level}"
    label = f"{family}, tiny, {_SHORT[args.dtype]}{compiled}{more}"
    rows, report = invariance.measure(label, system, level)
    found = evidence.new(evidence.Invariance, report)
    found.rows = rows
    # The families of one sweep share a file: the list of families is left out of the command.
    found.command = "python3 benchmarks/cpu/families.py"
    evidence.write(found, args.results)
    return evidence.total_differing(rows)


def main() -> None:
    bi_patch_entry.without_arming()
    from bi_patch.tools.models import families

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=list(families.FAMILIES))
    parser.add_argument("--level", choices=("quick", "default", "full"), default="quick")
    parser.add_argument("--dtype", choices=list(_SHORT), default="bfloat16")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    differ = False
    with tempfile.TemporaryDirectory() as root:
        for family in args.families:
            start = time.perf_counter()
            try:
                differing = measure(family, args, root)
            except Exception as error:  # the sweep goes on: the next family has its own engine
                print(f"{family}: {type(error).__name__}: {error}", flush=True)
                continue
            differ |= differing > 0
            print(f"{family}: {differing} differ ({time.perf_counter() - start:.0f} s)", flush=True)
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
