"""`bi-patch check` tells whether the patches and the anchors fit vLLM. It reads vLLM as text and never imports it."""

import sys
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bi_patch.tools import output
from bi_patch.tools.cli import app

if TYPE_CHECKING:
    from bi_patch.tools.upstream.report import Problem, Report


@app.command()
def check(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SOURCE]...", help="A wheel, a folder that holds vllm/, or `installed` (the default)."),
    ] = None,
    release: Annotated[
        str | None,
        typer.Option(help="Download this release and check it. With a SOURCE: treat the source as this release."),
    ] = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="Check every supported release, downloaded once into the cache folder."),
    ] = False,
    write: Annotated[
        bool,
        typer.Option(
            "--write", help="First regenerate patches and anchors, of every supported release unless a SOURCE is named."
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Check that the patch series still fits vLLM.

    The patches apply, reverse and close their patch points, and upstream changed none of these.

    Exit code 1: at least one check failed. Exit code 2: nothing could be checked.
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
        _print(reports, output.console())
    raise typer.Exit(0 if all(r.ok for r in reports) else 1)


def _print(reports: "list[Report]", console: Console) -> None:
    """Print a table in a terminal, or a line for each report in a pipe; then the problems, and what is counted."""
    if console.is_terminal:
        console.print(_table(reports))
    else:
        for r in reports:
            shares = ", ".join(f"{name} {part}/{whole}" for name, part, whole in _shares(r))
            _line(console, f"{_name(r)}: {_verdict(r)}; {shares}")
    for r in reports:
        for p in r.problems:
            _problem(console, _name(r), p)
    output.paragraph(
        console,
        "\nCounted: diffs that apply and that reverse, patch points that the patched source closes, and patch points "
        "whose source is the recorded one.",
    )


def _table(reports: "list[Report]") -> Table:
    table = Table(box=None, pad_edge=False, title="Patches and source fingerprints", title_justify="left")
    for column in ("release", *(name for name, _, _ in _shares(reports[0])), "result"):
        table.add_column(column, overflow="fold", justify="left" if column in ("release", "result") else "right")
    for r in reports:
        table.add_row(
            escape(_name(r)),
            *(f"[{'green' if part == whole else 'bold red'}]{part}/{whole}[/]" for _, part, whole in _shares(r)),
            f"[{'green' if r.ok else 'bold red'}]{_verdict(r)}[/]",
        )
    return table


def _name(report: "Report") -> str:
    """The release, and the source unless the source is the release's download."""
    from bi_patch.tools.upstream.sources import name_of

    read = report.source.rstrip("/").rsplit("/", 1)[-1]
    release = report.release if report.base == report.release else f"{report.release} as {report.base}"
    name = f"{name_of(report.package)} {release}"
    return name if read == f"{name_of(report.package).lower()}-{report.release}.zip" else f"{name} ({read})"


def _shares(report: "Report") -> list[tuple[str, int, int]]:
    """(name, count, total) of the diffs applied, diffs reversed, seams closed and anchors matched."""
    return [
        ("applied", report.applied, report.patches),
        ("reversed", report.reversed, report.patches),
        ("closed", report.closed, report.seams),
        ("sources", report.matched, report.anchors),
    ]


def _verdict(report: "Report") -> str:
    number = len(report.problems)
    return "fits" if report.ok else f"{number} problem{'' if number == 1 else 's'}"


def _problem(console: Console, name: str, problem: "Problem") -> None:
    _line(console, f"\n{name}, {problem.kind} {problem.seam}".rstrip(), "bold red")
    place = " in ".join(filter(None, (problem.target, problem.file)))
    if place:
        _line(console, f"  at {place}")
    _line(console, problem.message)
    for text in problem.diff.splitlines():
        _line(console, text, {"+": "green", "-": "red", "@": "cyan"}.get(text[:1]))


def _line(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
