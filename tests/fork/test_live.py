"""A patched copy of the installed vLLM closes the same seams as the import hooks do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bi_patch
from bi_patch.fork.apply import patched_copy

ROOT = Path(bi_patch.__file__).parent.parent
INSPECT = """
import json
import vllm
import vllm.config
from bi_patch.arming import gate, switch
findings = gate.inspect()
gate.verify()
state = switch.state()
print("RESULT" + json.dumps({
    "vllm": vllm.__file__, "form": state.settings.form, "release": str(state.plan.release),
    "seams": sorted((f.name, f.status, f.reason) for f in findings if f.required),
    "optional": sorted((f.name, f.status) for f in findings if not f.required),
}))
"""


def inspect(path, program, **environ):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_"))}
    clean |= {
        "PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)]),
        "VLLM_BATCH_INVARIANT": "1",
    } | environ
    result = subprocess.run(
        [sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.rpartition("RESULT")[2])


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return patched_copy(tmp_path_factory.mktemp("patched"))


@pytest.mark.engine
def test_patches_and_hooks_close_the_same_seams(copy):
    hooks = inspect([], "import bi_patch\n" + INSPECT, BI_PATCH_FORM="hooks")
    patches = inspect([copy], INSPECT, BI_PATCH_FORM="patches")
    assert patches.pop("vllm") == str(copy / "vllm/__init__.py") != hooks.pop("vllm")
    assert (patches.pop("form"), hooks.pop("form")) == ("patches", "hooks")
    assert patches == hooks
    assert {status for _, status, _ in hooks["seams"]} == {"closed"}


@pytest.mark.engine
def test_the_patched_copy_takes_hooks_too(copy):
    both = inspect([copy], "import bi_patch\n" + INSPECT, BI_PATCH_FORM="hooks")
    assert {status for _, status, _ in both["seams"]} == {"closed"}


@pytest.mark.engine
def test_the_patched_copy_is_inert_unless_asked(copy):
    program = """
import vllm.config.vllm, vllm.v1.worker.worker_base, sys, json
from bi_patch.arming import state
print("RESULT" + json.dumps([vllm.config.vllm.__file__, state() is None]))
"""
    file, unarmed = inspect([copy], program, VLLM_BATCH_INVARIANT="0")
    assert file == str(copy / "vllm/config/vllm.py") and unarmed
