"""Renders a table of evidence as Markdown: the rows, and below them device, release, commit and date."""

from __future__ import annotations

from collections.abc import Callable

from bi_patch.tools.evidence.kinds import (
    CAUSES,
    Cost,
    CostRow,
    Evidence,
    FaultRow,
    Faults,
    Invariance,
    InvarianceRow,
    Parity,
    faults_caught,
    total_differing,
)
from bi_patch.tools.evidence.store import Table


def markdown(table: Table) -> str:
    """The table as Markdown, followed by the origin of its rows."""
    return f"{_BODIES[table.kind](table)}\n\n{_origin(table)}"


def _cost(table: Table) -> str:
    lines = ["| model | workload | stock | upstream's mode | armed | armed / stock |", "|---|---|--:|--:|--:|--:|"]
    row: CostRow
    for row in table.rows:
        times = [_time(value, row.unit) for value in (row.stock, row.upstream, row.armed)]
        value = row.ratio or (row.armed / row.stock if row.armed and row.stock else None)
        ratio = "" if value is None else f"{value:.2f}"
        lines.append(f"| {row.model} | {row.workload} | {' | '.join(times)} | {ratio} |")
    return "\n".join([*lines, *_in_parts(table.rows)])


def _in_parts(rows: list[CostRow]) -> list[str]:
    """The lines of a second table, of engines with BI_PATCH_TP_INVARIANT=8; none without such an engine."""
    names = ("armed", "armed, `BI_PATCH_TP_INVARIANT=8`", "/ armed", "/ stock")
    lines = ["", f"| model | workload | {' | '.join(names)} |", f"|---|---|{'--:|' * len(names)}"]
    held = [row for row in rows if row.parts is not None]
    for row in held:
        times = [_time(value, row.unit) for value in (row.armed, row.parts)]
        ratios = [f"{row.parts / base:.2f}" if base else "-" for base in (row.armed, row.stock)]
        lines.append(f"| {row.model} | {row.workload} | {' | '.join([*times, *ratios])} |")
    return lines if held else []


def _invariance(table: Table, name: str = "axis", names: str = "axes") -> str:
    """A table of each model over its axes, then a table of each axis over all models. name, names: of an axis."""
    rows: list[InvarianceRow] = table.rows
    lines = [f"| model | {names} | positions compared | differing |", "|---|--:|--:|--:|"]
    for model, own in _by(rows, lambda row: row.model).items():
        lines.append(f"| {model} | {len({row.axis for row in own})} | {_sums(own)} |")
    lines += ["", f"| {name} | models | positions compared | differing |", "|---|--:|--:|--:|"]
    for axis, own in _by(rows, lambda row: row.axis).items():
        lines.append(f"| {axis} | {len({row.model for row in own})} | {_sums(own)} |")
    compared = sum(row.compared for row in rows)
    return "\n".join(lines) + f"\n\n{total_differing(rows)} of {compared:,} positions differ."


def _parity(table: Table) -> str:
    """As _invariance, over the lines of parity."""
    return _invariance(table, "line", "lines")


def _sums(rows: list[InvarianceRow]) -> str:
    return f"{sum(row.compared for row in rows):,} | {total_differing(rows)}"


def _by(rows: list[InvarianceRow], key: Callable[[InvarianceRow], str]) -> dict[str, list[InvarianceRow]]:
    found: dict[str, list[InvarianceRow]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _faults(table: Table) -> str:
    """Each planted fault, the probe that found the fault, and the first operation that locate named."""
    lines = ["| cause | planted | caught by | named |", "|--:|---|---|---|"]
    rows: list[FaultRow] = table.rows
    for row in rows:
        first = row.located.split("\n")[0].replace("|", "/")
        caught = row.axis if row.caught else "not seen"
        named = "" if not row.caught else first if row.named else f"wrongly: {first}"
        if row.refused:
            caught, named = "refused by name", first
        lines.append(f"| {row.cause} | {row.planted}{' (emulated)' if row.emulated else ''} | {caught} | {named} |")
    caught, refused = faults_caught(rows)
    compared, differing = table.newest.evidence.clean
    text = f"{caught} of {CAUSES} causes caught and named"
    text += f", {refused} more refused by name" if refused else ""
    text += f". Without a fault {differing} of {compared} pairs on the same axes differ." if compared else "."
    return "\n".join(lines) + f"\n\n{text}"


_BODIES = {Cost: _cost, Invariance: _invariance, Parity: _parity, Faults: _faults}


def _time(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:,.0f} {unit}" if value >= 100 else f"{value:#.3g} {unit}"


def _origin(table: Table) -> str:
    """The origin of the rows: device and release, then each file's libraries, date, commit and note."""
    head = f"{table.device}, vLLM {table.vllm}"
    if len(table.sources) == 1:
        return f"{head}, {_made(table.newest.evidence)}." + _note(table.newest.evidence)
    lines = [f"{head}:", ""]
    for source in reversed(table.sources):
        lines.append(f"- {', '.join(source.models)}: {_made(source.evidence)}.{_note(source.evidence)}")
    return "\n".join(lines)


def _made(evidence: Evidence) -> str:
    parts = [f"torch {evidence.torch}"]
    parts += [f"Triton {evidence.triton}"] if evidence.triton else []
    parts += [f"{evidence.threads} threads"] if evidence.threads > 1 else []
    return ", ".join([*parts, evidence.date, commit(evidence)])


def commit(evidence: Evidence) -> str:
    """The commit for readers, e.g. "commit 76a38d8"; a "+" means that the sources differed from the commit."""
    if not evidence.commit:
        return f"bi_patch {evidence.bi_patch}, commit unknown" if evidence.bi_patch else "commit not recorded"
    return f"commit {evidence.commit[:7]}{'+' if evidence.dirty else ''}"


def _note(evidence: Evidence) -> str:
    note = evidence.note.rstrip(".")
    return f" {note[0].upper()}{note[1:]}." if note else ""
