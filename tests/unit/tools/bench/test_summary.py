"""Summaries of the tables: which ratio stands in which column, and the sums of what was compared."""

from pathlib import Path

import pytest

from bi_patch.tools import evidence
from bi_patch.tools.evidence import schemes, summary
from bi_patch.tools.verify.engine import Info

RESULTS = Path(__file__).resolve().parents[4] / "benchmarks" / "results"
INFO = Info("armed", "0.33.0", "2.11.0", "NVIDIA H200", 2, 16, 500)


def tables(folder, **workloads):
    """The tables of one cost file; workloads: model -> {workload: ratio}."""
    found = evidence.new(evidence.Cost, INFO)
    found.date = "2026-01-02"
    found.rows = [
        evidence.CostRow(model, workload, "ms", 10.0, None, 10.0 * ratio, 3, ratio)
        for model, ratios in workloads.items()
        for workload, ratio in ratios.items()
    ]
    evidence.write(found, folder)
    return evidence.current(folder)


def test_ratios_stand_by_workload_and_clock(tmp_path):
    ratios = {
        "decode 1 x 512/128": 1.1,
        "decode (GPU) 1 x 512/128": 0.9,
        "decode 8 x 128 (GPU)": 0.8,
        "decode 256 x 512/128": 1.3,
        "decode 2 x 32000/64": 1.5,
        "prefill 8 x 1024/128": 0.95,
        "prefill 2 x 32000/64": 1.05,
        "total 256 x 512/128": 7.0,
        "1 x 1 image": 1.6,
        "1 x 1 image (GPU)": 1.4,
    }
    text = summary.blocks(tables(tmp_path, m=ratios))["summary-cost-h200"]
    assert "| model | by | decode of 1 request | 8 | 128 or 256 | 2 of 32,000 tokens | prompts |" in text
    assert "| m | GPU | 0.90 | 0.80 | - | - | - |\n| m | clock | 1.10 | - | 1.30 | 1.50 | 0.95 to 1.05 |" in text
    assert "| m | 1 x 1 image | 1.40 | 1.60 |" in text and "7.00" not in text
    assert text.endswith("Armed / stock on NVIDIA H200, vLLM 0.33.0, 2026-01-02.")


def test_a_chosen_table_has_its_models_in_its_order(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "CHOSEN", {"two": summary.Choice(("b", "a"), many=False)})
    rows = {"decode 1 x 512/128": 1.0, "decode (GPU) 1 x 512/128": 0.5, "decode (GPU) 256 x 512/128": 0.6}
    made = summary.blocks(tables(tmp_path, a=rows, b=rows, c=rows))["summary-cost-h200-two"]
    assert made.splitlines()[:4] == ["| model | decode of 1 request |", "|---|--:|", "| b | 0.50 |", "| a | 0.50 |"]


def test_a_chosen_table_needs_all_of_its_models(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "CHOSEN", {"two": summary.Choice(("a", "no such model"))})
    assert "summary-cost-h200-two" not in summary.blocks(tables(tmp_path, a={"decode 1 x 512/128": 1.0}))


def test_a_scheme_that_nobody_has_measured_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(schemes, "MODELS", ("b", "a", "d"))
    monkeypatch.setattr(schemes, "UPSTREAM_STOPS", ("d",))
    rows = {
        "decode 1 x 512/128": 9.0,
        "decode (GPU) 1 x 512/128": 0.5,
        "decode (GPU) 256 x 512/128": 0.6,
        "decode (GPU) 2 x 32000/64": 9.0,
        "prefill (GPU) 8 x 1024/128": 0.7,
        "prefill (GPU) 256 x 512/128": 0.8,
    }
    made = tables(tmp_path, a=rows, c=rows, d={"decode (GPU) 8 x 512/128": 0.5})
    made["cost-h200"].rows[1].upstream = 20.0
    lines = summary.blocks(made)["summary-cost-h200-quantized"].splitlines()
    no, stops = schemes.MISSING, schemes.STOPS
    assert lines[2:7] == [
        f"| b | stock and upstream's mode | {no} | {no} | {no} | {no} | {no} |",
        f"| a | stock | 0.50 | {no} | {no} | 0.60 | 0.70 to 0.80 |",
        f"| a | upstream's mode | 0.25 | {no} | {no} | {no} | {no} |",
        f"| d | stock | {no} | 0.50 | {no} | {no} | {no} |",
        f"| d | upstream's mode | {stops} | {stops} | {stops} | {stops} | {stops} |",
    ]
    assert "summary-cost-h200-quantized" not in summary.blocks(tables(tmp_path / "other", c=rows))


