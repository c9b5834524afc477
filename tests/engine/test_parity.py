"""Parity on the real engine: every line has equal bits, and every planted fault is caught and named. One engine."""

import msgspec
import pytest

from bi_patch.tools.models import recipes
from bi_patch.tools.parity import checkpoints, faults
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
def test_a_later_call_goes_on_with_the_same_bits(engine, start, tmp_path):
    """6 steps in one call, and 3 and 3 in two calls, each with an engine of its own."""
    plan = msgspec.structs.replace(PLAN, steps=6)
    assert not engine.line("GRPO", plan).differing
    whole = engine.runs()
    kept = msgspec.structs.replace(plan, folder=str(tmp_path))
    engine.line("GRPO", msgspec.structs.replace(kept, steps=3))
    half = engine.runs()
    with start(ARMED, recipes.TIED, kind=ParityEngine, extra=PROCESSED, max_model_len=512) as other:
        axes = [other.line(name, kept) for name in ("GRPO", "GRPO rerun")]
        again = other.runs()
    assert [axis.differing for axis in axes] == [0, 0] and axes[0].compared
    for run, first, parts in zip(whole, half, again, strict=True):
        assert first.steps == run.steps[:3] and first.masters != run.masters
        assert parts.steps == run.steps and parts.masters == run.masters
        assert (run.calls, parts.calls) == (1, 2) and len(parts.spent) == 6
        told = checkpoints.progress(tmp_path, run.micro, run.seats)
        assert [at.step for at in told] == run.steps


@pytest.mark.slow
def test_smollm2_learns_with_kl_zero(start):
    with start(ARMED, recipes.SMOL, kind=ParityEngine, extra=PROCESSED, max_model_len=512) as engine:
        axes = [engine.line(name, Plan(steps=4)) for name in ("GRPO", "GRPO rerun")]
        assert [axis.differing for axis in axes] == [0, 0]
        assert all(step.kl == 0 for run in engine.runs() for step in run.steps)
