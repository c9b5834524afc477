"""vLLM-Ascend 0.23 armed for real: every seam closed, its functions through the routes, what is not covered
refused."""

import json

import pytest

pytestmark = pytest.mark.ascend


def test_vllm_ascend_armed(on_npu, tmp_path):
    environ = {"BI_PATCH": "1", "VLLM_BATCH_INVARIANT": "1", "BI_PATCH_CACHE": str(tmp_path)}
    done = on_npu("tests/ascend/live.py", sources=True, **environ)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) >= 22
    assert {row["case"]: row["told"] for row in found if row["told"]} == {}


def test_a_seam_left_open_is_named(on_npu, tmp_path):
    code = "import sys; sys.argv = ['x']; import live\nlive.main()"
    environ = {"BI_PATCH": "1", "VLLM_BATCH_INVARIANT": "1", "BI_PATCH_CACHE": str(tmp_path)}
    done = on_npu("-c", code, sources=True, BI_PATCH_LEAVE_OPEN="engine.ascend_mode", **environ)
    assert done.returncode != 0
    assert "SeamOpen" in done.stderr and "engine.ascend_mode" in done.stderr
