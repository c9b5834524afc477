"""Cost rows, evidence files, tables and marks; how children are told their mode."""

import msgspec
import pytest

from bi_patch.tools import evidence
from bi_patch.tools.bench import cost
from bi_patch.tools.verify.child import ARMED, STOCK, UPSTREAM, child_environ
from bi_patch.tools.verify.engine import Info, Options, short_name

INFO = Info("armed", "0.32.0", "2.13.0+cpu", "CPU", 2, 16, 500)


def test_a_cost_row_takes_medians_and_paired_ratios():
    row = cost.row("m", "w", {STOCK: [10.0, 20.0, 40.0], ARMED: [11.0, 20.0, 42.0]}, 3)
    assert (row.stock, row.upstream, row.armed, row.ratio) == (20.0, None, 20.0, 1.05)
    assert row.stock_range == (10.0, 40.0)
    assert cost.is_noisy(row)
    assert not cost.is_noisy(cost.row("m", "w", {STOCK: [10.0, 11.0], ARMED: [11.0, 12.0]}, 2))


def made(model, **changes):
    found = evidence.new(evidence.Invariance, INFO)
    found.rows = [evidence.InvarianceRow(model, "batch size", 1000, 0)]
    return msgspec.structs.replace(found, **changes)


def test_files_are_named_and_keep_other_models(tmp_path):
    path = evidence.write(made("a"), "cpu", tmp_path)
    assert path.name == f"invariance-{made('a').date}-cpu-vllm-0.32.0.json"
    evidence.write(made("b"), "cpu", tmp_path)
    evidence.write(made("b"), "cpu", tmp_path)
    newest = evidence.newest(evidence.Invariance, tmp_path)
    assert [r.model for r in newest.rows] == ["a", "b"]
    table = evidence.invariance_table(newest)
    assert "| batch size | 0 / 1,000 | 0 / 1,000 |" in table and "0 of 2,000 positions differ" in table


def test_writing_leaves_what_was_measured_alone(tmp_path):
    evidence.write(made("a", note="said before"), "cpu", tmp_path)
    found = made("b")
    evidence.write(found, "cpu", tmp_path)
    assert [r.model for r in found.rows] == ["b"] and not found.note
    assert evidence.newest(evidence.Invariance, tmp_path).note == "said before"


@pytest.mark.parametrize("other", [{"device": "another CPU"}, {"torch": "2.14.0+cpu"}, {"threads": 4}])
def test_what_was_measured_on_something_else_has_a_file_of_its_own(tmp_path, other):
    first = evidence.write(made("a"), "cpu", tmp_path)
    second = evidence.write(made("b", **other), "cpu", tmp_path)
    assert second.name == f"{first.stem}-2.json"
    assert evidence.write(made("c", **other), "cpu", tmp_path) == second
    assert [r.model for r in msgspec.json.decode(first.read_bytes(), type=evidence.Invariance).rows] == ["a"]
    newest = evidence.newest(evidence.Invariance, tmp_path)
    assert [r.model for r in newest.rows] == ["b", "c"] and evidence.platforms(evidence.Invariance, tmp_path) == ["cpu"]


def test_no_file_is_a_named_error(tmp_path):
    with pytest.raises(evidence.EvidenceMissing, match="bi-patch bench"):
        evidence.newest(evidence.Cost, tmp_path)


def test_tables_stand_between_their_marks():
    text = "# R\n<!-- cost -->\nold\n<!-- /cost -->\nend\n"
    assert evidence.replace_between(text, "cost", "new\n") == "# R\n<!-- cost -->\nnew\n<!-- /cost -->\nend\n"
    with pytest.raises(evidence.EvidenceMissing):
        evidence.replace_between(text, "invariance", "")


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from bi_patch.tools.bench import plot

    found = evidence.new(evidence.Cost, INFO)
    found.rows = [cost.row("m", "w", {STOCK: [10.0], ARMED: [11.0]}, 1)]
    plot.cost(found, tmp_path / "cost.svg", cost.target("cpu"))
    assert (tmp_path / "cost.svg").read_text().startswith("<?xml")
    assert (cost.target("cpu"), cost.target("h100")) == (1.10, 1.00)
    assert "| m | w | 10.0 ms | - | 11.0 ms | 1.10 |" in evidence.cost_table(found)


@pytest.mark.parametrize(
    ("device", "short"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100"), ("NVIDIA GeForce RTX 4090", "4090")],
)
def test_short_names_of_devices(device, short):
    assert short_name(device) == short


def test_children_are_told_their_mode():
    eager, compiled = Options("m"), Options("m", eager=False)
    given = {"VLLM_BATCH_INVARIANT": "1", "BI_PATCH_LEAVE_OPEN": "x", "VLLM_CPU_KVCACHE_SPACE": "3"}
    stock = child_environ(given, STOCK, eager)
    assert stock["BI_PATCH"] == "0" and "VLLM_BATCH_INVARIANT" not in stock
    assert stock["TORCHDYNAMO_DISABLE"] == "1" and stock["VLLM_CPU_KVCACHE_SPACE"] == "3"
    armed = child_environ(given, ARMED, compiled)
    assert (armed["BI_PATCH"], armed["VLLM_BATCH_INVARIANT"], armed["BI_PATCH_LEAVE_OPEN"]) == ("1", "1", "x")
    assert "TORCHDYNAMO_DISABLE" not in armed
    upstream = child_environ(given, UPSTREAM, eager)
    assert (upstream["BI_PATCH"], upstream["VLLM_BATCH_INVARIANT"]) == ("0", "1")


def test_platforms_of_a_kind(tmp_path):
    for name in ("cost-2026-01-02-cpu-vllm-0.32.0.json", "cost-2026-01-02-h100-vllm-0.33.0.json", "other.json"):
        (tmp_path / name).write_text("{}")
    assert evidence.platforms(evidence.Cost, tmp_path) == ["cpu", "h100"]
    assert evidence.platforms(evidence.Invariance, tmp_path) == []
