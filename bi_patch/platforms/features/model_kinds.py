"""Kinds of models: pooling, encoders, several modalities, and latent attention (MLA)."""

from __future__ import annotations

from typing import Any

from bi_patch.platforms.features.model import Feature, refused, row, served, untried
from bi_patch.platforms.features.pairs import one_form
from bi_patch.platforms.features.questions import NO_SEAM, everywhere, of_model, takes_images, when_compiled

_CPU_MLA_MORE = "invariance-2026-11-28-cpu-amx-mla-more-vllm-0.32.0.json"
_CPU_MLA = "invariance-2026-11-28-cpu-amx-mla-vllm-0.32.0.json"
_H200_MLA = "invariance-2026-11-28-h200-mla-vllm-0.33.0.json"
_H200_MLA_TWO = "invariance-2026-11-29-h200-mla-two-vllm-0.33.0.json"
_H200_MLA_MORE = "invariance-2026-11-29-h200-mla-more-vllm-0.33.0.json"
_H200_MLA_GRAPHS = "invariance-2026-11-29-h200-mla-two-compiled-vllm-0.33.0.json"
_H200_MLA_ONE = "invariance-2026-11-29-h200-mla-eighths-compiled-vllm-0.33.0.json"
_H200_MLA_SHAPES = "invariance-2026-11-29-h200-mla-shapes-vllm-0.33.0.json"
_H200_MLA_SIZES = "invariance-2026-11-29-h200-mla-shapes-vllm-0.33.0-2.json"
_CPU_TEXT = "invariance-2026-11-28-cpu-text-vllm-0.32.0.json"
_CPU_POOLING = (
    "invariance-2026-11-28-cpu-amx-pooling-vllm-0.32.0.json",
    "invariance-2026-11-28-cpu-amx-pooling-2-vllm-0.32.0.json",
)
_H200_POOLING = "invariance-2026-11-28-h200-pooling-vllm-0.33.0.json"
_H200_ENCODERS = "invariance-2026-11-29-h200-pooling-vllm-0.33.0.json"
_H200_ENCODERS_COMPILED = "invariance-2026-11-29-h200-pooling-vllm-0.33.0-2.json"
_H200_SCORES_1 = "invariance-2026-11-30-h200-pooling-vllm-0.33.0.json"
_H200_SCORES_2 = "invariance-2026-11-30-h200-pooling-vllm-0.33.0-2.json"
_H200_KINDS_4 = "invariance-2026-11-30-h200-images-vllm-0.33.0-4.json"
_H200_KINDS_3 = "invariance-2026-11-30-h200-images-vllm-0.33.0-3.json"


def _scores(model: Any) -> bool:
    """Whether a decoder pools into the numbers of a head: a classifier, a reranker or a reward model."""
    if model.runner_type != "pooling" or getattr(model, "attn_type", "") == "encoder_only":
        return False
    heads = ("Classification", "RewardModel")
    return getattr(model, "convert_type", "") == "classify" or any(n.endswith(heads) for n in model.architectures)


def _embeddings(model: Any) -> bool:
    """Whether requests may bring the embeddings of images, sound or video."""
    return bool(getattr(getattr(model, "multimodal_config", None), "enable_mm_embeds", False))


