"""The check says what is wrong, by name, for each way in which a series and a vLLM can part."""

import pytest

from bi_patch.errors import AnchorMoved, PatchError, UnsupportedRelease
from bi_patch.platforms.releases import ALL
from bi_patch.tools.upstream import apply, check, record, series

CALL_LINE = series.CALL.splitlines()[-1]


def told(report, kind):
    return [p for p in report.problems if p.kind == kind]


def test_a_recorded_series_fits(small):
    report = small.check()
    assert report.problems == []
    assert (report.patches, report.applied, report.reversed) == (4, 4, 4)
    assert (report.seams, report.closed, report.anchors, report.matched) == (3, 3, 3, 3)


def test_recording_again_changes_nothing(small):
    before = {p.name: p.read_bytes() for p in small.series.iterdir()}
    small.write()
    assert {p.name: p.read_bytes() for p in small.series.iterdir()} == before


def test_a_header_says_what_why_how_and_until(small):
    patch = series.parse(small.patch("core-sched"))
    for line in (
        "Closes: scheduler.schedule",
        "Why: scheduler.schedule: why scheduler.schedule",
        "How: scheduler.schedule: how scheduler.schedule",
        "Until: scheduler.schedule: never",
        "Target: vllm/core/sched.py",
    ):
        assert line in patch.header.splitlines()


def test_a_module_with_a_copy_has_a_patch_that_claims_no_seam(small):
    patch = series.parse(small.patch("user"))
    assert patch.closes == () and patch.copies == ("engine.scale",)


def test_a_moved_anchor_is_named_with_upstreams_change(small):
    small.change("vllm/ops.py", "z = y + 1", "z = y + 2")
    (problem,) = small.check().problems
    assert (problem.kind, problem.seam, problem.target) == ("anchor", "engine.scale", "vllm.ops:scale")
    assert problem.file == "vllm/ops.py"
    assert "-    z = y + 1" in problem.diff and "+    z = y + 2" in problem.diff


def test_comments_and_docstrings_move_no_anchor(small):
    small.change("vllm/ops.py", '"""Scale."""', '"""Scale by a factor."""  # said better')
    assert small.check().ok


def test_a_renamed_function_is_named_with_the_nearest_one(small):
    small.change("vllm/ops.py", "def scale(x, by=2):", "def rescale(x, by=2):")
    report = small.check()
    (problem,) = told(report, "anchor")
    assert problem.seam == "engine.scale" and "no longer defines scale" in problem.message
    assert "the nearest is rescale" in problem.message and "+def rescale(x, by=2):" in problem.diff
    (open_seam,) = told(report, "close")  # the diff still applies, and closes nothing
    assert open_seam.seam == "engine.scale"
    assert (report.applied, report.closed, report.matched) == (4, 2, 2)


def test_a_module_that_is_gone_is_named(small):
    (small.tree / "vllm/core/dos.py").unlink()
    report = small.check()
    assert "there is no module vllm.core.dos" in told(report, "anchor")[0].message
    assert "core-dos.patch does not apply" in told(report, "patch")[0].message
    assert told(report, "close")[0].seam == "scheduler.run"
    assert (report.applied, report.reversed, report.closed) == (3, 3, 2)


def test_a_module_that_grew_at_its_end_does_not_take_the_patch(small):
    small.change("vllm/ops.py", "C = 3\n", "C = 3\nD = 4\n")
    (problem,) = told(small.check(), "patch")
    assert "engine-ops.patch does not apply" in problem.message


def test_a_vllm_that_is_patched_already_is_named(small):
    apply.apply(small.tree, small.patch("engine-ops"))
    (problem,) = told(small.check(), "patch")
    assert "carries bi_patch's call already" in problem.message
    with pytest.raises(PatchError, match="already"):
        small.write()


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        (CALL_LINE, "pass", "close"),  # claims, and closes nothing
        (CALL_LINE, f"if 0: {CALL_LINE}", "close"),
        ("close(__name__)", "close('vllm.core.dos')", "close"),
        ("# bi_patch: closes", "# bi_patch closes", "patch"),
        ("why engine.scale", "no reason", "series"),
    ],
)
def test_a_tampered_patch_is_found(small, old, new, kind):
    patch = small.patch("engine-ops")
    text = patch.read_text()
    assert old in text
    patch.write_text(text.replace(old, new))
    report = small.check()
    assert told(report, kind) and told(report, "series")
    assert all("engine-ops" in p.message or "vllm/ops.py" in p.message for p in report.problems)
    assert report.closed == (2 if kind == "close" else 3)


def test_a_patch_that_changes_another_file_too_is_refused(small):
    patch = small.patch("engine-ops")
    other = "--- a/vllm/lazy.py\n+++ b/vllm/lazy.py\n@@ -1 +1 @@\n-def use():\n+def use(x):\n"
    patch.write_text(patch.read_text() + other)
    (problem, *_) = told(small.check(), "series")
    assert "not vllm/ops.py alone" in problem.message


def test_a_patch_that_changes_other_lines_too_is_found(small):
    patch = small.patch("engine-ops")
    text = patch.read_text()
    assert " B = 2\n" in text
    patch.write_text(text.replace(" B = 2\n", "-B = 2\n+B = 4\n"))
    report = small.check()
    assert any("changed by more than the call" in p.message for p in told(report, "patch"))


def test_a_seam_claimed_twice_is_not_closed(small):
    patch = small.patch("core-sched")
    patch.write_bytes(
        patch.read_bytes().replace(b"Closes: scheduler.schedule", b"Closes: scheduler.schedule\n engine.scale")
    )
    report = small.check()
    assert any("2 diffs claim engine.scale" in p.message for p in told(report, "close"))


