"""`bi-patch check`: do the patch series and the anchors still fit vLLM? Reads text; never imports vLLM."""

import sys
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bi_patch.tools.cli import app

if TYPE_CHECKING:
    from bi_patch.tools.upstream.check import Report
    from bi_patch.tools.upstream.places import Problem


@app.command()
def check(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SOURCE]...", help="A wheel, a folder that holds vllm/, or `installed` (the default)."),
    ] = None,
    release: Annotated[
        str | None,
        typer.Option(help="Download this release and check it; with a SOURCE: take the source for this release."),
    ] = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="Check every supported release, downloaded once into the cache folder."),
    ] = False,
    write: Annotated[
        bool,
        typer.Option("--write", help="First generate series and anchors anew, of all releases if no SOURCE is named."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Check that the patches apply, reverse and close their seams, and that no anchor moved.

    Exit 1 when something moved.
    """
    from bi_patch import installed
    from bi_patch.errors import PatchError
    from bi_patch.platforms.releases import PACKAGES
    from bi_patch.settings import read
    from bi_patch.tools.upstream import fetch, record
    from bi_patch.tools.upstream.check import check as check_source
    from bi_patch.tools.upstream.sources import open_source

    names = list(sources or ())
    if every and (names or release):
        raise PatchError("--all checks every release: name no SOURCE and no --release with it")
    cache = read().cache
    if not names and release:
        names, release = [str(fetch.fetch(release, cache))], None
    elif not names and (every or write):
        here = ["installed"] if every and not write and installed.find("cpu") else []
        names = here + [str(fetch.fetch(r, cache, p)) for p, (_, releases) in PACKAGES.items() for r in releases]
    reports = []
    for name in names or ["installed"]:
        source = open_source(name, release)
        if write:
            record.record(source)
        reports.append(check_source(source))
    if json:
        each = [{"ok": r.ok, **msgspec.to_builtins(r)} for r in reports]
        answer = {"ok": all(r.ok for r in reports), "reports": each}
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
            ("" if r.package == "vllm" else f"{r.package} ")
            + (r.release if r.base == r.release else f"{r.release} (as {r.base})"),
            escape(r.source.rsplit("/", 1)[-1]),
            *(
                _share(*pair)
                for pair in (
                    (r.applied, r.patches),
                    (r.reversed, r.patches),
                    (r.closed, r.seams),
                    (r.matched, r.anchors),
                )
            ),
            "[green]fits[/]" if r.ok else f"[bold red]problems: {len(r.problems)}[/]",
        )
    console.print(table)
    for r in reports:
        for p in r.problems:
            _problem(console, f"{'vLLM' if r.package == 'vllm' else r.package} {r.release}", p)


def _problem(console: Console, what: str, problem: "Problem") -> None:
    def line(text: str, style: str | None = None) -> None:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    line(f"\n{what}, {problem.kind} {problem.seam}".rstrip(), "bold red")
    place = " in ".join(filter(None, (problem.target, problem.file)))
    if place:
        line(f"  at {place}")
    line(problem.message)
    for text in problem.diff.splitlines():
        line(text, {"+": "green", "-": "red", "@": "cyan"}.get(text[:1]))


def _share(part: int, whole: int) -> str:
    return f"[{'green' if part == whole else 'bold red'}]{part} of {whole}[/]"
