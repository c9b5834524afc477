"""The evidence files of benchmarks/hopper/report.py: ratios, and what an earlier run left is kept."""

import json
import subprocess
import sys
from pathlib import Path

REPORT = Path(__file__).resolve().parents[4] / "benchmarks" / "hopper" / "report.py"
END = "2026-01-01-h100-vllm-0.33.0.json"


def report(folder: Path, files: list[Path]) -> None:
    command = [sys.executable, REPORT, "h100", "2026-01-01", "--results", folder, *files]
    subprocess.run([str(part) for part in command], check=True, env={"PYTHONPATH": str(REPORT.parents[2])})


def run(folder: Path, model: str, **times: float) -> dict:
    files = []
    for mode, ms in times.items():
        row = {"workload": "1 x 512/128", "total_s": 1.0, "prefill_s": 0.1, "decode_ms": ms}
        found = {"model": model, "mode": mode, "device": "H100", "vllm": "0.33.0", "torch": "2.11", "cost": [row] * 2}
        found["matrix"] = [{"axis": "batch size", "compared": 7, "differing": 0}] if mode == "armed" else []
        files.append(folder / f"{model}-{mode}.json")
        files[-1].write_text(json.dumps(found))
    report(folder, files)
    return json.loads((folder / f"cost-{END}").read_text())


def test_rows_are_made_anew_by_model_and_notes_stay(tmp_path):
    first = run(tmp_path, "one", armed=2.0)
    assert [(row["model"], row["ratio"]) for row in first["rows"]] == [("one", None)]
    (tmp_path / f"cost-{END}").write_text(json.dumps(first | {"note": "kept"}))
    assert run(tmp_path, "one", armed=2.0, stock=4.0)["rows"][0]["ratio"] == 0.5
    both = run(tmp_path, "two", armed=3.0, stock=3.0)
    assert [(row["model"], row["ratio"]) for row in both["rows"]] == [("one", 0.5), ("two", 1.0)]
    assert both["note"] == "kept"
    matrix = json.loads((tmp_path / f"invariance-{END}").read_text())
    assert [row["model"] for row in matrix["rows"]] == ["one", "two"]


def test_reports_of_verify_become_rows_of_their_model(tmp_path):
    run(tmp_path, "Qwen3-30B-A3B, 6 layers", armed=2.0, stock=2.0)
    axis = {"name": "restart", "compared": 5, "differing": 0, "reason": ""}
    found = {"target": "/models/Qwen3-30B-A3B-6-layers", "mode": "armed", "device": "H100", "vllm": "0.33.0"}
    found |= {"torch": "2.11", "axes": [axis, axis | {"name": "LoRA", "compared": 0}]}
    (tmp_path / "verify.json").write_text(json.dumps(found))
    files = [tmp_path / "Qwen3-30B-A3B, 6 layers-armed.json", tmp_path / "verify.json"]
    report(tmp_path, files)
    rows = json.loads((tmp_path / f"invariance-{END}").read_text())["rows"]
    assert [(row["model"], row["axis"]) for row in rows] == [
        ("Qwen3-30B-A3B, 6 layers", "batch size"),
        ("Qwen3-30B-A3B, 6 layers", "restart"),
    ]
    assert json.loads((tmp_path / f"cost-{END}").read_text())["rows"][0]["armed"] == 2.0
