"""`bi-patch bench` measures the cost of invariance and the matrix of axes and models, and writes evidence files."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from bi_patch.errors import SettingError
from bi_patch.tools import output
from bi_patch.tools.cli import app


@app.command()
def bench(
    cost: Annotated[bool, typer.Option(help="Measure the time of stock and armed engines.")] = True,
    invariance: Annotated[bool, typer.Option(help="Measure armed engines along every axis of verify.")] = True,
    quick: Annotated[bool, typer.Option(help="Two repeats, and only the first model of each part.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Only measurements whose label contains this text; repeatable.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats of each workload.")] = 5,
    results: Annotated[Path, typer.Option(help="Folder of the result files.")] = Path("benchmarks/results"),
    tables: Annotated[
        bool, typer.Option("--tables", help="Measure nothing: print the tables of the newest files and draw the plots.")
    ] = False,
    write: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --tables: renew the tables between the marks of this page, or of README.md and docs/ in this "
            "folder; repeatable."
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="With --tables: say which tables measured this tree's code; exit 1 if README.md or a page under "
            "docs/ shows an older table.",
        ),
    ] = False,
) -> None:
    """Measure cost and invariance.

    Times mean something only on a machine that runs nothing else. Exit code 1: a position differed, or --check found an
    older table.
    """
    from bi_patch.tools import evidence
    from bi_patch.tools.bench import matrix

    console = output.console()
    if (write or check) and not tables:
        raise SettingError("--write and --check need --tables")
    if write and check:
        raise SettingError("--write and --check: choose one")
    if tables:
        _tables(console, results, write or [], check)
        return
    costs, matrix = _chosen(matrix.COST if cost else (), matrix.INVARIANCE if invariance else (), only or [], quick)
    if costs:
        _cost(console, costs, 2 if quick else repeats, results)
    if matrix and evidence.total_differing(_invariance(console, matrix, results)):
        raise typer.Exit(1)


def _chosen(costs, matrix, only: list[str], quick: bool):
    """The chosen measurements of each part. Raises SettingError when none are left or a text of --only matches none."""
    labels = list(dict.fromkeys(spec.label for spec in (*costs, *matrix)))
    if not labels:
        raise SettingError("--no-cost and --no-invariance together leave nothing to measure")
    for text in only:
        if not any(text in label for label in labels):
            raise SettingError(f"--only {text!r} is in no label; the labels are {', '.join(labels)}")
    parts = ([s for s in specs if not only or any(text in s.label for text in only)] for specs in (costs, matrix))
    return tuple(found[:1] if quick else found for found in parts)


def _options(spec, console: Console):
    from bi_patch.tools.models import recipes
    from bi_patch.tools.verify.engine import Options

    folder = recipes.path(spec.model, tell=lambda text: console.print(f"[dim]{escape(text)}[/]"))
    return Options(str(folder), dtype=spec.dtype, eager=spec.eager, max_model_len=3072, chunk=2048)


def _cost(console: Console, specs, repeats: int, results: Path) -> None:
    from bi_patch.tools import evidence
    from bi_patch.tools.bench import cost

    table = output.table(console, "Time of armed vLLM against stock vLLM")
    for column in ("model", "workload", "stock", "upstream", "armed", "armed / stock"):
        table.add_column(column, justify="left" if column in ("model", "workload") else "right")
    for spec in specs:
        with console.status("") as status:
            tell = _shown_by(status)
            rows, info, note = cost.measure(spec.label, _options(spec, console), repeats=repeats, tell=tell)
        found = evidence.new(evidence.Cost, info)
        found.rows, found.note = rows, note
        path = evidence.write(found, results)
        for row in rows:
            colour = "green" if row.ratio <= cost.target(info.platform) else "red"
            table.add_row(
                row.model,
                row.workload,
                *(_ms(v) for v in (row.stock, row.upstream, row.armed)),
                f"[{colour}]{row.ratio:.2f}[/]{' [yellow]noisy[/]' if cost.is_noisy(row) else ''}",
            )
        console.print(f"{spec.label}: {path}", markup=False, soft_wrap=True)
    console.print(table)


def _shown_by(status) -> Callable[[str], None]:
    return lambda text: status.update(escape(text))


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} ms"


def _invariance(console: Console, specs, results: Path) -> list:
    from bi_patch.tools import evidence
    from bi_patch.tools.bench import invariance
    from bi_patch.tools.bench.matrix import LEVEL
    from bi_patch.tools.verify import local

    everything = []
    for spec in specs:
        with console.status("") as status:
            show = _shown_by(status)

            def tell(text: str, show=show) -> None:
                show(text)
                if " differ" in text:
                    console.print(text, highlight=False, markup=False)

            system = local.local(spec.model, LEVEL, dtype=spec.dtype, eager=spec.eager, tell=tell)
            rows, report = invariance.measure(spec.label, system, LEVEL, only=spec.axes, tell=tell)
        found = evidence.new(evidence.Invariance, report)
        found.rows = rows
        path = evidence.write(found, results)
        everything += rows
        console.print(f"{spec.label}: {path}", markup=False, soft_wrap=True)
    differing = evidence.total_differing(everything)
    compared = sum(row.compared for row in everything)
    console.print(f"[bold {'red' if differing else 'green'}]{differing} of {compared:,} positions differ[/]")
    return everything


def _tables(console: Console, results: Path, write: list[Path], check: bool) -> None:
    from bi_patch.tools import evidence
    from bi_patch.tools.bench import plot
    from bi_patch.tools.bench import tables as bench_tables

    found = evidence.current(results)
    made = bench_tables.blocks(found)
    if check:
        _check(found, made, results)
        return
    if not write:
        for mark in bench_tables.distinct(found):
            print(f"## {mark}\n\n{made[mark]}\n")
    for page in (page for given in write for page in _pages(given, made)):
        count = bench_tables.write(page, made)
        console.print(f"{page}: {count} tables renewed", markup=False, soft_wrap=True)
    try:
        for path in bench_tables.draw(found, results):
            console.print(f"{path} drawn", markup=False, soft_wrap=True)
    except plot.PlotsMissing as error:
        console.print(f"No plots: {error}", markup=False, soft_wrap=True)


def _pages(given: Path, made) -> list[Path]:
    """The page itself, or the pages of a source tree that have marks. Raises SettingError for a tree without them."""
    from bi_patch.tools.bench import tables as bench_tables

    if not given.is_dir():
        return [given]
    if found := [page for page in bench_tables.pages(given) if bench_tables.marked(page, made)]:
        return found
    raise SettingError(f"--write {given}: no README.md and no page under docs/ has a mark of a table there")


def _check(found, made, results: Path) -> None:
    """Print which code each table measured, and notices. Exit with 1 when a page shows an older table."""
    from bi_patch.tools import evidence
    from bi_patch.tools.bench import tables as bench_tables

    for mark, table in bench_tables.distinct(found).items():
        for same, words in bench_tables.origins(mark, table):
            print(words if same else f"notice: {words}")
    for path in evidence.superseded(results):
        print(f"notice: {path} supplies no table: newer files hold all its models. Move it to {results / 'archive'}")
    failed = False
    for page in bench_tables.pages(Path()):
        if wrong := bench_tables.outdated(page, made):
            failed = True
            print(f"{page}: these tables are outdated: {', '.join(wrong)}")
    if failed:
        print("Run: bi-patch bench --tables --write .")
    raise typer.Exit(1 if failed else 0)
