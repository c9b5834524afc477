"""The demo on the real engine: stock and armed children, the report, the exit code, and a planted fault."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.engine

COMMAND = [sys.executable, "-c", "import bi_patch_entry; bi_patch_entry.cli()", "demo", "--quick"]


def run(tmp_path, **environ):
    """The finished process and its JSON (None when none was written)."""
    numbers = tmp_path / "demo.json"
    done = subprocess.run(
        [*COMMAND, "--json", str(numbers), "--picture", str(tmp_path / "demo.html")],
        check=False,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done, json.loads(numbers.read_text()) if numbers.exists() else None


def test_armed_is_bitwise_invariant(tmp_path):
    done, report = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    armed, stock = report["armed"], report["stock"]
    assert report["exit_code"] == 0 and armed["open_seams"] == [] and armed["cached_tokens"] > 0
    assert sum(c["differing"] for c in armed["cells"]) == 0
    assert sum(c["compared"] for c in armed["cells"]) == sum(c["compared"] for c in stock["cells"]) > 1000
    assert report["threads"] < 2 or sum(c["differing"] for c in stock["cells"]) > 0
    assert (tmp_path / "demo.html").read_text().count("<svg") == 2


def test_an_open_seam_is_refused_by_name(tmp_path):
    done, report = run(tmp_path, BI_PATCH_LEAVE_OPEN="attention.cpu_forward")
    assert done.returncode == 2 and report is None
    assert "SeamOpen" in done.stderr and "attention.cpu_forward" in done.stderr


def test_an_open_seam_that_is_allowed_is_seen(tmp_path):
    done, report = run(tmp_path, BI_PATCH_LEAVE_OPEN="linear.cpu_dispatch", BI_PATCH_ALLOW_OPEN="1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert report["armed"]["open_seams"] == ["linear.cpu_dispatch"]
    assert sum(c["differing"] for c in report["armed"]["cells"]) > 0
    assert "linear.cpu_dispatch" in done.stdout
