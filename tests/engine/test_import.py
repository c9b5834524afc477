"""A user's script: `import bi_patch` before vllm arms the engine core and worker processes that vLLM spawns."""

import json
import os
import subprocess
import sys

import pytest

from bi_patch.demo import models

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
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True)

    def ask(these):
        found = []
        for out in llm.generate(these, sampling, use_tqdm=False):
            picked = zip(out.outputs[0].token_ids, out.outputs[0].logprobs)
            found.append([(token, entry[token].logprob) for token, entry in picked])
        return found

    alone = [ask([p])[0] for p in prompts]
    print("RESULT", json.dumps([len(children), len(kernels), alone == ask(prompts)]))
"""


def test_spawned_engine_processes_are_armed(model, cache, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_BATCH"))}
    environ = clean | {
        "BI_PATCH_CACHE": str(cache), "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TORCHDYNAMO_DISABLE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script), model(models.QWEN3)], env=environ, capture_output=True, text=True, timeout=300
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert results, done.stderr[-4000:]
    children, kernels, equal = json.loads(results[0].removeprefix("RESULT"))
    assert children >= 1 and kernels >= 1 and equal
