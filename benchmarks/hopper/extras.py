"""One engine with what users turn on: LoRA, speculation, embeddings or images. extras_cost.py starts it.

    extras.py KIND MODE OUT.json

The engine measures a workload for each line of its input. The weights are random. Times are those of the engine's
steps; requests are processed before.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import child as costs

ADAPTERS, RANK, DRAFTS = 8, 16, 4
# CUDA graphs of the measured sizes alone; one decode of 16 requests with 4 drafts has 80 tokens.
_GRAPHS = {"compilation_config": {"cudagraph_capture_sizes": [1, 5, 8, 16, 40, 64, 80]}}
_COMMON = {"gpu_memory_utilization": 0.03, "kv_cache_memory_bytes": 2 << 30, "max_num_seqs": 64} | _GRAPHS
# name of the kind: the model's name in tables
TITLES = {
    "lora": "Llama-3.1-8B, 4 layers, 8 LoRA adapters",
    "ngram": "Qwen3-8B, 4 layers, n-grams, 4 drafts",
    "embed": "Qwen3-Embedding-0.6B",
    "images": "Qwen3-VL-2B, 6 + 4 layers, eager",
    "eagle3": "llama-100m, EAGLE-3 head, 4 drafts",
}
# kind: workload -> numbers: requests; tokens of text; generated tokens; images of each, or whether text repeats itself
LOADS: dict[str, dict[str, tuple[int, int, int, int]]] = {
    "lora": {
        "decode 1 x 128": (1, 16, 129, 1),
        "decode 8 x 128": (8, 16, 129, 1),
        "decode 64 x 128": (64, 16, 129, 1),
        "prefill 8 x 1000": (8, 1000, 1, 1),
        "decode 64 x 128, no adapter": (64, 16, 129, 0),
    },
    "ngram": {
        "1 x 512/128, text that repeats itself": (1, 512, 128, 1),
        "16 x 512/128, text that repeats itself": (16, 512, 128, 1),
        "16 x 512/128, other text": (16, 512, 128, 0),
    },
    "eagle3": {"1 x 512/128": (1, 512, 128, 0), "16 x 512/128": (16, 512, 128, 0)},
    "embed": {"1 x 64": (1, 64, 0, 0), "64 x 64": (64, 64, 0, 0), "64 x 512": (64, 512, 0, 0)},
    "images": {
        "1 x 1 image": (1, 64, 8, 1),
        "16 x 1 image": (16, 64, 8, 1),
        "4 x 4 images": (4, 64, 8, 4),
        "16 x text": (16, 64, 8, 0),
    },
}


def _lora(root: Path):
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    from bi_patch.tools.models import adapters, shapes

    shape = {**shapes.SHAPES["Llama-3.1-8B"], "num_hidden_layers": 4}
    model = shapes.save("Llama-3.1-8B", shape, root)
    given = {"skip_tokenizer_init": True, "enable_lora": True, "max_loras": ADAPTERS, "max_lora_rank": RANK}
    llm = LLM(model, load_format="dummy", max_model_len=2048, max_num_batched_tokens=8192, **_COMMON, **given)
    made = [
        LoRARequest(f"a{i}", i + 1, str(adapters.write(model, root / f"a{i}", seed=i, rank=RANK)))
        for i in range(ADAPTERS)
    ]
    return llm, lambda i, on: {"lora_request": made[i % 9] if on and i % 9 < ADAPTERS else None}


def _ngram(root: Path):
    from vllm import LLM

    from bi_patch.tools.models import shapes

    model = shapes.save("Qwen3-8B", {**shapes.SHAPES["Qwen3-8B"], "num_hidden_layers": 4}, root)
    drafts = {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
    given = {"skip_tokenizer_init": True, "speculative_config": drafts, "max_model_len": 2048}
    return LLM(model, load_format="dummy", **_COMMON, **given), lambda i, on: {}


def _eagle3(root: Path):
    from vllm import LLM

    from bi_patch.tools.models import drafts, recipes

    model = recipes.path(recipes.LLAMA_100M)
    head = drafts.write("eagle3", model, root / "head")
    asked = {"method": "eagle3", "num_speculative_tokens": DRAFTS, "model": str(head)}
    return LLM(str(model), dtype="bfloat16", speculative_config=asked, max_model_len=2048, **_COMMON), lambda i, on: {}


def _embed(root: Path):
    from vllm import LLM

    from bi_patch.tools.models import pooling

    name = TITLES["embed"]
    given = {**pooling.ARGUMENTS.get(name, {}), "dtype": "bfloat16", "max_model_len": 2048}
    return LLM(pooling.write(name, str(root)), load_format="dummy", **_COMMON, **given), lambda i, on: {}


def _images(root: Path):
    from vllm import LLM

    from bi_patch.tools.models import vision

    given = {"enforce_eager": True, "mm_processor_cache_gb": 0, "limit_mm_per_prompt": {"image": 4, "video": 0}}
    common = {name: value for name, value in _COMMON.items() if name != "compilation_config"}
    folder = vision.write("Qwen3-VL-2B", str(root))
    return LLM(folder, load_format="dummy", dtype="bfloat16", max_model_len=4096, **common, **given), lambda i, on: {}


ENGINES: dict[str, Callable] = {"lora": _lora, "ngram": _ngram, "eagle3": _eagle3, "embed": _embed, "images": _images}


def main(kind: str, mode: str, out: str) -> None:
    costs.environment(mode)
    if mode == "armed":
        import bi_patch  # noqa: F401  arms before vllm loads
    import torch
    import vllm

    from bi_patch.tools.verify import weights

    weights.make_random(7)
    llm, per_request = ENGINES[kind](Path(tempfile.mkdtemp(prefix="bi_patch-extras-")))
    for name, load in LOADS[kind].items():
        _timed(llm, kind, load, 1000 + len(name), per_request)  # the first run of each compiles and warms up
    device = torch.cuda.get_device_name()
    result = costs.head(device, vllm.__version__, torch.__version__, torch.get_num_threads())
    result |= {"model": TITLES[kind], "mode": mode, "cost": []}

    def measure(name: str, repeat: int) -> None:
        row = {"workload": name, "repeat": repeat}
        row["seconds"] = _timed(llm, kind, LOADS[kind][name], repeat, per_request)
        if repeat == 0:
            row |= _profiled(llm, kind, LOADS[kind][name], per_request)
        result["cost"].append(row)
        print("cost", TITLES[kind], mode, row, flush=True)
        costs.save(result, out)

    costs.take_turns(measure)
    os._exit(0)


def _profiled(llm, kind: str, load: tuple[int, int, int, int], per_request) -> dict:
    """Seconds of the GPU's kernels in a workload, and the longest kernels, each as [seconds, launches, name]."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as held:
        _timed(llm, kind, load, 77, per_request)
    found = costs.kernels(held)
    most = [[round(e.self_device_time_total / 1e6, 6), e.count, e.key[:120]] for e in found[:16]]
    return {"gpu_seconds": sum(e.self_device_time_total for e in found) / 1e6, "kernels": most}


