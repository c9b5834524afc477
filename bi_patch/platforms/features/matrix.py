"""What single requests ask for, beside what an engine turns on and beside each other: a row for each pair.

With the pairs of `pairs.py`, every pair of LoRA, speculation, quantized weights, structured output, logprobs, prefix
caching and preemption has a row. A configuration cannot tell what requests will ask for. So an engine that has its
part of an untried pair names the pair when it starts, and a pair of two requests' parts is named in the table alone.
"""

from __future__ import annotations

from typing import Any

from bi_patch.platforms.features.model import Asked, Cell, Feature, refused, row, served, untried
from bi_patch.platforms.features.pairs import LORA, PARTS, QUANTIZED, SPECULATION

GRAMMARS, LOGPROBS, CACHED, PREEMPTED = "structured output", "logprobs", "prefix caching", "preemption"
ENGINES = (LORA, SPECULATION, QUANTIZED)
REQUESTS = (GRAMMARS, LOGPROBS, CACHED, PREEMPTED)

_CPU_PAIRS = "invariance-2026-11-29-cpu-amx-pairs-vllm-0.32.0.json"
_CPU_QUANTIZED = "invariance-2026-11-28-cpu-amx-quantized-vllm-0.32.0.json"
_CPU_TINY = "invariance-2026-11-28-cpu-families-vllm-0.32.0.json"
_H200_LORA = "invariance-2026-11-29-h200-lora-vllm-0.33.0.json"
_H200_SPECULATION = "invariance-2026-11-28-h200-speculation-vllm-0.33.0.json"
_H200_FP8 = "invariance-2026-11-29-h200-pairs-vllm-0.33.0.json"
_H200_SMALL = "invariance-2026-11-30-h200-pairs-vllm-0.33.0.json"
_H200_DRAFTS = "invariance-2026-11-30-h200-speculation-vllm-0.33.0.json"
_H200_NGRAMS = "invariance-2026-11-30-h200-pairs-vllm-0.33.0-2.json"
_H100 = "invariance-2026-11-22-h100-vllm-0.33.0.json"

# The evidence of both together, by platform. A pair without a file is untried.
_CPU: dict[tuple[str, str], str] = {
    **dict.fromkeys(((first, asked) for first in (LORA, SPECULATION) for asked in REQUESTS), _CPU_PAIRS),
    **dict.fromkeys(((GRAMMARS, asked) for asked in REQUESTS[1:]), _CPU_PAIRS),
    **dict.fromkeys(((QUANTIZED, asked) for asked in REQUESTS), _CPU_QUANTIZED),
    **dict.fromkeys(((LOGPROBS, CACHED), (LOGPROBS, PREEMPTED), (CACHED, PREEMPTED)), _CPU_TINY),
}
_CUDA: dict[tuple[str, str], str] = {
    (LORA, LOGPROBS): _H200_LORA,
    (LORA, GRAMMARS): _H200_SMALL,
    (LORA, PREEMPTED): _H200_SMALL,
    **dict.fromkeys(((GRAMMARS, asked) for asked in REQUESTS[1:]), _H200_SMALL),
    (LORA, CACHED): "invariance-2026-11-30-h200-expert-lora-vllm-0.33.0.json",
    (SPECULATION, LOGPROBS): _H200_SPECULATION,
    (SPECULATION, GRAMMARS): _H200_NGRAMS,
    (SPECULATION, CACHED): _H200_DRAFTS,
    (SPECULATION, PREEMPTED): _H200_NGRAMS,
    **dict.fromkeys(((QUANTIZED, asked) for asked in REQUESTS), _H200_FP8),
    **dict.fromkeys(((LOGPROBS, CACHED), (LOGPROBS, PREEMPTED), (CACHED, PREEMPTED)), _H100),
}
_WHY = {  # by the file and the engine's part
    (_H200_FP8, QUANTIZED): "FP8, in eager mode",
    (_H200_SMALL, LORA): "a small Llama model in eager mode",
    (_H200_DRAFTS, SPECULATION): "n-grams, three layers of Qwen3-8B's sizes, compiled",
    (_H200_NGRAMS, SPECULATION): "n-grams, a small Qwen3 in eager mode",
    (_H200_SMALL, GRAMMARS): "a small Qwen3, in eager mode and compiled",
}
_ASCEND = {
    LORA: refused("its products split K by the number of rows", by="features.ascend"),
    SPECULATION: refused(
        "a step that checks drafts uses other kernels or draws than a single step", by="features.ascend"
    ),
    QUANTIZED: refused("no patch point covers it yet", by="features.ascend"),
}


def _cell(known: dict[tuple[str, str], str], pair: tuple[str, str]) -> Cell:
    why = _WHY.get((known.get(pair, ""), pair[0]), "")
    return served(known[pair], why=why) if pair in known else untried()


def pairs() -> tuple[tuple[str, str], ...]:
    """The pairs of this file, the engine's part first."""
    beside = [(first, asked) for first in ENGINES for asked in REQUESTS]
    among = [(first, other) for i, first in enumerate(REQUESTS) for other in REQUESTS[i + 1 :]]
    return (*beside, *among)


def _asked(pair: tuple[str, str]) -> Asked | None:
    """Whether an engine has its part of a pair, and the prefix cache if the other part is that."""
    first, other = pair
    if first not in ENGINES:
        return None

    def asked(config: Any) -> str:
        if config.model_config is None or not PARTS[first](config):
            return ""
        cached = getattr(config.cache_config, "enable_prefix_caching", True)
        return f"{first} with {other}" if other != CACHED or cached else ""

    return asked


def _row(pair: tuple[str, str]) -> Feature:
    first, other = pair
    ascend = _ASCEND.get(first, untried("checked without a device; nothing has run on an NPU"))
    cells = {"cpu": _cell(_CPU, pair), "cuda": _cell(_CUDA, pair), "ascend": ascend}
    return row(f"{first} with {other}", **cells, asked=_asked(pair))


MATRIX: tuple[Feature, ...] = tuple(_row(pair) for pair in pairs())
