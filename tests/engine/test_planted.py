"""Every fault planted in the CPU engine makes its axis differ, and locate names the place of the fault."""

import os

import pytest

from bi_patch.errors import BiPatchError
from bi_patch.tools.faults import catch, every
from bi_patch.tools.faults.child import FaultyEngine
from bi_patch.tools.faults.compiled import catch_compiled
from bi_patch.tools.faults.engines import few_blocks, options, speculating
from bi_patch.tools.models import recipes
from bi_patch.tools.verify import locate, precision
from bi_patch.tools.verify.case import Scenario
from bi_patch.tools.verify.child import ARMED, PATIENT
from bi_patch.tools.verify.probes.base import pair

pytestmark = pytest.mark.engine

# test_mla.py and test_quantized.py plant the others.
CPU = [fault for fault in every() if "cpu" in fault.platforms and not fault.model]
# Axes with an engine of their own: test_weights.py plants the faults of updates, test_pooling.py those of poolers,
# test_lora.py those of adapters, test_images.py those of images.
OWN = (catch.PREEMPTION, catch.UPDATE, catch.POOLED, catch.LORA, catch.SPECULATION, catch.IMAGES)
MAIN = [fault.name for fault in CPU if fault.axis not in OWN]


@pytest.fixture(scope="module")
def engine(start, model):
    """One armed engine in which tests plant and remove faults. Its model has experts, fp32, tied routers and head."""
    given = options("cpu", "")
    changes = {f: getattr(given, f) for f in given.__struct_fields__ if f not in ("model", "chunk", "max_model_len")}
    with start(
        ARMED, recipes.MOE, kind=FaultyEngine, chunk=given.chunk, max_model_len=given.max_model_len, **changes
    ) as made:
        yield made


@pytest.fixture(scope="module")
def load(engine):
    return catch.workload(engine)


def test_the_causes_that_cpu_can_show_are_all_planted():
    assert {fault.cause for fault in CPU} == {*range(1, 30), *range(31, 38)} - {17, 24}
    assert len({fault.name for fault in every()}) == len(every())


@pytest.mark.parametrize("name", MAIN)
def test_a_planted_fault_is_caught_and_named(engine, load, name):
    found = catch.catch(engine, name, load)
    print(f"{found.cause}: {name}: {found.named}")
    assert found.caught, f"{found.axis} did not see it in {found.compared} pairs"
    assert found.right, found.named


def test_without_a_fault_the_same_axes_see_nothing(engine, load):
    for axis in sorted({fault.axis for fault in CPU} - {*OWN, catch.PRECISION, catch.RESTART}):
        cases = list(catch.cases(engine, axis, load))
        assert cases and not any(case.differs for case in cases), axis
    precise = precision.of(engine, widened=True)
    assert not precise.failed and precise.layers == 10 and 0 < precise.worst < 1


def test_without_a_fault_nothing_is_located(engine, load):
    request = load.greedy(1)
    fillers = [load.filler(i) for i in range(4)]
    alone, company = Scenario.alone(request), Scenario.among(fillers[:2], request, fillers[2:])
    answers = [locate.trace(engine, s).answer for s in (alone, company)]
    case = pair("a batch of 5", alone, company, *answers)
    assert not case.differs and locate.locate_on(engine, case) is None


def test_tracing_changes_no_bit(engine, load):
    request = load.greedy(2).but(prompt_logprobs=1, temperature=0.7, seed=3)
    engine.reset_cache()
    (plain,) = engine.generate([request])
    assert locate.trace(engine, Scenario.alone(request)).answer == plain


def test_preemption(start, engine):
    given = few_blocks(options("cpu", ""), engine.info.block_size)
    with start(
        ARMED,
        recipes.MOE,
        kind=FaultyEngine,
        chunk=given.chunk,
        max_model_len=given.max_model_len,
        kv_blocks=given.kv_blocks,
        dtype=given.dtype,
        digests=True,  # so that a custom logits processor is preempted, too
    ) as small:
        load = catch.workload(small)
        assert not any(case.differs for case in catch.cases(small, catch.PREEMPTION, load))
        for name in (fault.name for fault in CPU if fault.axis == catch.PREEMPTION):
            found = catch.catch(small, name, load)
            assert found.caught and found.right, found


def test_speculation(start):
    given = speculating(options("cpu", ""))
    changes = {f: getattr(given, f) for f in given.__struct_fields__ if f != "model"}
    with start(ARMED, recipes.MOE, kind=FaultyEngine, **changes) as speculating_engine:
        load = catch.workload(speculating_engine)
        cases = list(catch.cases(speculating_engine, catch.SPECULATION, load))
        assert cases and not any(case.differs for case in cases)
        for name in (fault.name for fault in CPU if fault.axis == catch.SPECULATION):
            found = catch.catch(speculating_engine, name, load)
            print(f"{found.cause}: {name}: {found.named}")
            assert found.caught and found.right, found


def test_a_fault_of_another_platform_is_refused(engine):
    name = next(fault.name for fault in every() if fault.platforms == ("cuda",))
    with pytest.raises(BiPatchError, match="cannot be planted on cpu"):
        engine.plant(name)
    with pytest.raises(BiPatchError, match="there is no fault"):
        engine.plant("no such fault")


def test_a_stock_engine_is_located_by_the_seam_that_it_lacks(stock):
    """Without bi_patch the differences are real, and locate names the seam that would close them."""
    load = catch.workload(stock)
    case = next(c for axis in ("batch size", "mixed lengths") for c in catch.cases(stock, axis, load) if c.differs)
    found = locate.locate_on(stock, case)
    print(found.words())
    assert found.seam and found.seam_status.startswith("open") and found.module.startswith("model.layers.0")


@pytest.mark.slow
def test_compiled_norms_are_caught_and_named_by_what_layers_leave_behind():
    """Cause 17: norms that inductor compiles differ from eager norms. The bundled kernels' norms do not."""
    given, environ = options("cpu", ""), PATIENT | os.environ
    found = catch_compiled(given, environ, "cpu")
    print(found.named)
    assert found.caught and found.right, found
    assert "norm.cpu_rms" in found.named
    clean = catch_compiled(given, environ, "cpu", planted=False)
    assert clean.compared > 0 and not clean.caught, clean.first
