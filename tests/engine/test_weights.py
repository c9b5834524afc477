"""Weight updates on the CPU engine: with new weights, it answers as an engine that was started with them."""

import functools
import os
import subprocess
import sys

import msgspec
import pytest
from safetensors.torch import load_file, save_file

from bi_patch.tools.faults import catch, every
from bi_patch.tools.faults.child import FaultyEngine
from bi_patch.tools.models import recipes
from bi_patch.tools.verify import checkpoint, updates
from bi_patch.tools.verify.answers import Answer, NotComparable, compare
from bi_patch.tools.verify.case import Update
from bi_patch.tools.verify.child import ARMED, PATIENT, ChildEngine
from bi_patch.tools.verify.engine import Options
from bi_patch.tools.verify.instruments import InFlight
from bi_patch.tools.verify.probes import FEATURE_PROBES, updating

pytestmark = pytest.mark.engine

PROBE = next(probe for probe in FEATURE_PROBES if probe.name == catch.UPDATE)
FAULTS = [fault.name for fault in every() if fault.axis == catch.UPDATE]


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """folder(name): a recipe's model whose head is its embedding, in bf16."""
    return functools.cache(
        lambda name: str(checkpoint.write(model(name), 3, tmp_path_factory.mktemp(name) / "A", tied=True))
    )


def options(folder: str, **changes) -> Options:
    return Options(folder, max_model_len=1024, chunk=512, **changes)


def axis(given: Options, kind=ChildEngine, further=lambda engine, load: None):
    """The cases of the axis: an engine with the weights, and an engine with others that gets them and goes back."""
    environ = PATIENT | os.environ
    with ChildEngine(ARMED, given, environ=environ) as engine:
        load = catch.workload(engine)
        assert not PROBE.missing(engine)
        change, requests = PROBE.changes(engine)[0], PROBE.requests(engine, load)
        expected = PROBE.collect(engine, load)
    with kind(ARMED, given.but(**change.options), environ=environ) as engine:
        got = PROBE.collect(engine, load, change)
        further(engine, load)
    return list(PROBE.cases(change, requests, expected, got))


def test_updates_of_experts_and_of_a_tied_head(folder):
    """Eager: each way to and fro, on a warm cache; memory; marks; a part of a layer; faults, each caught and named."""

    def further(engine, load):
        _in_flight(engine, PROBE.requests(engine, load)[-1].but(max_tokens=8))
        _in_place(engine, PROBE.requests(engine, load))
        for name in FAULTS:
            found = catch.catch(engine, name, load)
            print(f"{name}: {found.named}")
            assert found.caught and found.right, found

    cases = axis(options(folder(recipes.MOE)), FaultyEngine, further)
    assert len(cases) == 4 * 2 * len({case.label.split("request ")[1] for case in cases})
    assert not [f"{case.label}: {case.difference.first}" for case in cases if case.differs]


def _first(engine) -> str:
    """The folder of the weights that the engine was not started with."""
    return next(model for model, held in updating._folders.items() if held.name == engine.options.model)


def _in_flight(engine, request):
    """An answer over an update says so, and leaves nothing for a request that comes after the update."""
    update = InFlight(Update(updates.RELOAD, _first(engine)), [request, request.but(delay=5)])
    data = engine.ask("update in flight", msgspec.msgpack.encode(update))
    spanning, later = msgspec.msgpack.decode(data, type=list[Answer])
    assert spanning.weights_changed and not later.weights_changed
    with pytest.raises(NotComparable, match="weights changed"):
        compare(spanning, later)
    engine.reset_cache()
    assert not compare(later, engine.generate([request])[0]).differing
    engine.ask("update", msgspec.msgpack.encode(Update(updates.RELOAD, engine.options.model)))


