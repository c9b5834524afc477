"""Speculative decoding: kinds of drafts, and the rule that accepts them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bi_patch.platforms.features import configs
from bi_patch.platforms.features.model import Feature, refused, row, served, untried
from bi_patch.platforms.features.pairs import recurrent
from bi_patch.platforms.features.questions import everywhere, joined, when_compiled

_CPU_SUFFIXES = "invariance-2026-11-29-cpu-amx-speculation-vllm-0.32.0-2.json"
_CPU_HEADS = "invariance-2026-11-29-cpu-amx-speculation-vllm-0.32.0-3.json"
_CPU_DRAFTS = "invariance-2026-11-29-cpu-amx-speculation-vllm-0.32.0.json"
_H200_DRAFTS = "invariance-2026-11-29-h200-speculation-vllm-0.33.0.json"
_CPU_SPECULATION = "invariance-2026-11-28-cpu-amx-speculation-vllm-0.32.0.json"
_H200_SPECULATION = "invariance-2026-11-28-h200-speculation-vllm-0.33.0.json"
_VERIFIED = "a step that checks drafts uses other kernels or draws than a single step"
_OTHER_DRAFTS = "Use the method ngram, draft_model, eagle or eagle3, or turn it off"


def _speculative(check: Callable[[Any], object], words: str) -> Callable[[Any], str]:
    """`words` if `check` is true for the engine's SpeculativeConfig, else ""."""
    return lambda config: words if config.speculative_config is not None and check(config.speculative_config) else ""


def _method(speculative: Any) -> str:
    return getattr(speculative, "method", None) or ""


