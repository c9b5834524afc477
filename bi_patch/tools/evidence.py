"""The evidence files: what a run measured, on what, in the forms that README tables and plots are made from."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import msgspec

from bi_patch.errors import BiPatchError
from bi_patch.files import write_json
from bi_patch.tools.verify.engine import Info

RESULTS = Path("benchmarks/results")


class EvidenceMissing(BiPatchError):
    """A table or plot was asked for and no evidence file of its kind is there."""


class CostRow(msgspec.Struct):
    """One workload's time. stock, upstream, armed: medians in `unit`, None where that engine cannot run.

    ratio: the median over repeats of armed / stock, each pair measured back to back. *_range: least and greatest.
    """

    model: str
    workload: str
    unit: str
    stock: float | None
    upstream: float | None
    armed: float | None
    repeats: int
    ratio: float | None = None
    stock_range: tuple[float, float] | None = None
    armed_range: tuple[float, float] | None = None


class InvarianceRow(msgspec.Struct):
    """One axis on one model: positions compared bitwise, how many differ, and words for the first one."""

    model: str
    axis: str
    compared: int
    differing: int
    first: str = ""


class FaultRow(msgspec.Struct):
    """One planted fault. cause: its number in docs/causes.md. planted: its name. caught: its axis saw it.

    named: locate named the module, op and seam that it was planted at. emulated: re-created outside its own kernel.
    axis: the probe that had to see it. located: what locate said. refused: the engine does not start with the feature.
    """

    cause: int
    planted: str
    caught: bool
    named: bool
    axis: str = ""
    emulated: bool = False
    refused: bool = False
    located: str = ""

    @property
    def model(self) -> str:
        return f"{self.cause} {self.planted}"  # what a later run of the same day replaces


class Cost(msgspec.Struct):
    device: str
    vllm: str
    torch: str
    date: str
    rows: list[CostRow]
    threads: int = 0
    note: str = ""


class Invariance(msgspec.Struct):
    device: str
    vllm: str
    torch: str
    date: str
    rows: list[InvarianceRow]
    threads: int = 0
    note: str = ""


class Faults(msgspec.Struct):
    """clean: pairs compared on the same axes without a fault, and how many of them differed."""

    device: str
    vllm: str
    torch: str
    date: str
    rows: list[FaultRow]
    threads: int = 0
    note: str = ""
    clean: tuple[int, int] = (0, 0)


Evidence = TypeVar("Evidence", Cost, Invariance, Faults)
_KINDS = {Cost: "cost", Invariance: "invariance", Faults: "faults"}
CAUSES = 25  # docs/causes.md


def new(kind: type[Evidence], info: Info) -> Evidence:
    """An empty evidence of today for what `info` describes."""
    return kind(info.device, info.vllm, info.torch, datetime.date.today().isoformat(), [], info.threads)


def file_name(evidence: Cost | Invariance | Faults, platform: str) -> str:
    """E.g. cost-2026-11-21-cpu-vllm-0.32.0.json. platform: cpu, h100, ..."""
    release = re.sub(r"[^0-9A-Za-z.]+", "-", evidence.vllm)
    return f"{_KINDS[type(evidence)]}-{evidence.date}-{platform}-vllm-{release}.json"


def write(evidence: Evidence, platform: str, folder: Path = RESULTS) -> Path:
    """Write the file and return its path; `evidence` is left as it is.

    Rows of other models that an earlier file of the day holds are kept in it, when it was measured on the same: another
    device, vLLM, torch or number of threads gets a file of its own, `...-2.json`.
    """
    first = folder / file_name(evidence, platform)
    path, number = first, 1
    while path.exists():
        before = msgspec.json.decode(path.read_bytes(), type=type(evidence))
        if _measured_on(before) == _measured_on(evidence):
            models = {row.model for row in evidence.rows}
            rows = [row for row in before.rows if row.model not in models] + evidence.rows
            evidence = msgspec.structs.replace(evidence, rows=rows, note=evidence.note or before.note)
            break
        number += 1
        path = first.with_name(f"{first.stem}-{number}{first.suffix}")
    write_json(path, evidence)
    return path


def _measured_on(evidence: Evidence) -> tuple[str, str, str, int]:
    return evidence.device, evidence.vllm, evidence.torch, evidence.threads


def platforms(kind: type[Evidence], folder: Path = RESULTS) -> list[str]:
    """The platforms that have files of a kind."""
    pattern = re.compile(rf"{_KINDS[kind]}-\d{{4}}-\d\d-\d\d-(.+?)-vllm-")
    return sorted({m.group(1) for file in folder.glob("*.json") if (m := pattern.match(file.name))})


def newest(kind: type[Evidence], folder: Path = RESULTS, platform: str = "*") -> Evidence:
    """The newest file of a kind. Raises EvidenceMissing."""
    # By stem: the second file of a day comes after the first.
    found = sorted(folder.glob(f"{_KINDS[kind]}-*-{platform}-vllm-*.json"), key=lambda path: path.stem)
    if not found:
        raise EvidenceMissing(f"no {_KINDS[kind]}-*.json in {folder}: run `bi-patch bench` first")
    return msgspec.json.decode(found[-1].read_bytes(), type=kind)


def cost_table(cost: Cost) -> str:
    """Markdown: each workload's time, stock and armed, and their ratio."""
    lines = ["| model | workload | stock | upstream's mode | armed | armed / stock |", "|---|---|--:|--:|--:|--:|"]
    for row in cost.rows:
        times = [_time(value, row.unit) for value in (row.stock, row.upstream, row.armed)]
        value = row.ratio or (row.armed / row.stock if row.armed and row.stock else None)
        ratio = "" if value is None else f"{value:.2f}"
        lines.append(f"| {row.model} | {row.workload} | {' | '.join(times)} | {ratio} |")
    return "\n".join(lines) + "\n\n" + _where(cost)


