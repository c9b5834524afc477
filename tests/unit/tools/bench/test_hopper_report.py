"""benchmarks/hopper: costs and verify's reports become result files; the arguments of the scripts."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import msgspec
import pytest

from bi_patch.tools import evidence
from bi_patch.tools.provenance import Provenance
from bi_patch.tools.verify import report as verify

ROOT = Path(__file__).resolve().parents[4]
HOPPER = ROOT / "benchmarks" / "hopper"
MADE_BY = Provenance("0.2.0", "c" * 40, "d" * 64, "child.py")


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script as `python script arguments` does, in this process: another one would import torch again."""
    command = [str(HOPPER / script), *map(str, arguments)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", command),
        mock.patch.object(sys, "path", [str(HOPPER), *sys.path]),
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def report(folder: Path, *arguments: object) -> list[Path]:
    """The result files that exist after the call, in order."""
    done = run("report.py", *arguments, "--results", folder / "results")
    assert not done.returncode, done.stderr
    return sorted((folder / "results").iterdir())


def costs(folder: Path, model: str, **times: float) -> list[Path]:
    """Files like those of child.py for one decode workload. times: milliseconds per step, by mode."""
    files = []
    for mode, ms in times.items():
        row = {"workload": "1 x 512/128", "repeat": 0, "total_s": 1.0, "prefill_s": 0.1, "decode_ms": ms}
        found = {"model": model, "mode": mode, "device": "NVIDIA H100", "vllm": "0.33.0", "torch": "2.11", "threads": 1}
        found |= {"provenance": msgspec.to_builtins(MADE_BY), "eager": False, "cost": [row] * 2}
        files.append(folder / f"{model}-{mode}.json")
        files[-1].write_text(json.dumps(found))
    return files


def verified(folder: Path, model: str, **changes) -> Path:
    """A report like that of `bi-patch verify --json`."""
    axes = [
        verify.Axis("restart", "", state=verify.PASSED, compared=5, pairs=1),
        verify.Axis("LoRA", "", state=verify.NOT_APPLICABLE, reason="no adapter"),
        verify.Axis("prefix cache", "", state=verify.NOT_EXERCISED, reason="no hits"),
    ]
    found = verify.Report(f"/models/{model}", "armed", "quick", "2026-01-01T00:00:00", axes)
    found.device, found.vllm, found.torch, found.threads = "NVIDIA H100", "0.33.0", "2.11", 1
    found.provenance = msgspec.structs.replace(MADE_BY, command="bi-patch verify")
    path = folder / f"{model}-verify.json"
    verify.write(msgspec.structs.replace(found, **changes), path)
    return path


def test_costs_become_rows_with_ratios(tmp_path):
    (path,) = report(tmp_path, *costs(tmp_path, "one", armed=2.0))
    found = evidence.read(path, evidence.Cost)
    assert path.name == f"cost-{found.date}-h100-vllm-0.33.0.json"
    assert [(row.model, row.armed, row.stock, row.ratio) for row in found.rows] == [("one", 2.0, None, None)]
    assert (found.commit, found.digest, found.command) == (MADE_BY.commit, MADE_BY.digest, "child.py")
    report(tmp_path, *costs(tmp_path, "one", armed=2.0, stock=4.0, upstream=5.0))
    (row,) = evidence.read(path, evidence.Cost).rows
    assert (row.workload, row.unit, row.upstream, row.ratio) == ("decode 1 x 512/128", "ms/step", 5.0, 0.5)
    assert row.repeats == 2 and row.armed_range == (2.0, 2.0) and row.parts is None
    report(tmp_path, *costs(tmp_path, "one", armed=2.0, stock=4.0, parts=2.5))
    (row,) = evidence.read(path, evidence.Cost).rows
    assert (row.armed, row.parts, row.ratio) == (2.0, 2.5, 0.5)


def test_the_rows_of_a_workload(tmp_path):
    row = {"workload": "256 x 512/128", "repeat": 0, "total_s": 3.0, "prefill_s": 1.0, "decode_ms": 2.0, "gpu_ms": 1.5}
    extra = {"workload": "prefill 8 x 1000", "repeat": 0, "seconds": 0.25, "gpu_seconds": 0.125}
    files = costs(tmp_path, "one", armed=2.0, stock=4.0)
    for file in files:
        held = json.loads(file.read_text())
        times = [{"decode_ms": n * (1 + (held["mode"] == "stock"))} for n in (1.0, 2.0, 9.0)]
        held["cost"] = [row | {"gpu_prefill_s": 0.5}, *(row | time for time in times), extra]
        file.write_text(json.dumps(held))
    (path,) = report(tmp_path, *files)
    rows = {row.workload: row for row in evidence.read(path, evidence.Cost).rows}
    assert set(rows) == {
        *(f"{what} 256 x 512/128" for what in ("decode", "decode (GPU)", "prefill", "prefill (GPU)", "total")),
        *("prefill 8 x 1000", "prefill 8 x 1000 (GPU)"),
    }
    assert rows["prefill (GPU) 256 x 512/128"].repeats == 1 and rows["prefill 8 x 1000"].unit == "s"
    assert rows["decode 256 x 512/128"].ratio == 0.5  # the median over pairs of 2 / 2, 1 / 2, 2 / 4 and 9 / 18


def test_a_wait_of_one_rank_for_another_is_no_time_of_the_gpu(tmp_path):
    files = costs(tmp_path, "a", stock=10.0, armed=9.0)
    for file, own, other in zip(files, (5.0, 1.0), (2.0, 4.0), strict=True):
        found = json.loads(file.read_text())
        for rank, outside in ((file, own), (Path(f"{file}.rank1"), other)):
            row = {
                "workload": "8 x 1024/64",
                "repeat": 0,
                "graph_ms": 8.0,
                "outside_ms": outside,
                "gpu_prefill_s": outside,
            }
            rank.write_text(json.dumps(found | {"cost": [row | {"gpu_ms": 99.0, "gpu_typical_ms": 99.0}]}))
        Path(f"{file}.rank1.log").write_text("not a result")
    (written,) = report(tmp_path, *files)
    rows = {row["workload"]: row for row in json.loads(written.read_text())["rows"]}
    decode, prompts = rows["decode (GPU) 8 x 1024/64"], rows["prefill (GPU) 8 x 1024/64"]
    assert (decode["stock"], decode["armed"], decode["ratio"]) == (10.0, 9.0, 0.9)
    assert (prompts["stock"], prompts["armed"], prompts["ratio"]) == (2.0, 1.0, 0.5)


def test_other_models_and_notes_stay_in_the_file(tmp_path):
    report(tmp_path, *costs(tmp_path, "one", armed=2.0, stock=4.0), "--note", "kept")
    (path,) = report(tmp_path, *costs(tmp_path, "two", armed=3.0, stock=3.0))
    found = evidence.read(path, evidence.Cost)
    assert [(row.model, row.ratio) for row in found.rows] == [("one", 0.5), ("two", 1.0)] and found.note == "kept"


def test_a_command_that_was_given_is_the_files_command(tmp_path):
    files = [*costs(tmp_path, "one", armed=2.0), verified(tmp_path, "one")]
    assert {json.loads(p.read_text())["command"] for p in report(tmp_path, *files)} == {"child.py", "bi-patch verify"}
    for path in report(tmp_path, *files, "--command", "run.py --model one"):
        if path.stem.endswith("-2"):
            assert json.loads(path.read_text())["command"] == "run.py --model one"


def test_reports_of_verify_become_rows_of_their_model(tmp_path):
    files = [*costs(tmp_path, "one", armed=2.0), verified(tmp_path, "Qwen3-30B-A3B-6-layers")]
    cost, invariance = report(tmp_path, *files)
    found = evidence.read(invariance, evidence.Invariance)
    rows = [(row.model, row.axis, row.compared, row.differing) for row in found.rows]
    assert rows == [("Qwen3-30B-A3B, 6 layers", "restart", 5, 0)]
    assert found.note == "Qwen3-30B-A3B, 6 layers: prefix cache: not exercised: no hits"
    assert (found.date, found.time, found.triton) == ("2026-01-01", "00:00:00", "")  # of the run, not of this process
    assert evidence.read(cost, evidence.Cost).rows[0].armed == 2.0
    assert set(evidence.current(tmp_path / "results")) >= {"cost-h100", "invariance-h100"}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"mode": "stock"}, "only the report of an armed engine is evidence"),
        ({"axes": [], "stopped": "no GPU"}, "nothing was compared: no GPU"),
        ({"vllm": "0.26.0"}, "not of one device, release and bi_patch"),
        ({"provenance": msgspec.structs.replace(MADE_BY, digest="e" * 64)}, "not of one device, release and bi_patch"),
    ],
)
def test_what_is_no_evidence_is_refused(tmp_path, changes, said):
    done = run("report.py", *costs(tmp_path, "one", armed=2.0), verified(tmp_path, "one", **changes))
    assert done.returncode == 1 and said in done.stderr


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"rows": []}')
    done = run("report.py", tmp_path / "x.json")
    assert done.returncode == 1 and "neither a file of child.py nor a report of verify" in done.stderr


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("run.py", "--model", "nosuchmodel"), "invalid choice: 'nosuchmodel'"),
        (("child.py", "Qwen3-8B", "armed", "x.json"), "nothing to measure"),
        (("child.py", "Qwen3-8B", "armed", "x.json", "--cost", "--only", "1 x 1"), "no such workload: 1 x 1"),
    ],
)
def test_arguments_that_ask_for_nothing_are_named(arguments, said):
    done = run(*arguments)
    assert done.returncode and said in done.stderr


@pytest.mark.parametrize("script", ["run.py", "turns.py", "child.py", "report.py", "costs.py", "extras_cost.py"])
def test_help(script):
    assert run(script, "--help").returncode == 0
