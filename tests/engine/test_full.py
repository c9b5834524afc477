"""`bi-patch verify --full`: every axis that a CPU engine can have, on eager and on compiled base engines."""

import pytest

from bi_patch.tools.models import recipes
from bi_patch.tools.verify import report
from bi_patch.tools.verify.levels import FULL
from bi_patch.tools.verify.local import local
from bi_patch.tools.verify.measure import verify

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# Axes of servers, of GPUs, of other models, and of settings that the engines here do not have.
_ELSEWHERE = {
    "concurrent clients",
    "images",
    "pooled vectors",
    "routed experts",
    "sleep and wake",
    "tensor parallel size",
}
_EAGER_ONLY = {"LoRA", "LoRA off", "features together"}  # vLLM for CPU runs adapters in eager mode


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", [recipes.LLAMA, recipes.MOE])
def test_every_axis(model, name, eager):
    found = verify(local(model(name), FULL, eager=eager, logits=True), FULL)
    states = {axis.name: (axis.state, axis.reason) for axis in found.axes}
    assert found.exit_code == report.INVARIANT and found.complete, (found.verdict, states)
    missing = {axis.name for axis in found.axes if axis.state == report.NOT_APPLICABLE}
    allowed = _ELSEWHERE | (_EAGER_ONLY if name == recipes.MOE or not eager else set())
    assert missing <= allowed, {axis: states[axis] for axis in missing - allowed}
    passed = [axis for axis in found.axes if axis.state == report.PASSED]
    assert all(axis.compared > 0 for axis in passed) and {axis.name for axis in passed} | missing == set(states)
