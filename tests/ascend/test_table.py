"""Every spelling on the real torch_npu dispatcher: served and right, or refused by name; without the routes, native."""

import json

import pytest

pytestmark = pytest.mark.ascend


def rows(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["spelling"]: row for row in map(json.loads, filter(lambda s: s.startswith("{"), done.stdout.splitlines()))}


@pytest.mark.parametrize("mode", ["inference", "grad"])
def test_with_the_routes_no_spelling_reaches_a_native_kernel(on_npu, mode):
    table = rows(on_npu("tests/ascend/table.py", mode))
    assert len(table) >= 60
    assert {name: row["told"] for name, row in table.items() if row["found"] != row["wanted"]} == {}
    refused = [row for row in table.values() if row["found"] == "refused"]
    assert refused and all("::" in row["told"] and "BI_PATCH=0" in row["told"] for row in refused)


def test_without_the_routes_every_spelling_is_native(on_npu):
    table = rows(on_npu("tests/ascend/table.py", "stock"))
    assert {row["found"] for row in table.values()} == {"native"}
