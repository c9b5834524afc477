"""Options of requests that no axis of verify has, on the real engine: alone and in company, with equal bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bi_patch.tools.models import recipes

pytestmark = pytest.mark.engine


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_option_gives_the_same_bits_in_company(model, cache, dtype):
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_BATCH"))} | {
        "BI_PATCH_CACHE": str(cache),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    script = Path(__file__).with_name("request_options.py")
    done = subprocess.run(
        [sys.executable, str(script), model(recipes.QWEN3), dtype],
        env=environ,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    (line,) = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    compared, differing, preemptions, ends = json.loads(line)
    assert compared == 48 and differing == [] and preemptions > 0
    assert ends["repetition"] == "repetition" and ends["stop tokens late"] in ("stop", "length")
