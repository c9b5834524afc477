"""The cost of what users turn on, on a GPU: LoRA, speculation, embeddings, images; stock and armed engines in turns.

    PYTHONPATH=. python3 benchmarks/hopper/extras_cost.py [--only lora,ngram] [--ready 130] [--limit 190]
        [--results FOLDER]

All engines start at once, each with a KV cache of fixed size. `--ready` seconds later, those whose partner is not
ready end; then nothing starts any more, and the others take turns. The weights are random. Times are those of the
engine's steps; requests are processed before. A result file is written again after each workload.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ADAPTERS, RANK, DRAFTS = 8, 16, 4
_GRAPHS = {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 40, 64, 80, 160, 320]}}
_COMMON = {"gpu_memory_utilization": 0.06, "kv_cache_memory_bytes": 2 << 30, "max_num_seqs": 64} | _GRAPHS
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


def child(kind: str, mode: str) -> None:
    """One engine. Each line of the input is a workload and a repeat; each answer is its seconds."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["BI_PATCH"] = "1" if mode == "armed" else "0"
    os.environ.pop("VLLM_BATCH_INVARIANT", None)
    if mode == "armed":
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
        import bi_patch  # noqa: F401  arms before vllm loads
    else:
        import bi_patch_entry

        bi_patch_entry.without_arming()
    sys.path.insert(0, str(Path(__file__).parent))
    import stamp

    from bi_patch.tools.verify import weights

    weights.make_random(7)
    llm, per_request = ENGINES[kind](Path(tempfile.mkdtemp(prefix="bi_patch-extras-")))
    for name, load in LOADS[kind].items():
        _timed(llm, kind, load, 1000 + len(name), per_request)  # the first run of each compiles and warms up
    print("turn ready", json.dumps(stamp.head()), flush=True)
    for line in sys.stdin:
        name, repeat = line.rstrip("\n").split("\t")
        print("turn", _timed(llm, kind, LOADS[kind][name], int(repeat), per_request), flush=True)
    os._exit(0)


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

    from bi_patch.tools.verify.engine import _images

    placeholder, _ = _images(llm)
    made = [Image.frombytes("RGB", (16, 16), source.randbytes(16 * 16 * 3)).resize((448, 448)) for _ in range(count)]
    tokens = [*placeholder * count, *prompt["prompt_token_ids"]]
    return {"prompt_token_ids": tokens, "multi_modal_data": {"image": made}}


class Child:
    """The process of one engine."""

    def __init__(self, kind: str, mode: str) -> None:
        self.kind, self.mode, self.head = kind, mode, None
        self._answers: queue.Queue[str] = queue.Queue()
        command = [sys.executable, __file__, "child", kind, mode]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            if line.startswith("turn "):
                self._answers.put(line[5:].strip())
            else:
                self.lines.append(line)
        self._answers.put("ended")

    def ready(self, seconds: float) -> bool:
        try:
            said = self._answers.get(timeout=max(0.1, seconds))
        except queue.Empty:
            return False
        if not said.startswith("ready "):
            return False
        self.head = json.loads(said.removeprefix("ready "))
        return True

    def measure(self, name: str, repeat: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{name}\t{repeat}\n")
        self.process.stdin.flush()
        return float(self._answers.get(timeout=60))


def turns(pairs: list[tuple[Child, Child]], until: float) -> Iterator[tuple[str, str, dict[str, list[float]]]]:
    """(kind, workload, seconds by mode) of each workload. The engines of a pair take turns to go first."""
    for pair in pairs:
        try:
            for name in LOADS[pair[0].kind]:
                if time.monotonic() > until:
                    return
                times: dict[str, list[float]] = {"stock": [], "armed": []}
                for repeat in range(5):
                    for engine in pair[:: 1 if repeat % 2 == 0 else -1]:
                        times[engine.mode].append(engine.measure(name, repeat))
                yield pair[0].kind, name, times
        except (ValueError, OSError, queue.Empty) as error:
            print(f"{pair[0].kind}: {error!r}", *pair[0].lines[-8:], *pair[1].lines[-8:], flush=True)


def row(kind: str, name: str, times: dict[str, list[float]]):
    from bi_patch.tools.evidence import CostRow

    stock, armed = times["stock"], times["armed"]
    ratio = statistics.median(a / s for a, s in zip(armed, stock, strict=True))

    def ends(values: list[float]) -> tuple[float, float]:
        return round(min(values), 5), round(max(values), 5)

    middle = [round(statistics.median(values), 5) for values in (stock, armed)]
    found = CostRow(TITLES[kind], name, "s", middle[0], None, middle[1], len(stock), round(ratio, 4))
    found.stock_range, found.armed_range = ends(stock), ends(armed)
    return found


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        return child(*sys.argv[2:4])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(LOADS))
    parser.add_argument("--ready", type=float, default=130, help="seconds for the start of all engines")
    parser.add_argument("--limit", type=float, default=190, help="seconds until the last workload starts")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--logs", type=Path, help="a folder for the output of engines")
    a = parser.parse_args()
    import bi_patch_entry

    bi_patch_entry.without_arming()
    from bi_patch.tools import evidence

    class Found(evidence.Cost, kw_only=True):
        variant = property(lambda self: "extras")

    began = time.monotonic()
    children = [[Child(kind, mode) for mode in ("stock", "armed")] for kind in a.only.split(",")]
    held = [engine for pair in children for engine in pair]
    try:
        up = {id(engine) for engine in held if engine.ready(began + a.ready - time.monotonic())}
        print(
            f"ready after {time.monotonic() - began:.0f} s: {[(e.kind, e.mode) for e in held if id(e) in up]}",
            flush=True,
        )
        pairs = [(one, two) for one, two in children if {id(one), id(two)} <= up]
        for engine in held:
            if not any(engine in pair for pair in pairs):
                engine.process.kill()
        rows, path = [], None
        for kind, name, times in turns(pairs, began + a.limit):
            rows.append(row(kind, name, times))
            print(rows[-1], flush=True)
            head = pairs[0][1].head
            found = Found(**head)
            found.rows = rows
            found.command = "python3 benchmarks/hopper/extras_cost.py"
            found.note = "Stock and armed engines in turns on one GPU: seconds of the engine's steps"
            path = evidence.write(found, a.results)
        print(path, f"after {time.monotonic() - began:.0f} s", flush=True)
    finally:
        for engine in held:
            engine.process.kill()
            if a.logs:
                a.logs.mkdir(parents=True, exist_ok=True)
                (a.logs / f"{engine.kind}-{engine.mode}.log").write_text("".join(engine.lines[-60:]))


if __name__ == "__main__":
    main()
