"""Starts cpu/request_kinds.py, and makes rows of evidence of what it prints. For cpu/requests.py and
hopper/features.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bi_patch.tools.evidence import InvarianceRow

# Beginnings of what request_kinds.py prints, and the name of the axis.
AXES = {
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


def measured(
    folder: str, dtype: str, label: str, environ: Mapping[str, str], arguments: Mapping[str, object] | None = None
) -> tuple[list[InvarianceRow], list[str]]:
    """A row for each axis that compared something, and what failed otherwise.

    folder: of the model. dtype: a key of SHORT. label: of the rows. arguments: further ones of vllm.LLM. Raises
    CalledProcessError if the engine fails.
    """
    from bi_patch.tools.verify.child import ARMED, PATIENT, child_environ
    from bi_patch.tools.verify.engine import Options

    more = dict(arguments or {})
    options = Options(folder, eager=bool(more.get("enforce_eager", True)))
    given = child_environ(os.environ | PATIENT, ARMED, options) | environ
    script = Path(__file__).with_name("cpu") / "request_kinds.py"
    command = [sys.executable, "-P", script, folder, dtype, json.dumps(more)]
    done = subprocess.run(command, env=given, stdout=subprocess.PIPE, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok ", "FAIL "))]
    print("\n".join(lines), flush=True)
    return judged(lines, label)


def judged(lines: Sequence[str], label: str) -> tuple[list[InvarianceRow], list[str]]:
    """The rows of what request_kinds.py printed, and what failed without a differing position."""
    wrong = [x for x in lines if x.startswith("FAIL ") and not x.split(" ", 1)[1].startswith(tuple(AXES))]
    rows = []
    for begins, axis in AXES.items():
        found = [line for line in lines if line.split(" ", 1)[1].startswith(begins)]
        counts = [[int(count) for count in line.rpartition("\t")[2].split()] for line in found]
        failed = [line for line in found if line.startswith("FAIL ")]
        compared, differing = (sum(count[i] for count in counts) for i in (0, 1))
        if not compared or failed and not differing:
            wrong.append(f"{axis}: {failed or 'nothing was compared'}")
        else:
            rows.append(InvarianceRow(label, axis, compared, differing))
    return rows, wrong
