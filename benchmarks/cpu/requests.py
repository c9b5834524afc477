"""Measures on CPU what single requests turn on: structured output, processed logprobs, custom logits processors.

    PYTHONPATH=. python3 benchmarks/cpu/requests.py [--results FOLDER]

One armed engine of a tiny model in eager mode, one compiled, along the axes of verify. Exit code 1: positions differ.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import bi_patch_entry

AXES = ("structured output", "processed logprobs", "custom logits processors", "kinds of sampling")


def main() -> None:
    bi_patch_entry.without_arming()
    from bi_patch.tools import evidence
    from bi_patch.tools.bench import invariance
    from bi_patch.tools.models import recipes
    from bi_patch.tools.verify import levels, local

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()

    class Found(evidence.Invariance, kw_only=True):
        variant = "requests"

    level = replace(levels.FULL, cpu_seconds=None, cross=(), lengths=(3, 40, 290))

    def tell(text: str) -> None:
        if " differ" in text:
            print(text, flush=True)

    rows = []
    for eager in (True, False):
        system = local.local(recipes.QWEN3, level, dtype="bfloat16", eager=eager, logits=True)
        label = f"{recipes.QWEN3} bf16{'' if eager else ' compiled'}"
        made, report = invariance.measure(label, system, level, only=AXES, tell=tell)
        rows += made
        found = evidence.new(Found, report)
    found.rows = rows
    print(evidence.write(found, args.results))
    sys.exit(1 if evidence.total_differing(rows) else 0)


if __name__ == "__main__":
    main()
