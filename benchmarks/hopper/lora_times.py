"""Times one engine with LoRA on a GPU: the shape of Llama-3.1-8B with few layers, eight adapters of rank 16.

    python benchmarks/hopper/lora_times.py MODE OUT.json [--layers 8] [--lock FILE]

MODE: stock, upstream (vLLM's batch-invariant mode) or armed; each in a process of its own. Processes that start side by
side time one at a time, if they have a lock. Workloads: decode of 1, 8
and 64 requests with adapters in turn and, for every ninth, with none; prefill of 8 prompts of 1,000 tokens. Seconds
by the clock are the least of several runs, those of the GPU's kernels are of one run.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import lora_engine

ADAPTERS, RANK = 8, 16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=lora_engine.MODES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--lock", type=Path)
    asked = parser.parse_args()
    lora_engine.start(asked.mode)
    from bi_patch.tools.models import adapters, shapes

    root = Path(tempfile.mkdtemp())
    shape = {**shapes.SHAPES["Llama-3.1-8B"], "num_hidden_layers": asked.layers}
    model = shapes.save("Llama-3.1-8B, few layers", shape, root)
    began = time.perf_counter()
    llm = lora_engine.engine(model, ADAPTERS, RANK, 0.1)
    found = lora_engine.about(asked.mode, layers=asked.layers, started=round(time.perf_counter() - began, 1))
    folders = [adapters.write(model, root / f"a{i}", seed=i, rank=RANK) for i in range(ADAPTERS)]
    lora_engine.Clock(llm, folders).measure(found, asked.out, 5, asked.lock)
    os._exit(0)


if __name__ == "__main__":
    main()
