"""A patched copy of the installed vLLM closes the same seams as the import hooks and computes the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bi_patch
from bi_patch.arming.children import SITE
from bi_patch.tools.models import recipes
from bi_patch.tools.upstream.apply import patched_copy

ROOT = Path(bi_patch.__file__).parent.parent
INSPECT = """
import json
import vllm
import vllm.config
from bi_patch.arming import process, startup
findings = startup.inspect()
startup.check()
state = process.state()
print("RESULT" + json.dumps({
    "vllm": vllm.__file__, "form": state.settings.form, "release": str(state.plan.release),
    "seams": sorted((f.name, f.status, f.reason) for f in findings if f.required),
    "optional": sorted((f.name, f.status) for f in findings if not f.required),
}))
"""


# A program in a file, because vLLM's engine process imports the main module again.
GENERATE = """
import json
import sys


def main():
    import vllm

    llm = vllm.LLM(
        model=sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=512, num_gpu_blocks_override=64
    )
    prompts = [vllm.TokensPrompt(prompt_token_ids=list(range(3, 3 + n))) for n in (7, 60, 33)]
    sampling = vllm.SamplingParams(temperature=0, max_tokens=8, logprobs=1, detokenize=False)

    def bits(output):
        steps = zip(output.outputs[0].token_ids, output.outputs[0].logprobs)
        return [(token, logprobs[token].logprob.hex()) for token, logprobs in steps]

    together = [bits(o) for o in llm.generate(prompts, sampling, use_tqdm=False)]
    alone = [bits(llm.generate([p], sampling, use_tqdm=False)[0]) for p in prompts]
    print("RESULT" + json.dumps({"vllm": vllm.__file__, "together": together, "alone": alone}))


if __name__ == "__main__":
    main()
"""


def run(path, *arguments, **environ):
    """The result that a Python process prints. path: the first folders on PYTHONPATH."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_BATCH"))}
    clean |= {"PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)]), "VLLM_BATCH_INVARIANT": "1"}
    clean |= {k: v for k, v in os.environ.items() if k == "BI_PATCH_CACHE"} | environ
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, env=clean, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return json.loads(result.stdout.rpartition("RESULT")[2].splitlines()[0])


def inspect(path, program, **environ):
    return run(path, "-c", program, **environ)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return patched_copy(tmp_path_factory.mktemp("patched"))


@pytest.mark.engine
def test_patches_and_hooks_close_the_same_seams(copy):
    hooks = inspect([], "import bi_patch\n" + INSPECT, BI_PATCH_FORM="hooks")
    patches = inspect([copy], INSPECT, BI_PATCH_FORM="patches")
    assert patches.pop("vllm") == str(copy / "vllm/__init__.py") != hooks.pop("vllm")
    assert (patches.pop("form"), hooks.pop("form")) == ("patches", "hooks")
    assert patches == hooks
    assert {status for _, status, _ in hooks["seams"]} == {"closed"}


@pytest.mark.engine
def test_the_patched_copy_takes_hooks_too(copy):
    both = inspect([copy], "import bi_patch\n" + INSPECT, BI_PATCH_FORM="hooks")
    assert {status for _, status, _ in both["seams"]} == {"closed"}


@pytest.mark.engine
def test_the_patched_copy_is_inert_unless_asked(copy):
    program = """
import vllm.config.vllm, vllm.v1.worker.worker_base, sys, json
from bi_patch.arming import state
print("RESULT" + json.dumps([vllm.config.vllm.__file__, state() is None]))
"""
    file, unarmed = inspect([copy], program, VLLM_BATCH_INVARIANT="0")
    assert file == str(copy / "vllm/config/vllm.py") and unarmed


@pytest.mark.engine
def test_an_engine_of_the_patched_copy_computes_the_same_bits(copy, tmp_path):
    program = tmp_path / "generate.py"
    program.write_text(GENERATE)
    model = recipes.path(recipes.QWEN3)
    patches = run([copy], program, model, BI_PATCH_FORM="patches", VLLM_CPU_KVCACHE_SPACE="1")
    hooks = run([SITE], program, model, BI_PATCH_FORM="hooks", VLLM_CPU_KVCACHE_SPACE="1")
    assert patches.pop("vllm") == str(copy / "vllm/__init__.py") != hooks.pop("vllm")
    assert patches["together"] == patches["alone"]
    assert patches == hooks
