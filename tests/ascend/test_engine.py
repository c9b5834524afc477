"""vLLM's own engine, scheduler and Qwen3 with vLLM-Ascend's worker on npu:0: a request's bits do not depend on other
requests, on chunks of its prompt, on the prefix cache, or on preemption."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.ascend


@pytest.fixture(scope="module")
def engine(on_npu, tmp_path_factory):
    """engine(model, *options): what a run of engine.py tells. All runs share what vLLM keeps of a model's class, which
    it finds out in a process of its own."""
    caches = tmp_path_factory.mktemp("vllm")
    return lambda *arguments, **more: answer(on_npu, tmp_path_factory.mktemp("engine"), caches, *arguments, **more)


def answer(on_npu, tmp_path, caches, *arguments, first=()):
    environ = {"BI_PATCH": "1", "VLLM_BATCH_INVARIANT": "1", "BI_PATCH_CACHE": str(tmp_path / "cache")}
    environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    # torch 2.13's cache of compiled graphs does not accept vLLM-Ascend's compiler, which was written for torch 2.10.
    environ |= {"TORCHINDUCTOR_AUTOGRAD_CACHE": "0", "VLLM_CACHE_ROOT": str(caches)}
    # vLLM-Ascend's maybe_pad_and_reduce returns its input. torch 2.13 warns of this, and raises an error if CI is set.
    environ |= {"TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING": "0"}
    model = tmp_path / "model"
    model.mkdir()
    command = ("tests/ascend/engine.py", arguments[0], str(model), *arguments[1:])
    done = on_npu(*command, sources=True, first=first, timeout=900, **environ)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


@pytest.fixture(scope="module")
def dense(engine):
    """What one engine with the dense model finds: first without a fault, and then with a planted fault."""
    return engine("dense", "fault")


@pytest.mark.parametrize("model", ["dense", "experts"])
def test_a_request_does_not_depend_on_the_batch(engine, request, model):
    found = request.getfixturevalue("dense") if model == "dense" else engine(model)
    ways = found["ways"]
    # The engine took the compared paths: prompts cut at other places, a cached block, a preempted request.
    assert ways["cuts alone"][2][:2] == [96, 31] and [5, 31, 60] in ways["steps together"]
    assert ways["cached tokens"] == [128] and (model == "experts" or ways["preempted"] > 0)
    assert found["compared"] > 250
    of_any_layers = {"preemption", "seeded sampling"} if model == "dense" else set()
    assert set(found["differing"]) == {"batch and chunks", "prefix cache", "decode = prefill"} | of_any_layers
    assert not any(found["differing"].values()), found["differing"]


def test_keys_cut_by_the_number_of_rows_are_caught(dense):
    assert dense["with the fault"]["decode = prefill"] > 0


def test_the_ascendc_package_serves_whole_prompts(engine):
    """With a double of the package: its operators compute the sums, and options that would cut a prompt are refused."""
    found = engine("dense", "ascendc", first=(Path(__file__).parent / "doubles",))
    assert found["compared"] > 40 and found["differing"] == {"batch": 0}
    assert "chunked prefill" in found["refused"]["chunks and prefixes"]
    assert "scheduler.ascend_preemption" in found["refused"]["preemption"]
    assert set(found["calls"]) >= {"npu_mm_batch_invariant", "npu_fused_infer_attention_score_batch_invariant"}


def test_the_compiled_model_computes_by_served_operators(engine):
    found = engine("dense", "compiled")
    assert found["mode"] == "VLLM_COMPILE" and found["compared"] >= 25 and found["differing"] == {"batch": 0}
