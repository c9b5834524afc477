"""`bi-patch ascend-check` checks the bundled Ascend kernels on this machine's NPU."""

import json
from typing import Annotated

import typer

from bi_patch.tools.ascend_check import COUNTS, check
from bi_patch.tools.cli import app


@app.command()
def ascend_check(
    rows: Annotated[int, typer.Option(min=1, help="Compare up to this number of rows.")] = max(COUNTS),
) -> None:
    """Check the bundled kernels on an Ascend NPU.

    Each kernel is compared with fp64 on the CPU, and each row alone with the same row in a batch, bitwise. The command
    prints one JSON object. It needs CANN, torch_npu and triton-ascend.

    Exit code 0: all bits are equal and all errors are small. 1: a bit differs or an error is too large. 2: the kernels
    could not be checked.
    """
    found = check(rows)
    print(json.dumps(found, indent=1))
    raise typer.Exit(0 if all(row["ok"] for row in found["rows"]) else 1)
