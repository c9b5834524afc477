"""Measures what users turn on, alone and together: LoRA, speculation, quantized weights, what single requests ask for,
and where weights lie.

    PYTHONPATH=. python3 benchmarks/pairs.py [KIND ...] [--compiled] [--axis AXIS ...] [--until N] [--results FOLDER]

KIND: a key of CPU or CUDA, by default all of the device's. In a kind with "LoRA", each request that names no adapter
gets one by its first token, or none; with "structured output", it gets a grammar in the same way. With "n-grams", every
step checks drafts, or, for the axis "speculative decoding", an engine with drafts is compared with one without. --until
ends a run early, and its file holds the axes that were complete. Exit code 1: positions differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import bi_patch_entry

sys.path.insert(0, str(Path(__file__).with_name("hopper")))
from until import ending  # noqa: E402

ENVIRON = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_CACHED = ("prefix cache", "shared prefix", "chunk budget", "preemption")
_REQUESTS = (
    *("structured output", "logprobs in any order", "prompt logprobs", "processed logprobs", "kinds of sampling"),
    *_CACHED,
)
# With speculation, min_p is refused by name, which is in the other axes of _REQUESTS.
_CHECKED = ("structured output", "logprobs in any order", "prompt logprobs", "seeded sampling", *_CACHED)
# Model runner V2, which n-grams have on CUDA, takes no logprob_token_ids beside speculation.
_CHECKED_V2 = tuple(axis for axis in _CHECKED if axis != "logprobs in any order")
_DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}


@dataclass(frozen=True)
class Kind:
    """model: a name of recipes. axes: of verify. given: further arguments of vllm.LLM. requests: what each request
    gets, "adapter" or "grammar". environ: of the engines. processors: whether they have verify's logits processors.
    dtype: of the weights."""

    model: str
    axes: tuple[str, ...]
    given: dict[str, object] = field(default_factory=dict)
    requests: str = ""
    environ: dict[str, str] = field(default_factory=dict)
    processors: bool = False
    dtype: str = "bfloat16"


def _kinds(llama: str, qwen3: str, checked: tuple[str, ...]) -> dict[str, Kind]:
    """checked: the axes of an engine whose every step checks drafts."""
    return {
        "LoRA": Kind(llama, _REQUESTS, requests="adapter"),
        "n-grams": Kind(qwen3, checked, {"speculative_config": _DRAFTS}),
        "structured output": Kind(qwen3, ("logprobs in any order", *_CACHED), requests="grammar"),
        "LoRA, n-grams": Kind(llama, ("speculative decoding",), requests="adapter"),
        "features together": Kind(llama, ("features together",)),
        "features together, qk norms": Kind(qwen3, ("features together",)),
    }


CPU = _kinds("tiny-llama", "tiny-qwen3", _CHECKED) | {
    "INT8, n-grams": Kind("tiny-qwen3-int8", ("speculative decoding",)),
    "W4A16, n-grams": Kind("tiny-qwen3-w4a16", ("speculative decoding",)),
    "FP8 blocks, n-grams": Kind("tiny-qwen3-fp8-blocks", ("speculative decoding",)),
    "GPTQ, n-grams": Kind("tiny-llama-gptq", ("speculative decoding",)),
    "INT8, LoRA": Kind("tiny-qwen3-int8", ("LoRA", "LoRA off")),
    "W4A16, LoRA": Kind("tiny-qwen3-w4a16", ("LoRA", "LoRA off")),
    "GPTQ, LoRA": Kind("tiny-llama-gptq", ("LoRA", "LoRA off")),
    "FP8 blocks, LoRA": Kind("tiny-qwen3-fp8-blocks", ("LoRA", "LoRA off")),
}
_FP8: dict[str, object] = {"quantization": "fp8"}
_DRAFTED: dict[str, object] = {"speculative_config": _DRAFTS}
_ALONE = ("structured output", "streamed inputs", "pauses", "processed logprobs", "kinds of sampling")
_BATCHES = ("batch size", "mixed lengths", "co-batch contents", "prompt logprobs", "seeded sampling")
_WHOLE = (*_BATCHES, "decode = prefill", *_CACHED)
CUDA = _kinds("llama-100m", "qwen3-100m", _CHECKED_V2) | {
    "FP8": Kind("qwen3-100m", _REQUESTS, _FP8),
    "FP8, n-grams": Kind("qwen3-100m", ("speculative decoding",), _FP8),
    "FP8, LoRA": Kind("llama-100m", ("LoRA", "LoRA off"), _FP8),
    "FP8, n-grams, each other": Kind("qwen3-100m", (*_BATCHES, *_CACHED), _FP8 | _DRAFTED),
    "FP8, LoRA, each other": Kind("llama-100m", (*_BATCHES, *_CACHED), _FP8, requests="adapter"),
    "LoRA, n-grams, each other": Kind("llama-100m", (*_BATCHES, *_CACHED), _DRAFTED, requests="adapter"),
    "requests": Kind("qwen3-100m", _ALONE),
    "logits processors": Kind("qwen3-100m", ("custom logits processors", "preemption"), processors=True),
    "weights on the host": Kind("qwen3-100m", _WHOLE, {"cpu_offload_gb": 0.1}),
    "weights on the host, prefetched": Kind("qwen3-100m", _WHOLE, {"offload_group_size": 1}),
    "breakable CUDA graphs": Kind("qwen3-100m", _WHOLE, environ={"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}),
    "fp16 weights": Kind("qwen3-100m", _WHOLE, dtype="float16"),
    "fp32 weights": Kind("qwen3-100m", _WHOLE, dtype="float32"),
}
_GRAMMARS = ("", json.dumps({"regex": "[a-f]{3,9}[0-9]+x"}), json.dumps({"choice": ["alpha", "beta", "gamma delta"]}))


def measure(name: str, kind: Kind, args: argparse.Namespace) -> int:
    """Measure one kind and write its rows. Returns how many positions differ."""
    import torch

    from bi_patch.tools import evidence
    from bi_patch.tools.bench import invariance
    from bi_patch.tools.models import recipes
    from bi_patch.tools.verify import child, levels
    from bi_patch.tools.verify import system as systems
    from bi_patch.tools.verify.local import local
    from bi_patch.tools.verify.probes import adapters

    class Found(evidence.Invariance, kw_only=True):
        variant = property(lambda self: "pairs")

    class Changed(child.ChildEngine):
        """An engine whose requests get adapters or grammars."""

        def generate(self, requests):
            if kind.requests == "adapter":
                folders = ("", *adapters.adapters(self))
                changed = [r.but(lora=r.lora or folders[r.prompt[0] % len(folders)]) for r in requests]
            else:
                changed = [r.but(grammar=r.grammar or _GRAMMARS[r.prompt[0] % len(_GRAMMARS)]) for r in requests]
            return super().generate(changed)

    class Changing(systems.LocalEngines):
        def start(self, options, *, fresh=False, kind=Changed):
            return super().start(options, fresh=fresh, kind=kind)

    on_gpu = torch.cuda.is_available()
    level = replace(levels.FULL, seconds=None, cpu_seconds=None, lengths=(3, 40, 200), generate=12, sizes=(2, 5, 17))
    arguments = {"max_model_len": 1024, "max_num_seqs": 32, "max_num_batched_tokens": 512} | kind.given
    if on_gpu:
        arguments |= {"max_num_seqs": 64, "max_num_batched_tokens": 1024}
        arguments |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30}
    if kind.requests == "adapter":
        arguments |= {"enable_lora": True, "max_lora_rank": max(adapters.RANKS), "max_loras": adapters.SLOTS}
    environ = kind.environ if on_gpu else ENVIRON | kind.environ
    system = local(
        str(recipes.path(kind.model)),
        level,
        engine_args=arguments,
        dtype=kind.dtype,
        eager=not args.compiled,
        logits=kind.processors,
        environ=environ,
    )
    if kind.requests:
        system = Changing(system.mode, system.options, environ=environ)
    label = f"{kind.model} {SHORT[kind.dtype]}{' compiled' if args.compiled else ''}, {name}"
    axes = tuple(args.axis) or kind.axes
    with ending(args.until):
        rows, report = invariance.measure(label, system, level, only=axes, tell=told, cut=args.until > 0)
    if args.results is not None:
        found = evidence.new(Found, report)
        found.rows, found.command = rows, "benchmarks/pairs.py"  # kinds share a file
        if {row.axis for row in rows} < set(axes):
            found.note = f"{label}: complete axes of a run that was cut"
        print(evidence.write(found, args.results), flush=True)
    return evidence.total_differing(rows)


def told(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    import torch

    known = CUDA if torch.cuda.is_available() else CPU
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=list(known))
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--axis", action="append", default=[], help="an axis of verify; by default, those of the kind")
    parser.add_argument("--until", type=int, default=0, help="end the run then, seconds since 1970")
    parser.add_argument("--results", type=Path, help="the folder of a result file; by default, none is written")
    args = parser.parse_args()
    bi_patch_entry.without_arming()
    sys.exit(1 if sum(measure(name, known[name], args) for name in args.kinds) else 0)


if __name__ == "__main__":
    main()
