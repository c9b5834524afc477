"""Arming the installed vLLM in real processes, without an engine: closing, refusing, disarming, the start-up check."""

import json

import pytest

pytestmark = pytest.mark.engine

# One process, because an import of vLLM takes 10 s. Prints a JSON object.
ARMED = """
import json, sys
import vllm  # the package alone, without its modules
import bi_patch
from bi_patch.arming import startup

state = bi_patch.state()
told = {"armed": state.armed}
findings = startup.inspect()
told["not closed"] = [str(f) for f in findings if f.status != startup.CLOSED]
startup.check()
# Gemma 3's images need torchvision, which may be missing here: their patch point waits for the module.
late = sum(p.seam.on_import and p.target.module not in sys.modules for p in state.plan.seams)
told |= {"closed": state.closed, "open": state.open - late, "late": late, "state": repr(state)}
from vllm.plugins import load_general_plugins

load_general_plugins()

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl as C

ours, C.forward = C.forward, lambda self: None
try:
    startup.check()
except bi_patch.BiPatchError as error:
    told["replaced"] = f"{type(error).__name__}: {error}"
C.forward = ours
startup.check()

entries = list(state.ledger.entries)
told["entries"] = [len(entries), sum(e.is_closed() for e in entries)]
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
told["restored"] = len(entries)
try:
    bi_patch.arm()
except bi_patch.BiPatchError as error:
    told["again"] = f"{type(error).__name__} {error} {bi_patch.state()}"
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(run_python):
    """What a process tells that loads every patch point, opens one for a while, and disarms."""
    done = run_python(ARMED)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_seam_closes_and_disarming_restores_by_identity(told):
    count, closed = told["entries"]
    assert told["not closed"] == [] and count == closed == told["restored"] >= 15


def test_arming_after_vllm_names_the_modules(run_python):
    code = "import vllm.v1.worker.worker_base, vllm.model_executor.layers.linear\nimport bi_patch"
    done = run_python(code)
    assert done.returncode != 0 and "ArmedTooLate" in done.stderr
    assert "vllm.v1.worker.worker_base" in done.stderr and "bi-patch run" in done.stderr
    assert "in a notebook, restart the kernel, then import bi_patch first" in done.stderr


def test_arming_again_after_disarming_is_refused_while_vllm_is_loaded(told):
    said = told["again"]
    assert said.startswith("ArmedTooLate bi_patch was disarmed in this process, which cannot be armed again"), said
    assert "restart the kernel" in said and said.endswith("None")


def test_the_state_counts_what_closed(told):
    closed, late = told["closed"], told["late"]
    assert closed > 15 and told["open"] == 0 and late <= 1, told
    assert f"{closed} of {closed + late} patch points closed" in told["state"]


def test_importing_only_the_package_is_not_too_late(told):
    assert told["armed"] is True


def test_a_seam_that_something_else_replaced_is_open(told):
    assert told["replaced"].startswith("SeamOpen") and "something else replaced forward" in told["replaced"]


def test_an_open_seam_is_named_by_the_plugin(run_python):
    """`told` loads the plugins with every patch point closed."""
    code = "import bi_patch\nfrom vllm.plugins import load_general_plugins\nload_general_plugins()"
    done = run_python(code, BI_PATCH_LEAVE_OPEN="attention.cpu_forward")
    assert done.returncode != 0 and "SeamOpen" in done.stderr
    assert "attention.cpu_forward at vllm.v1.attention.backends.cpu_attn" in done.stderr


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
