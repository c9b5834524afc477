"""`bi-patch check` in a process, as users run it: exit codes, JSON, and no import of vLLM."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import bi_patch
from bi_patch.tools.cli import check
from bi_patch.tools.upstream import series
from bi_patch.tools.upstream.report import Problem, Report

ROOT = Path(bi_patch.__file__).parent.parent
PROGRAM = """
import sys
import bi_patch_entry
try:
    bi_patch_entry.cli()
finally:
    loaded = sorted({"vllm", "torch"} & set(sys.modules))
    print("loaded", loaded, file=sys.stderr)
"""


def run(*arguments, command="check", **environ):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_"))}
    clean |= {"PYTHONPATH": str(ROOT), "COLUMNS": "160"} | environ
    line = [sys.executable, "-c", PROGRAM, command, *map(str, arguments)]
    result = subprocess.run(line, env=clean, capture_output=True, text=True, check=False)
    assert "loaded []" in result.stderr, result.stderr
    return result


def test_an_unknown_release_exits_1_and_is_named(small):
    result = run(small.tree, "--release", "0.99.0")
    assert result.returncode == 1
    assert "vLLM 0.99.0 is unknown" in result.stdout
    assert "engine.config" in result.stdout


def test_json(small):
    result = run(small.tree, "--json")
    assert result.returncode == 1  # the small vLLM states release 0.32.0, but has no target of that release's seams
    answer = json.loads(result.stdout)
    (report,) = answer["reports"]
    assert answer["ok"] is report["ok"] is False and report["release"] == "0.32.0"
    assert {"anchor", "patch", "close"} <= {p["kind"] for p in report["problems"]}


@pytest.mark.parametrize(
    "arguments", [("/no/such/source",), ("--all", "installed"), ("--release", "x"), ("--no-such-option",)]
)
def test_wrong_usage_exits_2(arguments):
    assert run(*arguments).returncode == 2


def test_a_pipe_gets_a_plain_line_for_each_report(small):
    shares = "applied 0/{0}, reversed 0/{0}, closed 0/{1}, sources 0/{2}"
    result = run(small.tree, "--release", "0.33.0", COLUMNS="40")
    first = result.stdout.splitlines()[0]
    counts = r"applied 0/(\d+), reversed 0/(\d+), closed 0/(\d+), sources 0/(\d+)"
    made = re.fullmatch(rf"vLLM 0\.33\.0 \(tree\): \d+ problems; {counts}", first)
    assert made and made[1] == made[2] and first.endswith(shares.format(made[1], made[3], made[4]))


def test_a_terminal_gets_a_table_of_80_columns():
    fits = {"patches": 41, "applied": 41, "reversed": 41, "seams": 157, "closed": 157, "anchors": 157, "matched": 157}
    reports = [
        Report("/cache/vllm-0.33.0.zip", "0.33.0", "0.33.0", **fits),
        Report("installed", "0.32.0", "0.32.0", **fits),
        Report("trees/[b]vllm/", "0.34.0", "0.33.0", problems=[Problem("release", "unknown")]),
        Report("/cache/vllm-ascend-0.23.0.zip", "0.23.0", "0.23.0", **fits, package="vllm_ascend"),
    ]
    console = Console(width=80, force_terminal=True, color_system=None, file=io.StringIO())
    check._print(reports, console)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    starts = ("vLLM 0.33.0 ", "vLLM 0.32.0 (installed) ", "vLLM 0.34.0 as 0.33.0 ([b]vllm) ", "vllm-ascend 0.23.0 ")
    rows = [next(line for line in lines if line.startswith(start)) for start in starts]
    assert [row.split()[-1] for row in rows] == ["fits", "fits", "problem", "fits"]
    assert max(map(len, lines)) <= 80


def test_a_patched_copy_is_made_and_not_twice(tmp_path):
    made = run(tmp_path / "copy", command="patched-copy")
    assert made.returncode == 0 and f"PYTHONPATH={tmp_path / 'copy'} BI_PATCH_FORM=patches" in made.stdout
    assert (tmp_path / "copy/vllm/config/vllm.py").read_text().endswith(series.CALL)
    again = run(tmp_path / "copy", command="patched-copy")
    assert again.returncode == 2 and "exists already" in again.stderr


def test_an_unknown_setting_exits_2(small):
    assert "BI_PATCH_TYPO" in run(small.tree, BI_PATCH_TYPO="1").stderr


def test_the_installed_vllm_fits_and_is_not_imported():
    result = run("installed", VLLM_BATCH_INVARIANT="1")
    assert result.returncode == 0, result.stdout
    assert "fits" in result.stdout
