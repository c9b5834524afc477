"""Cost rows, result files, the choice of current files, and tables; how a child learns its mode."""

from pathlib import Path

import msgspec
import pytest

from bi_patch import __version__, identity
from bi_patch.tools import evidence
from bi_patch.tools.bench import cost
from bi_patch.tools.evidence.kinds import short_name
from bi_patch.tools.verify.child import ARMED, STOCK, UPSTREAM, child_environ
from bi_patch.tools.verify.engine import Info, Options

INFO = Info("armed", "0.32.0", "2.13.0+cpu", "AMD EPYC (2 cores)", 2, 16, 500)
RESULTS = Path(__file__).resolve().parents[4] / "benchmarks" / "results"


def test_a_cost_row_takes_medians_and_paired_ratios():
    row = cost.row("m", "w", {STOCK: [10.0, 20.0, 40.0], ARMED: [11.0, 20.0, 42.0]}, 3)
    assert (row.stock, row.upstream, row.armed, row.ratio) == (20.0, None, 20.0, 1.05)
    assert row.stock_range == (10.0, 40.0)
    assert cost.is_noisy(row)
    assert not cost.is_noisy(cost.row("m", "w", {STOCK: [10.0, 11.0], ARMED: [11.0, 12.0]}, 2))


def made(*models, kind=evidence.Invariance, **changes):
    found = evidence.new(kind, INFO)
    found.rows = [evidence.InvarianceRow(model, "batch size", 1000, 0) for model in models]
    return msgspec.structs.replace(found, **changes)


def invariance(folder):
    return evidence.current(folder)["invariance-cpu"]


@pytest.mark.parametrize("kind", [evidence.Cost, evidence.Invariance, evidence.Faults, evidence.Parity])
def test_every_kind_says_what_made_it(kind, tmp_path):
    found = evidence.new(kind, INFO)
    written = msgspec.json.decode(evidence.write(found, tmp_path).read_bytes())
    assert (written["bi_patch"], written["digest"]) == (__version__, identity.digest())
    assert (written["device"], written["vllm"], written["torch"]) == (INFO.device, INFO.vllm, INFO.torch)
    assert written["threads"] == 2 and written["command"] and written["time"] and "commit" in written
    assert evidence.read(evidence.write(found, tmp_path), kind) == found


def test_files_are_named_and_keep_other_models(tmp_path):
    path = evidence.write(made("a"), tmp_path)
    assert path.name == f"invariance-{made().date}-cpu-vllm-0.32.0.json"
    evidence.write(made("b"), tmp_path)
    evidence.write(made("b"), tmp_path)
    table = invariance(tmp_path)
    assert [r.model for r in table.rows] == ["a", "b"] and len(table.sources) == 1
    text = evidence.markdown(table)
    assert "| a | 1 | 1,000 | 0 |" in text and "| batch size | 2 | 2,000 | 0 |" in text
    assert "0 of 2,000 positions differ" in text


def test_writing_leaves_what_was_measured_alone(tmp_path):
    evidence.write(made("a", note="said before"), tmp_path)
    found = made("b")
    evidence.write(found, tmp_path)
    assert [r.model for r in found.rows] == ["b"] and not found.note
    assert invariance(tmp_path).newest.evidence.note == "said before"


@pytest.mark.parametrize(
    "other",
    [
        {"device": "another CPU (4 cores)"},
        {"torch": "2.14.0+cpu"},
        {"threads": 4},
        {"digest": "other code"},
        {"commit": "another"},
        {"command": "bi-patch bench --only b"},
    ],
)
def test_what_was_measured_otherwise_has_a_file_of_its_own(tmp_path, other):
    first = evidence.write(made("a"), tmp_path)
    second = evidence.write(made("b", **other), tmp_path)
    assert second.name == f"{first.stem}-2.json"
    assert evidence.write(made("c", **other), tmp_path) == second
    assert [r.model for r in evidence.read(first, evidence.Invariance).rows] == ["a"]
    assert [r.model for r in evidence.read(second, evidence.Invariance).rows] == ["b", "c"]


def test_a_run_of_faults_replaces_the_whole_file(tmp_path):
    found = evidence.new(evidence.Faults, INFO)
    found.rows = [evidence.FaultRow(1, "one", True, True), evidence.FaultRow(2, "two", True, True)]
    evidence.write(found, tmp_path)
    found.rows = found.rows[:1]
    assert len(evidence.read(evidence.write(found, tmp_path), evidence.Faults).rows) == 1


def test_the_newest_file_is_chosen_by_what_the_files_hold(tmp_path):
    names = ("invariance-2026-01-09-cpu-vllm-0.32.0.json", "invariance-z.json", "invariance-2026-01-02-x.json")
    days = ("2026-01-01", "2026-01-02", "2026-01-03")
    for name, day, differing in zip(names, days, range(3)):
        found = made("m", date=day)
        found.rows[0].differing = differing
        (tmp_path / name).write_bytes(msgspec.json.encode(found))
    assert [row.differing for row in invariance(tmp_path).rows] == [2]
    assert {path.name for path in evidence.superseded(tmp_path)} == set(names[:2])
    later = made("m", date="2026-01-03", time="23:59:59.9")
    (tmp_path / "invariance-a.json").write_bytes(msgspec.json.encode(later))
    assert invariance(tmp_path).newest.path.name == "invariance-a.json"


