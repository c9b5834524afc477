"""Measures on CPU that speculative decoding changes no bit: engines with drafts against one without.

    PYTHONPATH=. python3 benchmarks/cpu/speculation.py [--only TEXT] [--results FOLDER]

The axis "speculative decoding" of verify on tiny models, eager and compiled: n-grams, for tiny-llama also a draft
model, EAGLE and EAGLE-3 heads, for tiny-mimo its own head (MTP). With arctic-inference on the path also suffixes. Exit
code 1: positions differ.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import bi_patch_entry

AXIS = "speculative decoding"


def main() -> None:
    bi_patch_entry.without_arming()
    from bi_patch import settings
    from bi_patch.tools import evidence
    from bi_patch.tools.bench import invariance
    from bi_patch.tools.models import families, recipes
    from bi_patch.tools.verify import levels, local

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only models whose label contains this text")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()

    class Found(evidence.Invariance, kw_only=True):
        variant = "speculation"

    level = replace(levels.FULL, cpu_seconds=None, lengths=(3, 40, 290))
    kinds = (
        (recipes.QWEN3, "bfloat16", True),
        (recipes.QWEN3, "bfloat16", False),
        (recipes.MOE, "bfloat16", True),
        (recipes.WINDOW, "bfloat16", True),
        (recipes.QWEN3, "float32", True),
        (recipes.LLAMA, "bfloat16", True),
        (recipes.MIMO, "bfloat16", True),
        ("DeepSeek V3", "bfloat16", True),
    )
    rows = []
    for name, dtype, eager in kinds:
        label = f"{name} {'bf16' if dtype == 'bfloat16' else 'fp32'}{'' if eager else ' compiled'}, "
        label += {recipes.LLAMA: "n-grams, a draft model, heads", recipes.MIMO: "n-grams, MTP"}.get(name, "n-grams")
        label += ", suffixes" if find_spec("arctic_inference") is not None else ""
        if args.only not in label:
            continue
        family = name in families.FAMILIES
        folder = families.write(name, settings.read().cache / "families") if family else name
        system = local.local(folder, level, dtype=dtype, eager=eager, random_weights=7 if family else None)
        made, report = invariance.measure(label, system, level, only=(AXIS,), tell=lambda text: print(text, flush=True))
        rows += made
        found = evidence.new(Found, report)
        found.rows = rows
        print(evidence.write(found, args.results), flush=True)
    sys.exit(1 if evidence.total_differing(rows) else 0)


if __name__ == "__main__":
    main()
