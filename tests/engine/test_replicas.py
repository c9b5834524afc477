"""Real data-parallel engine cores on CPU that would answer a request differently: their server or engine stops."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bi_patch.tools.models import recipes

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SMALL = ("--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "256", "--max-num-batched-tokens", "256")
TWO = ("--data-parallel-size", "2", "--data-parallel-size-local", "1", "--data-parallel-address", "127.0.0.1")

# A write that fails in one engine core alone, and the answers after it.
PARTLY = """
import bi_patch
import asyncio, sys


def write(worker):
    if worker.vllm_config.parallel_config.data_parallel_index:
        raise OSError("no such file on this node")
    for parameter in worker.get_model().parameters():
        parameter.data.mul_(2)
    bi_patch.weights_changed()


async def main(folder):
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    given = dict(dtype="bfloat16", enforce_eager=True, max_model_len=256, max_num_batched_tokens=256, seed=0)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=folder, data_parallel_size=2, **given))

    async def ask(name):
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        async for answer in engine.generate({"prompt_token_ids": [3, 14, 15, 92]}, params, request_id=name):
            last = answer
        return tuple(last.outputs[0].token_ids)

    print("before:", len(set(await asyncio.gather(*(ask(f"a{i}") for i in range(6))))), flush=True)
    for what in (engine.collective_rpc(write), ask("b")):
        try:
            print("went on:", await what, flush=True)
        except Exception as error:
            print("stopped:", type(error).__name__, error, flush=True)
    engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
"""


def environ(cache, **more):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_BATCH"))}
    clean |= {"BI_PATCH_CACHE": str(cache), "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    clean |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    clean |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VLLM_NO_USAGE_STATS": "1"}
    return clean | more


def node(folder, environment, log, *options):
    """Start a node of a server, in a process group of its own."""
    command = ["bi-patch", "run", "--", "vllm", "serve", folder, *SMALL, *TWO, *options]
    with log.open("wb") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)


def test_a_server_whose_engine_cores_have_other_settings_stops(model, cache, free_port, tmp_path):
    """Its load would decide which of them serves a request. The second has equal bits for every number of ranks."""
    folder, logs = model(recipes.QWEN3), [tmp_path / "first", tmp_path / "second"]
    meet = ("--data-parallel-rpc-port", str(free_port()))
    nodes = [
        node(folder, environ(cache), logs[0], *meet, "--port", str(free_port())),
        node(
            folder,
            environ(cache, BI_PATCH_TP_INVARIANT="8"),
            logs[1],
            *meet,
            *("--headless", "--data-parallel-start-rank", "1"),
        ),
    ]
    try:
        assert nodes[0].wait(900) != 0
    finally:
        for process in nodes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    said = logs[0].read_text()
    assert "UnsupportedFeature: engine.front_end: data-parallel engine cores differ in " in said, said[-4000:]
    assert "settings (BI_PATCH_TP_INVARIANT=" in said


def test_a_write_that_fails_in_one_engine_core_alone_stops_the_engine(model, cache, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PARTLY)
    given = environ(cache, VLLM_BATCH_INVARIANT="1", VLLM_ALLOW_INSECURE_SERIALIZATION="1")
    command = [sys.executable, "-P", script, model(recipes.QWEN3)]
    ended = subprocess.run(command, env=given, capture_output=True, text=True, timeout=900)
    said = ended.stdout + ended.stderr
    assert "before: 1" in said and "went on" not in said, said[-4000:]
    assert "no such file on this node" in said and "stopped: EngineDeadError" in said, said[-4000:]
    assert "WeightsBroken: an update of the weights of Qwen3ForCausalLM failed half way" in said, said[-4000:]
