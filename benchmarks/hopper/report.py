"""Makes result files from the files of child.py and of `bi-patch verify --json`.

    PYTHONPATH=. python3 benchmarks/hopper/report.py FILE.json... [--results FOLDER] [--command TEXT] [--note TEXT]

The files may be of several models and modes, but of one device, with the same libraries and the same digest of
bi_patch. Costs of child.py become cost-*.json; reports of verify become invariance-*.json. The model of a report is the
name of the folder that was verified.
"""

import argparse
import importlib.metadata
import statistics
import sys
from pathlib import Path

import bi_patch_entry

bi_patch_entry.without_arming()  # this process only reads files

import msgspec  # noqa: E402

from bi_patch.tools import evidence  # noqa: E402
from bi_patch.tools.bench import invariance  # noqa: E402
from bi_patch.tools.models import shapes  # noqa: E402
from bi_patch.tools.provenance import Provenance  # noqa: E402
from bi_patch.tools.verify import report as verify  # noqa: E402

MODES = ("stock", "upstream", "armed")
# What bursts.py measures on each rank, a wait for another rank included: of the ranks, the least waited least.
OF_RANKS = ("outside_ms", "gpu_prefill_s")


class Costs(msgspec.Struct):
    """A file of child.py: one engine's repeats, each with its workload and times."""

    model: str
    mode: str
    device: str
    vllm: str
    torch: str
    threads: int
    provenance: Provenance
    cost: list[dict]


def load(path: Path) -> Costs | verify.Report:
    """Read a file of child.py or a report of verify. Exits for another file, and for a report that is no evidence."""
    try:
        if "axes" not in msgspec.json.decode(path.read_bytes(), type=dict):
            return of_ranks(msgspec.json.decode(path.read_bytes(), type=Costs), path)
        found = verify.read(path)
    except (OSError, msgspec.DecodeError, ValueError) as error:
        sys.exit(f"{path} is neither a file of child.py nor a report of verify: {error}")
    if found.mode != "armed" or found.provenance is None:
        sys.exit(f"{path}: only the report of an armed engine is evidence; this report's engine was {found.mode}")
    if not found.compared:
        sys.exit(f"{path}: nothing was compared: {found.stopped}")
    return found


def of_ranks(run: Costs, path: Path) -> Costs:
    """The times of rank 0, with the least of all ranks where a rank's time holds waits. Other ranks' files lie beside
    the file of rank 0 (peers.fork)."""
    held = {(row["workload"], row["repeat"]): row for row in run.cost}
    for beside in sorted(path.parent.glob(f"{path.name}.rank*[0-9]")):
        for row in msgspec.json.decode(beside.read_bytes(), type=Costs).cost:
            own = held.get((row["workload"], row["repeat"]), {})
            own |= {field: min(own[field], row[field]) for field in OF_RANKS if field in own and field in row}
    for row in run.cost:
        if "graph_ms" in row:
            row["gpu_ms"] = row["gpu_typical_ms"] = row["graph_ms"] + row["outside_ms"]
    return run


def measured_on(run: Costs | verify.Report) -> tuple[str, str, str, str]:
    return run.device, run.vllm, run.torch, run.provenance.digest


def cost_rows(runs: list[Costs]) -> list[evidence.CostRow]:
    """One row per model, workload and quantity: medians over the repeats, decode in ms per step, others in s.

    (GPU): the time of the kernels alone, from a profile of one repeat.
    """
    times: dict[tuple, dict[str, list[float]]] = {}
    for run in runs:
        for row in run.cost:
            if "gpu_ms" in row:  # files of before hold the mean of the steps alone
                row.setdefault("gpu_typical_ms", row["gpu_ms"])
            for name, unit, field in quantities(row["workload"]):
                if field in row:
                    times.setdefault((run.model, name, unit), {}).setdefault(run.mode, []).append(row[field])
    return [cost_row(*key, modes) for key, modes in times.items()]


