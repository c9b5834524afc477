"""`bi-patch demo` on the real engine: the table, the picture, the reports, the exit code, and a planted fault."""

import json
import os
import subprocess
import sys

import pytest

from bi_patch.tools.demo import level
from bi_patch.tools.verify import report

pytestmark = pytest.mark.engine

# The tests differ in the armed engine only. So the stock engine's side is measured once and kept in a file.
CODE = """
import pickle, sys
from pathlib import Path
import bi_patch_entry
bi_patch_entry.without_arming()
from bi_patch.tools.demo import run

kept, measure = Path(sys.argv.pop(1)), run.side

def side(mode, *given, **options):
    if mode != "stock":
        return measure(mode, *given, **options)
    if not kept.exists():
        kept.write_bytes(pickle.dumps(measure(mode, *given, **options)))
    return pickle.loads(kept.read_bytes())

run.side = side
bi_patch_entry.cli()
"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The file of the stock engine's side."""
    return tmp_path_factory.mktemp("demo") / "stock.pickle"


@pytest.fixture
def run(kept, tmp_path):
    """run(**environ): run the demo; returns the finished process and the reports in its JSON file by mode, or None
    without a file."""

    def run(**environ):
        numbers = tmp_path / "demo.json"
        command = [sys.executable, "-c", CODE, str(kept), "demo", "--quick", "--json", str(numbers)]
        done = subprocess.run(
            [*command, "--picture", str(tmp_path / "demo.html")],
            check=False,
            env=os.environ | environ,
            capture_output=True,
            text=True,
            timeout=900,
        )
        if not numbers.exists():
            return done, None
        return done, {mode: report.from_json(held) for mode, held in json.loads(numbers.read_text()).items()}

    return run


def test_stock_differs_and_armed_is_bitwise_invariant(run, tmp_path):
    done, found = run()
    assert done.returncode == 0, done.stdout + done.stderr
    stock, armed = found["stock"], found["armed"]
    assert (stock.mode, armed.mode) == ("stock", "armed") and armed.exit_code == report.INVARIANT
    assert armed.open_seams == () and armed.complete and armed.differing == 0
    assert armed.compared == stock.compared > 1000
    states = {axis.name: axis.state for axis in armed.axes if axis.state != report.LEFT_OUT}
    assert states == dict.fromkeys(level.axes(quick=True), report.PASSED)
    for name in level.axes(quick=True):
        assert name in done.stdout
    page = (tmp_path / "demo.html").read_text()
    pairs = sum(axis.pairs for side in (stock, armed) for axis in side.axes)
    assert page.count("<svg") == 1 and page.count("<rect") == pairs
    if armed.threads > 1:  # a single thread hides variance
        assert stock.differing > 0 and stock.exit_code == report.DIFFERS
        assert "The stock engine is NOT batch-invariant" in " ".join(done.stdout.split())
    if any(axis.tokens_changed for axis in stock.axes):
        assert "alone:" in done.stdout and "<mark>" in page


def test_an_open_seam_is_refused_by_name(run):
    done, found = run(BI_PATCH_LEAVE_OPEN="attention.cpu_forward")
    assert done.returncode == 2
    assert found["armed"].compared == 0 and "SeamOpen" in found["armed"].stopped
    assert "SeamOpen" in done.stdout and "attention.cpu_forward" in done.stdout


@pytest.mark.slow
def test_an_open_seam_that_is_allowed_is_seen(run):
    done, found = run(BI_PATCH_LEAVE_OPEN="linear.cpu_dispatch", BI_PATCH_ALLOW_OPEN="1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert found["armed"].open_seams == ("linear.cpu_dispatch",)
    assert found["armed"].differing > 0
    assert "linear.cpu_dispatch" in done.stdout
