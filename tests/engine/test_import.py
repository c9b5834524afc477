"""A user's script: `import bi_patch` before vllm arms the engine core and worker processes that vLLM spawns."""

import json
import os
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
    grammar = llm.llm_engine.vllm_config.structured_outputs_config.backend
    print("RESULT", json.dumps([len(children), len(kernels), equal, kept, refused, grammar]))
"""


def test_spawned_engine_processes_are_armed(model, cache, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_BATCH"))}
    environ = clean | {
        "BI_PATCH_CACHE": str(cache),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script), model(recipes.QWEN3)], env=environ, capture_output=True, text=True, timeout=300
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert results, done.stderr[-4000:]
    children, kernels, equal, kept, refused, grammar = json.loads(results[0].removeprefix("RESULT"))
    assert children >= 1 and kernels >= 1 and equal
    assert kept
    assert "requests.parameters" in refused and "skip_reading_prefix_cache" in refused
    assert grammar == "xgrammar"