def _in_place(engine, asked):
    """On CPU, embeddings, norms and heads can be written in place. The packed head follows `weights_changed`."""
    own, first = engine.options.model, _first(engine)
    known = engine.generate(asked)
    for folder in (first, own, first):  # the first two reload what the others write
        engine.ask("update", msgspec.msgpack.encode(Update(updates.COPY, folder)))
    assert all(compare(a, b).differing for a, b in zip(known, engine.generate(asked)))
    engine.ask("update", msgspec.msgpack.encode(Update(updates.COPY, own)))
    assert not any(compare(a, b).differing for a, b in zip(known, engine.generate(asked)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [recipes.QWEN3, recipes.MOE])
def test_compiled_code_serves_new_weights(folder, name):
    cases = axis(options(folder(name), eager=False))
    assert cases and not [f"{case.label}: {case.difference.first}" for case in cases if case.differs]


@pytest.mark.slow
def test_new_weights_of_gptq_without_qzeros(folder, tmp_path):
    """Zero points of a symmetric checkpoint, which vLLM does not read: they may be missing at an update, too."""
    held = checkpoint.write(folder(recipes.GPTQ), 3, tmp_path / "without") / "model.safetensors"
    save_file({name: value for name, value in load_file(held).items() if not name.endswith("qzeros")}, held)
    cases = axis(options(str(held.parent)))
    assert cases and not [f"{case.label}: {case.difference.first}" for case in cases if case.differs]


# The engine core is in this process, the worker in another one.
WORKER = """
import pytest
import sys
import bi_patch
from safetensors.torch import load_file
from vllm import LLM, SamplingParams
from bi_patch.errors import WeightsBroken
from bi_patch.seams import weights
from bi_patch.training import samplers

if __name__ == "__main__":
    own, other = sys.argv[1:]
    llm = LLM(own, max_model_len=256, enforce_eager=True, distributed_executor_backend="mp", skip_tokenizer_init=True)
    executor = llm.llm_engine.engine_core.engine_core.model_executor

    def answer():
        asked = SamplingParams(temperature=0.0, max_tokens=4, logprobs=0, detokenize=False)
        (made,) = llm.generate([{"prompt_token_ids": list(range(5, 45))}], asked, use_tqdm=False)
        return made.outputs[0].token_ids, [next(iter(step.values())).logprob for step in made.outputs[0].logprobs]

    def folder():
        return executor.collective_rpc(lambda worker: worker.vllm_config.model_config.model)

    def write(worker):
        for name, parameter in worker.get_model().named_parameters():
            if name.endswith("w2_weight"):
                parameter.data.copy_(parameter.data.flip(0))

    known = answer()
    executor.collective_rpc("reload_weights", kwargs={"weights_path": other})
    with pytest.raises(RuntimeError, match="not by a call through the engine"):
        executor.collective_rpc(lambda worker: weights.ready())
    llm.collective_rpc("reload_weights", kwargs={"weights_path": other})
    assert answer() != known and folder() == [other]
    samplers.sampler(llm).load(load_file(own + "/model.safetensors").items())
    assert answer() == known and folder() == [other]
    llm.collective_rpc("reload_weights")
    assert answer() != known
    with pytest.raises(RuntimeError, match="weights.cpu_experts: the experts of .* were written in place"):
        llm.collective_rpc(write)
    with pytest.raises(RuntimeError, match="failed half way.*weights.cpu_experts"):
        answer()
    print("DONE", flush=True)
"""


def test_a_worker_in_a_process_of_its_own(folder, cache, tmp_path):
    """A load that the core did not ask for; a sync's folder; experts written in place; then no step runs."""
    own = folder(recipes.MOE)
    other = str(checkpoint.write(own, 4, tmp_path / "other"))
    script = tmp_path / "run.py"
    script.write_text(WORKER)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_BATCH"))}
    given = {"BI_PATCH_CACHE": str(cache), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    asked = [sys.executable, str(script), own, other]
    done = subprocess.run(asked, env=clean | given, capture_output=True, text=True, timeout=900)
    assert "DONE" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
