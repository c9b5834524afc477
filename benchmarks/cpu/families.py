"""Runs `bi-patch verify` for one tiny model of each family on CPU, with random weights.

    PYTHONPATH=. python3 benchmarks/cpu/families.py [FAMILY ...] [--level full] [--dtype float32] [--compiled]

Families are names in bi_patch/tools/models/families.py, or models of recipes.py, e.g. tiny-qwen3, which have weights of
their own. The rows join one result file of the day. A family that bi_patch refuses gets no row; its refusal is printed.
A family that differs gets its rows, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import bi_patch_entry

sys.path.insert(0, str(Path(__file__).parents[1]))
import sweep  # noqa: E402  beside this folder


def measure(family: str, args: argparse.Namespace, root: str) -> int:
    """Measure one family and write its rows. Returns the number of positions that differ."""
    from bi_patch.tools.models import families, recipes
    from bi_patch.tools.verify import local

    made = family in recipes.NAMES  # a model with weights of its own
    folder = str(recipes.path(family)) if made else families.write(family, root)
    seed = None if made else sweep.SEED
    system = local.local(folder, sweep.level(args), dtype=args.dtype, eager=not args.compiled, random_weights=seed)
    name = family if made else f"{family}, tiny"
    variant = "" if args.level == "quick" else args.level
    return sweep.measure(name, system, args, "python3 benchmarks/cpu/families.py", variant)


def main() -> None:
    bi_patch_entry.without_arming()
    from bi_patch.tools.models import families

    args = sweep.arguments(__doc__, "families", families.FAMILIES).parse_args()
    sweep.run(args.families, lambda family, root: measure(family, args, root), errors=False)


if __name__ == "__main__":
    main()