def test_parts_of_k_stand_against_armed_and_stock(tmp_path):
    rows = {"decode (GPU) 1 x 512/128": 0.5, "prefill (GPU) 8 x 1024/128": 1.0, "decode 1 x 512/128": 1.0}
    made = tables(tmp_path, a=rows, b=rows)
    assert "summary-cost-h200-parts" not in summary.blocks(made)
    assert "TP_INVARIANT" not in evidence.markdown(made["cost-h200"])
    for row in made["cost-h200"].rows:
        row.parts = 11.0 if row.model == "a" else None
    assert summary.blocks(made)["summary-cost-h200-parts"].splitlines()[:4] == [
        "| model | against | decode of 1 request | prompts |",
        "|---|---|--:|--:|",
        "| a | armed | 2.20 | 1.10 |",
        "| a | stock | 1.10 | 1.10 |",
    ]
    assert "| a | decode (GPU) 1 x 512/128 | 5.00 ms | 11.0 ms | 2.20 | 1.10 |" in evidence.markdown(made["cost-h200"])


def test_axes_of_quantized_weights_stand_by_mode(tmp_path):
    found = evidence.new(evidence.Invariance, INFO)
    held = {
        "a FP8, 2 layers": ("batch size", "restart", "eager and compiled"),
        "a FP8, 2 layers, eager": (*schemes.BATCH, "preemption", "another axis"),
        "a FP8, 2 layers, compiled": ("prefix cache", "preemption"),
        "a FP8, 2 layers, TP 2": ("batch size",),
        "a FP8, 4 layers": ("batch size",),
        "b INT8, 2 layers": ("batch size",),
        "b INT8, 2 layers, compiled, prompts dequantized": ("decode = prefill", "restart"),
        "c, 2 layers": ("batch size",),
    }
    found.rows = [evidence.InvarianceRow(model, axis, 10, 0) for model, axes in held.items() for axis in axes]
    found.rows.append(evidence.InvarianceRow("b INT8, 2 layers", "prefix cache", 10, 1))
    evidence.write(found, tmp_path)
    assert summary.blocks(evidence.current(tmp_path))["summary-invariance-h200-quantized"].splitlines()[2:] == [
        "| a FP8 | 6 of 6 | 2 of 6 | yes | eager, compiled | compiled |",
        "| b INT8 | - | 2 of 6 | - | - | compiled |",
    ]


@pytest.mark.parametrize("word", summary.CHOSEN)
def test_the_committed_files_have_the_chosen_models(word):
    assert f"summary-cost-h200-{word}" in summary.blocks(evidence.current(RESULTS))


def test_sums_have_a_row_for_each_device_and_release(tmp_path):
    for release, differing in (("0.9.0", 1), ("0.10.0", 0)):
        found = evidence.new(evidence.Invariance, INFO)
        found.vllm, found.rows = release, [evidence.InvarianceRow("m", axis, 1000, differing) for axis in ("a", "b")]
        evidence.write(found, tmp_path)
    made = summary.blocks(evidence.current(tmp_path))
    assert made["summary-invariance"].splitlines()[2:] == [
        "| H200 | 0.10.0 | 1 | 2 | 2,000 | 0 |",
        "| H200 | 0.9.0 | 1 | 2 | 2,000 | 2 |",
    ]
    assert made["summary-invariance-total"] == "**2 of 4,000 positions differ.**"


def test_faults_are_counted_by_device(tmp_path):
    found = evidence.new(evidence.Faults, INFO)
    found.dtype, found.clean = "bfloat16", (10, 0)
    found.rows = [evidence.FaultRow(1, "one", True, True), evidence.FaultRow(2, "two", True, False)]
    evidence.write(found, tmp_path)
    made = summary.blocks(evidence.current(tmp_path))["summary-faults"]
    assert made.splitlines()[-1] == f"| H200 | 0.33.0 | 1 of {evidence.CAUSES} | 0 | 0 of 10 |"
