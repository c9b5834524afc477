"""`bi-patch demo`: stock and armed vLLM on the same prompts, alone and inside batches, compared bitwise."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from bi_patch.tools.cli import app


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="A model's folder; by default SmolLM2-135M-Instruct.")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer prompts and batches.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the numbers to this file.")] = None,
    picture: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path("build/demo.html"),
) -> None:
    """Compare stock and armed vLLM on the same prompts.

    Exit code 0: the armed engine was bitwise invariant. 1: it was not. 2: it could not be checked.
    """
    from bi_patch.errors import SettingError
    from bi_patch.files import write_json
    from bi_patch.tools.demo import picture as picture_module
    from bi_patch.tools.demo import run, show
    from bi_patch.tools.models import recipes

    if dtype not in ("bfloat16", "float32"):
        raise SettingError(f"--dtype {dtype!r} is not understood; use bfloat16 or float32")
    console = Console()
    folder = recipes.path(model or recipes.SMOL, tell=lambda text: console.print(f"[dim]{escape(text)}[/]"))
    name = recipes.describe(folder)
    console.print(f"[bold]bi_patch demo[/]: {escape(name)}, {dtype}, the real vLLM engine, stock and then armed\n")
    with _Progress(console) as progress:
        report = run.run(str(folder), dtype=dtype, quick=quick, watcher=progress, name=folder.name)
    names, columns = tuple(report.prompts), tuple(report.columns)
    console.print(show.table(names, columns, report.stock, report.armed))
    for side in (report.stock, report.armed):
        changed = show.divergences(side)
        if changed is not None:
            console.print(changed)
    title = f"Is vLLM batch-invariant? {folder.name}, {dtype}, vLLM {report.vllm}"
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_text(
        picture_module.page(title, report.verdict, names, columns, report.stock, report.armed), encoding="utf-8"
    )
    if json is not None:
        write_json(json, report)
        console.print(f"Numbers: {json}", markup=False, soft_wrap=True)
    console.print(f"Picture: {picture.resolve()}", markup=False, soft_wrap=True)
    console.print()
    colour = "green" if report.exit_code == 0 else "red"
    console.print(f"[bold {colour}]Verdict.[/] {escape(' '.join(report.verdict))}")
    console.print(f"[dim]{report.seconds:.0f} seconds; {escape(report.device)}, {report.threads} threads[/]")
    raise typer.Exit(report.exit_code)


class _Progress:
    """rich's progress bar as a watcher; without a terminal, one line per engine."""

    def __init__(self, console: Console) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[mode]:5}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
        )
        self._tasks: dict[str, int] = {}
        self._differing = 0

    def __enter__(self) -> "_Progress":
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def begin(self, mode: str) -> None:
        self._differing = 0
        self._tasks[mode] = self._progress.add_task("starting the engine", total=None, mode=mode)

    def planned(self, mode: str, rounds: int) -> None:
        self._progress.update(self._tasks[mode], total=rounds)

    def running(self, mode: str, about: str) -> None:
        self._progress.update(self._tasks[mode], description=f"{about} [dim]({self._differing} differ so far)[/]")

    def stopped(self, mode: str, why: str) -> None:
        text = f"{self._differing} positions differ; then it stopped"
        done = self._progress.tasks[self._tasks[mode]].completed
        self._progress.update(self._tasks[mode], description=text, total=done)

    def finished(self, mode: str, differing: int) -> None:
        self._differing += differing
        self._progress.advance(self._tasks[mode])
        self._progress.update(self._tasks[mode], description=f"{self._differing} positions differ")
