"""Runs `bi-patch verify` for the tiny quantized models on CPU, eager and compiled.

    PYTHONPATH=. python3 benchmarks/cpu/quantized.py [MODEL ...] [--level quick] [--eager | --compiled]

Models are names in recipes.QUANTIZED. The rows join one result file of the day. If a model differs, or its products are
less accurate than its scheme allows, the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import bi_patch_entry


def measure(name: str, compiled: bool, args: argparse.Namespace) -> bool:
    """Measure one model and write its rows. Returns whether every position is equal and every product accurate."""
    from bi_patch.tools import evidence
    from bi_patch.tools.bench import invariance
    from bi_patch.tools.models import recipes
    from bi_patch.tools.verify import levels, local

    # No limit of time: every axis of the level is measured.
    level = replace(levels.LEVELS[args.level], seconds=None, cpu_seconds=None)
    system = local.local(str(recipes.path(name)), level, eager=not compiled)
    rows, report = invariance.measure(f"{name} bf16{' compiled' if compiled else ''}", system, level)
    print("\n".join(report.verdict), flush=True)
    found = evidence.new(evidence.Invariance, report)
    found.rows = rows
    found.command = "python3 benchmarks/cpu/quantized.py"
    evidence.write(found, args.results)
    precise = report.precision is not None and not report.precision.failed and not report.precision.missing
    return precise and not evidence.total_differing(rows)


def main() -> None:
    bi_patch_entry.without_arming()
    from bi_patch.tools.models import recipes

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(recipes.QUANTIZED))
    parser.add_argument("--level", choices=("quick", "default", "full"), default="quick")
    parser.add_argument("--eager", action="store_true", help="eager engines only")
    parser.add_argument("--compiled", action="store_true", help="compiled engines only")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    modes = [compiled for compiled in (False, True) if not (args.eager if compiled else args.compiled)]
    good = True
    for name in args.models:
        for compiled in modes:
            start = time.perf_counter()
            right = measure(name, compiled, args)
            good &= right
            said = "no position differs" if right else "NOT RIGHT"
            print(f"{name}{' compiled' if compiled else ''}: {said} ({time.perf_counter() - start:.0f} s)", flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
