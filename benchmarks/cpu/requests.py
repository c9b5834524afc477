"""Measures on CPU what single requests turn on: structured output, processed logprobs, custom logits processors; and
n, beam search, prompt embeddings, bias with allowed tokens, min_tokens, priorities, a reset of running requests, and
streamed inputs.

    PYTHONPATH=. python3 -P benchmarks/cpu/requests.py [--only axes|kinds] [--results FOLDER]

The first three, streamed inputs and pauses: axes of verify, on one armed engine of a tiny model in eager mode, and one
compiled; streamed inputs of some families as well. The others, and streamed inputs: each alone and in company, on
engines in fp32 and bf16 (request_kinds.py). Exit code 1: positions differ.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bi_patch_entry

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
# Beginnings of what request_kinds.py prints, and the name of the axis.
KINDS = {
    "n": "n",
    "beam search": "beam search",
    "prompt_embeds": "prompt embeddings",
    "logit_bias with allowed_token_ids": "bias with allowed tokens",
    "min_tokens": "min_tokens",
    "priorities": "priorities",
    "a reset of running requests": "a reset of running requests",
    "streamed inputs": "streamed inputs",
}
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def kinds(dtype: str) -> tuple[list, SimpleNamespace]:
    """Rows of evidence of one engine, and what the file says of the machine. Raises CalledProcessError."""
    import torch
    import vllm

    from bi_patch import settings
    from bi_patch.tools import evidence
    from bi_patch.tools.models import recipes
    from bi_patch.tools.verify.child import ARMED, PATIENT, child_environ
    from bi_patch.tools.verify.engine import Options, cpu_name

    folder = str(recipes.path(recipes.QWEN3, cache=settings.read().cache))
    environ = child_environ(os.environ | PATIENT, ARMED, Options(folder)) | {
        "PYTHONPATH": os.environ.get("PYTHONPATH", "."),
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, "-P", Path(__file__).with_name("request_kinds.py"), folder, dtype]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok ", "FAIL "))]
    print("\n".join(lines), flush=True)
    if others := [x for x in lines if x.startswith("FAIL ") and not x.split(" ", 1)[1].startswith(tuple(KINDS))]:
        raise SystemExit("\n".join(others))
    rows = []
    for begins, axis in KINDS.items():
        found = [line for line in lines if line.split(" ", 1)[1].startswith(begins)]
        counts = [[int(count) for count in line.rpartition("\t")[2].split()] for line in found]
        failed = [line for line in found if line.startswith("FAIL ")]
        compared, differing = (sum(count[i] for count in counts) for i in (0, 1))
        if not compared or failed and not differing:
            raise SystemExit(f"{axis}: {failed or 'nothing was compared'}")
        rows.append(
            evidence.InvarianceRow(f"{recipes.QWEN3} {SHORT[dtype]}, single requests", axis, compared, differing)
        )
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
        made += [kinds(dtype) for dtype in SHORT]
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
