"""The real vLLM-Ascend, armed: every seam closes, bi_patch's operators serve its functions, and calls that are not
covered are refused."""

import json

import pytest

pytestmark = pytest.mark.ascend


def printed(done):
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def live(on_npu, tmp_path_factory):
    """live(form, *first): what live.py prints when hooks or patches close the seams."""

    def run(form, *first):
        environ = {"VLLM_BATCH_INVARIANT": "1", "BI_PATCH": "1", "BI_PATCH_FORM": form}
        environ["BI_PATCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
        done = on_npu("tests/ascend/live.py", form, sources=True, first=first, **environ)
        assert done.returncode == 0, done.stderr[-3000:]
        return printed(done)

    return run


@pytest.fixture(scope="module")
def hooks(live):
    return live("hooks")


def test_vllm_ascend_armed(hooks):
    found = [row for row in hooks if "case" in row]
    assert len(found) >= 22
    assert {row["case"]: row["told"] for row in found if row["told"]} == {}


def test_a_seam_left_open_is_named(on_npu, tmp_path):
    code = "import sys; sys.argv = ['x']; import live\nlive.main()"
    environ = {"BI_PATCH": "1", "VLLM_BATCH_INVARIANT": "1", "BI_PATCH_CACHE": str(tmp_path)}
    done = on_npu("-c", code, sources=True, BI_PATCH_LEAVE_OPEN="engine.ascend_mode", **environ)
    assert done.returncode != 0
    assert "SeamOpen" in done.stderr and "engine.ascend_mode" in done.stderr


COPY = """
import sys
from pathlib import Path
import bi_patch_entry
bi_patch_entry.without_arming()
from bi_patch.tools.upstream.apply import patched_copy
print(patched_copy(Path(sys.argv[1])))
"""


def test_patches_close_the_seams_that_hooks_close(on_npu, live, hooks, tmp_path):
    """In a patched copy of vLLM and vLLM-Ascend, the code at the end of the modules alone makes the same cases pass."""
    copy = tmp_path / "copy"
    made = on_npu("-c", COPY, str(copy), sources=True)
    assert made.returncode == 0, made.stderr[-3000:]
    rows = {}
    for form, told in (("hooks", hooks), ("patches", live("patches", copy))):
        (state,) = (row for row in told if "seams" in row)
        assert state["form"] == form and state["from"].startswith(str(copy)) == (form == "patches")
        assert {row["case"]: row["told"] for row in told if row.get("told")} == {}
        rows[form] = state["seams"]
    assert rows["patches"] == rows["hooks"] and {status for _, status in rows["hooks"]} == {"closed"}
