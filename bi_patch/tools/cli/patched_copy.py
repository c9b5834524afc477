"""`bi-patch patched-copy` makes a copy of the installed vLLM and applies the patches."""

from pathlib import Path
from typing import Annotated

import typer

from bi_patch.tools.cli import app


@app.command()
def patched_copy(
    folder: Annotated[Path, typer.Argument(help="Where the copy goes. It must not hold vllm/.")],
) -> None:
    """Make a patched copy of the installed vLLM.

    An installed vLLM-Ascend is copied, too. The copy is small: it links to every file that no patch changes.
    """
    from bi_patch.tools.upstream import apply

    copy = apply.patched_copy(folder).resolve()
    typer.echo(f"{copy}\nRun it: PYTHONPATH={copy} BI_PATCH_FORM=patches VLLM_BATCH_INVARIANT=1 vllm serve ...")