def test_a_table_shows_each_model_as_its_newest_file_has_it(tmp_path):
    evidence.write(made("a", "b", date="2026-01-01", commit="1" * 40, dirty=False, note="the first"), tmp_path)
    evidence.write(made("b", date="2026-01-02", commit="2" * 40, dirty=True), tmp_path)
    table = invariance(tmp_path)
    assert [source.models for source in table.sources] == [("b",), ("a",)] and not evidence.superseded(tmp_path)
    text = evidence.markdown(table)
    assert "- a: torch 2.13.0+cpu" in text and "2026-01-01, commit 1111111. The first." in text
    assert "2026-01-02, commit 2222222+." in text


def test_releases_and_devices_have_tables_of_their_own(tmp_path):
    evidence.write(made("a", vllm="0.9.0"), tmp_path)
    evidence.write(made("b", vllm="0.10.0", date="2026-01-01"), tmp_path)
    evidence.write(made("c", device="NVIDIA H100 80GB HBM3", kind=evidence.Parity), tmp_path)
    tables = evidence.current(tmp_path)
    assert [row.model for row in tables["invariance-cpu"].rows] == ["b"], "0.10 is newer than 0.9"
    assert [row.model for row in tables["invariance-cpu-vllm-0.9.0"].rows] == ["a"]
    assert [row.model for row in tables["parity-h100"].rows] == ["c"]


def test_faults_of_another_dtype_have_a_table_of_their_own(tmp_path):
    for dtype in ("float32", "bfloat16"):
        found = evidence.new(evidence.Faults, INFO)
        found.dtype, found.rows = dtype, [evidence.FaultRow(1, "one", True, True)]
        evidence.write(found, tmp_path)
    assert set(evidence.current(tmp_path)) == {
        *("faults-cpu", "faults-cpu-bf16", "faults-cpu-vllm-0.32.0", "faults-cpu-bf16-vllm-0.32.0")
    }


def test_the_archive_supplies_no_table(tmp_path):
    evidence.write(made("a"), tmp_path / "archive")
    with pytest.raises(evidence.EvidenceMissing, match="bi-patch bench"):
        evidence.current(tmp_path)
    evidence.write(made("b"), tmp_path / "h100")
    assert [row.model for row in invariance(tmp_path).rows] == ["b"]


@pytest.mark.parametrize("content", ["{", "{}", '{"rows": []}'])
def test_a_broken_file_is_named(tmp_path, content):
    path = tmp_path / "cost-2026-01-01-cpu-vllm-0.32.0.json"
    path.write_text(content)
    with pytest.raises(evidence.EvidenceUnreadable, match=path.name):
        evidence.current(tmp_path)


def test_old_files_decode_with_defaults(tmp_path):
    path = tmp_path / "cost-2026-01-01-cpu-vllm-0.32.0.json"
    path.write_text('{"device": "CPU", "vllm": "0.32.0", "torch": "t", "date": "2026-01-01", "rows": []}')
    found = evidence.read(path, evidence.Cost)
    assert (found.bi_patch, found.commit, found.digest, found.command, found.triton) == ("", None, "", "", "")


def test_every_committed_file_supplies_a_table():
    assert evidence.current(RESULTS) and not evidence.superseded(RESULTS)


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from bi_patch.tools.bench import tables

    found = evidence.new(evidence.Cost, INFO)
    found.rows = [cost.row("m", "w", {STOCK: [10.0], ARMED: [11.0]}, 1)]
    evidence.write(found, tmp_path)
    current = evidence.current(tmp_path)
    (plot,) = tables.draw(current, tmp_path)
    assert plot.name == "cost-cpu.svg" and plot.read_text().startswith("<?xml")
    drawn = plot.read_bytes()
    tables.draw(current, tmp_path)
    assert plot.read_bytes() == drawn, "the same rows give the same file"
    assert (cost.target("cpu"), cost.target("cpu-amx"), cost.target("h100")) == (1.10, 1.10, 1.00)
    assert "| m | w | 10.0 ms | - | 11.0 ms | 1.10 |" in evidence.markdown(current["cost-cpu"])


@pytest.mark.parametrize(
    ("device", "short"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Intel(R) Xeon(R) Platinum 8488C (8 cores)", "cpu"),
        ("Intel(R) Xeon(R) Platinum 8488C, AMX (8 cores)", "cpu-amx"),
    ],
)
def test_short_names_of_devices(device, short):
    assert made(device=device).platform == short
    assert short.startswith("cpu") or short_name(device) == short


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
