"""`bi-patch check`: do the patch series and the anchors still fit vLLM? Reads sources only; vLLM is never imported."""

import sys
from typing import TYPE_CHECKING

import msgspec
import typer
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from bi_patch.cli import app

if TYPE_CHECKING:
    from bi_patch.fork.check import Report


@app.command()
def check(
    sources: list[str] = typer.Argument(
        None, metavar="[SOURCE]...", help="A wheel, a folder that holds vllm/, or `installed`. [default: installed]"
    ),
    release: str = typer.Option(
        None, help="Download this release and check it; with a SOURCE: take the source for this release."
    ),
    every: bool = typer.Option(
        False, "--all", help="Check every supported release, downloaded once into the cache folder."
    ),
    write: bool = typer.Option(
        False, "--write", help="Generate the series and anchors of each source anew first. [default: --all]"
    ),
    json: bool = typer.Option(False, "--json", help="Print JSON instead of tables."),
) -> None:
    """Check that the patches apply, reverse and close their seams, and that no anchor moved.

    Exit 1 when something moved.
    """
    from bi_patch.arming import installed
    from bi_patch.errors import PatchError
    from bi_patch.fork import fetch, record
    from bi_patch.fork.check import check as check_source
    from bi_patch.fork.sources import open_source
    from bi_patch.seams.registry import RELEASES
    from bi_patch.settings import read

    names = list(sources or ())
    if every and (names or release):
        raise PatchError("--all checks every release: name no SOURCE and no --release with it")
    cache = read().cache
    if not names and release:
        names, release = [str(fetch.fetch(release, cache))], None
    elif not names and (every or write):
        here = ["installed"] if every and not write and installed.find("cpu") else []
        names = here + [str(fetch.fetch(r, cache)) for r in RELEASES]
    reports = []
    for name in names or ["installed"]:
        source = open_source(name, release)
        if write:
            record.record(source)
        reports.append(check_source(source))
    if json:
        answer = {"ok": all(r.ok for r in reports), "reports": reports}
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(answer)) + b"\n")
    else:
        _print(reports)
    raise typer.Exit(0 if all(r.ok for r in reports) else 1)


def _print(reports: "list[Report]") -> None:
    console = Console()
    table = Table(title="Patch series against vLLM", title_justify="left")
    for column in ("vLLM", "source", "applied", "reversed", "seams closed", "anchors matched", ""):
        table.add_column(column, overflow="fold")
    for r in reports:
        table.add_row(
            r.release if r.base == r.release else f"{r.release} (as {r.base})",
            r.source.rsplit("/", 1)[-1],
            *(_share(*pair) for pair in (
                (r.applied, r.patches), (r.reversed, r.patches), (r.closed, r.seams), (r.matched, r.anchors)
            )),
            "[green]fits[/]" if r.ok else f"[bold red]{len(r.problems)} problems[/]",
        )  # fmt: skip
    console.print(table)
    for r in reports:
        for p in r.problems:
            console.print(f"\nvLLM {r.release}, {p.kind} {p.seam}".rstrip(), style="bold red", highlight=False)
            if p.target or p.file:
                console.print(f"  at {p.target}{' in ' if p.target and p.file else ''}{p.file}", highlight=False)
            console.print(p.message, highlight=False, markup=False, soft_wrap=True)
            if p.diff:
                console.print(Syntax(p.diff, "diff", background_color="default", word_wrap=True))


def _share(part: int, whole: int) -> str:
    return f"[{'green' if part == whole else 'bold red'}]{part} of {whole}[/]"