def quantities(workload: str) -> list[tuple[str, str, str]]:
    """What tables show of a workload, if its rows have it: the row's name, the unit, the field of the engine's file.

    The short prefill of few requests, and their total, are no rows of their own.
    """
    found = [(workload, "s", "seconds"), (f"{workload} (GPU)", "s", "gpu_seconds")]
    found += [(f"decode {workload}", "ms/step", "decode_ms"), (f"decode (GPU) {workload}", "ms/step", "gpu_typical_ms")]
    number = workload.partition(" x ")[0]
    many = number.isdecimal() and int(number) > 64
    if many or workload.partition("/")[0] in ("8 x 1024", "2 x 32000"):
        found += [(f"prefill {workload}", "s", "prefill_s"), (f"prefill (GPU) {workload}", "s", "gpu_prefill_s")]
    return found + ([(f"total {workload}", "s", "total_s")] if many else [])


def cost_row(model: str, workload: str, unit: str, times: dict[str, list[float]]) -> evidence.CostRow:
    """One row. times: the times of all repeats, by mode, in the same order."""
    median = {mode: round(statistics.median(values), 5) for mode, values in times.items()}
    span = {mode: (round(min(values), 5), round(max(values), 5)) for mode, values in times.items()}
    pairs = list(zip(times.get("armed", ()), times.get("stock", ()), strict=False))
    return evidence.CostRow(
        model,
        workload,
        unit,
        *(median.get(mode) for mode in MODES),
        repeats=min(map(len, times.values())),
        ratio=round(statistics.median(armed / stock for armed, stock in pairs), 4) if pairs else None,
        parts=median.get("parts"),
        stock_range=span.get("stock"),
        armed_range=span.get("armed"),
    )


def model_of(report: verify.Report) -> str:
    folder = Path(report.system).name
    return {shapes.short(name): name for name in shapes.SHAPES}.get(folder, folder)


def holes(reports: list[verify.Report]) -> str:
    """The note's text about positions and axes that the reports could not measure."""
    return ". ".join(
        f"{model_of(found)}: {hole.rstrip('.')}" for found in reports for hole in invariance.unmeasured(found)
    )


def write(kind, runs: list, rows: list, note: str, a: argparse.Namespace) -> Path:
    """Write the result file of these runs; returns its path. Without --command, it records the runs' own commands."""
    commands = "; ".join(dict.fromkeys(run.provenance.command for run in runs))
    made_by = msgspec.structs.replace(runs[-1].provenance, command=a.command or commands)
    found = evidence.new(kind, runs[-1], made_by)
    if isinstance(runs[-1], verify.Report):
        found.date, _, found.time = runs[-1].date.partition("T")
    if importlib.metadata.version("torch") != runs[-1].torch:
        found.triton = ""  # Triton here is not the one that ran, which the files do not name
    found.rows, found.note = rows, ". ".join(filter(None, (a.note, note)))
    return evidence.write(found, a.results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, default=evidence.RESULTS)
    parser.add_argument("--command", default="", help="the command to record in place of the files' own commands")
    parser.add_argument("--note", default="", help="a sentence for the result files")
    a = parser.parse_args()
    runs = [load(path) for path in a.files]
    if len({measured_on(run) for run in runs}) != 1:
        sys.exit(f"the files are not of one device, release and bi_patch: {sorted(set(map(measured_on, runs)))}")
    costs = [run for run in runs if isinstance(run, Costs)]
    reports = [run for run in runs if isinstance(run, verify.Report)]
    if rows := cost_rows(costs):
        print(write(evidence.Cost, costs, rows, "", a))
        for row in rows:
            print(f"{row.model}: {row.workload}: armed / stock {row.ratio or '-'}")
    if rows := [row for found in reports for row in invariance.rows(model_of(found), found)]:
        print(write(evidence.Invariance, reports, rows, holes(reports), a))
        print(f"{evidence.total_differing(rows)} of {sum(row.compared for row in rows):,} positions differ")


if __name__ == "__main__":
    main()
