"""A patched copy of the installed vLLM closes the same seams as the import hooks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bi_patch

ROOT = Path(bi_patch.__file__).parent.parent
INSPECT = """
import json
import vllm
import vllm.config
from bi_patch.arming import process, startup
findings = startup.inspect()
startup.check()
state = process.state()
print("RESULT" + json.dumps({
    "vllm": vllm.__file__, "form": state.settings.form, "release": str(state.plan.release),
    "seams": sorted((f.name, f.status, f.reason) for f in findings if f.required),
    "optional": sorted((f.name, f.status) for f in findings if not f.required),
}))
"""


def inspect(path, program, **environ):
    """The result that a program prints. path: the first folders on PYTHONPATH."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_BATCH"))}
    paths = [*map(str, path), str(ROOT), os.environ["PYTHONPATH"]]
    clean |= {"PYTHONPATH": os.pathsep.join(paths), "VLLM_BATCH_INVARIANT": "1"}
    clean |= {k: v for k, v in os.environ.items() if k == "BI_PATCH_CACHE"} | environ
    result = subprocess.run(
        [sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=False, timeout=900
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return json.loads(result.stdout.rpartition("RESULT")[2].splitlines()[0])


@pytest.mark.engine
def test_patches_and_hooks_close_the_same_seams(patched):
    hooks = inspect([], "import bi_patch\n" + INSPECT, BI_PATCH_FORM="hooks")
    patches = inspect([patched], INSPECT, BI_PATCH_FORM="patches")
    assert patches.pop("vllm") == str(patched / "vllm/__init__.py") != hooks.pop("vllm")
    assert (patches.pop("form"), hooks.pop("form")) == ("patches", "hooks")
    assert patches == hooks
    assert {status for _, status, _ in hooks["seams"]} == {"closed"}


@pytest.mark.engine
def test_the_patched_copy_takes_hooks_too(patched):
    both = inspect([patched], "import bi_patch\n" + INSPECT, BI_PATCH_FORM="hooks")
    assert {status for _, status, _ in both["seams"]} == {"closed"}


@pytest.mark.engine
def test_the_patched_copy_is_inert_unless_asked(patched):
    program = """
import vllm.config.vllm, vllm.v1.worker.worker_base, sys, json
from bi_patch.arming import state
print("RESULT" + json.dumps([vllm.config.vllm.__file__, state() is None]))
"""
    file, unarmed = inspect([patched], program, VLLM_BATCH_INVARIANT="0")
    assert file == str(patched / "vllm/config/vllm.py") and unarmed
