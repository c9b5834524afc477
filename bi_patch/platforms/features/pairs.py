"""Features that a user turns on together: each pair is served with evidence of both together, or refused by name.

`PARTS` says how a configuration shows a feature. A row is one feature with one or several others, of the same state.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from bi_patch.platforms import schemes
from bi_patch.platforms.features import rank_cells
from bi_patch.platforms.features.model import Cell, Feature, refused, row, served, untried
from bi_patch.platforms.features.quantized_ranks import SHARED
from bi_patch.platforms.features.ranks import compiled, shown, size, whole_experts

_CPU_PAIRS = "invariance-2026-11-29-cpu-amx-pairs-vllm-0.32.0.json"
_CPU_TOGETHER = "invariance-2026-11-29-cpu-amx-pairs-vllm-0.32.0-2.json"  # with grammars and cached prefixes, too
_CPU_LATENT = "invariance-2026-11-29-cpu-amx-speculation-vllm-0.32.0-4.json"
_H200_PAIRS = "invariance-2026-11-29-h200-speculation-vllm-0.33.0-2.json"
_H200_EXPERT_LORA = (
    "invariance-2026-11-30-h200-expert-lora-vllm-0.33.0.json",
    "invariance-2026-11-30-h200-expert-lora-vllm-0.33.0-2.json",
)
_H200_LORA_FP8 = "invariance-2026-11-29-h200-pairs-vllm-0.33.0-2.json"
_SCHEMES = "INT8, 4-bit weights and FP8 blocks of tiny models, in eager mode"
_ALONE = "nobody has compared bits of both together"
TRIAL = "nobody has compared an engine's bits yet"


def several_ranks(config: Any, *kinds: str) -> bool:
    """Whether an engine has several ranks of one of these kinds of parallelism."""
    return any(size(config, f"{kind}_parallel_size") > 1 for kind in kinds)


def one_form() -> bool:
    """Whether MLA on CUDA computes every token in one form (bi_patch.settings; this layer must not import it)."""
    return os.environ.get("BI_PATCH_MLA") == "one"


def recurrent(model: Any) -> bool:
    return any(bool(getattr(model, name, False)) for name in ("is_hybrid", "is_attention_free", "has_inner_state"))


def _model(name: str) -> Callable[[Any], bool]:
    return lambda config: bool(getattr(config.model_config, name, False))


def _text_only(config: Any) -> bool:
    media = getattr(config.model_config, "multimodal_config", None)
    return PARTS["multimodal models"](config) and bool(getattr(media, "language_model_only", False))


def _other_dtype(config: Any) -> bool:
    kind = getattr(config.lora_config, "lora_dtype", "auto")
    return kind not in ("auto", getattr(config.model_config, "dtype", None))


def _parses_reasoning(config: Any) -> bool:
    return bool(getattr(getattr(config, "structured_outputs_config", None), "reasoning_parser", ""))


def _eighth(config: Any) -> bool:
    kind = str(getattr(getattr(config, "cache_config", None), "cache_dtype", "auto"))
    return kind.startswith("fp8") or kind == "auto" and schemes.caches(config)


def _channels(config: Any) -> bool:
    """Whether all quantized weights of a checkpoint are FP8 per channel, with activations per token."""
    return _every(config, ("fp8", schemes.CHANNEL, "fp8", schemes.TOKEN, False, False, ""))


def _int8(config: Any) -> bool:
    """Whether all quantized weights of a checkpoint are INT8 per channel, with activations per token."""
    return _every(config, ("int8", schemes.CHANNEL, "int8", schemes.TOKEN, False, False, ""))


def _blocks(config: Any) -> bool:
    """Whether all quantized weights of a checkpoint are FP8 in blocks of 128 x 128."""
    return _every(config, ("fp8", "128x128", "fp8", "128", False, False, ""))


def _nvfp4(config: Any) -> bool:
    """Whether all quantized weights of a dense model are in NVFP4, with or without activations in NVFP4."""
    both = ("nvfp4", "16", "", "", False, False, ""), ("nvfp4", "16", "nvfp4", "16", True, False, "")
    return not (PARTS[MLA](config) or PARTS[EXPERTS](config)) and _every(config, *both)


def _latent_blocks(config: Any) -> bool:
    return PARTS[MLA](config) and _blocks(config)


def _dense_blocks(config: Any) -> bool:
    return not (PARTS[MLA](config) or PARTS[EXPERTS](config)) and _blocks(config)


def _every(config: Any, *wanted: tuple[object, ...]) -> bool:
    """Whether an engine has quantized weights, and what matters of each of their schemes is one of `wanted`."""
    used = schemes.of(config) if PARTS[QUANTIZED](config) else ()
    kinds = [(s.weight, s.scale, s.activation, s.activation_scale, s.static, s.online, s.other) for s in used]
    return bool(kinds) and all(kind in wanted for kind in kinds)


def _checkpoint(config: Any) -> bool:
    """Whether quantized weights are another kind than FP8 that vLLM makes while it loads 16-bit weights."""
    model = config.model_config
    kind = getattr(model, "quantization", None)
    own = getattr(getattr(model, "hf_config", None), "quantization_config", None)
    return kind is not None and (kind != "fp8" or bool(own))


LORA, SPECULATION, POOLING = "LoRA", "speculative decoding", "pooling"
_DRAFTS = "a draft model or heads"
TENSOR, STAGES = "tensor parallelism", "pipeline parallelism"
QUANTIZED, MLA, RECURRENT = "quantized weights", "MLA", "recurrent layers"
OTHER_SCHEMES = "quantized weights other than FP8 made while loading"
EIGHTH = "an FP8 KV cache"
EXPERTS = "experts"
_EMBEDS = "prompt embeddings"
_CHANNELS, _LATENT_BLOCKS = "FP8 weights per channel", "FP8 blocks of 128 x 128 in models with MLA"
_BLOCKS, _NVFP4 = "FP8 blocks of 128 x 128 in dense models", "NVFP4 weights in dense models"
_OTHERS = "other quantized weights"
_TEXT = "multimodal models as text models (--language-model-only)"  # `beside` has images
_INT8, _NO_INT8 = "INT8 weights and activations", "quantized weights other than INT8"
PARTS: dict[str, Callable[[Any], bool]] = {
    LORA: lambda config: config.lora_config is not None,
    SPECULATION: lambda config: config.speculative_config is not None,
    POOLING: lambda config: getattr(config.model_config, "runner_type", "") == "pooling",
    QUANTIZED: lambda config: getattr(config.model_config, "quantization", None) is not None,
    OTHER_SCHEMES: _checkpoint,
    MLA: _model("use_mla"),
    RECURRENT: lambda config: recurrent(config.model_config),
    EIGHTH: _eighth,
    _CHANNELS: _channels,
    _LATENT_BLOCKS: _latent_blocks,
    _BLOCKS: _dense_blocks,
    _NVFP4: _nvfp4,
    _OTHERS: lambda config: (
        PARTS[QUANTIZED](config)
        and not any(held(config) for held in (_channels, _latent_blocks, _dense_blocks, _nvfp4))
    ),
    _INT8: _int8,
    _NO_INT8: lambda config: PARTS[QUANTIZED](config) and not _int8(config),
    "multimodal models": _model("is_multimodal_model"),
    _TEXT: _text_only,
    "encoder-decoder models": _model("is_encoder_decoder"),
    "ranks that share a model": lambda config: several_ranks(config, "tensor", "pipeline"),
    "pipeline parallelism": lambda config: several_ranks(config, "pipeline"),
    "tensor parallelism": lambda config: several_ranks(config, "tensor"),
    "data parallelism": lambda config: several_ranks(config, "data"),
    "several ranks": lambda config: several_ranks(
        config, "tensor", "pipeline", "data", "decode_context", "prefill_context"
    ),
    "KV transfer or offload": lambda config: config.kv_transfer_config is not None,
    "a reasoning parser": _parses_reasoning,
    "custom logits processors": _model("logits_processors"),
    "watermarks": lambda config: getattr(config, "watermark_config", None) is not None,
    EXPERTS: _model("is_moe"),
    # vLLM embeds the other tokens of a step apart, and its metadata of adapters are those of the whole step.
    _EMBEDS: _model("enable_prompt_embeds"),
    # The last three are what LoRA is refused with:
    _DRAFTS: lambda config: getattr(config.speculative_config, "method", None) not in (None, "ngram"),
    "sharded adapters (--fully-sharded-loras)": lambda config: bool(
        getattr(config.lora_config, "fully_sharded_loras", False)
    ),
    "adapters in another type than the model's (--lora-dtype)": _other_dtype,
}
_OF_LORA = list(PARTS)[-3:]
_EXPERTS_OF_LORA = ("Qwen3MoeForCausalLM",)  # models whose experts may take adapters


def _pairs(
    first: str, *others: str, cpu: Cell, cuda: Cell | tuple[Cell, ...], ascend: Cell, details: str = ""
) -> Feature:
    """A row: `first` with each of `others`. Names are keys of PARTS."""

    def asked(config: Any) -> str:
        if config.model_config is None or not PARTS[first](config):
            return ""
        found = [other for other in others if PARTS[other](config)]
        return f"{first} with {' and '.join(found)}" if found else ""

    words = f"{first} with {', '.join(others)}"
    return row(words, cpu=cpu, cuda=cuda, ascend=ascend, asked=asked, details=details)


def _of_ranks(first: str, other: str, **given: Any) -> Feature:
    """A row of `first` with `other`, a kind of parallelism. given: of `_pairs`, without the cell of the CPU."""
    return _pairs(first, other, cpu=rank_cells.CPU[first, other], **given)


_REFUSED = refused(_ALONE, todo="Use one of them")
_NO_SEAM = refused("no patch point covers it yet")
_OLDER = refused(_ALONE, todo="Use vLLM 0.33, or one of them", releases="<0.33")


_NO_EXPERTS = refused(
    "vLLM takes Triton experts where adapters may come, and its CPU build has no Triton: with vLLM 0.32.0, a tiny "
    "Qwen3-MoE stopped at its first step (module 'triton.language' has no attribute 'bfloat16')",
    todo="Use one of them",
)


def _other_experts(config: Any) -> str:
    """Cut experts of tensor-parallel ranks that no run has. The rows of data and expert parallelism judge the rest."""
    asked = PARTS[EXPERTS](config) and several_ranks(config, "tensor") and not several_ranks(config, "data")
    return "experts with other tensor parallelism" if asked and not whole_experts(config) and not shown(config) else ""


def _other_latent(config: Any) -> str:
    asked = PARTS[MLA](config) and several_ranks(config, "tensor")
    return "MLA with other tensor parallelism" if asked and (one_form() or not shown(config)) else ""


def _eighth_compiled(config: Any) -> str:
    there = compiled(config) and PARTS[EIGHTH](config) and (_dense_blocks(config) or _nvfp4(config))
    return "an FP8 KV cache with quantized weights, compiled" if there else ""


def _eighth_ranks(config: Any) -> str:
    if not PARTS[EIGHTH](config) or not several_ranks(config, "tensor", "pipeline"):
        return ""
    other = several_ranks(config, "pipeline") or size(config, "tensor_parallel_size") > 2
    other = other or any(PARTS[part](config) for part in (MLA, EXPERTS, QUANTIZED))
    return "an FP8 KV cache with other ranks" if other else ""


def _other_recurrent_model(config: Any) -> str:
    if not PARTS[RECURRENT](config) or not several_ranks(config, "tensor", "pipeline"):
        return ""
    own = set(getattr(config.model_config, "architectures", None) or ())
    kind = size(config, "tensor_parallel_size"), size(config, "pipeline_parallel_size"), compiled(config)
    measured = bool(own) and {(name, *kind) for name in own} <= rank_cells.RECURRENT
    return "" if measured else "recurrent layers with other ranks"


def _other_recurrent(config: Any) -> str:
    several = PARTS[RECURRENT](config) and size(config, "tensor_parallel_size") > 2
    return "recurrent layers with other tensor parallelism" if several else ""


def _more_than_two(config: Any) -> str:
    sizes = [size(config, f"{kind}_parallel_size") for kind in ("tensor", "pipeline", "data")]
    several = sorted(size for size in sizes if size > 1)
    return "ranks of two kinds, more than two by two" if len(several) > 1 and several != [2, 2] else ""


def _two_compiled(config: Any) -> str:
    if not compiled(config):
        return ""
    found = [part for part in (LORA, SPECULATION, QUANTIZED) if PARTS[part](config)]
    return f"{' with '.join(found)}, compiled" if len(found) > 1 else ""


def _latent_drafts_compiled(config: Any) -> str:
    both = compiled(config) and PARTS[SPECULATION](config) and PARTS[MLA](config)
    return "speculative decoding with MLA, compiled" if both else ""


def _all_three(config: Any) -> str:
    parts = (LORA, SPECULATION, QUANTIZED)
    held = config.model_config is not None and all(PARTS[part](config) for part in parts)
    return "LoRA with speculative decoding and quantized weights" if held else ""


def _adapted_experts(config: Any) -> str:
    return f"{LORA} with {EXPERTS}" if _lora_of_experts(config) and _only_examined(config) else ""


def _other_adapted_experts(config: Any) -> str:
    asked = _lora_of_experts(config) and not _only_examined(config)
    return f"{LORA} with {EXPERTS} of other models, or beside another feature" if asked else ""


def _lora_of_experts(config: Any) -> bool:
    return config.model_config is not None and PARTS[LORA](config) and PARTS[EXPERTS](config)


def _only_examined(config: Any) -> bool:
    held = getattr(config.model_config, "architectures", None) or ()
    beside = PARTS[SPECULATION](config) or PARTS[QUANTIZED](config)
    return bool(held) and set(held) <= set(_EXPERTS_OF_LORA) and not beside


def _never(first: str, *others: str) -> Feature:
    return _pairs(first, *others, cpu=_REFUSED, cuda=_REFUSED, ascend=_REFUSED)


PAIRS: tuple[Feature, ...] = (
    _pairs(
        LORA,
        SPECULATION,
        cpu=served(_CPU_PAIRS, _CPU_TOGETHER, why="n-grams; also with grammars, logprobs and cached prefixes at once"),
        cuda=(_OLDER, served(_H200_PAIRS, why="n-grams, a small Llama model in eager mode")),
        ascend=_REFUSED,
    ),
    _pairs(
        LORA,
        QUANTIZED,
        cpu=served(_CPU_PAIRS, why=_SCHEMES),
        cuda=(_OLDER, served(_H200_LORA_FP8, why="--quantization fp8, a small Llama model in eager mode")),
        ascend=_REFUSED,
    ),
    row(
        "LoRA, speculation and quantized weights, all three",
        cpu=untried("each pair was measured"),
        cuda=_REFUSED,
        ascend=_REFUSED,
        asked=_all_three,
    ),
    _pairs(LORA, OTHER_SCHEMES, cpu=served(_CPU_PAIRS, why=_SCHEMES), cuda=_REFUSED, ascend=_REFUSED),
    row(
        "LoRA with experts: Qwen3-MoE",
        cpu=_NO_EXPERTS,
        cuda=(
            _OLDER,
            served(
                *_H200_EXPERT_LORA,
                why="two layers of Qwen3-30B-A3B with 32 experts, in eager mode and compiled; adapters of ranks 8 to "
                "64 of attention, experts, embeddings and the head",
            ),
        ),
        ascend=_REFUSED,
        asked=_adapted_experts,
    ),
    row(
        "LoRA with experts of other models than Qwen3-MoE, or beside speculation or quantized weights",
        cpu=_NO_EXPERTS,
        cuda=_REFUSED,
        ascend=_REFUSED,
        asked=_other_adapted_experts,
    ),
    _pairs(
        SPECULATION,
        QUANTIZED,
        cpu=served(_CPU_PAIRS, why=f"n-grams; {_SCHEMES}"),
        cuda=(_OLDER, served(_H200_PAIRS, why="n-grams, --quantization fp8, a small Llama model in eager mode")),
        ascend=_REFUSED,
    ),
    _pairs(
        SPECULATION,
        OTHER_SCHEMES,
        cpu=served(_CPU_PAIRS, why=f"n-grams; {_SCHEMES}"),
        cuda=_REFUSED,
        ascend=_REFUSED,
    ),
    row(
        "two of LoRA, speculation and quantized weights, in an engine that vLLM compiles",
        cpu=untried("measured in eager mode"),
        cuda=(
            _OLDER,
            served(
                "invariance-2026-11-30-h200-speculation-vllm-0.33.0.json",
                "invariance-2026-11-30-h200-pairs-vllm-0.33.0.json",
                why="n-grams, --quantization fp8, a small Llama model",
            ),
        ),
        ascend=_REFUSED,
        asked=_two_compiled,
    ),
    row(
        "speculative decoding with MLA, in an engine that vLLM compiles",
        cpu=untried("measured in eager mode"),
        cuda=_REFUSED,
        ascend=_REFUSED,
        asked=_latent_drafts_compiled,
    ),
    _pairs(
        SPECULATION,
        MLA,
        cpu=served(_CPU_LATENT, why="n-grams; a tiny DeepSeek V3 in eager mode"),
        cuda=_REFUSED,
        ascend=_REFUSED,
    ),
    _pairs(
        SPECULATION,
        RECURRENT,
        cpu=refused(
            "vLLM copies the states of drafts by a Triton kernel (precopy_mamba_align_fused_kernel), which its CPU "
            "build lacks: a tiny Qwen3-Next stopped at its first step",
            todo="Use one of them",
        ),
        cuda=_REFUSED,
        ascend=_REFUSED,
    ),
    _never(_DRAFTS, QUANTIZED, MLA),
    _never(POOLING, QUANTIZED),
    _never(
        LORA,
        *("pipeline parallelism", "tensor parallelism", "data parallelism", "KV transfer or offload"),
        *(POOLING, _TEXT, "encoder-decoder models", MLA, RECURRENT, _EMBEDS),
        *_OF_LORA,
    ),
    _never(
        SPECULATION,
        *(POOLING, "several ranks", "KV transfer or offload"),
        *("a reasoning parser", "custom logits processors", "watermarks"),
    ),
    _never(POOLING, MLA, RECURRENT, "ranks that share a model"),
    _never(EIGHTH, _OTHERS, LORA, SPECULATION, POOLING, RECURRENT, "multimodal models"),
    _pairs(
        EIGHTH,
        _CHANNELS,
        cpu=_REFUSED,
        cuda=(
            served(
                "invariance-2026-11-30-h200-eighths-vllm-0.33.0.json",
                "invariance-2026-11-30-h200-eighths-vllm-0.33.0-2.json",
                "invariance-2026-11-30-h200-kv-heads-vllm-0.33.0-3.json",
                why="two layers of Qwen3-8B's sizes, in eager mode; the checkpoint asks for the cache; with scales "
                "of each key head compiled, too",
                releases=">=0.33",
            ),
            _REFUSED,
        ),
        ascend=_REFUSED,
    ),
    _pairs(
        EIGHTH,
        _BLOCKS,
        cpu=_REFUSED,
        cuda=(
            served(
                "invariance-2026-11-30-h200-eighths-vllm-0.33.0.json",
                why="two layers of Qwen3-8B's sizes, in eager mode; scales of 1",
                releases=">=0.33",
            ),
            _REFUSED,
        ),
        ascend=_REFUSED,
    ),
    _pairs(
        EIGHTH,
        _NVFP4,
        cpu=_REFUSED,
        cuda=(
            served(
                "invariance-2026-11-30-h200-nvfp4-rows-vllm-0.33.0.json",
                why="two layers of Qwen3-8B's sizes, in eager mode; ModelOpt's checkpoint asks for the cache",
                releases=">=0.33",
            ),
            _REFUSED,
        ),
        ascend=_REFUSED,
    ),
    row(
        f"an FP8 KV cache with {_BLOCKS}, or {_NVFP4}, compiled",
        cpu=_REFUSED,
        cuda=(
            served(
                "invariance-2026-11-30-h200-schemes-vllm-0.33.0-2.json",
                why="two layers of Qwen3-8B's sizes",
                releases=">=0.33",
            ),
            _REFUSED,
        ),
        ascend=_REFUSED,
        asked=_eighth_compiled,
    ),
    _pairs(
        EIGHTH,
        _LATENT_BLOCKS,
        cpu=_REFUSED,
        cuda=(
            served(
                "invariance-2026-11-29-h200-mla-shapes-vllm-0.33.0-2.json",
                why="four layers of DeepSeek-V3's sizes, compiled; Triton-MLA, in two forms",
                releases=">=0.33",
            ),
            _REFUSED,
        ),
        ascend=_REFUSED,
    ),
    _pairs(
        EIGHTH,
        MLA,
        cpu=_REFUSED,
        cuda=(
            served(
                "invariance-2026-11-29-h200-mla-eighths-vllm-0.33.0.json",
                "invariance-2026-11-29-h200-mla-eighths-compiled-vllm-0.33.0.json",
                why="four layers of DeepSeek-V2-Lite's sizes, compiled and in eager mode; Triton-MLA, in two forms",
                releases=">=0.33",
            ),
            _REFUSED,
        ),
        ascend=_REFUSED,
    ),
    _pairs(
        EIGHTH,
        TENSOR,
        cpu=_REFUSED,
        cuda=(rank_cells.CUDA[EIGHTH, TENSOR], _REFUSED),
        ascend=_REFUSED,
    ),
    row(
        "an FP8 KV cache with more than two tensor-parallel ranks, with stages, or with several ranks of models with "
        "MLA, experts or quantized weights",
        cpu=_REFUSED,
        cuda=(untried(releases=">=0.33"), _REFUSED),
        ascend=_REFUSED,
        asked=_eighth_ranks,
    ),
    *(
        _of_ranks(first, other, cuda=rank_cells.CUDA[first, other], ascend=untried())
        for first, other in (
            (TENSOR, STAGES),
            (TENSOR, "data parallelism"),
            (STAGES, "data parallelism"),
        )
    ),
    row(
        "two kinds of tensor, pipeline and data parallelism, of which one has more than two ranks",
        cpu=untried("measured with two by two ranks, and BI_PATCH_TP_INVARIANT with four by two"),
        cuda=untried("measured with two by two ranks"),
        ascend=untried(),
        asked=_more_than_two,
    ),
    _of_ranks(EXPERTS, TENSOR, cuda=rank_cells.EXPERTS_ON_CUDA, ascend=untried()),
    row(
        "experts with tensor parallelism in other sizes, models or modes than above",
        cpu=untried("measured with a tiny Qwen3-MoE"),
        cuda=untried(),
        ascend=untried(),
        asked=_other_experts,
    ),
    _of_ranks(MLA, TENSOR, cuda=rank_cells.MLA_ON_CUDA, ascend=_NO_SEAM),
    row(
        "MLA with tensor parallelism in other sizes, models or modes than above, or in one form (BI_PATCH_MLA=one)",
        cpu=untried("measured with tiny DeepSeek V2 and V3 over two ranks"),
        cuda=untried(),
        ascend=_NO_SEAM,
        asked=_other_latent,
    ),
    _of_ranks(MLA, STAGES, cuda=rank_cells.CUDA[MLA, STAGES], ascend=_NO_SEAM),
    _of_ranks(
        RECURRENT,
        TENSOR,
        cuda=rank_cells.CUDA[RECURRENT, TENSOR],
        ascend=_NO_SEAM,
        details="On CPU, each rank gathers the rows of a norm that ranks share.",
    ),
    row(
        "recurrent layers with tensor parallelism over more than two ranks",
        cpu=untried("measured with two ranks"),
        cuda=untried("measured with two ranks"),
        ascend=_NO_SEAM,
        asked=_other_recurrent,
    ),
    _of_ranks(
        RECURRENT,
        STAGES,
        cuda=rank_cells.CUDA[RECURRENT, STAGES],
        ascend=_NO_SEAM,
        details="vLLM 0.32 and 0.33 stop at the start if a stage lacks a kind of layer that another has ('Workers "
        "disagree on supported KV cache layouts'), and with Granite 4-H, whose stages run each other's layers.",
    ),
    row(
        "recurrent layers over ranks in other models than Qwen3-Next and Falcon-H1, or in stages in other models than "
        "Qwen3-Next or compiled",
        cpu=rank_cells.RECURRENT_ON_CPU,
        cuda=untried(),
        ascend=_NO_SEAM,
        asked=_other_recurrent_model,
    ),
    *SHARED,
    _of_ranks(_INT8, STAGES, cuda=untried(), ascend=_NO_SEAM),
    _pairs(_NO_INT8, STAGES, cpu=untried(), cuda=untried(), ascend=_NO_SEAM),
)
