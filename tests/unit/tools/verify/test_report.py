"""A report's verdict follows from its axes and from the comparison with fp64."""

import math
from pathlib import Path

import msgspec
import pytest

from bi_patch.tools.provenance import Provenance
from bi_patch.tools.verify import page
from bi_patch.tools.verify import report as reports
from bi_patch.tools.verify.answers import Answer, Request
from bi_patch.tools.verify.case import Case, Scenario
from bi_patch.tools.verify.precision import Imprecise, Precision, none
from bi_patch.tools.verify.report import (
    DIFFERED,
    FAILED,
    INVARIANT,
    NOT_APPLICABLE,
    NOT_EXERCISED,
    OUT_OF_TIME,
    PASSED,
    UNCHECKED,
    Axis,
    Pair,
    Report,
)

ROUGH = Imprecise("model.layers.0.mlp.down_proj", "linear.cpu_dispatch", 64, 128, "float32", 257, 900.0)


@pytest.mark.parametrize(
    ("failed", "code", "said"), [([], 0, "as accurate as fp32"), ([ROUGH], 1, "down_proj, with 900")]
)
def test_products_of_low_precision_are_no_pass(failed, code, said):
    axis = Axis("batch size", "", state=PASSED, compared=10)
    report = Report("model", "armed", "quick", "2026-01-01", [axis], precision=Precision(3, 99, 900.0, failed))
    report.conclude()
    assert report.exit_code == code
    assert any(said in sentence for sentence in report.verdict)


def test_without_a_comparison_with_fp64_the_axes_decide():
    report = Report("model", "server", "quick", "2026-01-01", [Axis("batch size", "", state=PASSED, compared=10)])
    report.conclude()
    assert report.exit_code == INVARIANT and len(report.verdict) == 1


@pytest.mark.parametrize("unchecked, code", [(True, UNCHECKED), (False, INVARIANT)])
def test_a_comparison_with_fp64_that_was_not_made_is_said(unchecked, code):
    report = Report(
        "model",
        "armed",
        "quick",
        "2026-01-01",
        [Axis("batch size", "", state=PASSED, compared=10)],
        precision=none("the reason", unchecked=unchecked),
    )
    report.conclude()
    assert report.exit_code == code and report.verdict[1] == "Products were not compared with fp64: the reason."


def test_the_worst_of_several_engines_stays():
    for worse, better in ((FAILED, PASSED), (FAILED, NOT_EXERCISED), (NOT_EXERCISED, PASSED), (OUT_OF_TIME, PASSED)):
        for order in ((worse, better), (better, worse)):
            axis = Axis("a", "", compared=10)
            for state in order:
                axis.settle(state, f"{state} first")
            assert (axis.state, axis.reason) == (worse, f"{worse} first")
    axis = Axis("a", "", compared=10, differing=1)
    axis.settle()
    axis.settle(FAILED, "it died")
    assert (axis.state, axis.reason) == (DIFFERED, "it died")
    axis = Axis("a", "", compared=10)
    axis.settle(NOT_APPLICABLE, "refused")
    assert axis.state == FAILED and "only a part" in axis.reason


def test_a_file_of_another_format_is_refused(tmp_path):
    report = Report("model", "armed", "quick", "2026-01-01", [])
    report.conclude()
    reports.write(report, tmp_path / "report.json")
    later = (tmp_path / "report.json").read_text().replace('"format": 1', '"format": 2')
    (tmp_path / "report.json").write_text(later)
    with pytest.raises(msgspec.DecodeError, match="format"):
        reports.read(tmp_path / "report.json")


def test_a_difference_of_an_interrupted_run_is_incomplete_too():
    report = Report("m", "upstream", "quick", "2026-01-01", [Axis("a", "", compared=10, differing=1)], stopped="no.")
    report.conclude()
    assert report.verdict[0].startswith("Incomplete: vLLM's own batch-invariant mode is NOT batch-invariant: 1 of 10")
    report.stopped = ""
    report.conclude()
    assert report.verdict[0].startswith("vLLM's own batch-invariant mode is NOT")


def test_every_field_of_the_file_is_documented():
    page = (Path(__file__).parents[4] / "docs" / "verify.md").read_text()
    table = page[page.index("## The report as JSON") :]
    for struct in (Report, Axis, Pair, Provenance):
        missing = [name for name in struct.__struct_fields__ if f"`{name}`" not in table]
        assert not missing, (struct.__name__, missing)


def test_a_report_is_read_back_bit_for_bit(tmp_path):
    alone = Scenario([Request((1, 2))])
    odd = Answer([1, 2, 3], [-math.inf, -0.0, math.nextafter(-1.5, 0)], [[(1, -math.inf)], [(2, 0.1)], []])
    axis = Axis("a", "")
    axis.add(Case.of("a", "odd", alone, alone, odd, Answer([1, 2, 3], [math.nan, 0.0, -1.5], [[], [], []])))
    axis.settle()
    report = Report(
        "model",
        "armed",
        "quick",
        "2026-01-01",
        [axis],
        options={"chunk": None, "extra": {"seed": 5}},
        precision=Precision(1, 1, math.inf, [ROUGH]),
    )
    report.conclude()
    reports.write(report, tmp_path / "report.json")
    back = reports.read(tmp_path / "report.json")
    assert repr(back) == repr(report) and page.page(back) == page.page(report)
    assert math.isnan(back.axes[0].case.got.logprobs[0]) and back.axes[0].case.expected == odd
