"""Unseeded requests on an engine whose core is a process of its own: each answer names its seed, and alone, with this
seed, it is bitwise the same. The engine core refuses what the front end did not check."""

import json
import os
import random
import subprocess
import sys

import pytest

from bi_patch.ops import seeds
from bi_patch.tools.models import recipes

pytestmark = pytest.mark.engine

# The engine core reads BI_PATCH_UNSEEDED=derive when it starts. The script changes what its front end read.
SCRIPT = """
import bi_patch
import json, random, sys
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from bi_patch.ops import seeds as drawn
from bi_patch.seams import active
from bi_patch.seams.common import seeds


def main():
    llm = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=256, max_num_seqs=64,
              max_num_batched_tokens=64, num_gpu_blocks_override=int(sys.argv[2]), disable_log_stats=False, seed=3)
    found = {}
    block = llm.llm_engine.vllm_config.cache_config.block_size

    def prompt(tag, length):
        return {"prompt_token_ids": [random.Random(f"{tag} {i}").randrange(1900) for i in range(length)]}

    def params(**given):
        return SamplingParams(**{"temperature": 1.0, "max_tokens": 12, "ignore_eos": True, "logprobs": 1, **given})

    def bits(completion):
        return [list(completion.token_ids), [[(k, v.logprob) for k, v in step.items()] for step in completion.logprobs]]

    def ask(prompts, given):
        return llm.generate(prompts, given, use_tqdm=False)

    def replayed(asked, given, outputs):
        # How many answers are not the same alone, with the seed that the answer names.
        wrong = 0
        for prompt, own, output in zip(asked, given, outputs):
            for completion in output.outputs:
                alone = own.clone()
                alone.seed, alone.n = completion.seed, 1
                wrong += bits(ask([prompt], alone)[0].outputs[0]) != bits(completion)
        return wrong

    def expected(prompt, count):
        # The first seeds of a request, from the request alone.
        own = params(output_kind=RequestOutputKind.FINAL_ONLY)
        request = llm.llm_engine.input_processor.process_inputs("x", prompt, own, ("generate",))
        key = drawn.digest(3, *seeds.identity(request))
        return [drawn.nth(key, i) for i in range(count)]

    def preemptions():
        return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")

    # Random seeds: identical requests, seeded and greedy neighbours, n answers, more requests than the cache holds.
    active.unseeded = "random"
    asked = [prompt("same", 5)] * 4 + [prompt(i, block - 6) for i in range(12)]
    given = [params()] * 4 + [params(seed=(None, 7, -5)[i % 3], temperature=(1.0, 0.7, 0.0)[i // 4], max_tokens=20)
                              for i in range(12)]
    before = preemptions()
    outputs = ask(asked, given)
    found["preemptions"] = preemptions() - before
    found["random"] = [o.outputs[0].seed for o in outputs]
    found["replayed"] = replayed(asked, given, outputs)
    found["caller's parameters"] = given[0].seed
    (many,) = ask([prompt("n", 9)], params(n=4))
    found["n"] = [c.seed for c in many.outputs]
    found["n replayed"] = replayed([prompt("n", 9)], [params(n=4)], [many])
    (whole,) = ask([prompt("n", 9)], params(n=4, seed=many.outputs[0].seed))
    found["n again"] = [bits(c) for c in whole.outputs] == [bits(c) for c in many.outputs]

    # Derived seeds: the k-th of identical requests has the k-th seed, in any order, beside any others.
    active.unseeded = "derive"
    asked = [(kind, prompt(kind, 5)) for kind in ("a", "a", "a", "a", "b", "b", "c")]
    random.Random(int(sys.argv[3])).shuffle(asked)
    outputs = ask([p for _, p in asked], params())
    found["derived"] = sorted((kind, o.outputs[0].seed) for (kind, _), o in zip(asked, outputs))
    found["expected"] = sorted(
        (kind, seed) for kind, count in (("a", 4), ("b", 2), ("c", 1)) for seed in expected(prompt(kind, 5), count))
    found["derived replayed"] = replayed([p for _, p in asked], [params()] * len(asked), outputs)
    (many,) = ask([prompt("d", 5)], params(n=3))
    found["derived n"] = [c.seed for c in many.outputs]

    # The front end refuses, with a name.
    active.unseeded = "refuse"
    found["refused"] = []
    for one in (params(), params(seed=2**70), params(seed=2**63 - 2, n=4), params(seed=-3, n=4)):
        try:
            ask([prompt("a", 5)], one)
        except ValueError as error:
            found["refused"].append(str(error))
    ask([prompt("a", 5)], params(temperature=0.0))

    # The engine core refuses a request that another client built. The request beside it goes on.
    engine = llm.llm_engine

    def built(name, **changes):
        request = engine.input_processor.process_inputs(name, prompt("a", 5), params(seed=1), ("generate",))
        for field, value in changes.items():
            setattr(request.sampling_params, field, value)
        engine.add_request(name, request, request.params)

    built("good")
    built("cached prompt", prompt_logprobs=1, skip_reading_prefix_cache=False)
    built("wide seed", seed=2**63)
    built("no seed", seed=None)
    for library in ("xgrammar", "guidance"):
        asked = StructuredOutputsParams(regex="[a-f]{300,400}")
        asked._backend = library
        built(library, structured_outputs=asked)
    done = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output.outputs[0]
    found["core"] = {name: c.finish_reason for name, c in done.items()}
    found["good"] = bits(done["good"]) == bits(ask([prompt("a", 5)], params(seed=1))[0].outputs[0])
    found["core's seed"] = done["no seed"].seed is not None
    print("RESULT", json.dumps(found))


if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def found(model, cache, tmp_path_factory):
    script = tmp_path_factory.mktemp("unseeded") / "script.py"
    script.write_text(SCRIPT)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_BATCH"))}
    environ = clean | {
        "BI_PATCH_CACHE": str(cache),
        "BI_PATCH_UNSEEDED": "derive",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    order = str(random.randrange(1 << 30))  # the seeds that are expected below are the same for every order
    done = subprocess.run(
        [sys.executable, str(script), model(recipes.QWEN3), "12", order],
        env=environ,
        capture_output=True,
        text=True,
        timeout=900,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert results, done.stdout[-4000:] + done.stderr[-4000:]
    held = json.loads(results[0].removeprefix("RESULT"))
    print(held, [line for line in done.stdout.splitlines() if "requests." in line])
    held["log"] = done.stdout + done.stderr
    return held


def test_each_unseeded_answer_is_the_same_alone_with_its_seed(found):
    """Beside seeded and greedy requests (https://github.com/vllm-project/vllm/issues/51226), and over preemptions."""
    seeds_named = found["random"]
    assert found["preemptions"] > 0
    assert len(set(seeds_named[:4])) == 4 and all(0 <= seed < seeds.LIMIT for seed in seeds_named[:4])
    assert seeds_named[5] == 7 and seeds_named[6] == -5 and seeds_named[-1] is None  # seeded, seeded, greedy
    assert found["replayed"] == 0
    assert found["caller's parameters"] is None


def test_n_answers_count_from_one_seed(found):
    first = found["n"][0]
    assert found["n"] == [first, first + 1, first + 2, first + 3]
    assert found["n replayed"] == 0 and found["n again"]


def test_derived_seeds_do_not_depend_on_order_or_company(found):
    derived = found["derived"]
    assert derived == found["expected"]
    assert len({seed for _, seed in derived}) == len(derived)
    assert found["derived replayed"] == 0
    assert len(set(found["derived n"])) == 3 and not set(found["derived n"]) & {seed for _, seed in derived}


def test_the_front_end_refuses_by_name(found):
    unseeded, wide, late, through = found["refused"]
    assert "BI_PATCH_UNSEEDED=refuse" in unseeded
    assert "more than 64 bits" in wide and "more than 64 bits" in late and "holds -1" in through


def test_the_engine_core_refuses_one_request_and_goes_on(found):
    assert found["core"] == {
        "good": "length",
        "cached prompt": "error",
        "wide seed": "error",
        "no seed": "length",
        "xgrammar": "length",
        "guidance": "error",
    }
    assert found["good"] and found["core's seed"]
    assert "skip_reading_prefix_cache=False" in found["log"] and "more than 64 bits" in found["log"]
    assert "names the grammar library 'guidance', and by its content 'xgrammar' serves it" in found["log"]
