"""`bi-patch faults` plants every known cause of differing bits in a live engine, and tests whether verify names it."""

from pathlib import Path
from typing import Annotated

import typer

from bi_patch.tools import output
from bi_patch.tools.cli import app


@app.command()
def faults(
    platform: Annotated[
        str, typer.Option(help="cpu, or cuda on a GPU host (a wide MoE model with random weights).")
    ] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the result file.")] = Path("benchmarks/results"),
    only: Annotated[str, typer.Option(help="Plant only these faults (names with commas); write no file.")] = "",
    dtype: Annotated[
        str, typer.Option(help="bfloat16, float32 or float16; by default float32 on CPU, bfloat16 on CUDA.")
    ] = "",
    compile: Annotated[bool, typer.Option(help="Also plant the fault that needs torch.compile.")] = True,
    at_once: Annotated[
        int, typer.Option(min=1, help="Engines that run at a time; on a GPU, each takes about 20 GB.")
    ] = 1,
) -> None:
    """Plant each known fault and check that verify names it.

    The command plants the faults of a platform one by one and writes the results to
    faults-DATE-PLATFORM-vllm-RELEASE.json under --out. A file of the same name is replaced.

    Exit code 0: verify caught and named every fault, and nothing differed without a fault. 1: otherwise. 2: an engine
    failed. On CPU a run takes about two minutes.
    """
    from bi_patch.errors import SettingError
    from bi_patch.tools.faults import run

    for option, value, known in (("--platform", platform, run.PLATFORMS), ("--dtype", dtype, run.DTYPES)):
        if value not in known:
            raise SettingError(f"{option} {value!r} is not understood; use {' or '.join(filter(None, known))}")
    if platform == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SettingError("--platform cuda: torch sees no GPU here")
    names = [name.strip() for name in only.split(",") if name.strip()]
    console = output.console()
    kept: list[Path] = []

    def tell(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def keep(found) -> None:
        if not names:
            kept[:] = [run.write(found, out)]

    found = run.measure(platform, only=names, dtype=dtype, compiled=compile, at_once=at_once, tell=tell, keep=keep)
    for path in kept:
        tell(f"Written: {path}")
    tell(run.verdict(found))
    raise typer.Exit(0 if run.all_right(found) else 1)
