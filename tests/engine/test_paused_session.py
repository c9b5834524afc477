"""A streamed input over a pause: it goes on with the bits of the whole prompt, or has ended."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bi_patch.tools.models import recipes

pytestmark = pytest.mark.engine


def test_a_part_behind_a_pause_has_the_parts_before_it_or_none_comes(model, cache):
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_BATCH"))} | {
        "BI_PATCH_CACHE": str(cache),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    script = Path(__file__).with_name("paused_session.py")
    done = subprocess.run(
        [sys.executable, str(script), model(recipes.QWEN3)], env=environ, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    (line,) = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    kept, aborted, whole, left = json.loads(line)
    assert kept == [[kept[0][0], whole], "length"] and len(whole) == 5
    assert aborted == [[kept[0][0]], "abort"]  # without the end, the engine answered the second part alone
    assert left == []
