"""Every spelling of an operation on the real torch_npu dispatcher. Armed, bi_patch serves the right result or refuses
the call by name. Stock, the call reaches a native kernel."""

import json
from pathlib import Path

import pytest

from bi_patch.ops.ascend import machine

DOUBLES = Path(__file__).parent / "doubles"
pytestmark = pytest.mark.ascend


def rows(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["spelling"]: row for row in printed(done) if "spelling" in row}


def printed(done):
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("mode", ["inference", "grad"])
def test_armed_no_spelling_reaches_a_native_kernel(on_npu, mode):
    table = rows(on_npu("tests/ascend/table.py", mode))
    assert len(table) >= 60
    assert {name: row["told"] for name, row in table.items() if row["found"] != row["wanted"]} == {}
    refused = [row for row in table.values() if row["found"] == "refused"]
    assert refused and all("::" in row["told"] and "BI_PATCH=0" in row["told"] for row in refused)


def test_where_ascendc_is_installed_it_serves(on_npu):
    """With a double of the AscendC package, the same spellings are right, and each of its operators serves a call."""
    done = on_npu("tests/ascend/table.py", first=(DOUBLES,))
    table = rows(done)
    assert {name: row["told"] for name, row in table.items() if row["found"] != row["wanted"]} == {}
    (calls,) = (row["calls"] for row in printed(done) if "calls" in row)
    assert set(calls) == set(machine.SCHEMAS) and all(calls.values())


def test_stock_every_spelling_is_native(on_npu):
    table = rows(on_npu("tests/ascend/table.py", "stock"))
    assert {row["found"] for row in table.values()} == {"native"}


def test_the_command_for_a_device_runs(on_npu):
    """The command for people with an NPU runs without errors of its own, here in the interpreter and on few rows."""
    code = (
        "import sys, canonical, host_ops, bi_patch_entry; canonical.install(); host_ops.install()\n"
        "sys.argv = ['bi-patch', 'ascend-check', '--rows', '3']; bi_patch_entry.cli()"
    )
    done = on_npu("-c", code)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    text = done.stdout[done.stdout.index("{") :]
    assert all(row["ok"] for row in json.loads(text)["rows"])


def test_a_chip_that_is_not_in_the_table_is_named(on_npu):
    code = "import torch_npu\nfrom bi_patch.ops.ascend import dispatch\ndispatch.install()"
    done = on_npu("-c", code, STUB_SOC="Ascend950PR_950z")
    assert "UnsupportedDevice" in done.stderr and "Ascend950PR_950z" in done.stderr
