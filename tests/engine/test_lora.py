"""LoRA on the CPU engine: rows of any company, and what is refused by name."""

import pytest

from bi_patch.errors import UnsupportedFeature
from bi_patch.tools.faults import catch, every
from bi_patch.tools.faults.child import FaultyEngine
from bi_patch.tools.faults.engines import adapters
from bi_patch.tools.models import adapters as made
from bi_patch.tools.models import recipes
from bi_patch.tools.verify import probes
from bi_patch.tools.verify.child import ARMED, EngineFailed
from bi_patch.tools.verify.engine import Options
from bi_patch.tools.verify.probes import adapters as probe
from bi_patch.tools.verify.probes.base import Change

pytestmark = pytest.mark.engine

FAULTS = [fault.name for fault in every() if fault.axis == catch.LORA and "cpu" in fault.platforms]


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


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught_and_named(engine, load, name):
    found = catch.catch(engine, name, load)
    print(f"{found.cause}: {name}: {found.named}")
    assert found.caught, f"{found.axis} did not see it in {found.compared} pairs"
    assert found.right, found.named


def test_an_adapter_that_does_not_fit_is_vllms_own_error(engine, load, tmp_path):
    """vLLM refuses a rank above max_lora_rank when it loads the adapter, and the engine goes on."""
    folder = made.write(engine.options.model, tmp_path / "wide", seed=9, rank=512)
    with pytest.raises(EngineFailed, match="rank 512 is greater than max_lora_rank"):
        engine.generate([load.greedy(0).but(lora=str(folder))])


@pytest.mark.parametrize(
    "name,extra,said",
    [
        (recipes.MOE, {}, "LoRA with experts"),
        (recipes.LLAMA, {"fully_sharded_loras": True}, "sharded adapters"),
        (recipes.LLAMA, {"lora_dtype": "float16"}, "adapters in another type than the model's"),
        (recipes.LLAMA, {"pipeline_parallel_size": 2}, "LoRA with pipeline parallelism"),
    ],
    ids=["experts", "sharded", "another type", "pipeline parallelism"],
)
def test_what_is_not_covered_is_refused_by_name(refusing, model, name, extra, said):
    with pytest.raises(UnsupportedFeature, match=said):
        refusing.refuse(Options(model(name), max_model_len=256, extra={"enable_lora": True, **extra}))
