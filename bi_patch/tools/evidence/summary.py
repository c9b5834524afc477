"""Short tables of the current files, for readers of pages: ratios of cost, and counts of what was compared.

A ratio is armed / stock. By GPU: the kernels' time alone. By clock: what a user waits, the host's time included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from packaging.version import Version

from bi_patch.tools.evidence import schemes
from bi_patch.tools.evidence.kinds import (
    CAUSES,
    Cost,
    Evidence,
    Faults,
    Invariance,
    Parity,
    faults_caught,
    total_differing,
)
from bi_patch.tools.evidence.store import Table

LONG = 8000  # tokens: a request of more is a long one
MANY = 64  # requests: decode steps of more share a column


class Choice(NamedTuple):
    """The models of a short table for one page. many: with the column of more than MANY requests."""

    models: tuple[str, ...]
    many: bool = True


# The mark's last word, and what summary-cost-h200-WORD shows.
CHOSEN: Mapping[str, Choice] = {
    "headline": Choice(
        (
            "Qwen3-8B",
            "Llama-3.2-1B",
            "Qwen3-30B-A3B, 12 layers",
            "DeepSeek-V2-Lite",
            "Qwen3-Next-80B-A3B, 8 layers",
            "Falcon-H1-7B, 8 layers",
            "Granite-4.0-H-Small, 8 layers",
            "Qwen3-8B W4A16, 6 layers",
            "Qwen3-8B FP8 block, 6 layers",
            "Qwen3-8B, 8 layers, TP 2",
            "Qwen3-30B-A3B, 4 layers, TP 2",
        ),
        many=False,
    ),
    "mla": Choice(("DeepSeek-V2-Lite", "DeepSeek-V3 FP8 block, 4 layers", "DeepSeek-V2-Lite, 6 layers")),
    "trainer": Choice(("Qwen3-1.7B, trainer", "Llama-3.2-1B, trainer")),
}

_GPU = re.compile(r" ?\(GPU\)")
_WORKLOAD = re.compile(r"(decode|prefill) (\d+) x (\d+)(?:/\d+)?$")


def blocks(tables: Mapping[str, Table]) -> dict[str, str]:
    """The Markdown of each summary, by the summary's mark."""
    made = {}
    for mark, table in tables.items():
        if table.kind is Invariance and mark == "invariance-h200" and (text := schemes.compared(table)):
            made[f"summary-{mark}-quantized"] = text
        if table.kind is not Cost:
            continue
        made[f"summary-{mark}"] = _cost(table)
        if text := _in_parts(table):
            made[f"summary-{mark}-parts"] = text
        models = {row.model for row in table.rows}
        for word, choice in CHOSEN.items():
            if mark == "cost-h200" and models.issuperset(choice.models):
                made[f"summary-{mark}-{word}"] = _cost(table, choice)
        if mark == "cost-h200" and (held := schemes.models(table)):
            made[f"summary-{mark}-quantized"] = (
                f"{schemes.markdown(table)}\n\n{_origin(table, held, 'stock and armed / upstream')}"
            )
    for kind, name in ((Invariance, "axes"), (Parity, "lines")):
        if found := [table for table in _distinct(tables) if table.kind is kind]:
            made[f"summary-{kind.kind}"] = _compared(found, name)
            made[f"summary-{kind.kind}-total"] = _total(found)
    if found := [table for table in _distinct(tables) if table.kind is Faults]:
        made["summary-faults"] = _faults(found)
    return made


def _distinct(tables: Mapping[str, Table]) -> list[Table]:
    """Each table once: by device, the newest release first."""
    found = {id(table): table for table in tables.values()}.values()
    newest_first = sorted(found, key=lambda table: Version(table.vllm), reverse=True)
    return sorted(newest_first, key=lambda table: (_device(table.newest.evidence), table.variant))


def _cost(table: Table, choice: Choice | None = None) -> str:
    """Ratios of decode steps and prompts, a row for each model and clock; then a row for each other workload.

    choice: only these models, in this order, and of each the GPU's time where it was measured.
    """
    ratios: dict[tuple[str, str], dict[str, list[float]]] = {}
    others: dict[tuple[str, str], dict[str, float]] = {}
    for row in table.rows:
        value = row.ratio or (row.armed / row.stock if row.armed and row.stock else None)
        if value is None or (choice and row.model not in choice.models):
            continue
        by = "GPU" if _GPU.search(row.workload) else "clock"
        workload = _GPU.sub("", row.workload)
        if column := _column(workload):
            ratios.setdefault((row.model, by), {}).setdefault(column, []).append(value)
        elif not workload.startswith("total"):
            others.setdefault((row.model, workload), {})[by] = value
    if choice:
        ratios, others = _ordered(ratios, choice), others if not ratios else {}
    else:
        ratios = dict(sorted(ratios.items(), key=lambda item: (item[0][0].lower(), item[0][1] != "GPU")))
        others = dict(sorted(others.items(), key=lambda item: item[0][0].lower()))
    parts = [_ratios(ratios, choice is None or choice.many)] if ratios else []
    parts += [_others(others)] if others else []
    return "\n\n".join([*parts, _origin(table, {model for model, _ in (*ratios, *others)})])