def test_a_seam_claimed_by_another_modules_patch_is_not_closed(small):
    for word, old, new in (
        ("core-sched", b"scheduler.schedule\n", b"scheduler.run\n"),
        ("core-dos", b"scheduler.run\n", b"scheduler.schedule\n"),
    ):
        patch = small.patch(word)
        patch.write_bytes(patch.read_bytes().replace(b"Closes: " + old, b"Closes: " + new))
    report = small.check()
    assert report.closed == 1
    assert any("claims scheduler.run, whose target is in vllm.core.dos" in p.message for p in told(report, "close"))


def test_an_unknown_claim_is_found(small):
    patch = small.patch("engine-ops")
    patch.write_text(patch.read_text().replace("Closes: engine.scale", "Closes: engine.scale\n engine.other"))
    assert any("engine.other, which is no seam" in p.message for p in told(small.check(), "close"))


def test_a_series_in_another_order_is_found(small):
    index = small.series / "series"
    head, *names = index.read_text().splitlines()
    index.write_text("\n".join([head, *reversed(names)]) + "\n")
    (problem,) = small.check().problems
    assert problem.kind == "series" and "0101-engine-ops.patch" in problem.message


@pytest.mark.parametrize("case", ["no series", "unlisted", "missing", "twice"])
def test_a_series_that_does_not_match_its_folder_is_refused(small, case):
    index, patch = small.series / "series", small.patch("engine-ops")
    if case == "no series":
        index.unlink()
    elif case == "unlisted":
        index.write_text(index.read_text().replace(patch.name, ""))
    elif case == "missing":
        patch.unlink()
    else:
        index.write_text(index.read_text() + patch.name + "\n")
    report = small.check()
    (problem,) = told(report, "series")
    assert case == "no series" or patch.name in problem.message
    assert report.applied == report.closed == 0


def test_a_new_seam_without_a_patch_is_open(small):
    small.add("norm.mark", "vllm.core.sched", "MARK")
    report = small.check()
    assert told(report, "series")
    assert [p.seam for p in told(report, "close")] == ["norm.mark"]
    assert any("no anchor of norm.mark was recorded" in p.message for p in told(report, "anchor"))
    small.write()
    assert small.check().ok


def test_a_seam_that_went_leaves_nothing_behind(small):
    small.planned = small.planned[1:]
    kinds = {p.kind for p in small.check().problems}
    assert kinds == {"series", "close", "anchor", "patch"}
    small.write()
    assert small.check().ok
    assert not list(small.series.glob("*ops*")) and not list(small.series.glob("*user*"))


def test_a_module_that_newly_holds_a_copy_is_named(small):
    (small.tree / "vllm/new.py").write_text("from . import ops\nfrom vllm import scale as again\n")
    (small.tree / "vllm/core/deep.py").write_text("if True:\n    from ..ops import scale\n")
    (problem,) = small.check().problems
    assert problem.kind == "copies" and problem.seam == "engine.scale"
    assert "vllm.core.deep, vllm.new newly hold" in problem.message  # vllm/__init__.py hands it on; lazy.py holds none


def test_a_copy_handed_on_under_another_name_is_named(small):
    (small.tree / "vllm/facade.py").write_text("from vllm.ops import scale as grow\n")
    (small.tree / "vllm/new.py").write_text("from vllm.facade import grow\n")
    (small.tree / "vllm/other.py").write_text("from vllm.facade import scale\n")  # which it does not have
    (problem,) = small.check().problems
    assert problem.kind == "copies" and "vllm.facade, vllm.new newly hold" in problem.message


def test_a_listed_copy_that_is_none_is_named(small):
    small.add("norm.scale", "vllm.ops", "scale", copies=("vllm.lazy", "vllm.not_in_this_release"))
    small.write()
    (problem,) = small.check().problems
    assert problem.kind == "copies" and "Target.copies lists vllm.lazy" in problem.message


def test_damaged_anchors_are_not_believed(small):
    (small.series / "anchors.json").write_text("[{]")
    report = small.check()
    assert report.matched == 0 and len(told(report, "anchor")) == 3


def test_a_file_that_is_no_python_is_named(small):
    (small.tree / "vllm/ops.py").write_text("def scale(:\n")
    report = small.check()
    assert any("cannot be read as Python" in p.message for p in told(report, "anchor"))


def test_recording_a_missing_target_writes_nothing(small):
    before = {p.name: p.read_bytes() for p in small.series.iterdir()}
    small.add("norm.gone", "vllm.ops", "gone")
    with pytest.raises(AnchorMoved, match="norm.gone"):
        small.write()
    assert {p.name: p.read_bytes() for p in small.series.iterdir()} == before


def test_an_unknown_release_is_named_and_compared_with_the_nearest(small):
    (small.tree / "vllm/_version.py").write_text("__version__ = '0.99.1'\n")
    report = check.check(small.source())
    assert (report.release, report.base) == ("0.99.1", max(ALL))
    assert report.problems[0].kind == "release" and "vLLM 0.99.1 is unknown" in report.problems[0].message
    assert any(p.kind == "anchor" and p.seam == "engine.config" for p in report.problems)
    with pytest.raises(PatchError, match="releases.py"):
        record.record(small.source())


@pytest.mark.parametrize(("release", "base"), [("0.1", "0.23.0"), ("0.26.5", "0.26.0"), ("0.32.0", "0.32.0")])
def test_nearest_known_release(release, base):
    assert check.nearest(release) == base


def test_a_release_outside_the_matrix_has_no_seams():
    with pytest.raises(UnsupportedRelease):
        series.planned_seams("0.99.1")
