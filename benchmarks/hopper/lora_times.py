"""Times one engine with LoRA on a GPU: the shape of Llama-3.1-8B with few layers, eight adapters of rank 16.

    python benchmarks/hopper/lora_times.py MODE OUT.json [--layers 8] [--lock FILE]

MODE: stock, upstream (vLLM's batch-invariant mode) or armed; each in a process of its own. Processes that start side by
side time one at a time, if they have a lock. Workloads: decode of 1, 8
and 64 requests with adapters in turn and, for every ninth, with none; prefill of 8 prompts of 1,000 tokens. Seconds
are the least of several runs.
"""

import argparse
import contextlib
import fcntl
import json
import os
import random
import tempfile
import time
from pathlib import Path

ADAPTERS, RANK = 8, 16


@contextlib.contextmanager
def locked(path: Path | None):
    with open(path or os.devnull, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=("stock", "upstream", "armed"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--lock", type=Path)
    asked = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if asked.mode != "stock":
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    if asked.mode == "armed":
        from bi_patch import arming

        arming.arm()
    else:
        os.environ["BI_PATCH"] = "0"
        import bi_patch_entry

        bi_patch_entry.without_arming()
    import torch
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from bi_patch.tools.models import adapters, shapes
    from bi_patch.tools.verify import weights

    root = Path(tempfile.mkdtemp())
    shape = {**shapes.SHAPES["Llama-3.1-8B"], "num_hidden_layers": asked.layers}
    model = shapes.save("Llama-3.1-8B, few layers", shape, root)
    weights.make_random(7)
    began = time.perf_counter()
    llm = LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_seqs=64,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        enable_lora=True,
        max_loras=ADAPTERS,
        max_lora_rank=RANK,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]},
        gpu_memory_utilization=0.1,
        kv_cache_memory_bytes=3 << 30,
    )
    found = {
        "mode": asked.mode,
        "device": torch.cuda.get_device_name(),
        "vllm": vllm.__version__,
        "torch": str(torch.__version__),
        "date": time.strftime("%Y-%m-%d"),
        "layers": asked.layers,
        "started": round(time.perf_counter() - began, 1),
        "seconds": {},
    }
    loras = [
        LoRARequest(f"a{i}", i + 1, str(adapters.write(model, root / f"a{i}", seed=i, rank=RANK)))
        for i in range(ADAPTERS)
    ]
    source = random.Random(3)

    def run(count: int, length: int, tokens: int, with_lora: bool) -> float:
        prompts = [{"prompt_token_ids": [source.randrange(30000) for _ in range(length)]} for _ in range(count)]
        asked_for = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        given = [loras[i % 9] if i % 9 < 8 else None for i in range(count)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        llm.generate(prompts, asked_for, use_tqdm=False, **({"lora_request": given} if with_lora else {}))
        return time.perf_counter() - start

    for name, count, length, tokens in (
        ("decode 1", 1, 16, 129),
        ("decode 8", 8, 16, 129),
        ("decode 64", 64, 16, 129),
        ("prefill 8 x 1000", 8, 1000, 1),
    ):
        for with_lora in (True, False):
            with locked(asked.lock):
                run(count, length, tokens, with_lora)
                best = min(run(count, length, tokens, with_lora) for _ in range(5))
            found["seconds"][f"{name}{'' if with_lora else ', no adapter'}"] = round(best, 5)
            asked.out.write_text(json.dumps(found, indent=1))
    os._exit(0)


if __name__ == "__main__":
    main()
