"""A user's script: `import bi_patch` before vllm arms the engine core and worker processes that vLLM spawns."""

import json
import os
import re
import subprocess
import sys

import pytest

from bi_patch.tools.models import recipes

pytestmark = pytest.mark.engine

SCRIPT = """
import bi_patch
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    import psutil
    llm = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=1024, max_num_batched_tokens=128)
    children = psutil.Process().children(recursive=True)
    kernels = [p.pid for p in children if any("bi_cpu" in m.path for m in p.memory_maps())]
    prompts = [{"prompt_token_ids": [(7 * i + j) % 1900 for j in range(n)]} for i, n in enumerate((5, 300, 40, 611, 9))]
    common = dict(temperature=0, max_tokens=8, ignore_eos=True)
    sampling = SamplingParams(logprobs=1, **common)

    def ask(these, sampling=sampling):
        return [
            [sorted((token, entry.logprob) for token, entry in step.items()) for step in out.outputs[0].logprobs]
            for out in llm.generate(these, sampling, use_tqdm=False)
        ]

    alone = [ask([p])[0] for p in prompts]
    equal = alone == ask(prompts)
    # A request for top logprobs, beside requests for the logprobs of fewer and of more given tokens.
    top = SamplingParams(logprobs=3, **common)
    given = [SamplingParams(logprob_token_ids=ids, **common) for ids in ([5, 6], [9, 8, 7, 6, 5])]
    lone = [ask([p], s)[0] for p, s in zip(prompts, [top, *given])]
    kept = lone == ask(prompts[:3], [top, *given]) and [len(step) >= 3 for step in lone[0]] == [True] * 8
    refused = ""
    try:
        ask(prompts[:1], SamplingParams(prompt_logprobs=1, skip_reading_prefix_cache=False, **common))
    except ValueError as error:
        refused = str(error)
    print("RESULT", json.dumps([len(children), len(kernels), equal, kept, refused, grammars(llm, ask)]))
"""
GRAMMARS = """
# For each kind of grammar: the library, and whether the answer alone equals the answers beside the others.
def grammars(llm, ask):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    def schema(**more):
        return {"type": "object", "properties": {"n": {"type": "integer", **more}}, "required": ["n"]}

    tag = {"triggers": ["<f>"], "structures": [{"begin": "<f>", "schema": schema(), "end": "</f>"}]}
    kinds = {
        "multipleOf": {"json": schema(multipleOf=7)},
        "schema": {"json": schema()},
        "regex": {"regex": "[a-f]{3,9}[0-9]+x"},
        "choice": {"choice": ["alpha", "beta"]},
        "object": {"json_object": True},
        "tag": {"structural_tag": json.dumps(tag)},
        "pattern": {"json": {**schema(), "patternProperties": {"^k": {"type": "integer"}}}},
    }

    def made(kind):
        given = {"structured_outputs": StructuredOutputsParams(**kinds[kind])} if kind else {}
        return SamplingParams(temperature=0, max_tokens=10, logprobs=1, **given)

    prompts = {k: {"prompt_token_ids": [(3 * i + j) % 1900 for j in range(7 + i)]} for i, k in enumerate([*kinds, ""])}
    asked = {kind: made(kind) for kind in prompts}
    alone = {kind: ask([prompts[kind]], asked[kind])[0] for kind in prompts}
    told = {kind: [asked[kind].structured_outputs._backend if kind else "", True] for kind in prompts}
    for order in (list(prompts), list(prompts)[::-1]):
        answers = ask([prompts[kind] for kind in order], [made(kind) for kind in order])
        for kind, answer in zip(order, answers):
            told[kind][1] &= len(answer) > 0 and answer == alone[kind]
    return told
"""
# Front end armed, engine core not: the child processes inherit BI_PATCH=0.
UNARMED = """
import bi_patch
import os, sys
from vllm import LLM

if __name__ == "__main__":
    del os.environ["VLLM_BATCH_INVARIANT"]
    os.environ["BI_PATCH"] = "0"
    LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=256)
"""


def run(script, source, model, cache):
    """Run a script in a clean environment, with vLLM's engine core in a process of its own."""
    script.write_text(source)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_BATCH"))}
    environ = clean | {
        "BI_PATCH_CACHE": str(cache),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    command = [sys.executable, str(script), model(recipes.QWEN3)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=900)


def test_spawned_engine_processes_are_armed(model, cache, tmp_path):
    done = run(tmp_path / "script.py", GRAMMARS + SCRIPT, model, cache)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert results, done.stderr[-4000:]
    children, kernels, equal, kept, refused, grammars = json.loads(results[0].removeprefix("RESULT"))
    assert children >= 1 and kernels >= 1 and equal
    assert kept
    assert "requests.parameters" in refused and "skip_reading_prefix_cache" in refused
    libraries = {"multipleOf": "guidance", "pattern": "outlines", "": ""}
    kinds = ("multipleOf", "schema", "regex", "choice", "object", "tag", "pattern", "")
    assert grammars == {kind: [libraries.get(kind, "xgrammar"), True] for kind in kinds}
    said = [line for line in (done.stdout + done.stderr).splitlines() if "bi_patch 0." in line and " armed: " in line]
    # Where a library's kernel fails, the bundled one serves.
    told = r"certificates: [1-9]\d* passed, \d+ failed, \d+ of them from the cache, in \d+\.\d s[ ,]"
    assert len(said) == 2 and all(re.search(told, line) for line in said), said
    assert "engine core" in said[0] and "front end" in said[1]


def test_a_front_end_stops_if_its_engine_core_is_not_armed(model, cache, tmp_path):
    done = run(tmp_path / "script.py", UNARMED, model, cache)
    assert done.returncode != 0 and "SeamOpen" in done.stderr
    assert "the engine core is not armed, and its front end is armed" in done.stderr