MODEL_KINDS: tuple[Feature, ...] = (
    row(
        "pooling: embeddings",
        short="embeddings",
        cpu=served(_CPU_POOLING[1], why="tiny models of each kind"),
        cuda=(
            refused("nobody tried it with these releases", todo="Use vLLM 0.33", releases="<0.33"),
            served(_H200_POOLING, why="an embedding model in eager mode; the cost is not measured"),
        ),
        ascend=refused(NO_SEAM, todo="Use a generating model"),
        asked=of_model(lambda m: m.runner_type == "pooling", "pooling models"),
        details="Embeddings of any length. Refused by name: poolers outside of a list, late interaction, late "
        "chunking, and new weights for such an engine.",
    ),
    row(
        "pooling: classifiers, rerankers and rewards made from decoders",
        cpu=served(_CPU_POOLING[1], why="tiny models of each kind"),
        cuda=(
            refused("nobody tried it with these releases", todo="Use vLLM 0.33", releases="<0.33"),
            served(
                _H200_SCORES_1,
                _H200_SCORES_2,
                why="the shape of Qwen3-Reranker-0.6B, and four layers of Qwen2's sizes, random weights, in eager mode",
            ),
        ),
        ascend=refused(NO_SEAM, todo="Use a generating model"),
        asked=of_model(_scores, "classifiers, rerankers and rewards"),
        details="One number or more for each prompt or token, from a head that the model has. Heads of encoders "
        "have a row of their own.",
    ),
    row(
        "pooling models, compiled",
        cpu=untried("one of the kinds was compared, with an engine in eager mode"),
        cuda=served(_H200_ENCODERS_COMPILED, why="shapes of BERT large and ModernBERT base"),
        ascend=refused(NO_SEAM, todo="Use a generating model"),
        asked=when_compiled(of_model(lambda m: m.runner_type == "pooling", "compiled pooling models")),
    ),
    row(
        "encoders with attention in both directions (BERT, XLM-R, ModernBERT)",
        cpu=served(*_CPU_POOLING, why="tiny models of each kind, in bf16"),
        cuda=(
            refused("nobody tried it with these releases", todo="Use vLLM 0.33", releases="<0.33"),
            served(_H200_ENCODERS, why="shapes of BERT large, XLM-R base and ModernBERT base, in bf16"),
        ),
        ascend=refused(NO_SEAM, todo="Use a model with causal attention"),
        asked=of_model(lambda m: getattr(m, "attn_type", "") == "encoder_only", "attention in both directions"),
    ),
    row(
        "embeddings of images, sound or video (--enable-mm-embeds)",
        **everywhere("such a request brings rows that no patch point computed", "Leave --enable-mm-embeds out"),
        asked=of_model(_embeddings, "multimodal embeddings"),
    ),
    row(
        "multimodal models as text models (--language-model-only)",
        cpu=served(_CPU_TEXT),
        cuda=served(
            _H200_KINDS_4,
            _H200_KINDS_3,
            why="few layers of Gemma-3-4B in eager mode, of Qwen3-VL-2B compiled, random weights",
        ),
        ascend=refused(NO_SEAM, todo="Use a text model"),
        asked=of_model(lambda m: m.is_multimodal_model and not takes_images(m), "multimodal models"),
    ),
    row(
        "encoder-decoder models",
        **everywhere(NO_SEAM)
        | {
            "cpu": refused(
                "the bundled CPU attention has none over an encoder's keys: a tiny Whisper stopped when vLLM made it",
                todo="Use a decoder",
            )
        },
        asked=of_model(lambda m: m.is_encoder_decoder, "encoder-decoder models"),
    ),
    row(
        "diffusion language models",
        **everywhere("their code is compiled separately for a batch of one", "Use another model"),
        asked=of_model(lambda m: getattr(m, "is_diffusion", False), "diffusion language models"),
    ),
    row(
        "MLA (multi-head latent attention)",
        cpu=served(_CPU_MLA, _CPU_MLA_MORE, why="tiny shapes"),
        cuda=(
            refused("its two forms of attention give different bits", releases="<0.33"),
            served(
                _H200_MLA,
                _H200_MLA_TWO,
                _H200_MLA_GRAPHS,
                _H200_MLA_MORE,
                _H200_MLA_SHAPES,
                why="DeepSeek-V2-Lite's, GLM-4.7-Flash's and Kimi K2's sizes; with BI_PATCH_MLA=one four layers, and "
                "slow with long contexts",
            ),
        ),
        ascend=refused("its two forms of attention give different bits"),
        asked=of_model(lambda m: m.use_mla, "MLA"),
        details="On CUDA, prompts and generated tokens have forms of their own, chosen by position, and decode differs "
        "from prefill. `BI_PATCH_MLA=one`, and the CPU, compute both in one form, the absorbed one.",
    ),
    row(
        "MLA, compiled",
        cpu=served(_CPU_MLA_MORE),
        cuda=(
            refused("its two forms of attention give different bits", releases="<0.33"),
            served(
                _H200_MLA_GRAPHS,
                _H200_MLA_MORE,
                _H200_MLA_SHAPES,
                _H200_MLA_SIZES,
                why="in CUDA graphs: DeepSeek-V2-Lite's, GLM-4.7-Flash's and Kimi K2's sizes",
            ),
        ),
        ascend=refused("its two forms of attention give different bits"),
        asked=when_compiled(of_model(lambda m: m.use_mla, "compiled MLA")),
    ),
    row(
        "MLA in one form, compiled (BI_PATCH_MLA=one)",
        cpu=served(_CPU_MLA_MORE, why="the CPU has no other form"),
        cuda=(
            refused("its two forms of attention give different bits", releases="<0.33"),
            served(
                _H200_MLA_SHAPES,
                _H200_MLA_ONE,
                why="four layers of DeepSeek-V2-Lite's sizes; slow with long contexts",
            ),
        ),
        ascend=refused("its two forms of attention give different bits"),
        asked=when_compiled(of_model(lambda m: one_form() and m.use_mla, "compiled MLA in one form")),
    ),
    row(
        "sparse MLA: an indexer that chooses tokens (DeepSeek V3.2, GLM-5)",
        **everywhere("nothing fixes the order of the tokens that the indexer chooses, and which of two tied ones"),
        asked=of_model(lambda m: m.use_mla and hasattr(getattr(m, "hf_text_config", None), "index_topk"), "sparse MLA"),
    ),
)
