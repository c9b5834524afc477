"""LoRA on the CPU engine: adapters in any company, and requests without an adapter."""

import pytest

from bi_patch.tools.faults import catch
from bi_patch.tools.faults.child import FaultyEngine
from bi_patch.tools.faults.engines import adapters
from bi_patch.tools.models import recipes
from bi_patch.tools.verify import probes
from bi_patch.tools.verify.child import ARMED
from bi_patch.tools.verify.engine import Options
from bi_patch.tools.verify.probes import adapters as probe
from bi_patch.tools.verify.probes.base import Change

pytestmark = pytest.mark.engine


def changes(given: Options) -> dict:
    return {f: getattr(given, f) for f in given.__struct_fields__ if f not in ("model", "chunk", "max_model_len")}


@pytest.fixture(scope="module")
def engine(start):
    """An armed engine in fp32 with two slots, for adapters of up to rank 256 on linears, embeddings and the head."""
    with start(ARMED, recipes.LLAMA, kind=FaultyEngine, chunk=512, **changes(adapters())) as made:
        yield made


@pytest.fixture(scope="module")
def load(engine):
    return catch.workload(engine)


def test_adapters_do_not_depend_on_company(engine, load):
    cases = list(catch.cases(engine, catch.LORA, load))
    assert len(cases) > 10 and not any(case.differs for case in cases)


def test_a_request_without_an_adapter_has_the_bits_of_an_engine_without_lora(engine, load, start):
    axis = next(p for p in probes.FEATURE_PROBES if isinstance(p, probe.WithoutProbe))
    with start(ARMED, recipes.LLAMA, dtype="float32", chunk=512) as plain:
        asked = axis.requests(plain, load)
        expected = axis.collect(plain, load)
    change = Change("LoRA on", {})
    cases = list(axis.cases(change, asked, expected, axis.collect(engine, load, change)))
    assert len(cases) == 3 and not any(case.differs for case in cases)
