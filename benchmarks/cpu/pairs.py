"""Measures on CPU what users turn on together: LoRA, speculation, quantized weights, and what single requests ask for.

    PYTHONPATH=. python3 benchmarks/cpu/pairs.py [KIND ...] [--results FOLDER]

KIND: a key of KINDS, by default all. In engines with LoRA, each request that names no adapter gets one by its first
token, or none. In engines with n-grams, every step checks drafts. "LoRA, n-grams" and "INT8, n-grams" compare engines
with speculation with one without. Exit code 1: positions differ.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import bi_patch_entry

ENVIRON = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_REQUESTS = (
    *("structured output", "logprobs in any order", "prompt logprobs", "processed logprobs", "kinds of sampling"),
    *("prefix cache", "shared prefix", "chunk budget", "preemption"),
)
_DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
_SPECULATION = {"speculative_config": _DRAFTS}
# kind: the model, whether requests get adapters, further arguments of vllm.LLM, axes of verify
KINDS: dict[str, tuple[str, bool, dict[str, object], tuple[str, ...]]] = {
    "LoRA": ("tiny-llama", True, {}, _REQUESTS),
    "n-grams": ("tiny-qwen3", False, _SPECULATION, _REQUESTS),
    "LoRA, n-grams": ("tiny-llama", True, {}, ("speculative decoding",)),
    "INT8, n-grams": ("tiny-qwen3-int8", False, {}, ("speculative decoding",)),
    "W4A16, n-grams": ("tiny-qwen3-w4a16", False, {}, ("speculative decoding",)),
    "FP8 blocks, n-grams": ("tiny-qwen3-fp8-blocks", False, {}, ("speculative decoding",)),
    "INT8, LoRA": ("tiny-qwen3-int8", False, {}, ("LoRA", "LoRA off")),
}


def measure(kind: str, results: Path | None) -> int:
    """Measure one kind and write its rows. Returns how many positions differ."""
    from bi_patch.tools import evidence
    from bi_patch.tools.bench import invariance
    from bi_patch.tools.models import recipes
    from bi_patch.tools.verify import child, levels
    from bi_patch.tools.verify import system as systems
    from bi_patch.tools.verify.local import local
    from bi_patch.tools.verify.probes import adapters

    class Found(evidence.Invariance, kw_only=True):
        variant = property(lambda self: "pairs")

    class Adapted(child.ChildEngine):
        """An engine whose requests get adapters."""

        def generate(self, requests):
            folders = ("", *adapters.adapters(self))
            return super().generate([r.but(lora=r.lora or folders[r.prompt[0] % len(folders)]) for r in requests])

    class Adapting(systems.LocalEngines):
        def start(self, options, *, fresh=False, kind=Adapted):
            return super().start(options, fresh=fresh, kind=kind)

    model, adapted, given, axes = KINDS[kind]
    level = replace(levels.FULL, seconds=None, cpu_seconds=None, lengths=(3, 40, 200), generate=12, sizes=(2, 5, 17))
    arguments = {"max_model_len": 1024, "max_num_seqs": 64, "max_num_batched_tokens": 512} | given
    if adapted:
        arguments |= {"enable_lora": True, "max_lora_rank": max(adapters.RANKS), "max_loras": adapters.SLOTS}
    system = local(
        str(recipes.path(model)), level, engine_args=arguments, dtype="bfloat16", eager=True, environ=ENVIRON
    )
    if adapted:
        system = Adapting(system.mode, system.options, environ=ENVIRON)
    label = f"{model} bf16, {kind}"
    rows, report = invariance.measure(label, system, level, only=axes, tell=lambda text: print(text, flush=True))
    if results is not None:
        found = evidence.new(Found, report)
        found.rows, found.command = rows, "benchmarks/cpu/pairs.py"  # kinds share a file
        print(evidence.write(found, results), flush=True)
    return evidence.total_differing(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--results", type=Path, help="the folder of a result file; by default, none is written")
    args = parser.parse_args()
    bi_patch_entry.without_arming()
    sys.exit(1 if sum(measure(kind, args.results) for kind in args.kinds) else 0)


if __name__ == "__main__":
    main()
