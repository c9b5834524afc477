"""What the benchmarks of LoRA in an engine share: how a process is armed, the engine's arguments, and its times."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import time
from pathlib import Path
from types import SimpleNamespace

MODES = ("stock", "upstream", "armed")
SIZES = [1, 2, 4, 8, 16, 32, 64]  # of captured CUDA graphs
# (name, requests, tokens of a prompt, generated tokens)
WORKLOADS = (
    ("prefill 8 x 1000", 8, 1000, 1),
    ("decode 64", 64, 16, 65),
    ("decode 8", 8, 16, 65),
    ("decode 1", 1, 16, 65),
)


def start(mode: str) -> None:
    """Arm this process, or not. Call it before vLLM is imported. Engines run in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if mode != "stock":
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    if mode == "armed":
        from bi_patch import arming

        arming.arm()
    else:
        os.environ["BI_PATCH"] = "0"
        import bi_patch_entry

        bi_patch_entry.without_arming()


def options(model: str, eager: bool, cache: int, **extra):
    """Options of an engine whose bits are compared. model: a folder. cache: bytes of the KV cache."""
    from bi_patch.tools.verify.engine import Options

    held = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": cache} | extra
    held["compilation_config"] = {} if eager else {"cudagraph_capture_sizes": SIZES}
    return Options(
        model,
        eager=eager,
        max_model_len=2048,
        max_num_seqs=64,
        chunk=2048,
        tokenizer=False,
        random_weights=7,
        extra=held,
    )


def change(probe, given):
    """The change of options that `probe` asks of an engine with the options `given`, before any engine has started."""
    return probe.changes(SimpleNamespace(options=given))[0]


def engine(model: str, adapters: int, rank: int, share: float):
    """An engine whose times are taken, with random weights and room for so many adapters beside each other."""
    from vllm import LLM

    from bi_patch.tools.verify import weights

    weights.make_random(7)
    return LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_seqs=64,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        enable_lora=True,
        max_loras=adapters,
        max_lora_rank=rank,
        compilation_config={"cudagraph_capture_sizes": [1, 8, 64]},  # of WORKLOADS
        gpu_memory_utilization=share,
        kv_cache_memory_bytes=3 << 30,
    )


def about(mode: str, **more) -> dict:
    """The first fields of a file of times."""
    import torch
    import vllm

    libraries = {"device": torch.cuda.get_device_name(), "vllm": vllm.__version__, "torch": str(torch.__version__)}
    return {"mode": mode} | libraries | {"date": time.strftime("%Y-%m-%d")} | more | {"seconds": {}, "gpu seconds": {}}


@contextlib.contextmanager
def locked(path: Path | None):
    """Processes with the same lock file run such blocks one after the other. None: no lock."""
    with open(path or os.devnull, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Clock:
    """Times an engine's requests. They have the adapters `folders` in turn, and after each round one has none."""

    def __init__(self, llm, folders: list[Path]) -> None:
        from vllm.lora.request import LoRARequest

        self.llm, self.source = llm, random.Random(3)
        self.adapters = [LoRARequest(f"a{i}", i + 1, str(folder)) for i, folder in enumerate(folders)] + [None]

    def run(self, requests: int, length: int, tokens: int, with_lora: bool) -> float:
        """Seconds of so many requests of `length` tokens, which generate `tokens` each."""
        import torch
        from vllm import SamplingParams

        ids = [[self.source.randrange(30000) for _ in range(length)] for _ in range(requests)]
        wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        given = [self.adapters[i % len(self.adapters)] for i in range(requests)]
        more = {"lora_request": given} if with_lora else {}
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.llm.generate([{"prompt_token_ids": part} for part in ids], wanted, use_tqdm=False, **more)
        return time.perf_counter() - start

    def on_gpu(self, *sizes) -> float:
        """Seconds of the GPU's kernels in a `run`, without the host's."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as held:
            self.run(*sizes)
        return sum(event.self_device_time_total for event in held.key_averages()) / 1e6

    def measure(self, found: dict, out: Path, repeats: int, lock: Path | None) -> None:
        """Add the least seconds of each workload to `found`, and the GPU's of one more run. Write the file `out` after
        each workload."""
        for name, *sizes in WORKLOADS:
            for with_lora in (True, False):
                label = f"{name}{'' if with_lora else ', no adapter'}"
                with locked(lock):
                    self.run(*sizes, with_lora)
                    best = min(self.run(*sizes, with_lora) for _ in range(repeats))
                    found["gpu seconds"][label] = round(self.on_gpu(*sizes, with_lora), 5)
                found["seconds"][label] = round(best, 5)
                out.write_text(json.dumps(found, indent=1))
