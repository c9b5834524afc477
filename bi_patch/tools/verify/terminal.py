"""Shows a run's progress and its report in a terminal."""

from __future__ import annotations

import sys

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from bi_patch.tools.verify.measure import Watcher
from bi_patch.tools.verify.report import (
    DIFFERED,
    FAILED,
    LEFT_OUT,
    NOT_APPLICABLE,
    NOT_EXERCISED,
    OUT_OF_TIME,
    PASSED,
    UNSETTLED,
    Axis,
    Report,
)

_COLOURS = {
    PASSED: "green",
    DIFFERED: "bold red",
    NOT_APPLICABLE: "dim",
    LEFT_OUT: "dim",
    NOT_EXERCISED: "yellow",
    OUT_OF_TIME: "yellow",
    FAILED: "bold yellow",
}


class _Left(ProgressColumn):
    """The column with the time left, counted down from the last estimate."""

    def render(self, task: Task) -> Text:
        return Text(f"{_time(task.fields['until'] - (task.elapsed or 0.0))} left" if task.fields["until"] else "")


class Live(Watcher):
    """Shows a progress bar with the time left; without a terminal, prints one line per axis."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            _Left(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=1.0, until=0.0)

    def __enter__(self) -> Live:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def starting(self, what: str, left: float) -> None:
        if self._console.is_terminal:
            self._show(what, left)
        else:
            self._console.print(f"{what}: about {_time(left)} to the end of this run", highlight=False)

    def measuring(self, axis: Axis, left: float) -> None:
        self._show(f"{axis.name} [dim]({axis.pairs} pairs, {axis.differing} positions differ)[/]", left)

    def settled(self, axis: Axis, left: float) -> None:
        self._show(axis.name, left)
        if axis.state == LEFT_OUT:
            return
        self._console.print(_line(axis), highlight=False, soft_wrap=True)

    def _show(self, what: str, left: float) -> None:
        task = self._progress.tasks[self._task]
        elapsed = task.elapsed or 0.0
        until = max(elapsed + left, 0.1)
        self._progress.update(self._task, description=what, until=until, completed=elapsed / until)


def distance(largest: float) -> str:
    """The largest difference of a logprob in a table. A logprob of minus infinity in one answer is infinitely far."""
    return "0" if not largest else "inf" if largest >= sys.float_info.max else f"{largest:.1e}"


def summary(report: Report) -> RenderableType:
    """The table of axes, the first pairs that differ, the axes without a result, and the verdict."""
    table = Table(
        title="Positions compared bitwise", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    table.add_column("axis")
    for name in ("compared", "differing", "largest", "ulps", "seconds", "start"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("result")
    table.columns[0].no_wrap = True
    for axis in report.axes:
        if axis.compared:
            table.add_row(
                axis.name,
                f"{axis.compared:,}",
                f"{axis.differing:,}",
                distance(axis.largest),
                f"{axis.ulps:,}",
                f"{axis.seconds:.1f}",
                f"{axis.starting:.1f}" if axis.starting else "",
                _state(axis),
            )
    nothing = report.stopped and not any(axis.compared for axis in report.axes)  # then the verdict says all
    parts: list[RenderableType] = [] if nothing else [table]
    for axis in report.axes:
        if axis.shown:
            parts.append(Text(f"\n{axis.name}: where bits differ", style="bold"))
            for pair in axis.shown[:3]:
                parts.append(Text(f"  {pair.first}"))
                if pair.located:
                    parts.append(Text(f"  first operation that differs: {pair.located}", style="bold red"))
    without = [axis for axis in report.axes if not axis.compared or axis.state in UNSETTLED]
    parts += _aside([axis for axis in without if not nothing or axis.state == FAILED])
    if report.failure:
        parts.append(Text(f"\n{report.failure.rstrip()}", style="dim"))
    colour = {0: "green", 1: "bold red", 2: "bold yellow"}[report.exit_code]
    parts.append(Text.from_markup(f"\n[{colour}]Verdict.[/] {escape(' '.join(report.verdict))}"))
    what = (
        report.device,
        report.vllm and f"vLLM {report.vllm}",
        report.torch and f"torch {report.torch}",
        f"{report.seconds:.0f} s",
        f"engine starts: {report.starts} ({report.starting:.0f} s)" if report.mode != "server" else "",
        report.provenance and f"bi_patch {report.provenance.words()}",
    )
    parts.append(Text(", ".join(filter(None, what)), style="dim"))
    return Group(*parts)


def plain(report: Report, width: int = 110) -> str:
    """The summary as text without colours, for a log or the message of a failed test."""
    console = Console(width=width, no_color=True, force_terminal=False, record=True, file=_Nowhere())
    console.print(summary(report))
    return console.export_text()


class _Nowhere:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def _aside(axes: list[Axis]) -> list[RenderableType]:
    """The axes without a result; axes with the same reason share a line."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for axis in axes:
        grouped.setdefault((axis.state, axis.reason), []).append(axis.name)
    lines: list[RenderableType] = [Text("")] if grouped else []
    for (state, reason), names in grouped.items():
        why = f": {reason}" if reason else ""
        lines.append(Text.assemble((f"{state}: ", _COLOURS.get(state, "yellow")), ", ".join(names), (why, "dim")))
    return lines


def _line(axis: Axis) -> Text:
    counted = f"{axis.differing:,} of {axis.compared:,} positions differ" if axis.compared else ""
    text = "; ".join(filter(None, (counted, axis.reason)))
    return Text.assemble(("  " + axis.state, _COLOURS.get(axis.state, "")), f"  {axis.name}  ", (text, "dim"))


def _state(axis: Axis) -> Text:
    return Text(axis.state, style=_COLOURS.get(axis.state, "yellow"))


def _time(seconds: float) -> str:
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 100 else f"{whole // 60}:{whole % 60:02d} min"
