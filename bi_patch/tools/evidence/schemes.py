"""Tables of quantized weights: each scheme's cost beside stock vLLM and beside upstream's mode, holes included; and
the axes of verify in which few layers with each scheme were compared."""

from __future__ import annotations

import re

from bi_patch.tools.evidence.store import Table

MISSING, STOPS = "not measured", "stops"
# Models at which upstream's mode stops with an error, so its time cannot be measured.
UPSTREAM_STOPS = ("Qwen3-8B AWQ, 6 layers", "Qwen3-8B NVFP4, 6 layers", "Qwen3-30B-A3B NVFP4 experts, 6 layers")
# The models whose rows the table has, in this order, with or without a measurement.
MODELS = (
    "Qwen3-8B FP8 block, 6 layers",
    "Qwen3-8B FP8 channel, 6 layers",
    "Qwen3-8B FP8 tensor, 6 layers",
    "Qwen3-8B FP8 static, 6 layers",
    "Qwen3-8B INT8, 6 layers",
    "Qwen3-8B AWQ, 6 layers",
    "Qwen3-8B GPTQ, 6 layers",
    "Qwen3-8B W4A16, 6 layers",
    "Qwen3-8B W8A16, 6 layers",
    "Qwen3-8B NVFP4, 6 layers",
    "Qwen3-8B FP8 KV cache, 6 layers",
    "Qwen3-30B-A3B FP8 block experts, 6 layers",
    "Qwen3-30B-A3B FP8 channel experts, 6 layers",
    "Qwen3-30B-A3B W4A16 experts, 6 layers",
    "Qwen3-30B-A3B NVFP4 experts, 6 layers",
    "gpt-oss-20b MXFP4, 6 layers",
    "DeepSeek-V3 FP8 block, 4 layers",
)
# Models whose label in the newest file leaves out what decides their time.
SHOWN = {
    "DeepSeek-V2-Lite, 6 layers": "DeepSeek-V2-Lite, 6 layers, BI_PATCH_MLA=one",
}
_COLUMNS = ("1", "8", "64", "128 or 256", "prompts")
_HEADS = ("decode of 1 request", *_COLUMNS[1:])
_OTHERS = {"stock": "stock", "upstream": "upstream's mode"}
_WORKLOAD = re.compile(r"(decode|prefill) \(GPU\) (\d+) x (\d+)/")
_LONG = 8000  # tokens: requests of more have no column


def markdown(table: Table) -> str:
    """The table: armed / other, by the GPU's time, for each model and each of the two others. table: of costs."""
    lines = [f"| model | against | {' | '.join(_HEADS)} |", "|---|---|" + "--:|" * len(_HEADS)]
    for model in MODELS:
        rows = {name: _ratios(table, model, field) for field, name in _OTHERS.items()}
        if not any(rows.values()):
            rows = {" and ".join(rows): {}}
        for name, found in rows.items():
            hole = STOPS if model in UPSTREAM_STOPS and name == _OTHERS["upstream"] else MISSING
            cells = (_range(found[column]) if column in found else hole for column in _COLUMNS)
            lines.append(f"| {SHOWN.get(model, model)} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def models(table: Table) -> set[str]:
    """The models of the table that a file has measured."""
    return {row.model for row in table.rows} & set(MODELS)


def _ratios(table: Table, model: str, other: str) -> dict[str, list[float]]:
    """By column: the ratios of a model's armed times and those of the other mode."""
    found: dict[str, list[float]] = {}
    for row in table.rows:
        time, workload = getattr(row, other), _WORKLOAD.match(row.workload)
        if row.model != model or workload is None or not time or not row.armed or int(workload[3]) >= _LONG:
            continue
        ratio = row.ratio if other == "stock" and row.ratio else row.armed / time
        found.setdefault(_column(workload[1], int(workload[2])), []).append(ratio)
    return found


def _column(kind: str, requests: int) -> str:
    return "prompts" if kind == "prefill" else str(requests) if requests <= 64 else "128 or 256"


def _range(values: list[float]) -> str:
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return least if least == most else f"{least} to {most}"


BATCH = ("batch size", "mixed lengths", "co-batch contents", "prefix cache", "chunk budget", "decode = prefill")
_FEW_LAYERS = re.compile(r"(.+), 2 layers(?:, (eager|compiled)(?:, prompts dequantized)?)?$")
_SCHEME = re.compile(r"FP8|FP4|INT8|AWQ|GPTQ|W[48]A16|AutoRound")
_EAGER, _GRAPHS, _BOTH = "eager", "compiled", "eager and compiled"


def compared(table: Table) -> str:
    """What the newest files compared of two layers with quantized weights: a row for each model. "" without a model.

    table: of invariance. A number counts axes of BATCH. A mode is named where its newest file has the axis.
    """
    held: dict[str, dict[str, set[str]]] = {}
    for row in table.rows:
        found = _FEW_LAYERS.match(row.model)
        if found and _SCHEME.search(found[1]) and row.compared and not row.differing:
            held.setdefault(found[1], {}).setdefault(found[2] or _GRAPHS, set()).add(row.axis)
    if not held:
        return ""
    lines = [
        "| model | axes in eager mode | axes compiled | compiled against eager | preemption | restart |",
        "|---|--:|--:|---|---|---|",
    ]
    for model, modes in sorted(held.items(), key=lambda item: item[0].lower()):
        counts = [len(modes.get(mode, set()) & {*BATCH}) for mode in (_EAGER, _GRAPHS)]
        cells = [f"{count} of {len(BATCH)}" if count else "-" for count in counts]
        cells.append("yes" if _BOTH in set().union(*modes.values()) else "-")
        for axis in ("preemption", "restart"):
            cells.append(", ".join(mode for mode in (_EAGER, _GRAPHS) if axis in modes.get(mode, ())) or "-")
        lines.append(f"| {' | '.join([model, *cells])} |")
    return "\n".join(lines)
