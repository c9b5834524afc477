"""The patches, applied to a copy of the installed package, give the same engine as the import hooks: the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bi_patch
from bi_patch.tools.models import recipes
from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.child import ARMED
from bi_patch.tools.verify.probes import PROBES, Workload

pytestmark = pytest.mark.engine


# A program in a file, because vLLM's engine process imports the main module again.
GENERATE = """
import json
import sys


def main():
    import vllm

    llm = vllm.LLM(
        model=sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=512, num_gpu_blocks_override=64
    )
    prompts = [vllm.TokensPrompt(prompt_token_ids=list(range(3, 3 + n))) for n in map(int, sys.argv[2:])]
    sampling = vllm.SamplingParams(temperature=0, max_tokens=8, logprobs=1, detokenize=False, ignore_eos=True)

    def bits(output):
        steps = zip(output.outputs[0].token_ids, output.outputs[0].logprobs)
        return [(token, logprobs[token].logprob.hex()) for token, logprobs in steps]

    together = [bits(o) for o in llm.generate(prompts, sampling, use_tqdm=False)]
    alone = [bits(llm.generate([p], sampling, use_tqdm=False)[0]) for p in prompts]
    print("RESULT" + json.dumps({"vllm": vllm.__file__, "together": together, "alone": alone}))


if __name__ == "__main__":
    main()
"""
LENGTHS = (7, 60, 33)


@pytest.mark.slow
def test_patched_copy_passes_the_same_probes(start, bf16, patched):
    paths = os.pathsep.join(filter(None, (str(patched), os.environ.get("PYTHONPATH"))))
    with start(ARMED, recipes.QWEN3, environ={"BI_PATCH_FORM": "patches", "PYTHONPATH": paths}) as engine:
        load = Workload.random(engine.info.vocab_size, generate=6)
        load = Workload(load.subjects, load.fillers, load.long, load.generate, (1, 5, 16))
        answers = {}
        for form, one in (("patches", engine), ("hooks", bf16)):
            for probe in (p for p in PROBES if p.name in ("batch size", "decode = prefill", "prefix cache")):
                result = probe.run(one, load)
                assert result.compared > 0 and result.differing == 0, f"{form}: {result.axis}: {result.first}"
            answers[form] = one.generate([load.greedy(i) for i in range(len(load.subjects))])
    assert answers["patches"] == answers["hooks"]


def test_an_engine_core_of_the_patched_copy_computes_the_same_bits(bf16, model, cache, patched, tmp_path):
    """The copy's engine core is a process of its own. Requests alone and together have the bits that hooks give."""
    program = tmp_path / "generate.py"
    program.write_text(GENERATE)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_BATCH"))}
    paths = [str(patched), str(Path(bi_patch.__file__).parent.parent), os.environ["PYTHONPATH"]]
    environ = {"PYTHONPATH": os.pathsep.join(paths), "VLLM_BATCH_INVARIANT": "1", "BI_PATCH_FORM": "patches"}
    environ |= {"BI_PATCH_CACHE": str(cache), "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, str(program), model(recipes.QWEN3), *map(str, LENGTHS)],
        env=clean | environ,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found = json.loads(done.stdout.rpartition("RESULT")[2].splitlines()[0])
    assert found["vllm"] == str(patched / "vllm/__init__.py")
    assert found["together"] == found["alone"]
    hooks = bf16.generate([Request(tuple(range(3, 3 + n)), max_tokens=8) for n in LENGTHS])
    bits = [[[token, value.hex()] for token, value in zip(answer.tokens, answer.logprobs)] for answer in hooks]
    assert found["together"] == bits