_DRAFTING = ("draft_model", "eagle", "eagle3")  # methods whose drafts a model or a head of its own makes
OWN_HEADS = frozenset({"MiMoForCausalLM"})  # models whose own heads (MTP) an engine was compared with
_MADE_OF = frozenset({"MiMoMTPModel"})  # vLLM's names of these heads
# Fields of a SpeculativeConfig whose values change neither a row of the model nor what is accepted. `model` and its
# like are for `_beside_drafts`, `rejection_sample_method` and its like for `_other_rule`.
_FREE = {
    *("method", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min", "max_model_len", "enforce_eager"),
    *("model", "revision", "quantization", "target_model_config", "target_parallel_config"),
    *("draft_model_config", "draft_parallel_config", "draft_load_config"),
    *("tensor_parallel_size", "draft_tensor_parallel_size"),
    *("rejection_sample_method", "synthetic_acceptance_rates", "synthetic_acceptance_length"),
    *("fly_window_size", "fly_entropy_threshold", "fly_entropy_top_k"),
    *("suffix_decoding_max_tree_depth", "suffix_decoding_max_cached_requests"),
    *("suffix_decoding_max_spec_factor", "suffix_decoding_min_token_prob"),
}


def _beside_drafts(config: Any) -> str:
    """Options of speculative decoding, and kinds of draft models, that nobody has examined."""
    speculative = config.speculative_config
    if speculative is None:
        return ""
    found = {f"the option {name}": True for name in configs.changed(speculative, _FREE)}
    draft = getattr(speculative, "draft_model_config", None)
    if _method(speculative) in (*_DRAFTING, "mtp") and draft is not None:
        kinds = {
            "MLA": bool(getattr(draft, "use_mla", False)),
            "recurrent layers": recurrent(draft),
            "quantized weights": getattr(draft, "quantization", None) is not None,
            "images, sound or video": bool(getattr(draft, "is_multimodal_model", False)),
            "experts": bool(getattr(draft, "is_moe", False)),
        }
        found |= {f"a draft model with {kind}": there for kind, there in kinds.items()}
    return joined("speculative decoding with ", found)


def _speculating_on_v1(config: Any) -> str:
    first = config.speculative_config is not None and not getattr(config, "use_v2_model_runner", False)
    return "speculative decoding on model runner V1" if first else ""


def _own_heads(speculative: Any) -> bool:
    """Whether drafts come from heads of the model itself (MTP), as bi_patch serves them."""
    draft, target = (getattr(speculative, f"{whose}_model_config", None) for whose in ("draft", "target"))
    named = set(getattr(getattr(draft, "hf_config", None), "architectures", None) or ())
    owner = set(getattr(target, "architectures", None) or ())
    return _method(speculative) == "mtp" and set() != named <= _MADE_OF and set() != owner <= OWN_HEADS


def _other_rule(speculative: Any) -> bool:
    return getattr(speculative, "rejection_sample_method", "standard") != "standard"


DRAFTS: tuple[Feature, ...] = (
    row(
        "speculative decoding with n-grams of the request (method ngram)",
        short="speculation (n-grams)",
        cpu=served(_CPU_SPECULATION),
        cuda=(refused(_VERIFIED, releases="<0.33"), served(_H200_SPECULATION, why="on model runner V2")),
        ascend=refused(_VERIFIED),
        asked=_speculative(lambda s: _method(s) == "ngram", "speculative decoding with n-grams"),
        details="On equals off, bit for bit: tokens, logprobs and the draws of seeded requests.",
    ),
    row(
        "speculative decoding on model runner V1 (VLLM_USE_V2_MODEL_RUNNER=0)",
        cpu=served(_CPU_SPECULATION, why="the CPU build has no other runner"),
        cuda=refused("nobody has compared it with an engine without speculation", todo="Use model runner V2"),
        ascend=refused(_VERIFIED),
        asked=_speculating_on_v1,
    ),
    row(
        "speculative decoding with a draft model or heads (methods draft_model, eagle, eagle3)",
        short="speculation (draft model, EAGLE heads)",
        cpu=served(_CPU_DRAFTS, why="for a tiny Llama model, in eager mode"),
        cuda=(
            refused(_VERIFIED, releases="<0.33"),
            served(_H200_DRAFTS, why="on model runner V2, for a small Llama model, whose own weights make its drafts"),
        ),
        ascend=refused(_VERIFIED),
        asked=_speculative(lambda s: _method(s) in _DRAFTING, "speculative decoding with a draft model or heads"),
        details="On equals off, as with n-grams: whatever the drafts are, the model's own rows decide.",
    ),
    row(
        "speculative decoding with suffixes of earlier answers (method suffix, which needs arctic-inference)",
        cpu=served(_CPU_SUFFIXES, why="a tiny Qwen3 model, in eager mode, arctic-inference 0.1.1"),
        cuda=refused("vLLM has it on model runner V1 only, which is refused with speculation", todo=_OTHER_DRAFTS),
        ascend=refused(_VERIFIED),
        asked=_speculative(lambda s: _method(s) == "suffix", "speculative decoding with suffixes"),
        details="Earlier answers of other requests choose the drafts, and the model's own rows decide. The library "
        "brings a plugin that changes vLLM, which is refused: list the other plugins in VLLM_PLUGINS.",
    ),
    row(
        "speculative decoding with a model's own heads (method mtp) of MiMo",
        cpu=served(_CPU_HEADS, why="a tiny model with one layer, in eager mode"),
        cuda=refused("nobody has compared it with an engine without speculation", todo=_OTHER_DRAFTS),
        ascend=refused(_VERIFIED, todo=_OTHER_DRAFTS),
        asked=_speculative(_own_heads, "speculative decoding with a model's own heads"),
        details="On equals off, as with n-grams.",
    ),
    row(
        "speculative decoding with a draft model, heads or suffixes, compiled",
        cpu=untried("measured in eager mode"),
        cuda=(refused(_VERIFIED, releases="<0.33"), served(_H200_DRAFTS, why="for a small Llama model")),
        ascend=refused(_VERIFIED),
        asked=when_compiled(
            _speculative(
                lambda s: _method(s) in (*_DRAFTING, "suffix", "mtp"), "drafts of a model, heads or suffixes, compiled"
            )
        ),
    ),
    row(
        "speculative decoding with other drafts: ngram_gpu, MTP of other models, Medusa, DFlash, ...",
        **everywhere(_VERIFIED, _OTHER_DRAFTS)
        | {
            "cpu": refused(
                "nobody has compared them: the head of a tiny DeepSeek V3 has a router without a certificate, and "
                "vLLM's CPU build lacks a kernel for the drafts of Qwen3-Next",
                todo=_OTHER_DRAFTS,
            )
        },
        asked=_speculative(
            lambda s: _method(s) not in ("ngram", "suffix", *_DRAFTING) and not _own_heads(s),
            "speculative decoding with other drafts than n-grams, suffixes, a draft model and EAGLE heads",
        ),
    ),
    row(
        "speculative decoding with further options (e.g. parallel_drafting, draft_sample_method probabilistic, numbers "
        "of drafts by batch size, adaptive verification), or with a quantized, multimodal, MoE, MLA or recurrent draft "
        "model",
        **everywhere("nobody has compared it with an engine without speculation", "Leave it out"),
        asked=_beside_drafts,
    ),
    row(
        "speculative decoding that accepts drafts by another rule (rejection_sample_method synthetic, fly, block)",
        **everywhere("it accepts drafts that the model did not draw", "Leave rejection_sample_method out"),
        asked=_speculative(_other_rule, "another rule of acceptance"),
    ),
)