def _timed(llm, kind: str, load: tuple[int, int, int, int], repeat: int, per_request) -> float:
    """Seconds of the engine's steps for one workload, whose requests are the same for every engine and repeat."""
    import torch
    from vllm import PoolingParams, SamplingParams

    count, length, tokens, special = load
    source = random.Random(repeat * 7919 + count * 31 + length)
    llm.reset_prefix_cache()
    for i in range(count):
        text = [source.randrange(100, 1900) for _ in range(23 if kind == "ngram" and special else length)]
        prompt: dict[str, object] = {"prompt_token_ids": (text * (length // len(text) + 1))[:length]}
        if kind == "images" and special:
            prompt = _with_images(llm, prompt, special, source)
        if kind == "embed":
            asked: object = PoolingParams(task=llm.pooling_task)
        else:
            asked = SamplingParams(
                temperature=0.0,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                allowed_token_ids=[77] if kind == "ngram" and special else None,
            )
        llm.llm_engine.add_request(
            f"{repeat} {load} {i} {time.monotonic_ns()}", prompt, asked, **per_request(i, special)
        )
    torch.cuda.synchronize()
    began = time.perf_counter()
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return time.perf_counter() - began


def _with_images(llm, prompt: dict, count: int, source: random.Random) -> dict:
    from PIL import Image

    from bi_patch.tools.verify.engine import image_tokens

    placeholders, _ = image_tokens(llm)
    made = [Image.frombytes("RGB", (16, 16), source.randbytes(16 * 16 * 3)).resize((448, 448)) for _ in range(count)]
    tokens = [*placeholders["image"] * count, *prompt["prompt_token_ids"]]
    return {"prompt_token_ids": tokens, "multi_modal_data": {"image": made}}


if __name__ == "__main__":
    main(*sys.argv[1:4])
