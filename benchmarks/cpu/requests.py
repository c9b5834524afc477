"""Measures on CPU what single requests turn on: structured output, processed logprobs, custom logits processors; and
n, beam search, prompt embeddings, bias with allowed tokens, min_tokens, priorities, a reset of running requests, and
streamed inputs.

    PYTHONPATH=. python3 -P benchmarks/cpu/requests.py [--only axes|kinds] [--results FOLDER]

The first three, streamed inputs and pauses: axes of verify, on one armed engine of a tiny model in eager mode, and one
compiled; streamed inputs of some families as well. The others, and streamed inputs: each alone and in company, on
engines in fp32 and bf16, eager and compiled (request_kinds.py). Exit code 1: positions differ.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bi_patch_entry

sys.path.insert(0, str(Path(__file__).parents[1]))
import single_requests  # noqa: E402

AXES = (
    *("structured output", "processed logprobs", "custom logits processors", "kinds of sampling"),
    *("streamed inputs", "pauses"),
)
FAMILIES = (
    "Gemma 3",
    "DeepSeek V2",
    "Qwen3-Next",
    "Falcon-H1",
    "LFM2",
)  # streamed inputs and pauses: each keeps other states


def kinds(dtype: str, eager: bool) -> tuple[list, SimpleNamespace]:
    """Rows of evidence of one engine, and what the file says of the machine. Raises CalledProcessError."""
    import torch
    import vllm

    from bi_patch import settings
    from bi_patch.tools.models import recipes
    from bi_patch.tools.verify.engine import cpu_name

    folder = str(recipes.path(recipes.QWEN3, cache=settings.read().cache))
    environ = {"PYTHONPATH": os.environ.get("PYTHONPATH", "."), "OMP_NUM_THREADS": "2"}
    label = f"{recipes.QWEN3} {single_requests.SHORT[dtype]}, single requests{'' if eager else ', compiled'}"
    rows, wrong = single_requests.measured(folder, dtype, label, environ, {"enforce_eager": eager})
    if wrong:
        raise SystemExit("\n".join(wrong))
    here = SimpleNamespace(
        device=f"{cpu_name()} ({os.cpu_count()} cores)", vllm=vllm.__version__, torch=str(torch.__version__), threads=2
    )
    return rows, here


def axes() -> tuple[list, object]:
    """Rows of evidence of an engine in eager mode and of a compiled one, and verify's last report."""
    from bi_patch.tools.bench import invariance
    from bi_patch.tools.models import families, recipes
    from bi_patch.tools.verify import levels, local

    level = replace(levels.FULL, cpu_seconds=None, cross=(), lengths=(3, 40, 290))

    def tell(text: str) -> None:
        if " differ" in text:
            print(text, flush=True)

    rows, report = [], None
    for eager in (True, False):
        system = local.local(recipes.QWEN3, level, dtype="bfloat16", eager=eager, logits=True)
        label = f"{recipes.QWEN3} bf16, requests{'' if eager else ', compiled'}"
        made, report = invariance.measure(label, system, level, only=AXES, tell=tell)
        rows += made
    with tempfile.TemporaryDirectory() as root:
        for family in FAMILIES:
            folder = families.write(family, root)
            system = local.local(folder, level, dtype="bfloat16", eager=True, random_weights=7)
            made, report = invariance.measure(
                f"{family}, tiny, bf16, requests", system, level, only=AXES[-2:], tell=tell
            )
            rows += made
    return rows, report


def main() -> None:
    bi_patch_entry.without_arming()
    from bi_patch.tools import evidence

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("axes", "kinds"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()

    class Found(evidence.Invariance, kw_only=True):
        variant = "requests"

    made = []
    if args.only != "axes":
        made += [kinds(dtype, eager) for dtype in single_requests.SHORT for eager in (True, False)]
    if args.only != "kinds":
        made.append(axes())
    rows = [row for found, _ in made for row in found]
    found = evidence.new(Found, made[-1][1])
    found.rows = rows
    found.command = "python3 -P benchmarks/cpu/requests.py" + (f" --only {args.only}" if args.only else "")
    print(evidence.write(found, args.results))
    sys.exit(1 if evidence.total_differing(rows) else 0)


if __name__ == "__main__":
    main()
