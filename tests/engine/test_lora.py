"""LoRA on the CPU engine: rows of any company, loading and unloading, and what is refused by name."""

import os
import subprocess
import sys

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


RUN = """
import os, shutil, sys
from bi_patch import arming
arming.arm()
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    model, first, second = sys.argv[1:]
    lora = dict(enable_lora=True, max_lora_rank=16, max_loras=2)
    llm = LLM(model, dtype="float32", max_model_len=512, max_num_seqs=4, **lora)
    asked = SamplingParams(temperature=0, max_tokens=6, logprobs=0, ignore_eos=True)

    def answer(*lora):
        outputs = llm.generate([{"prompt_token_ids": list(range(5, 300))}], asked, use_tqdm=False,
                               lora_request=LoRARequest(*lora) if lora else None)
        made = outputs[0].outputs[0]
        return made.token_ids, [next(iter(step.values())).logprob for step in made.logprobs]

    def refused(text, call):
        try:
            call()
        except Exception as error:
            seen = error
            while seen is not None and text not in str(seen):
                seen = seen.__cause__ or seen.__context__
            assert seen is not None, error
        else:
            raise AssertionError(text)

    engine = llm.llm_engine
    plain, one, two = answer(), answer("one", 1, first), answer("two", 2, second)
    assert len({str(made) for made in (plain, one, two)}) == 3
    # Removed, loaded again in another order, and under other numbers and names.
    assert engine.remove_lora(1) and engine.remove_lora(2) and not engine.list_loras()
    assert engine.add_lora(LoRARequest("two", 2, second)) and engine.list_loras() == {2}
    assert answer("one", 1, first) == one and answer("two", 2, second) == two and answer() == plain
    assert answer("again", 3, first) == one and answer("one", 1, first) == one
    # One number for two adapters.
    refused("lora_int_id 1 is the adapter 'one'", lambda: answer("other", 1, second))
    refused("lora_int_id 2 is the adapter 'two'", lambda: engine.add_lora(LoRARequest("two", 2, first)))
    assert answer("one", 1, first) == one
    # New weights of the base, and of an adapter.
    refused("weights.calls", lambda: llm.collective_rpc("reload_weights"))
    assert engine.remove_lora(1)
    for name in os.listdir(second):
        shutil.copy(os.path.join(second, name), os.path.join(first, name))
    refused("holds other weights than when adapter 1", lambda: engine.add_lora(LoRARequest("one", 1, first)))
    assert answer("new", 4, first) == two
    print("DONE", flush=True)
"""


def test_loading_and_unloading(model, cache, tmp_path):
    own = model(recipes.LLAMA)
    folders = [str(made.write(own, tmp_path / f"{i}", seed=i, rank=rank)) for i, rank in enumerate((8, 16))]
    _run(tmp_path, RUN, cache, own, *folders)


def _run(tmp_path, text, cache, *given):
    script = tmp_path / "run.py"
    script.write_text(text)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_BATCH"))}
    clean |= {"BI_PATCH_CACHE": str(cache), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run([sys.executable, str(script), *given], env=clean, capture_output=True, text=True, timeout=900)
    assert "DONE" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]


WIDE_HEAD = """
import sys
from bi_patch import arming
arming.arm()
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    model, head, plain = sys.argv[1:]
    llm = LLM(model, dtype="bfloat16", max_model_len=256, max_num_seqs=2, enforce_eager=True, enable_lora=True,
              max_lora_rank=8, max_loras=2, hf_overrides={"head_dtype": "float32"})
    asked = SamplingParams(temperature=0, max_tokens=3, logprobs=0, ignore_eos=True)

    def answer(*lora):
        made = llm.generate([{"prompt_token_ids": list(range(5, 30))}], asked, use_tqdm=False,
                            lora_request=LoRARequest(*lora) if lora else None)
        return [next(iter(step.values())).logprob for step in made[0].outputs[0].logprobs]

    before = answer()
    for ask in (lambda: answer("head", 1, head), lambda: llm.llm_engine.add_lora(LoRARequest("head", 1, head))):
        try:
            ask()
        except Exception as error:
            assert "lora.head" in str(error), error
        else:
            raise AssertionError("not refused")
    assert answer("plain", 2, plain) != before
    assert answer() == before
    print("DONE", flush=True)
"""


def test_an_adapter_of_a_wide_head_is_refused_and_the_engine_goes_on(model, cache, tmp_path):
    own = model(recipes.LLAMA)
    folders = [
        str(made.write(own, tmp_path / name, seed=i, rank=8, embedded=embedded))
        for i, (name, embedded) in enumerate((("head", True), ("plain", False)))
    ]
    _run(tmp_path, WIDE_HEAD, cache, own, *folders)


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
