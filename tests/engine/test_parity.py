"""Parity on the real engine: every line has equal bits, and every planted fault is caught and named. One engine."""

import pytest

from bi_patch.tools.models import recipes
from bi_patch.tools.parity import faults
from bi_patch.tools.parity.child import ParityEngine
from bi_patch.tools.parity.plan import NAMES, Plan
from bi_patch.tools.verify.child import ARMED
from bi_patch.tools.verify.report import PASSED

pytestmark = pytest.mark.engine
PLAN = Plan(steps=2, micro=(12, 5), seats=(64, 7), group=3, tokens=8, updates=1, cuts=((8,), (1,) * 8, (3, 5)))
PROCESSED = {"logprobs_mode": "processed_logprobs"}


@pytest.fixture(scope="module")
def engine(start):
    with start(ARMED, recipes.TIED, kind=ParityEngine, extra=PROCESSED, max_model_len=512) as made:
        yield made


@pytest.mark.parametrize("name", NAMES)
def test_every_line_has_equal_bits(engine, name):
    axis = engine.line(name, PLAN)
    assert (axis.state, axis.differing) == (PASSED, 0), axis.shown or axis.reason
    assert axis.compared


def test_both_runs_end_with_the_same_weights_and_no_kl(engine):
    first, second = engine.runs()
    assert first.masters == second.masters
    assert first.steps == second.steps and all(step.kl == 0 for step in first.steps)
    assert len({step.norm for step in first.steps}) == PLAN.steps  # something was learned


@pytest.mark.parametrize("fault", faults.FAULTS, ids=faults.NAMES)
def test_every_planted_fault_is_caught_and_named(engine, fault):
    found = faults.catch(engine, fault, PLAN)
    assert found.caught and found.named, found


@pytest.mark.slow
def test_smollm2_learns_with_kl_zero(start):
    with start(ARMED, recipes.SMOL, kind=ParityEngine, extra=PROCESSED, max_model_len=512) as engine:
        axes = [engine.line(name, Plan(steps=4)) for name in ("GRPO", "GRPO rerun")]
        assert [axis.differing for axis in axes] == [0, 0]
        assert all(step.kl == 0 for run in engine.runs() for step in run.steps)
