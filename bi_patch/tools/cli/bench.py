"""`bi-patch bench`: what invariance costs, and the matrix of axes and models, written as evidence files."""

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
    cost: Annotated[bool, typer.Option(help="Measure time, stock against armed.")] = True,
    invariance: Annotated[bool, typer.Option(help="Measure the matrix of axes and models, armed.")] = True,
    quick: Annotated[bool, typer.Option(help="Two repeats, and only the first model of each part.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Only measurements whose label contains this; repeatable.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats of each workload.")] = 5,
    results: Annotated[Path, typer.Option(help="Folder of the evidence files.")] = Path("benchmarks/results"),
    tables: Annotated[
        bool, typer.Option("--tables", help="Measure nothing: print the tables of the newest files, draw the plot.")
    ] = False,
    readme: Annotated[Path | None, typer.Option(help="With --tables: put them between this file's marks.")] = None,
) -> None:
    """Measure cost and invariance. Exit 1 when a position differed; times are only meant for a quiet machine."""
    from bi_patch.tools import evidence
    from bi_patch.tools.bench import matrix

    console = output.console()
    if tables:
        _tables(console, results, readme)
        return
    if readme is not None:
        raise SettingError("--readme goes with --tables")
    costs, matrix = _chosen(matrix.COST if cost else (), matrix.INVARIANCE if invariance else (), only or [], quick)
    if costs:
        _cost(console, costs, 2 if quick else repeats, results)
    if matrix and evidence.total_differing(_invariance(console, matrix, results)):
        raise typer.Exit(1)


def _chosen(costs, matrix, only: list[str], quick: bool):
    """What is measured of each part. Raises SettingError when that is nothing, or a text of --only matches nothing."""
    labels = list(dict.fromkeys(spec.label for spec in (*costs, *matrix)))
    if not labels:
        raise SettingError("--no-cost and --no-invariance leave nothing to measure")
    for text in only:
        if not any(text in label for label in labels):
            raise SettingError(f"--only {text!r} is in no label; there are {', '.join(labels)}")
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

    table = output.table(console, "Time of armed over stock vLLM")
    for column in ("model", "workload", "stock", "upstream", "armed", "armed / stock"):
        table.add_column(column, justify="left" if column in ("model", "workload") else "right")
    for spec in specs:
        with console.status("") as status:
            tell = _shown_by(status)
            rows, info, note = cost.measure(spec.label, _options(spec, console), repeats=repeats, tell=tell)
        found = evidence.new(evidence.Cost, info)
        found.rows, found.note = rows, note
        path = evidence.write(found, info.platform, results)
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
    from bi_patch.tools.verify import probes

    everything = []
    for spec in specs:
        axes = {"own": probes.OWN_PROBES, "cross": probes.CROSS_PROBES} if spec.cross else {"own": (), "cross": ()}
        with console.status("") as status:
            show = _shown_by(status)

            def tell(text: str, show=show) -> None:
                show(text)
                if " differ" in text:
                    console.print(text, highlight=False, markup=False)

            rows, info = invariance.measure(spec.label, _options(spec, console), **axes, tell=tell)
        found = evidence.new(evidence.Invariance, info)
        found.rows = list(rows)
        path = evidence.write(found, info.platform, results)
        everything += rows
        console.print(f"{spec.label}: {path}", markup=False, soft_wrap=True)
    differing = evidence.total_differing(everything)
    compared = sum(row.compared for row in everything)
    console.print(f"[bold {'red' if differing else 'green'}]{differing} of {compared:,} positions differ[/]")
    return everything


def _tables(console: Console, results: Path, readme: Path | None) -> None:
    from bi_patch.tools import evidence
    from bi_patch.tools.bench import cost, plot

    made = {}
    for platform in evidence.platforms(evidence.Cost, results):
        found = evidence.newest(evidence.Cost, results, platform)
        made[f"cost-{platform}"] = evidence.cost_table(found)
        plot.cost(found, results / f"cost-{platform}.svg", cost.target(platform))
    for platform in evidence.platforms(evidence.Invariance, results):
        found = evidence.newest(evidence.Invariance, results, platform)
        made[f"invariance-{platform}"] = evidence.invariance_table(found)
    if not made:
        raise SettingError(f"--results {results} holds no cost-*.json and no invariance-*.json")
    if readme is None:
        for text in made.values():
            print(text, end="\n\n")
        return
    text = readme.read_text(encoding="utf-8")
    wanted = [mark for mark in made if f"<!-- {mark} -->" in text]  # a file shows the tables that it has marks for
    if not wanted:
        marks = ", ".join(f"<!-- {mark} -->" for mark in made)
        raise SettingError(f"--readme {readme} has no mark of a table that there is: {marks}")
    for mark in wanted:
        text = evidence.replace_between(text, mark, made[mark])
    readme.write_text(text, encoding="utf-8")
    console.print(f"{readme}: {len(wanted)} tables renewed; plots drawn in {results}", markup=False, soft_wrap=True)
