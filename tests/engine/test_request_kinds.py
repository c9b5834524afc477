"""What single requests may turn on: n, beam search, prompt embeddings, bias and allowed tokens, min_tokens, priorities,
a reset that preempts all running requests, and streamed inputs. Tokens and logprobs are bitwise those of the request
alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bi_patch.tools.models import recipes
from bi_patch.tools.verify.child import ARMED, PATIENT, child_environ
from bi_patch.tools.verify.engine import Options

pytestmark = pytest.mark.engine

KINDS = (
    "n",
    "beam search",
    "prompt_embeds against tokens",
    "prompt_embeds with penalties",
    "prompt_embeds with penalties after other prompts",
    "prompt_embeds with the bytes of others",
    "prompt_embeds with an infinity are refused",
    "prompt_embeds with another width are refused",
    "logit_bias with allowed_token_ids",
    "min_tokens",
    "priorities",
    "a reset of running requests",
    "streamed inputs against whole prompts",
    "streamed inputs in company",
    "streamed inputs with other logprobs are refused",
    "streamed inputs that a pause aborted are refused",
)


@pytest.fixture(scope="module")
def lines(model) -> list[str]:
    folder = model(recipes.QWEN3)
    environ = child_environ(os.environ | PATIENT, ARMED, Options(folder)) | {
        "PYTHONPATH": os.pathsep.join((".", os.environ["PYTHONPATH"])),
    }
    script = Path(__file__).parents[2] / "benchmarks/cpu/request_kinds.py"
    done = subprocess.run(
        [sys.executable, "-P", script, folder], env=environ, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return [line.partition("\t")[0] for line in done.stdout.splitlines() if line.startswith(("ok ", "FAIL "))]


@pytest.mark.parametrize("kind", KINDS)
def test_kind(lines, kind):
    found = [line for line in lines if line.split(" ", 1)[1].startswith(kind)]
    assert found and all(line.startswith("ok ") for line in found), found


def test_nothing_else_failed(lines):
    assert not [line for line in lines if line.startswith("FAIL ")]
