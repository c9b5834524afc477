"""Turns the JSON files of child.py into the evidence files, a table and a plot.

    PYTHONPATH=.:$PYTHONPATH python3 benchmarks/hopper/report.py TAG DATE [--results FOLDER] FILE.json...

writes benchmarks/results/*-DATE-TAG-vllm-*.json.

TAG names the device, e.g. h100. Files of all models and modes may be given together, also reports of `bi-patch verify`,
whose model is their target's folder; devices and releases must agree.
Rows of other models that an earlier run of the same day left in the evidence files are kept.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import bi_patch_entry

bi_patch_entry.without_arming()  # this process only reads files

from bi_patch.tools.models import shapes  # noqa: E402

MODES = ("stock", "upstream", "armed")


def load(paths: list[str]) -> list[dict]:
    runs = [as_run(json.loads(Path(path).read_text())) for path in paths]
    found = {(run["device"], run["vllm"], run["torch"]) for run in runs}
    if len(found) != 1:
        sys.exit(f"the files are not of one device and release: {sorted(found)}")
    return runs


def as_run(found: dict) -> dict:
    """A report of `bi-patch verify` in the form of child.py's files; the latter as they are."""
    if "axes" not in found:
        return found
    rows = [
        {"axis": axis["name"], "compared": axis["compared"], "differing": axis["differing"], "note": axis["reason"]}
        for axis in found["axes"]
        if axis["compared"]
    ]
    kept = {name: found[name] for name in ("mode", "device", "vllm", "torch")}
    folder = Path(found["target"]).name
    names = {shapes.short(name): name for name in shapes.SHAPES}
    return kept | {"model": names.get(folder, folder), "cost": [], "matrix": rows}


def cost_rows(runs: list[dict]) -> list[dict]:
    """One row a model and workload: medians over the repeats; decode in ms a step, throughput and prefill in s."""
    times: dict[tuple, dict[str, list[float]]] = {}
    for run in runs:
        for row in run["cost"]:
            name = row["workload"]
            number = int(name.split(" ")[0])
            wanted = [("total", "s", "total_s"), ("prefill", "s", "prefill_s")] if number > 64 else []
            wanted += [] if number > 64 else [("decode", "ms/step", "decode_ms")]
            wanted += [("decode (GPU)", "ms/step", "gpu_ms")] if "gpu_ms" in row else []
            wanted += [("prefill", "s", "prefill_s")] if name in ("8 x 1024/128", "2 x 32000/64") else []
            for what, unit, field in wanted:
                key = (run["model"], f"{what} {name}", unit)
                times.setdefault(key, {}).setdefault(run["mode"], []).append(row[field])
    rows = []
    for (model, workload, unit), modes in times.items():
        median = {mode: statistics.median(modes[mode]) if mode in modes else None for mode in MODES}
        row = {"model": model, "workload": workload, "unit": unit}
        row |= {mode: median[mode] and round(median[mode], 4) for mode in MODES}
        row["repeats"] = min(len(values) for values in modes.values())
        row["ratio"] = round(median["armed"] / median["stock"], 4) if median["armed"] and median["stock"] else None
        for mode in ("stock", "armed"):
            row[f"{mode}_range"] = [round(f(modes[mode]), 4) for f in (min, max)] if mode in modes else None
        rows.append(row)
    return rows


def invariance_rows(runs: list[dict]) -> list[dict]:
    return [
        {
            "model": run["model"],
            "axis": row["axis"],
            "compared": row["compared"],
            "differing": row["differing"],
            "first": row.get("note", ""),
        }
        for run in runs
        if run["mode"] == "armed"
        for row in run["matrix"]
    ]


def merged(path: Path, head: dict, rows: list[dict]) -> dict:
    """The evidence file: `rows` after the rows of other models that `path` already holds, and its note."""
    models = {row["model"] for row in rows}
    held = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    kept = [row for row in held["rows"] if row["model"] not in models]
    return {**held, **head, "rows": kept + rows}


def table(rows: list[dict]) -> str:
    lines = ["| model | workload | unit | stock | upstream | armed | armed / stock |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["model"], row["workload"], row["unit"], row["stock"], row["upstream"], row["armed"], row["ratio"]]
        texts = ["" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else cell for cell in cells]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag")
    parser.add_argument("date")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    a = parser.parse_args()
    runs = load(a.files)
    head = {"device": runs[0]["device"], "vllm": runs[0]["vllm"], "torch": runs[0]["torch"], "date": a.date}
    end = f"{a.date}-{a.tag}-vllm-{head['vllm']}"
    a.results.mkdir(parents=True, exist_ok=True)
    costs, matrix = cost_rows(runs), invariance_rows(runs)
    if costs:
        path = a.results / f"cost-{end}.json"
        found = merged(path, head, costs)
        path.write_text(json.dumps(found, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(found["rows"]) + "\n")
        print(table(found["rows"]))
        draw(found, path.with_suffix(".svg"), a.tag)
    if matrix:
        path = a.results / f"invariance-{end}.json"
        path.write_text(json.dumps(merged(path, head, matrix), indent=1) + "\n")
        print(f"{sum(r['compared'] for r in matrix)} positions, {sum(r['differing'] for r in matrix)} differing")


def draw(found: dict, picture: Path, tag: str) -> None:
    """The plot, where the packages for it are installed."""
    try:
        import msgspec

        from bi_patch.tools.bench import cost, plot
        from bi_patch.tools.evidence import Cost

        plot.cost(msgspec.convert(found, Cost), picture, cost.target(tag))
    except (ImportError, RuntimeError) as error:
        print(f"no plot: {error}")


if __name__ == "__main__":
    main()
