"""The cost of images on a GPU: one engine, prompts with one or several made images, seconds.

    PYTHONPATH=. python3 benchmarks/hopper/images.py MODEL stock|armed OUT.json [--eager]

MODEL is a name of bi_patch/tools/models/vision.py. The weights are random. Every repeat has new images.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time

# name: requests, images of each, width and height in pixels, generated tokens
SETS = {
    "1 x 1 image": (1, 1, 448, 8),
    "32 x 1 image": (32, 1, 448, 8),
    "8 x 4 images": (8, 4, 448, 8),
    "64 x 1 small image": (64, 1, 128, 8),
    "64 x text": (64, 0, 0, 8),
}
_REPEATS = 4  # the first is not counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("mode", choices=("stock", "armed"))
    parser.add_argument("out")
    parser.add_argument("--eager", action="store_true")
    a = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["BI_PATCH"] = "1" if a.mode == "armed" else "0"
    os.environ.pop("VLLM_BATCH_INVARIANT", None)
    if a.mode == "armed":
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
        import bi_patch  # noqa: F401  arms before vllm loads
    started = time.perf_counter()
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import stamp
    from PIL import Image
    from vllm import LLM, SamplingParams

    from bi_patch.tools.models import vision
    from bi_patch.tools.verify import weights
    from bi_patch.tools.verify.engine import _images

    weights.make_random(7)
    llm = LLM(
        model=vision.write(a.model, tempfile.mkdtemp(prefix="bi_patch-images-")),
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=4096,
        max_num_seqs=64,
        enforce_eager=a.eager,
        gpu_memory_utilization=0.3,
        mm_processor_cache_gb=0,
        limit_mm_per_prompt={"image": 4, "video": 0} if "Qwen" in a.model else {"image": 4},
    )
    placeholder, _ = _images(llm)
    found = {**stamp.head(), "model": a.model, "mode": a.mode, "eager": a.eager}
    found["start_s"] = round(time.perf_counter() - started, 1)
    found["rows"] = []
    parameters = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=8)
    for name, (count, images, size, tokens) in SETS.items():
        times, encode = [], []
        for repeat in range(_REPEATS):
            source = random.Random(repeat * 1000 + count + images)
            asked = []
            for _ in range(count):
                text = [source.randrange(1900) for _ in range(64)]
                pictures = [
                    Image.frombytes("RGB", (16, 16), source.randbytes(16 * 16 * 3)).resize((size, size))
                    for _ in range(images)
                ]
                asked.append({"prompt_token_ids": [*placeholder * images, *text]})
                if images:
                    asked[-1]["multi_modal_data"] = {"image": pictures}
            parameters.max_tokens = tokens
            # Processing runs before the engine's steps, so that the steps alone are timed.
            for i, prompt in enumerate(asked):
                llm.llm_engine.add_request(f"{name} {repeat} {i}", prompt, parameters)
            start = time.perf_counter()
            first = None
            while llm.llm_engine.has_unfinished_requests():
                llm.llm_engine.step()
                first = first or time.perf_counter() - start
            times.append(time.perf_counter() - start)
            encode.append(first)
        found["rows"].append(
            {
                "workload": name,
                "median_ms": round(statistics.median(times[1:]) * 1e3, 2),
                "first_step_ms": round(statistics.median(encode[1:]) * 1e3, 2),
                "all_ms": [round(t * 1e3, 2) for t in times],
            }
        )
        print(found["rows"][-1], flush=True)
        with open(a.out, "w") as file:
            json.dump(found, file, indent=1)
    os._exit(0)


if __name__ == "__main__":
    main()