def invariance_table(invariance: Invariance) -> str:
    """Markdown: axes down, models across; each entry is differing / compared positions."""
    models = list(dict.fromkeys(row.model for row in invariance.rows))
    axes = list(dict.fromkeys(row.axis for row in invariance.rows))
    found = {(row.axis, row.model): f"{row.differing} / {row.compared:,}" for row in invariance.rows}
    lines = [f"| axis | {' | '.join(models)} |", "|---|" + "--:|" * len(models)]
    for axis in axes:
        lines.append(f"| {axis} | {' | '.join(found.get((axis, model), '') for model in models)} |")
    total, differing = sum(r.compared for r in invariance.rows), sum(r.differing for r in invariance.rows)
    return "\n".join(lines) + f"\n\n{differing} of {total:,} positions differ. " + _where(invariance)


def faults_caught(rows: Iterable[FaultRow]) -> tuple[int, int]:
    """How many of the CAUSES known causes have faults that were all caught and named; how many are only refused."""
    planted: dict[int, list[FaultRow]] = {}
    refused = set()
    for row in rows:
        if row.refused:
            refused.add(row.cause)
        else:
            planted.setdefault(row.cause, []).append(row)
    caught = sum(all(r.caught and r.named for r in group) for group in planted.values())
    return caught, len(refused - set(planted))


def faults_table(faults: Faults) -> str:
    """Markdown: each planted fault, the probe that saw it, and the first operation that was named."""
    lines = ["| cause | planted | caught by | named |", "|--:|---|---|---|"]
    for row in faults.rows:
        first = row.located.split("\n")[0].replace("|", "/")
        caught = row.axis if row.caught else "not seen"
        named = "" if not row.caught else first if row.named else f"wrongly: {first}"
        if row.refused:
            caught, named = "refused by name", first
        lines.append(f"| {row.cause} | {row.planted}{' (emulated)' if row.emulated else ''} | {caught} | {named} |")
    caught, refused = faults_caught(faults.rows)
    compared, differing = faults.clean
    text = f"{caught} of {CAUSES} causes caught and named"
    text += f", {refused} more refused by name" if refused else ""
    text += f". Without a fault {differing} of {compared} pairs on the same axes differ." if compared else "."
    return "\n".join(lines) + f"\n\n{text} {_where(faults)}"


def replace_between(text: str, mark: str, table: str) -> str:
    """`text` with what stands between `<!-- mark -->` and `<!-- /mark -->` replaced by `table`.

    Raises EvidenceMissing when the marks are not there.
    """
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    if begin not in text or end not in text:
        raise EvidenceMissing(f"the marks {begin} and {end} are not in the text")
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{table.rstrip()}\n{end}{rest.split(end, 1)[1]}"


def _time(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:,.0f} {unit}" if value >= 100 else f"{value:#.3g} {unit}"


def _where(evidence: Cost | Invariance | Faults) -> str:
    text = f"{evidence.device}, vLLM {evidence.vllm}, torch {evidence.torch}, {evidence.date}."
    return f"{text} {evidence.note}" if evidence.note else text


def total_differing(rows: Iterable[InvarianceRow]) -> int:
    return sum(row.differing for row in rows)