def _in_parts(table: Table) -> str:
    """Engines with BI_PATCH_TP_INVARIANT=8 against armed and against stock engines, by the GPU's time; "" for none."""
    ratios: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in table.rows:
        column = _column(_GPU.sub("", row.workload)) if row.parts and _GPU.search(row.workload) else ""
        for against in ("armed", "stock"):
            if column and (base := getattr(row, against)):
                ratios.setdefault((row.model, against), {}).setdefault(column, []).append(row.parts / base)
    if not ratios:
        return ""
    origin = _origin(table, {model for model, _ in ratios}, "armed and stock", "`BI_PATCH_TP_INVARIANT=8`")
    return f"{_ratios(ratios, True, 'against')}\n\n{origin}"


def _ordered(ratios: dict, choice: Choice) -> dict:
    """The rows of the chosen models in their order, by the GPU's time where a model has it."""
    keys = [next((key for key in ((m, "GPU"), (m, "clock")) if key in ratios), None) for m in choice.models]
    return {key: ratios[key] for key in keys if key}


def _column(workload: str) -> str:
    """The column of a workload's ratio, "" for a workload of another kind."""
    if not (found := _WORKLOAD.match(workload)):
        return ""
    kind, requests, tokens = found[1], int(found[2]), int(found[3])
    if kind == "prefill":
        return "prompts"
    if tokens >= LONG:
        return f"{requests} of {tokens:,} tokens"
    return str(requests) if requests <= MANY else "more"


def _ratios(ratios: Mapping[tuple[str, str], Mapping[str, list[float]]], many: bool, second: str = "by") -> str:
    """second: what the second part of a key is."""
    held = {column for row in ratios.values() for column in row} - (set() if many else {"more"})
    numbers = sorted((column for column in held if column.isdigit()), key=int)
    long = sorted(column for column in held if " of " in column)
    columns = [*numbers, *({"more"} & held), *long, *({"prompts"} & held)]
    heads = {"more": "128 or 256"}
    if numbers:
        heads[numbers[0]] = f"decode of {numbers[0]} request{'s' if numbers[0] != '1' else ''}"
    clocks = len({by for _, by in ratios}) > 1
    names = ["model", *([second] if clocks else []), *(heads.get(column, column) for column in columns)]
    lines = [f"| {' | '.join(names)} |", "|---|" + ("---|" if clocks else "") + "--:|" * len(columns)]
    for (model, by), row in ratios.items():
        cells = [_shown(model), *([by] if clocks else []), *(_range(row.get(column)) for column in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _others(others: Mapping[tuple[str, str], Mapping[str, float]]) -> str:
    clocks = [by for by in ("GPU", "clock") if any(by in row for row in others.values())]
    names = clocks if len(clocks) > 1 else ["armed / stock"]
    lines = [f"| model | workload | {' | '.join(names)} |", "|---|---|" + "--:|" * len(clocks)]
    for (model, workload), row in others.items():
        cells = (f"{row[by]:.2f}" if by in row else "-" for by in clocks)
        lines.append(f"| {_shown(model)} | {workload} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(model: str) -> str:
    return schemes.SHOWN.get(model, model)


def _range(values: list[float] | None) -> str:
    if not values:
        return "-"
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return least if least == most else f"{least} to {most}"


def _compared(tables: list[Table], name: str) -> str:
    lines = [
        f"| device | vLLM | model configurations | {name} | positions compared | differing |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for table in tables:
        rows = table.rows
        counts = (len({row.model for row in rows}), len({row.axis for row in rows}))
        sums = f"{sum(row.compared for row in rows):,} | {total_differing(rows)}"
        lines.append(f"| {_device(table.newest.evidence)} | {table.vllm} | {counts[0]} | {counts[1]} | {sums} |")
    return "\n".join(lines)


def _total(tables: list[Table]) -> str:
    rows = [row for table in tables for row in table.rows]
    return f"**{total_differing(rows)} of {sum(row.compared for row in rows):,} positions differ.**"


def _faults(tables: list[Table]) -> str:
    lines = ["| device | vLLM | causes caught and named | refused by name | pairs that differ without a fault |"]
    lines.append("|---|---|--:|--:|--:|")
    for table in tables:
        found = table.newest.evidence
        caught, refused = faults_caught(table.rows)
        compared, differing = found.clean
        device = f"{_device(found)}{f', {found.variant}' if found.variant else ''}"
        clean = f"{differing} of {compared}" if compared else "-"
        lines.append(f"| {device} | {table.vllm} | {caught} of {CAUSES} | {refused} | {clean} |")
    return "\n".join(lines)


def _device(found: Evidence) -> str:
    return {"cpu": "CPU", "cpu-amx": "CPU with AMX"}.get(found.platform, found.platform.upper())


def _origin(table: Table, models: set[str], other: str = "stock", own: str = "Armed") -> str:
    """Device, release and days of the files that supply these models."""
    days = sorted({source.evidence.date for source in table.sources if models & set(source.models)})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{own} / {other} on {table.device}, vLLM {table.vllm}, {when}."
