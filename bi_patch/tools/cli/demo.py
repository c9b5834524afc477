"""`bi-patch demo`: stock and armed vLLM on the same prompts, alone and among other requests, compared bitwise."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bi_patch.tools import output
from bi_patch.tools.cli import app


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="A model's folder; by default SmolLM2-135M-Instruct.")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer prompts, axes and batches.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write both reports of verify to this file.")] = None,
    picture: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path("build/demo.html"),
) -> None:
    """Compare stock and armed vLLM on the same prompts.

    Exit code 0: the armed engine was bitwise invariant. 1: it was not. 2: it could not be checked, or a required seam
    was open.
    """
    from bi_patch.errors import SettingError
    from bi_patch.files import write_json
    from bi_patch.tools.demo import level, run, show
    from bi_patch.tools.demo import picture as picture_module
    from bi_patch.tools.models import recipes
    from bi_patch.tools.verify import levels, report, terminal
    from bi_patch.tools.verify.child import ARMED, STOCK

    if dtype not in ("bfloat16", "float32"):
        raise SettingError(f"--dtype {dtype!r} is not understood; use bfloat16 or float32")
    console = output.console()
    folder = recipes.path(model or recipes.SMOL, tell=lambda text: console.print(f"[dim]{escape(text)}[/]"))
    if not levels.has_tokenizer(str(folder)):
        raise SettingError(f"{folder} has no tokenizer, and the demo's prompts are texts")
    for path in (picture, json):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    run.would_arm()
    console.print(f"[bold]bi_patch demo[/]: {escape(recipes.describe(folder))}, {dtype}")
    console.print(f"{show.METHOD} First stock vLLM, then vLLM armed with bi_patch.\n")
    sides = []
    for mode in (STOCK, ARMED):
        console.print(f"[bold]{mode.capitalize()} vLLM[/]")
        with terminal.Live(console) as live:
            sides.append(run.side(mode, str(folder), dtype=dtype, quick=quick, watcher=live))
    stock, armed = sides
    axes, found = level.axes(quick), armed.report
    said = show.verdict(axes, stock, armed)
    console.print()
    console.print(show.table(axes, stock, armed))
    for side in sides:
        changed = show.texts(side)
        if changed is not None:
            console.print(changed)
    title = f"Is vLLM batch-invariant? {folder.name}, {dtype}, vLLM {found.vllm or stock.report.vllm}"
    picture.write_text(picture_module.page(title, said, axes, stock, armed), encoding="utf-8")
    if json is not None:
        write_json(json, {side.report.mode: report.as_json(side.report) for side in sides})
        console.print(f"Reports: {json}", markup=False, soft_wrap=True)
    console.print(f"Picture: {picture.resolve()}", markup=False, soft_wrap=True)
    colour = "green" if found.exit_code == 0 else "red"
    console.print(f"\n[bold {colour}]Verdict.[/] {escape(' '.join(said))}")
    seconds = sum(side.report.seconds for side in sides)
    console.print(f"[dim]{seconds:.0f} seconds; {escape(found.device)}, {found.threads} threads[/]")
    raise typer.Exit(found.exit_code)
