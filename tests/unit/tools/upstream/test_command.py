"""`bi-patch check` as users run it: exit codes, JSON, and no vLLM in the process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bi_patch

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


def run(*arguments, **environ):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_"))}
    clean |= {"PYTHONPATH": str(ROOT), "COLUMNS": "160"} | environ
    command = [sys.executable, "-c", PROGRAM, "check", *map(str, arguments)]
    result = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    assert "loaded []" in result.stderr, result.stderr
    return result


def test_an_unknown_release_exits_1_and_is_named(small):
    result = run(small.tree, "--release", "0.99.0")
    assert result.returncode == 1
    assert "vLLM 0.99.0 is unknown" in result.stdout
    assert "engine.config" in result.stdout


def test_json(small):
    result = run(small.tree, "--json")
    assert result.returncode == 1  # the small vLLM calls itself 0.32.0 and has none of its seams
    answer = json.loads(result.stdout)
    (report,) = answer["reports"]
    assert answer["ok"] is report["ok"] is False and report["release"] == "0.32.0"
    assert {"anchor", "patch", "close"} <= {p["kind"] for p in report["problems"]}


@pytest.mark.parametrize(
    "arguments", [("/no/such/source",), ("--all", "installed"), ("--release", "x"), ("--no-such-option",)]
)
def test_wrong_usage_exits_2(arguments):
    assert run(*arguments).returncode == 2


def test_an_unknown_setting_exits_2(small):
    assert "BI_PATCH_TYPO" in run(small.tree, BI_PATCH_TYPO="1").stderr


def test_the_installed_vllm_fits_and_is_not_imported():
    result = run("installed", VLLM_BATCH_INVARIANT="1")
    assert result.returncode == 0, result.stdout
    assert "fits" in result.stdout
