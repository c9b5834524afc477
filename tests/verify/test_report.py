"""What a report concludes from its axes and from the comparison with fp64."""

import pytest

from bi_patch.verify.precision import Imprecise, Precision
from bi_patch.verify.report import INVARIANT, PASSED, Axis, Report

ROUGH = Imprecise("model.layers.0.mlp.down_proj", "linear.cpu_dispatch", 64, 128, "float32", 257, 900.0)


@pytest.mark.parametrize(
    ("failed", "code", "said"), [([], 0, "as accurate as fp32"), ([ROUGH], 1, "down_proj with 900")]
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
