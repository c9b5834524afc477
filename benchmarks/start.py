"""Measures how long an armed engine takes to start, with an empty cache of certificates and again with a full one.

    PYTHONPATH=. python3 benchmarks/start.py [SHAPE] > benchmarks/results/start-DATE-DEVICE-vllm-RELEASE.txt

SHAPE is a name of bi_patch/tools/models/shapes.py, by default Qwen3-8B; its weights are empty. Each start is a process
of its own, with the folders of compiled code that the environment names (TRITON_CACHE_DIR, VLLM_CACHE_ROOT,
TORCHINDUCTOR_CACHE_DIR): set them to empty ones for a first start. The engine's own line says what certificates took.
"""

import os
import subprocess
import sys
import tempfile
import time

import bi_patch_entry


def once(shape: str, folder: str) -> None:
    import bi_patch  # noqa: F401  arms before vLLM loads

    began = time.perf_counter()
    from vllm import LLM

    from bi_patch.tools.models import shapes

    given = {"skip_tokenizer_init": True, "load_format": "dummy", "dtype": "bfloat16", "max_model_len": 4096}
    llm = LLM(model=shapes.write(shape, folder), **given)
    print(f"ready after {time.perf_counter() - began:.1f} s", flush=True)
    llm.llm_engine.engine_core.shutdown()


def main() -> None:
    shape = (*sys.argv[1:], "Qwen3-8B")[0]
    bi_patch_entry.without_arming()
    with tempfile.TemporaryDirectory() as folder:
        given = dict(os.environ) | {"VLLM_BATCH_INVARIANT": "1", "BI_PATCH_CACHE": f"{folder}/cache", "BI_PATCH": "1"}
        for start in ("cold", "warm"):
            command = [sys.executable, __file__, "--once", shape, folder]
            made = subprocess.run(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            lines = made.stdout.splitlines()
            ready = next((line for line in lines if line.startswith("ready after")), f"failed: {lines[-3:]}")
            sign = next((line for line in lines if " armed: vLLM" in line and "(engine core)" in line), "")
            print(f"{shape}, {start}: {ready}\n{sign.partition('] ')[2]}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--once"]:
        once(*sys.argv[2:])
    else:
        main()
