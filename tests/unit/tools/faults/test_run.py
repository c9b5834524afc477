"""Which faults a run leaves out: those whose axis does not apply to the engine."""

from types import SimpleNamespace

import msgspec

from bi_patch.tools import faults
from bi_patch.tools.faults import run


def test_a_fault_of_a_cache_that_the_engine_lacks_is_left_out_with_the_reason(arithmetic):
    """vLLM turns chunks and the prefix cache off for MLA on a CPU without AMX."""
    told = []
    held = run._Run("cpu", {}, "", told.append, lambda found: None)
    engine = arithmetic()
    fault = faults.named("latents of context and chunk apart")
    assert not held._left_out(engine, fault) and told == []
    engine.info = msgspec.structs.replace(engine.info, whole=True, cached=False)
    assert held._left_out(engine, fault)
    assert told == [
        f" 6 {fault.name}: left out (prefix cache): the model's prompts are computed whole, without a cache"
    ]


def test_a_fault_with_an_engine_of_its_own_or_without_an_axis_is_planted(arithmetic):
    held = run._Run("cpu", {}, "", print, lambda found: None)
    engine = arithmetic(random_weights=3)
    for axis in (run.catch.UPDATE, run.catch.PRECISION):
        assert not held._left_out(engine, SimpleNamespace(axis=axis))
