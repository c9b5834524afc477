"""Plots a cost file: the ratio of armed time to stock time for each workload. Needs matplotlib (extra `plots`)."""

from __future__ import annotations

import re
from pathlib import Path

from bi_patch.errors import BiPatchError
from bi_patch.tools.evidence import Cost


class PlotsMissing(BiPatchError):
    """matplotlib is not installed."""


def cost(evidence: Cost, path: Path, target: float) -> None:
    """Write a bar chart with a bar for each model and workload, and a line at `target`, the largest accepted ratio.

    The suffix of `path` chooses the format. Raises PlotsMissing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotsMissing("the plot needs matplotlib: in a clone of bi_patch, run pip install '.[plots]'") from error

    rows = [row for row in evidence.rows if row.ratio is not None]
    models = list(dict.fromkeys(row.model for row in rows))
    loads = list(dict.fromkeys(row.workload for row in rows))
    figure = Figure(figsize=(max(8, 1.05 * len(loads)), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / max(1, len(models))
    for number, model in enumerate(models):
        ratios = {row.workload: row.ratio for row in rows if row.model == model}
        present = [i for i, load in enumerate(loads) if load in ratios]
        places = [i + (number - (len(models) - 1) / 2) * width for i in present]
        bars = axes.bar(places, [ratios[loads[i]] for i in present], width * 0.92, label=model)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axes.axhline(1.0, color="#1d2733", linewidth=1)
    axes.axhline(target, color="#c23b22", linewidth=1, linestyle="--", label=f"target {target:.2f}")
    # Two lines for each name: whole names side by side would overlap.
    axes.set_xticks(range(len(loads)), [_two_lines(load) for load in loads], fontsize=8)
    axes.set_ylabel("time, armed / stock")
    axes.set_title(f"Cost of batch invariance ({evidence.device}, vLLM {evidence.vllm})", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(0, max([target, *(row.ratio for row in rows)]) + 0.35)  # room for the legend
    axes.legend(fontsize=7, ncols=3, frameon=False, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": path.stem}):  # the same rows give the same file
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _two_lines(load: str) -> str:
    """A workload's name, `decode 8 x 1024/128`, broken before its sizes."""
    return re.sub(r" (?=\d+ x )", "\n", load, count=1)
