"""LoRA of a model with experts on a GPU: bits along the axes of a batch, and times.

    python benchmarks/hopper/expert_lora.py plain ANSWERS [--eager]
    python benchmarks/hopper/expert_lora.py lora ANSWERS RESULTS [--eager]
    python benchmarks/hopper/expert_lora.py times MODE OUT.json [--after FILE] [--lock FILE]

The shape is Qwen3-30B-A3B's with two layers and 32 experts, and random weights. Adapters have ranks 8 to 64: on
attention and experts, on attention alone, and with embeddings and the head. `plain` starts an engine without LoRA and
keeps its answers in the file ANSWERS. `lora` starts an engine with LoRA, runs the axes with an adapter for each
request, waits for ANSWERS, and compares requests without an adapter with it; it writes an invariance file into the
folder RESULTS. Exit code 1: positions differ. `times`: MODE is stock, upstream or armed; four layers with 128 experts
and four adapters of rank 16. It starts the engine, waits until FILE exists, and times decode steps of 1, 8 and 64
requests with adapters in turn, and prefill. Seconds are the least of several runs.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

LAYERS, EXPERTS, VOCABULARY = 2, 32, 32000
AXES = ("batch size", "late arrivals", "chunk budget", "prefix cache", "decode = prefill", "prompt logprobs")


def _start(armed: bool, upstream: bool = True) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if upstream:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    if armed:
        from bi_patch import arming

        arming.arm()
    else:
        os.environ["BI_PATCH"] = "0"
        import bi_patch_entry

        bi_patch_entry.without_arming()


def _model(layers: int, experts: int) -> str:
    from bi_patch.tools.models import shapes

    shape = {**shapes.SHAPES["Qwen3-30B-A3B"], "num_hidden_layers": layers, "num_experts": experts}
    return shapes.save("experts with adapters", shape | {"vocab_size": VOCABULARY}, tempfile.mkdtemp())


def bits(asked) -> None:
    _start(armed=True)
    import msgspec

    from bi_patch.tools import evidence
    from bi_patch.tools.evidence import Invariance, InvarianceRow
    from bi_patch.tools.verify.answers import Answer
    from bi_patch.tools.verify.engine import LocalEngine, Options
    from bi_patch.tools.verify.probes import FEATURE_PROBES, PROBES, Workload, adapters
    from bi_patch.tools.verify.probes.base import NotExercised, Result

    class Found(Invariance, kw_only=True):
        variant = property(lambda self: "expert-lora")

    @dataclasses.dataclass(frozen=True)
    class Adapted(Workload):
        """A workload whose requests have the adapters in turn, and whose fillers have them or none."""

        folders: tuple[str, ...] = ()

        def greedy(self, index):
            return super().greedy(index).but(lora=self.folders[(index + 1) % len(self.folders)])

        def filler(self, index, **changes):
            given = ("", *self.folders)
            return super().filler(index, **{"lora": given[index % len(given)], **changes})

    options = Options(
        _model(LAYERS, EXPERTS),
        eager=asked.eager,
        max_model_len=2048,
        max_num_seqs=64,
        chunk=2048,
        tokenizer=False,
        random_weights=7,
        extra={
            "gpu_memory_utilization": 0.1,
            "kv_cache_memory_bytes": 1 << 30,
            "max_cpu_loras": 8,
            "compilation_config": {} if asked.eager else {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]},
        },
    )
    off = next(p for p in FEATURE_PROBES if isinstance(p, adapters.WithoutProbe))
    on = next(p for p in FEATURE_PROBES if p.name == "LoRA")
    given = {"lengths": (3, 37, 150, 411), "generate": 8, "sizes": (1, 2, 3, 8, 9, 17, 33, 40), "prefix": 200}
    load = Workload.random(VOCABULARY, **given)
    if asked.part == "plain":
        engine = LocalEngine(options)
        part = asked.answers.with_suffix(".part")
        part.write_bytes(msgspec.msgpack.encode(off.collect(engine, load)))
        part.rename(asked.answers)
        os._exit(0)
    change = off.changes(_Shown(options))[0]
    extra = {**change.options["extra"], "max_loras": 3}  # fewer than adapters, and several beside each other
    engine = LocalEngine(options.but(extra=extra))
    label = f"Qwen3-30B-A3B ({LAYERS} layers, {EXPERTS} experts) LoRA{' eager' if asked.eager else ''}"
    rows, failed = [], False

    def keep(result: Result) -> None:
        rows.append(InvarianceRow(label, result.axis, result.compared, result.differing, result.first))
        found = evidence.new(Found, engine.info)
        found.rows = rows
        evidence.write(found, asked.results)
        print(
            f"{time.monotonic() - BEGAN:.0f} s {label}: {result.axis} {result.differing}/{result.compared}", flush=True
        )
        if result.differing:
            print(result.first, flush=True)

    adapted = Adapted(**{f.name: getattr(load, f.name) for f in dataclasses.fields(load)})
    adapted = dataclasses.replace(adapted, folders=adapters.adapters(engine), budgets=(33, 256))
    for probe, workload in [(on, load), *((p, adapted) for name in AXES for p in PROBES if p.name == name)]:
        try:
            keep(probe.run(engine, workload))
        except NotExercised as error:
            failed = True
            print(f"{label}: {probe.name}: {error}", flush=True)
    while not asked.answers.exists():
        time.sleep(0.5)
    expected = msgspec.msgpack.decode(asked.answers.read_bytes(), type=list[Answer])
    got = off.collect(engine, load, change)
    keep(Result.of(off.name, off.cases(change, off.requests(engine, load), expected, got)))
    sys.stdout.flush()
    os._exit(1 if failed or any(row.differing for row in rows) else 0)


class _Shown:
    """An engine that was not started: what the probes read of it before its start."""

    def __init__(self, options) -> None:
        self.options = options


@contextlib.contextmanager
def locked(path: Path | None):
    with open(path or os.devnull, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def times(asked) -> None:
    _start(armed=asked.mode == "armed", upstream=asked.mode != "stock")
    import torch
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from bi_patch.tools.models import adapters
    from bi_patch.tools.verify import weights

    layers, experts, count, rank = 4, 128, 4, 16
    model = _model(layers, experts)
    folders = [
        adapters.write(model, Path(tempfile.mkdtemp()), seed=i, rank=rank, experts=True, embedded=i == count - 1)
        for i in range(count)
    ]
    weights.make_random(7)
    llm = LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_seqs=64,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        enable_lora=True,
        max_loras=count,
        max_lora_rank=rank,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]},
        gpu_memory_utilization=0.15,
        kv_cache_memory_bytes=3 << 30,
    )
    loras = [LoRARequest(f"a{i}", i + 1, str(folder)) for i, folder in enumerate(folders)]
    found = {
        "mode": asked.mode,
        "device": torch.cuda.get_device_name(),
        "vllm": vllm.__version__,
        "torch": str(torch.__version__),
        "date": time.strftime("%Y-%m-%d"),
        "model": f"Qwen3-30B-A3B ({layers} layers), {count} adapters of rank {rank}",
        "seconds": {},
    }
    source = random.Random(3)

    def run(requests: int, length: int, tokens: int, with_lora: bool) -> float:
        prompts = [{"prompt_token_ids": [source.randrange(30000) for _ in range(length)]} for _ in range(requests)]
        wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        given = [loras[i % (count + 1)] if i % (count + 1) < count else None for i in range(requests)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        llm.generate(prompts, wanted, use_tqdm=False, **({"lora_request": given} if with_lora else {}))
        return time.perf_counter() - start

    run(8, 16, 2, True)
    print(f"{time.monotonic() - BEGAN:.0f} s {asked.mode} is ready", flush=True)
    while asked.after and not asked.after.exists():
        time.sleep(0.2)
    for name, requests, length, tokens in (
        ("decode 1", 1, 16, 129),
        ("decode 8", 8, 16, 129),
        ("decode 64", 64, 16, 129),
        ("prefill 8 x 1000", 8, 1000, 1),
    ):
        for with_lora in (True, False):
            with locked(asked.lock):
                run(requests, length, tokens, with_lora)
                best = min(run(requests, length, tokens, with_lora) for _ in range(4))
            found["seconds"][f"{name}{'' if with_lora else ', no adapter'}"] = round(best, 5)
            asked.out.write_text(json.dumps(found, indent=1))
    print(f"{time.monotonic() - BEGAN:.0f} s {asked.mode}: {found['seconds']}", flush=True)
    os._exit(0)


BEGAN = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("plain", "lora"):
        part = parts.add_parser(name)
        part.add_argument("answers", type=Path)
        part.add_argument("--eager", action="store_true")
        if name == "lora":
            part.add_argument("results", type=Path)
    part = parts.add_parser("times")
    part.add_argument("mode", choices=("stock", "upstream", "armed"))
    part.add_argument("out", type=Path)
    part.add_argument("--after", type=Path)
    part.add_argument("--lock", type=Path)
    asked = parser.parse_args()
    times(asked) if asked.part == "times" else bits(asked)


if __name__ == "__main__":
    main()
