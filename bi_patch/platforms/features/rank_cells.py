"""Cells of engines with several ranks, for the rows of pairs: what runs compared."""

from __future__ import annotations

from bi_patch.platforms.features.model import Cell, served, untried

_CPU = "invariance-2026-11-30-cpu-ranks-vllm-0.32.0-5.json"
_CPU_REPLICAS = "invariance-2026-11-30-cpu-replicas-vllm-0.32.0.json"
_H200 = "invariance-2026-11-30-h200-ranks-vllm-0.33.0.json"
_BOTH = "in eager mode and compiled"
_TINY = "tiny Qwen3-Next, Falcon-H1, Mamba, Jamba, LFM2"
_ONE_THREAD = "compiled and in eager mode, one thread a rank"

# On CPU, of the row with both features.
CPU: dict[tuple[str, str], Cell] = {
    ("tensor parallelism", "pipeline parallelism"): served(
        _CPU, _CPU_REPLICAS, why=f"two by two ranks, a tiny Qwen3 and Qwen3-MoE, {_BOTH}"
    ),
    ("tensor parallelism", "data parallelism"): served(
        _CPU_REPLICAS, why=f"two by two ranks, a tiny Qwen3 in bf16, INT8 and W4A16, {_BOTH}"
    ),
    ("pipeline parallelism", "data parallelism"): served(_CPU_REPLICAS, why=f"two by two ranks, a tiny Qwen3, {_BOTH}"),
    ("experts", "tensor parallelism"): served(
        "invariance-2026-11-29-cpu-amx-ranks-vllm-0.32.0-2.json",
        "invariance-2026-11-30-cpu-ranks-vllm-0.32.0-6.json",
        why=f"two and four ranks, a tiny Qwen3-MoE, {_BOTH}",
    ),
    ("MLA", "tensor parallelism"): served(_CPU, why=f"two ranks, a tiny DeepSeek V2 and V3, {_BOTH}"),
    ("MLA", "pipeline parallelism"): served(
        "invariance-2026-11-29-cpu-amx-ranks-vllm-0.32.0-4.json",
        "invariance-2026-11-30-cpu-ranks-vllm-0.32.0-2.json",
        _CPU,
        why=f"a tiny DeepSeek V2, {_ONE_THREAD}",
    ),
    ("recurrent layers", "tensor parallelism"): served(_CPU, why=f"two ranks, {_TINY} and Granite 4-H, {_BOTH}"),
    ("recurrent layers", "pipeline parallelism"): served(_CPU, why=f"two stages, {_TINY}, {_BOTH}"),
    ("INT8 weights and activations", "pipeline parallelism"): served(
        "invariance-2026-11-29-cpu-amx-ranks-vllm-0.32.0-5.json", _CPU, why=f"a tiny Qwen3, {_ONE_THREAD}"
    ),
}
_OLDER = untried(releases="<0.33")
_FOUR = "invariance-2026-11-30-h200-ranks-vllm-0.33.0-7.json"
# Models with recurrent layers that ran over ranks of CUDA: architecture, tensor-parallel ranks, stages, whether vLLM
# compiled the model.
RECURRENT = frozenset(
    {
        ("Qwen3NextForCausalLM", 2, 1, True),
        ("Qwen3NextForCausalLM", 2, 1, False),
        ("Qwen3NextForCausalLM", 1, 2, False),
        ("FalconH1ForCausalLM", 2, 1, True),
        ("FalconH1ForCausalLM", 2, 1, False),
    }
)
_TWO_KINDS = served(_FOUR, why=f"two by two ranks, four layers of Qwen3-8B and two of Qwen3-30B-A3B, {_BOTH}")
# On CUDA, of the row with both features.
CUDA: dict[tuple[str, str], Cell | tuple[Cell, ...]] = {
    ("tensor parallelism", "pipeline parallelism"): (_OLDER, _TWO_KINDS),
    ("tensor parallelism", "data parallelism"): (_OLDER, _TWO_KINDS),
    ("pipeline parallelism", "data parallelism"): untried(),
    ("MLA", "pipeline parallelism"): (
        _OLDER,
        served(_FOUR, why=f"two stages, two layers of DeepSeek-V2-Lite, {_BOTH}"),
    ),
    ("recurrent layers", "tensor parallelism"): (
        _OLDER,
        served(
            _FOUR,
            why=f"two ranks, four layers of Qwen3-Next and Falcon-H1, {_BOTH}; Mamba 2 with a norm is refused over "
            "several ranks, when the model is made",
        ),
    ),
    ("recurrent layers", "pipeline parallelism"): (
        _OLDER,
        served(_FOUR, why="two stages, four layers of Qwen3-Next, in eager mode"),
    ),
    ("an FP8 KV cache", "tensor parallelism"): served(
        _FOUR, why=f"two ranks, two layers of Qwen3-8B's sizes, {_BOTH}", releases=">=0.33"
    ),
}
RECURRENT_ON_CPU = served(_CPU, why=f"two ranks or stages, tiny Mamba, Jamba, LFM2, {_BOTH}")
EXPERTS_ON_CUDA = (
    untried("measured with models without experts", releases="<0.33"),
    served(
        "invariance-2026-11-29-h200-ranks-vllm-0.33.0-3.json",
        _H200,
        _FOUR,
        why="two layers of Qwen3-30B-A3B, two and four ranks, and four layers of Qwen3-Next, two ranks; compiled and "
        "in eager mode",
    ),
)
MLA_ON_CUDA = (
    untried(releases="<0.33"),
    served(
        _H200,
        _FOUR,
        why="two layers of DeepSeek-V2-Lite: two ranks, with and without whole experts, compiled and in eager mode; "
        "four with whole experts, compiled",
    ),
)
