"""Features that a user turns on: parallelism, adapters, speculation, quantization, kinds of models and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bi_patch.platforms import schemes
from bi_patch.platforms.features import configs, parallel, variables
from bi_patch.platforms.features.model import REFUSED, SERVED, UNTRIED, Feature, absent, refused, row, served, untried
from bi_patch.platforms.features.pairs import one_form, recurrent
from bi_patch.platforms.features.ranks import compiled, norms, shown, size, whole_experts

_CPU_MLA_MORE = "invariance-2026-11-28-cpu-amx-mla-more-vllm-0.32.0.json"
_CPU_MLA = "invariance-2026-11-28-cpu-amx-mla-vllm-0.32.0.json"
_H200_MLA = "invariance-2026-11-28-h200-mla-vllm-0.33.0.json"
_H200_MLA_TWO = "invariance-2026-11-29-h200-mla-two-vllm-0.33.0.json"
_H200_MLA_MORE = "invariance-2026-11-29-h200-mla-more-vllm-0.33.0.json"
_H200_MLA_GRAPHS = "invariance-2026-11-29-h200-mla-two-compiled-vllm-0.33.0.json"
_H200_MLA_ONE = "invariance-2026-11-29-h200-mla-eighths-compiled-vllm-0.33.0.json"
_H200_MLA_SHAPES = "invariance-2026-11-29-h200-mla-shapes-vllm-0.33.0.json"
_H200_MLA_SIZES = "invariance-2026-11-29-h200-mla-shapes-vllm-0.33.0-2.json"
_CPU = "invariance-2026-11-22-cpu-vllm-0.32.0.json"
_FAMILIES = "invariance-2026-11-28-cpu-families-vllm-0.32.0.json"
_CPU_RANKS = "invariance-2026-11-28-cpu-ranks-vllm-0.32.0.json"
_CPU_TENSOR = "invariance-2026-11-29-cpu-amx-ranks-vllm-0.32.0.json"
_CPU_SIZES = "invariance-2026-11-29-cpu-amx-ranks-vllm-0.32.0-2.json"
_CPU_LAUNCHER = "invariance-2026-11-29-cpu-amx-launcher-vllm-0.32.0.json"
_H200_RANKS = "invariance-2026-11-29-h200-ranks-vllm-0.33.0.json"
_H200_SHARED = "invariance-2026-11-29-h200-ranks-vllm-0.33.0-3.json"
_H200_RANKS_MORE = "invariance-2026-11-30-h200-ranks-vllm-0.33.0.json"
_H200_DATA = "invariance-2026-11-30-h200-ranks-vllm-0.33.0-2.json"
_H200_MORE_RANKS = "invariance-2026-11-30-h200-ranks-vllm-0.33.0-5.json"
_H200_EXECUTORS = "invariance-2026-11-30-h200-ranks-vllm-0.33.0-3.json"
_H200_PARTS = "invariance-2026-11-30-h200-ranks-vllm-0.33.0-4.json"
_CPU_RANKS_UPDATED = "invariance-2026-11-29-cpu-amx-ranks-vllm-0.32.0-3.json"
_H200_WEIGHTS = "invariance-2026-11-29-h200-weights-vllm-0.33.0.json"
_H200_WEIGHTS_GRAPHS = "invariance-2026-11-29-h200-weights-vllm-0.33.0-2.json"
_H200_WEIGHTS_OLDER = "invariance-2026-11-29-h200-weights-vllm-0.26.0.json"
_H200_WEIGHTS_OLDER_GRAPHS = "invariance-2026-11-30-h200-weights-vllm-0.26.0.json"
_CPU_WEIGHTS = "invariance-2026-11-28-cpu-weights-vllm-0.32.0.json"
_CPU_WEIGHTS_MORE = "invariance-2026-11-29-cpu-amx-weights-vllm-0.32.0.json"
_CPU_PARITY_EXPERTS = "parity-2026-11-29-cpu-amx-experts-vllm-0.32.0.json"
_CPU_PARITY_RANKS = "parity-2026-11-29-cpu-amx-ranks-vllm-0.32.0.json"
_CPU_PARITY_TRL = "parity-2026-11-29-cpu-amx-trl-vllm-0.32.0.json"
_CPU_PARITY_LORA = "parity-2026-11-29-cpu-amx-lora-vllm-0.32.0.json"
_CPU_PARITY_FAMILIES = "parity-2026-11-29-cpu-amx-families-vllm-0.32.0.json"
_CPU_PARITY = "parity-2026-11-28-cpu-vllm-0.32.0.json"
_H200_PARITY = "parity-2026-11-28-h200-vllm-0.33.0.json"
_H200_PARITY_SHAPES = "parity-2026-11-29-h200-trainer-vllm-0.33.0.json"
_H200_PARITY_EXPERTS = "parity-2026-11-29-h200-experts-vllm-0.33.0.json"
_H200_PARITY_LORA = "parity-2026-11-29-h200-lora-vllm-0.33.0.json"
_H200_PARITY_FSDP = "parity-2026-11-29-h200-fsdp-vllm-0.33.0.json"
_H200_PARITY_RANKS = "parity-2026-11-29-h200-ranks-vllm-0.33.0.json"
_H200_PARITY_GRPO = "parity-2026-11-29-h200-grpo-vllm-0.33.0-4.json"
_H200_PARITY_EXPERTS_LINES = "parity-2026-11-29-h200-experts-vllm-0.33.0-2.json"
_H200_PARITY_LORA_COMPILED = "parity-2026-11-29-h200-lora-vllm-0.33.0-2.json"
_H200_PARITY_FAMILIES = "parity-2026-11-29-h200-families-vllm-0.33.0.json"
_H200_PARITY_WINDOW = "parity-2026-11-29-h200-families-vllm-0.33.0-2.json"
_H200_PARITY_QWEN2_5 = "parity-2026-11-29-h200-families-vllm-0.33.0-3.json"
_H200_PARITY_GRADIENTS_2B = "parity-2026-11-29-h200-gradients-vllm-0.33.0-3.json"
_H200_PARITY_GRADIENTS_1B = "parity-2026-11-29-h200-gradients-vllm-0.33.0-2.json"
_H200_PARITY_GRADIENTS = "parity-2026-11-29-h200-gradients-vllm-0.33.0.json"
_CPU_LORA = "invariance-2026-11-28-cpu-amx-lora-vllm-0.32.0.json"
_H200_LORA = "invariance-2026-11-29-h200-lora-vllm-0.33.0.json"
_H200_LORA_COMPILED = "invariance-2026-11-29-h200-lora-vllm-0.33.0-2.json"
_CPU_SUFFIXES = "invariance-2026-11-29-cpu-amx-speculation-vllm-0.32.0-2.json"
_CPU_QUICK = "invariance-2026-11-29-cpu-amx-quick-vllm-0.32.0.json"
_CPU_REQUESTS = "invariance-2026-11-29-cpu-amx-requests-vllm-0.32.0.json"
_CPU_HEADS = "invariance-2026-11-29-cpu-amx-speculation-vllm-0.32.0-3.json"
_CPU_DRAFTS = "invariance-2026-11-29-cpu-amx-speculation-vllm-0.32.0.json"
_H200_DRAFTS = "invariance-2026-11-29-h200-speculation-vllm-0.33.0.json"
_CPU_TEXT = "invariance-2026-11-28-cpu-text-vllm-0.32.0.json"
_H100 = "invariance-2026-11-22-h100-vllm-0.33.0.json"
_H100_AXES = "invariance-2026-11-28-h100-vllm-0.33.0.json"
_H100_NEWEST = "invariance-2026-11-22-h100-seams-vllm-0.33.0.json"
_WINDOW = "invariance-2026-11-22-h100-seams-vllm-0.26.0.json"
_WINDOW_H200 = "invariance-2026-11-28-h200-vllm-0.26.0.json"
_CPU_SPECULATION = "invariance-2026-11-28-cpu-amx-speculation-vllm-0.32.0.json"
_H200_SPECULATION = "invariance-2026-11-28-h200-speculation-vllm-0.33.0.json"
_LAYERS = "invariance-2026-11-28-h100-families-vllm-0.33.0.json"
_ALIBI = "invariance-2026-11-28-h100-alibi-vllm-0.33.0.json"
_CPU_POOLING = (
    "invariance-2026-11-28-cpu-amx-pooling-vllm-0.32.0.json",
    "invariance-2026-11-28-cpu-amx-pooling-2-vllm-0.32.0.json",
)
_H200_POOLING = "invariance-2026-11-28-h200-pooling-vllm-0.33.0.json"
_H200_ENCODERS = "invariance-2026-11-29-h200-pooling-vllm-0.33.0.json"
_H200_ENCODERS_COMPILED = "invariance-2026-11-29-h200-pooling-vllm-0.33.0-2.json"
_H200 = "invariance-2026-11-22-h200-vllm-0.33.0.json"
_NO_NPU = "checked without a device; nothing has run on an NPU"
_NO_SEAM = "no patch point covers it yet"
_VERIFIED = "a step that checks drafts uses other kernels or draws than a single step"
_OTHER_DRAFTS = "Use the method ngram, draft_model, eagle or eagle3, or turn it off"
_OUTSIDE = "bi_patch has patch points for vLLM's own code only"
_VOUCH = "Name the code in BI_PATCH_ALLOW_CODE if you know that its results do not depend on the batch"

_CACHES = {"cpu": ("auto", "bfloat16", "float16", "float32"), "cuda": ("auto", "bfloat16", "float16")}


def _of_model(check: Callable[[Any], object], words: str) -> Callable[[Any], str]:
    """`words` if `check` is true for the engine's model, else ""."""
    return lambda config: words if config.model_config is not None and check(config.model_config) else ""


def _weights(dtype: str) -> Callable[[Any], str]:
    """The words for weights of a torch dtype's name."""
    return _of_model(lambda model: str(getattr(model, "dtype", "")) == f"torch.{dtype}", f"{dtype} weights")


def _of_parallel(name: str, words: str, above: int = 1) -> Callable[[Any], str]:
    """`words` if a size of the parallel configuration is above a number, else "". A switch counts as 1."""
    return lambda config: words if int(getattr(config.parallel_config, name, 0) or 0) > above else ""


def _given(name: str, words: str) -> Callable[[Any], str]:
    return lambda config: words if getattr(config, name, None) is not None else ""


def _plain_data_parallel(words: str) -> Callable[[Any], str]:
    """`words` for several data-parallel ranks of a model without experts: they are independent engines."""

    def asked(config: Any) -> str:
        return words if size(config, "data_parallel_size") > 1 and not _shares_a_step(config) else ""

    return asked


# Models whose experts ranks may share. Of the last, no run has compared bits yet.
_MOE_OF_RANKS = ("Qwen3MoeForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
_ALL_TO_ALL = "allgather_reducescatter"  # vLLM's default, whose sums over ranks have a patch point
_STAGES = ("pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size")
_MOST = 4  # ranks


def _beside_shared_experts(config: Any) -> dict[str, bool]:
    """What no patch point or run covers where several ranks share experts, and whether an engine has it."""
    held, model = config.parallel_config, config.model_config
    backend = getattr(held, "all2all_backend", _ALL_TO_ALL)
    return {
        f"the all-to-all {backend}": backend != _ALL_TO_ALL,
        "pipeline or context parallelism": any(size(config, name) > 1 for name in _STAGES),
        "quantized weights": getattr(model, "quantization", None) is not None,
        "MLA in one form": bool(getattr(model, "use_mla", False)) and one_form(),
        "recurrent layers": recurrent(model),
        "pooling": getattr(model, "runner_type", "generate") != "generate",
        "LoRA": getattr(config, "lora_config", None) is not None,
        f"more than {_MOST} ranks": _ranks_of(config) > _MOST,
        "several hosts": size(config, "nnodes") > 1,
        "another placement of experts": getattr(held, "expert_placement_strategy", "linear") != "linear",
        "a KV cache of another type": getattr(getattr(config, "cache_config", None), "cache_dtype", "auto") != "auto",
        "another model than Qwen3-MoE and DeepSeek": not _all_of(model, _MOE_OF_RANKS),
    }


def _ranks_of(config: Any) -> int:
    return size(config, "tensor_parallel_size") * size(config, "data_parallel_size")


def _all_of(model: Any, architectures: tuple[str, ...]) -> bool:
    """Whether a model has an architecture, and only some of these."""
    own = set(getattr(model, "architectures", None) or ())
    return bool(own) and own <= set(architectures)


def _judged(state: str, words: str, measured: bool, other: dict[str, bool]) -> str:
    """`words` for a configuration whose row is in a state: served if measured, and refused for what `other` names."""
    if any(other.values()):
        return _joined(f"{words} with ", other) if state == REFUSED else ""
    return words if state == (SERVED if measured else UNTRIED) else ""


def _expert_parallel(state: str, words: str) -> Callable[[Any], str]:
    """`words` for tensor-parallel ranks that hold whole experts. The rows of data parallelism judge its ranks."""

    def asked(config: Any) -> str:
        if not whole_experts(config) or _shares_a_step(config):
            return ""
        other = _beside_shared_experts(config) | {"data parallelism": size(config, "data_parallel_size") > 1}
        return _judged(state, words, _ranks_of(config) == 1 or shown(config), other)

    return asked


def _shares_a_step(config: Any) -> bool:
    """Whether an engine has data-parallel ranks of a model with experts: each step is one of all ranks."""
    return size(config, "data_parallel_size") > 1 and bool(getattr(config.model_config, "is_moe", True))


def _experts_of_data_ranks(state: str, words: str) -> Callable[[Any], str]:
    """`words` for data-parallel ranks of a model with experts."""

    def asked(config: Any) -> str:
        if not _shares_a_step(config):
            return ""
        return _judged(state, words, shown(config), _beside_shared_experts(config))

    return asked


_ONE_STAGE = (2, 4, 6, 8)  # ranks that vLLM's one-stage all-reduce serves


def _carried(config: Any) -> str:
    """NCCL carries the parts of more than two compiled ranks, as far as a configuration tells. Workers see the rest."""
    ranks = size(config, "tensor_parallel_size")
    off = ranks not in _ONE_STAGE or getattr(config.parallel_config, "disable_custom_all_reduce", False)
    found = ranks > 2 and off and compiled(config)
    return "more than two compiled ranks without vLLM's one-stage all-reduce" if found else ""


def _to_host(transfer: Any) -> bool:
    """Whether a KVTransferConfig keeps keys and values in memory of the engine's own process, and nowhere else."""
    extra = getattr(transfer, "kv_connector_extra_config", None) or {}
    return (
        getattr(transfer, "kv_connector", None) in ("OffloadingConnector", "SimpleCPUOffloadConnector")
        and getattr(transfer, "kv_connector_module_path", None) is None
        and extra.get("spec_name", "CPUOffloadingSpec") == "CPUOffloadingSpec"
        and extra.get("kv_offload_backend", "cpu") == "cpu"
        and not extra.get("disk_path")
    )


def _transfer(to_host: bool) -> Callable[[Any], str]:
    def asked(config: Any) -> str:
        transfer = config.kv_transfer_config
        if transfer is None or _to_host(transfer) != to_host:
            return ""
        return f"{'KV offload' if to_host else 'KV transfer'} ({getattr(transfer, 'kv_connector', None)})"

    return asked


_EIGHTH_CACHES = ("fp8", "fp8_e4m3")


def _quantized_cache(config: Any) -> str:
    kind = getattr(config.cache_config, "cache_dtype", "auto")
    return "" if kind in (*_CACHES["cpu"], *_EIGHTH_CACHES) else f"a {kind!r} KV cache"


def _eighth_cache(config: Any) -> str:
    kind = getattr(config.cache_config, "cache_dtype", "auto")
    if kind == "auto" and schemes.caches(config):
        return "the checkpoint's FP8 KV cache"
    return f"a {kind!r} KV cache" if kind in _EIGHTH_CACHES else ""


def _fp32_cache(config: Any) -> str:
    return "a 'float32' KV cache" if getattr(config.cache_config, "cache_dtype", "auto") == "float32" else ""


def _images(model: Any) -> bool:
    """Whether a model takes images, sound or video."""
    taken = getattr(model, "multimodal_config", None)
    return model.is_multimodal_model and not getattr(taken, "language_model_only", False)


def _scores(model: Any) -> bool:
    """Whether a decoder pools into the numbers of a head: a classifier, a reranker or a reward model."""
    if model.runner_type != "pooling" or getattr(model, "attn_type", "") == "encoder_only":
        return False
    heads = ("Classification", "RewardModel")
    return getattr(model, "convert_type", "") == "classify" or any(n.endswith(heads) for n in model.architectures)


def _embeddings(model: Any) -> bool:
    """Whether requests may bring the embeddings of images, sound or video."""
    return bool(getattr(getattr(model, "multimodal_config", None), "enable_mm_embeds", False))


def _speculative(check: Callable[[Any], object], words: str) -> Callable[[Any], str]:
    """`words` if `check` is true for the engine's SpeculativeConfig, else ""."""
    return lambda config: words if config.speculative_config is not None and check(config.speculative_config) else ""


def _method(speculative: Any) -> str:
    return getattr(speculative, "method", None) or ""


_DRAFTING = ("draft_model", "eagle", "eagle3")  # methods whose drafts a model or a head of its own makes
OWN_HEADS = frozenset({"MiMoForCausalLM"})  # models whose own heads (MTP) an engine was compared with
_MADE_OF = frozenset({"MiMoMTPModel"})  # vLLM's names of these heads
# Fields of a SpeculativeConfig whose values change neither a row of the model nor what is accepted. `model` and its
# like are for `_odd_drafts`, `rejection_sample_method` and its like for `_other_rule`.
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
    return _joined("speculative decoding with ", found)


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


def _joined(before: str, found: dict[str, Any], after: str = "") -> str:
    """The names in `found` whose value is true, between two texts; "" if there is none."""
    named = [name for name, there in found.items() if there]
    return f"{before}{', '.join(named)}{after}" if named else ""


def _compiled(asked: Callable[[Any], str]) -> Callable[[Any], str]:
    """The words of `asked` if vLLM compiles the engine's model, else ""."""
    return lambda config: asked(config) if compiled(config) else ""


def _embeds(model: Any) -> bool:
    return getattr(model, "enable_prompt_embeds", False)


def _norms_over_ranks(config: Any) -> str:
    return "norms over ranks" if norms(config) else ""


def _started_by(backend: str, words: str) -> Callable[[Any], str]:
    """`words` if this backend of vLLM, not the engine, starts the workers."""

    def asked(config: Any) -> str:
        held = config.parallel_config
        given = {getattr(held, "distributed_executor_backend", None), getattr(held, "data_parallel_backend", None)}
        return words if backend in given else ""

    return asked


def _data_ranks_of_ray(config: Any) -> str:
    started = getattr(config.parallel_config, "data_parallel_backend", None) == "ray"
    return "data-parallel ranks of Ray" if started and size(config, "data_parallel_size") > 1 else ""


def _unexamined(config: Any) -> str:
    return ", ".join(parallel.unknown(config.parallel_config))


def _other_options(config: Any) -> str:
    return ", ".join(configs.unknown(config))


def _offloaded(config: Any) -> str:
    """Weights that stay in the host's memory. vLLM before 0.26 keeps the option in its CacheConfig."""
    held = getattr(config, "offload_config", None)
    gigabytes = getattr(getattr(held, "uva", None) or config.cache_config, "cpu_offload_gb", 0)
    groups = getattr(getattr(held, "prefetch", None), "offload_group_size", 0)
    return "weights in the host's memory" if (gigabytes or 0) > 0 or (groups or 0) > 0 else ""


def _variables(config: Any) -> str:
    return ", ".join(variables.unknown())


def _switched(name: str, words: str) -> Callable[[Any], str]:
    return lambda config: words if variables.switched(name) else ""


def _images_from_rust(config: Any) -> str:
    """The Rust front end sends images under hashes that it made itself, which no patch point sees."""
    taken = config.model_config is not None and _images(config.model_config)
    return "images from the Rust front end" if taken and variables.switched(_RUST) else ""


_RUST = "VLLM_USE_RUST_FRONTEND"


def _everywhere(why: str, todo: str = "") -> dict:
    cell = refused(why, todo=todo)
    return {"cpu": cell, "cuda": cell, "ascend": cell}


_STEP = "ranks share a step, and nobody has compared an engine's bits"
_NO_EXCHANGE = "vLLM's CPU communicator lacks all_gatherv: two ranks of a tiny Qwen3-MoE stopped at their first step"
_NO_MAP = "vLLM's CPU experts do not look which rank holds an expert"

FEATURES: tuple[Feature, ...] = (
    row(
        "bf16 weights",
        short="bf16 models",
        cpu=served(_CPU),
        cuda=served(_H100, _H100_NEWEST),
        ascend=untried(_NO_NPU),
        asked=_weights("bfloat16"),
    ),
    row("fp16 weights", cpu=untried(), cuda=untried(), ascend=untried(_NO_NPU), asked=_weights("float16")),
    row("fp32 weights", cpu=served(_CPU), cuda=untried(), ascend=untried(_NO_NPU), asked=_weights("float32")),
    row(
        "greedy and seeded sampling, logprobs, prompt logprobs",
        cpu=served(_CPU),
        cuda=served(_H100, _H100_NEWEST),
        ascend=untried(_NO_NPU),
        details="A sampled request without a seed gets a seed of its own, and the answer names the seed.",
    ),
    row(
        "prefix caching, chunked prefill, preemption",
        short="prefix caching, chunked prefill, preemption",
        cpu=served(_CPU),
        cuda=served(_H100, _H100_NEWEST),
        ascend=untried(_NO_NPU),
    ),
    row(
        "torch.compile",
        short="torch.compile",
        cpu=served(_CPU),
        cuda=served(_H100, _H100_NEWEST),
        ascend=untried(_NO_NPU),
    ),
    row(
        "CUDA graphs",
        cpu=absent(),
        cuda=served(_H100, _H100_NEWEST),
        ascend=refused(
            "full graphs keep the split of work of their capture",
            todo="Use cudagraph_mode PIECEWISE or NONE",
            by="compilation.ascend_graphs",
        ),
    ),
    row(
        "weight updates",
        short="weight updates",
        cpu=served(
            _CPU_WEIGHTS,
            _CPU_WEIGHTS_MORE,
            why="by reload_weights and model.load_weights; also of a model with MLA and of a hybrid",
        ),
        cuda=served(
            _H200_WEIGHTS,
            _H200_WEIGHTS_GRAPHS,
            _H200_WEIGHTS_OLDER,
            _H200_WEIGHTS_OLDER_GRAPHS,
            _H200_PARITY_GRPO,
            why="by reload_weights, on vLLM 0.26, too, eager and with CUDA graphs; 200 syncs of a trainer",
        ),
        ascend=untried(_NO_NPU),
        details="An engine that gets weights answers as an engine that was started with them. Writes of your own need "
        "`bi_patch.weights_changed()`.",
    ),
    row(
        "structured output",
        cpu=served(_CPU_QUICK, why="SmolLM2-135M, and a tiny Qwen3 compiled"),
        cuda=untried(),
        ascend=untried(_NO_NPU),
        details="Each request is served by the grammar library that it chooses itself, beside requests of others.",
    ),
    row(
        "processed logprobs and logits (--logprobs-mode)",
        cpu=served(_FAMILIES, why="measured in the mode processed_logprobs, on tiny models"),
        cuda=served(_H100_AXES, why="measured in the mode processed_logprobs, on an MoE model"),
        ascend=untried(_NO_NPU),
    ),
    row(
        "a trainer on Hugging Face transformers with the sampler's bits",
        short="a trainer with the sampler's bits",
        cpu=served(
            _CPU_PARITY,
            _CPU_PARITY_EXPERTS,
            _CPU_PARITY_FAMILIES,
            _CPU_PARITY_LORA,
            _CPU_PARITY_TRL,
            why="two tiny models and SmolLM2-135M on all lines of parity, a tiny Qwen3-MoE, Mixtral, Mistral, Qwen2.5, "
            "Gemma 2 and Gemma 3, LoRA adapters of PEFT, and TRL's GRPOTrainer",
        ),
        cuda=served(
            _H200_PARITY,
            _H200_PARITY_SHAPES,
            _H200_PARITY_EXPERTS,
            _H200_PARITY_EXPERTS_LINES,
            _H200_PARITY_FAMILIES,
            _H200_PARITY_WINDOW,
            _H200_PARITY_QWEN2_5,
            _H200_PARITY_LORA,
            _H200_PARITY_LORA_COMPILED,
            _H200_PARITY_FSDP,
            _H200_PARITY_GRADIENTS,
            _H200_PARITY_GRADIENTS_1B,
            _H200_PARITY_GRADIENTS_2B,
            _H200_PARITY_GRPO,
            why="two small models and two published shapes without experts, a tiny Gemma 2, Gemma 3, Mistral, Qwen2.5, "
            "Mixtral and Qwen3-MoE, two layers of Qwen3-30B-A3B, LoRA adapters of PEFT in bf16 beside an eager and a "
            "compiled sampler, and FSDP2 on one and two GPUs, with random weights; 200 steps of GRPO of SmolLM2-135M",
        ),
        ascend=refused("its operators with a backward do not exist there", by="training.device"),
        details="`bi_patch.training`: Llama, Mistral, Qwen2.5, Qwen3, Gemma 2 and 3, Mixtral, Qwen3-MoE.",
    ),
    row(
        "a trainer on one device beside a sampler with tensor parallelism",
        cpu=served(_CPU_PARITY_RANKS, why="two and four ranks, tiny models without experts"),
        cuda=served(
            _H200_PARITY_RANKS,
            why="two ranks, six layers of Qwen3-1.7B's shape, measured while vLLM's one-stage all-reduce added, which "
            "has the same order; where NCCL adds, the trainer refuses",
        ),
        ascend=refused("its operators with a backward do not exist there", by="training.device"),
        details="The trainer cuts K of `o_proj` and `down_proj` as the ranks do, and adds the parts in rank order. "
        "Refused by name: samplers whose ranks share experts, and samplers with `BI_PATCH_TP_INVARIANT`.",
    ),
    row(
        "custom logits processors",
        cpu=untried("the tests cover them"),
        cuda=untried(),
        ascend=untried(_NO_NPU),
        details="The class must say `batch_invariant = True`: its result for a row depends only on the request's "
        "parameters, prompt, generated tokens and logits. Other classes are refused (`plugins.logits_processors`).",
    ),
    row(
        "prompt embeddings (enable_prompt_embeds)",
        cpu=served(_CPU_REQUESTS, why="a tiny Qwen3 in eager mode, in bf16 and fp32"),
        cuda=untried(),
        ascend=untried(_NO_NPU),
        asked=_of_model(_embeds, "prompt embeddings"),
    ),
    row(
        "prompt embeddings, compiled",
        cpu=untried("measured in eager mode"),
        cuda=untried(),
        ascend=untried(_NO_NPU),
        asked=_compiled(_of_model(_embeds, "compiled prompt embeddings")),
    ),
    row(
        "n, beam search, bias with allowed tokens, min_tokens, priorities, a reset of running requests",
        cpu=served(_CPU_REQUESTS, why="a tiny Qwen3 in eager mode, in bf16 and fp32"),
        cuda=untried(),
        ascend=untried(_NO_NPU),
        details="`reset_prefix_cache(reset_running_requests=True)` is refused where it would drop tokens that a "
        "sampled request has drawn: with asynchronous scheduling on model runner V1.",
    ),
    row(
        "watermarks (--watermark-config)",
        **_everywhere("nobody has compared an engine's bits", "Leave it out"),
        asked=_given("watermark_config", "watermarks"),
    ),
    row(
        "weights in the host's memory (--cpu-offload-gb, --offload-group-size)",
        cpu=absent("the weights are in the host's memory in any case"),
        cuda=untried("the same kernels read them"),
        ascend=untried(_NO_NPU),
        asked=_offloaded,
    ),
    row(
        "code from outside vLLM: workers, worker extensions, executors, schedulers, models, layers, Inductor passes, "
        "platforms, general plugins",
        cpu=refused(_OUTSIDE, todo=_VOUCH, by="plugins.code"),
        cuda=refused(_OUTSIDE, todo=_VOUCH, by="plugins.code"),
        ascend=refused(_OUTSIDE, todo=_VOUCH, by="plugins.code"),
    ),
    row(
        "modelling code from a model's repository (--trust-remote-code)",
        cpu=refused(_OUTSIDE, todo=_VOUCH, by="plugins.code"),
        cuda=refused(_OUTSIDE, todo=_VOUCH, by="plugins.code"),
        ascend=refused(_OUTSIDE, todo=_VOUCH, by="plugins.code"),
        details="Models that vLLM has its own code for are not affected.",
    ),
    row(
        "sliding windows",
        cpu=served(_FAMILIES),
        cuda=served(
            _WINDOW, _WINDOW_H200, _LAYERS, why="layers with a window run on Triton attention, which is slower"
        ),
        ascend=untried(_NO_NPU),
    ),
    row(
        "attention sinks",
        cpu=refused("the bundled CPU attention has none", by="attention.cpu_init"),
        cuda=served(_LAYERS, why="gpt-oss in bf16"),
        ascend=refused("bi_patch has no kernel for them", by="attention.ascend_backend"),
    ),
    row(
        "ALiBi",
        cpu=refused("the bundled CPU attention has none", by="attention.cpu_init"),
        cuda=served(_ALIBI, why="layers with ALiBi run on Triton attention"),
        ascend=refused("bi_patch has no kernel for it", by="attention.ascend_backend"),
    ),
    row(
        "tensor parallelism",
        short="tensor parallelism",
        cpu=served(
            _CPU_TENSOR,
            _CPU_SIZES,
            _CPU_RANKS_UPDATED,
            why="measured with two ranks over shared memory, experts, compiled code and new weights included",
        ),
        cuda=(
            untried("the order of the sums is checked at the start", releases="<0.33"),
            served(
                _H200_RANKS,
                _H200_SHARED,
                _H200_RANKS_MORE,
                why="two and four ranks, compiled over peer memory, also with experts; two with MLA, and over NCCL",
            ),
        ),
        ascend=untried(_NO_NPU),
        asked=_of_parallel("tensor_parallel_size", "tensor parallelism over 1"),
    ),
    row(
        "tensor parallelism without vLLM's one-stage all-reduce (no peer memory, or other than 2, 4, 6 or 8 ranks), "
        "compiled",
        cpu=absent(),
        cuda=(
            untried("the order of the sums is checked at the start", releases="<0.32"),
            served(
                _H200_RANKS_MORE,
                _H200_DATA,
                why="two ranks of Qwen3-8B's sizes, in CUDA graphs; PyTorch's NCCL carried the parts, or vLLM's own",
            ),
        ),
        ascend=absent(),
    ),
    row(
        "tensor parallelism over more than two ranks without vLLM's one-stage all-reduce, compiled",
        cpu=absent(),
        cuda=(
            untried("the order of the sums is checked at the start", releases="<0.32"),
            refused(
                "NCCL carries the parts, and no run has shown more than two ranks in CUDA graphs",
                todo="Use --enforce-eager",
                by="communicator.cuda_rank_order",
            ),
        ),
        ascend=absent(),
        asked=_carried,
    ),
    row(
        "equal bits for every tensor-parallel size (BI_PATCH_TP_INVARIANT)",
        cpu=served(
            _CPU_SIZES,
            _CPU_RANKS_UPDATED,
            why="dense decoders; measured in bf16 (eager and compiled) and fp32 with 1, 2 and 4 ranks",
        ),
        cuda=(
            refused(_NO_SEAM, todo="Leave BI_PATCH_TP_INVARIANT out", by="communicator.leaves", releases="<0.33"),
            served(
                _H200_RANKS,
                _H200_RANKS_MORE,
                why="dense decoders in 16 bits with a 16-bit KV cache: one, two and four ranks compiled, one and two "
                "in eager mode; layers with a window, sinks or ALiBi were not measured, and the rest is refused",
            ),
        ),
        ascend=refused(_NO_SEAM, todo="Leave BI_PATCH_TP_INVARIANT out", by="communicator.leaves"),
    ),
    row(
        "pipeline parallelism",
        cpu=served(_CPU_RANKS, why="compiled; in eager mode, vLLM 0.32 itself may stop at the first request"),
        cuda=(untried(releases="<0.33"), served(_H200_RANKS, why="two stages in eager mode")),
        ascend=untried(_NO_NPU),
        asked=_of_parallel("pipeline_parallel_size", "pipeline parallelism over 1"),
    ),
    row(
        "pipeline parallelism, compiled",
        cpu=served(_CPU_RANKS),
        cuda=(untried(releases="<0.33"), served(_H200_RANKS_MORE, why="two stages")),
        ascend=untried(_NO_NPU),
        asked=_compiled(_of_parallel("pipeline_parallel_size", "compiled pipeline parallelism")),
    ),
    row(
        "data parallelism of models without experts",
        cpu=served(_CPU_RANKS),
        cuda=(
            untried("the ranks are independent engines", releases="<0.33"),
            served(_H200_SHARED, why="two ranks, compiled"),
        ),
        ascend=refused(_NO_SEAM),
        asked=_plain_data_parallel("data parallelism over 1"),
        details="All ranks need the same kind of device.",
    ),
    row(
        "data parallelism of MoE models",
        cpu=refused(_NO_EXCHANGE),
        cuda=(
            refused(_STEP, todo="Use vLLM 0.33", releases="<0.33"),
            served(
                _H200_DATA,
                _H200_MORE_RANKS,
                why="two ranks: two layers of Qwen3-30B-A3B with and without expert parallelism, compiled and in eager "
                "mode, and of DeepSeek-V2-Lite with it, compiled",
            ),
        ),
        ascend=refused(_STEP),
        asked=_experts_of_data_ranks(SERVED, "data parallelism over 1 of a MoE model"),
        details="A sum over ranks has one order, whichever rank owns a row. "
        "Requests have the same bits on every rank, whatever the other ranks do.",
    ),
    row(
        "data parallelism of MoE models over three or four ranks, over hosts or load balancers, with TP, of DeepSeek "
        "V3, or of DeepSeek V2 in eager mode or without expert parallelism",
        cpu=refused(_NO_EXCHANGE),
        cuda=(
            refused(_STEP, todo="Use vLLM 0.33", releases="<0.33"),
            untried("each worker checks the order of the sums at its start"),
        ),
        ascend=refused(_STEP),
        asked=_experts_of_data_ranks(UNTRIED, "data parallelism over 1 of a MoE model"),
    ),
    row(
        "data parallelism of MoE models with another all-to-all, more than four ranks, or another model or feature",
        **_everywhere(_STEP),
        asked=_experts_of_data_ranks(REFUSED, "data parallelism over 1 of a MoE model"),
    ),
    row(
        "expert parallelism of tensor-parallel ranks",
        cpu=refused(_NO_MAP),
        cuda=(
            refused("nobody has compared an engine's bits", todo="Use vLLM 0.33", releases="<0.33"),
            served(
                _H200_SHARED,
                _H200_RANKS_MORE,
                why="two layers of Qwen3-30B-A3B and of DeepSeek-V2-Lite over two ranks, compiled and in eager mode; "
                "of DeepSeek-V2-Lite over four, compiled",
            ),
        ),
        ascend=refused(_NO_SEAM),
        asked=_expert_parallel(SERVED, "expert parallelism"),
        details="Each rank holds whole experts and sees all rows. A model without experts ignores the option.",
    ),
    row(
        "expert parallelism over three ranks, over four of Qwen3-MoE or in eager mode, or of DeepSeek V3",
        cpu=refused(_NO_MAP),
        cuda=(
            refused("nobody has compared an engine's bits", todo="Use vLLM 0.33", releases="<0.33"),
            untried("measured over two ranks, and over four of DeepSeek V2, compiled"),
        ),
        ascend=refused(_NO_SEAM),
        asked=_expert_parallel(UNTRIED, "expert parallelism"),
    ),
    row(
        "expert parallelism with more than four ranks, other models, or another feature",
        **_everywhere("nobody has compared an engine's bits"),
        asked=_expert_parallel(REFUSED, "expert parallelism"),
    ),
    row(
        "expert load balancing",
        **_everywhere("the load decides which rank holds an expert, and each rank's part of a sum is rounded"),
        asked=_of_parallel("enable_eplb", "expert load balancing", 0),
    ),
    row(
        "decode context parallelism",
        **_everywhere(
            "ranks merge the keys before a chunk with the chunk's own keys, so the start of a chunk moves bits"
        ),
        asked=_of_parallel("decode_context_parallel_size", "decode context parallelism over 1"),
    ),
    row(
        "prefill context parallelism",
        **_everywhere("ranks merge parts of a row"),
        asked=_of_parallel("prefill_context_parallel_size", "prefill context parallelism over 1"),
    ),
    row(
        "dual-batch overlap",
        **_everywhere("the size of a batch decides where it is split in two"),
        asked=_of_parallel("enable_dbo", "dual-batch overlap", 0),
    ),
    row(
        "workers of an external launcher (torchrun)",
        cpu=served(_CPU_LAUNCHER, why="measured with two tensor-parallel ranks"),
        cuda=(
            untried("each worker must say that it is armed", releases="<0.33"),
            served(_H200_EXECUTORS, why="two tensor-parallel ranks of Qwen3-8B's sizes, in eager mode"),
        ),
        ascend=untried(_NO_NPU),
        asked=_started_by("external_launcher", "workers of an external launcher"),
        details="Arm every rank (`VLLM_BATCH_INVARIANT=1` for the launcher): ranks ask each other at their start.",
    ),
    row(
        "workers of an external launcher (torchrun), compiled",
        cpu=served(_CPU_LAUNCHER),
        cuda=(
            untried("each worker must say that it is armed", releases="<0.33"),
            served(_H200_MORE_RANKS, why="two tensor-parallel ranks of Qwen3-8B's sizes"),
        ),
        ascend=untried(_NO_NPU),
        asked=_compiled(_started_by("external_launcher", "compiled workers of an external launcher")),
    ),
    row(
        "workers of Ray",
        cpu=refused(
            "vLLM's CPU build has none: with Ray 2.60.0 it says 'current platform cpu does not support ray'",
            todo="Use the executor mp",
        ),
        cuda=(
            untried("each worker must say that it is armed", releases="<0.33"),
            served(_H200_MORE_RANKS, why="two tensor-parallel ranks of Qwen3-8B's sizes, in eager mode, on one host"),
        ),
        ascend=untried(_NO_NPU),
        asked=_started_by("ray", "workers of Ray"),
    ),
    row(
        "workers of Ray, compiled",
        cpu=refused("vLLM's CPU build has none", todo="Use the executor mp"),
        cuda=untried("measured in eager mode"),
        ascend=untried(_NO_NPU),
        asked=_compiled(_started_by("ray", "compiled workers of Ray")),
    ),
    row(
        "data-parallel ranks that Ray starts",
        cpu=refused("vLLM's CPU build has no Ray", todo="Use the executor mp"),
        cuda=untried("measured with tensor-parallel ranks"),
        ascend=untried(_NO_NPU),
        asked=_data_ranks_of_ray,
    ),
    row(
        "several API servers (--api-server-count)",
        cpu=untried("a test compares two"),
        cuda=untried("one engine answers them all"),
        ascend=untried(_NO_NPU),
        asked=_of_parallel("_api_process_count", "several API servers"),
    ),
    row(
        "several hosts",
        cpu=untried("the sum over ranks is checked at the start"),
        cuda=untried("the sum over ranks is checked at the start"),
        ascend=untried(_NO_NPU),
        asked=_of_parallel("nnodes", "several hosts"),
    ),
    row(
        "every other option of parallelism (sequence parallelism, sampling in shards, elastic experts, fault "
        "tolerance, ...)",
        **_everywhere("nobody has examined it"),
        asked=_unexamined,
    ),
    row(
        "every other option of vLLM's configuration that may choose a kernel or a rule, and that nobody has examined "
        "(use_fp64_gumbel, use_inductor_graph_partition, mla_prefill_backend, ...)",
        **_everywhere("nobody has examined it", "Leave it out"),
        asked=_other_options,
        details="Also an option that a later vLLM brings.",
    ),
    row(
        "environment variables of vLLM that may choose a kernel, and that nobody has examined "
        "(VLLM_MOE_ROUTING_SIMULATION_STRATEGY, VLLM_FLOAT32_MATMUL_PRECISION, ...)",
        **_everywhere("nobody has examined it", "Unset it"),
        asked=_variables,
        details="Variables of paths, logs, limits and timeouts are free, and so are those that a patch point covers.",
    ),
    row(
        "breakable CUDA graphs (VLLM_USE_BREAKABLE_CUDAGRAPH=1)",
        cpu=absent(),
        cuda=untried("nobody has compared an engine's bits"),
        ascend=untried(_NO_NPU),
        asked=_switched("VLLM_USE_BREAKABLE_CUDAGRAPH", "breakable CUDA graphs"),
    ),
    row(
        "vLLM's Rust front end (VLLM_USE_RUST_FRONTEND=1)",
        cpu=untried("the engine core checks each request"),
        cuda=untried("the engine core checks each request"),
        ascend=untried(_NO_NPU),
        asked=_switched(_RUST, "the Rust front end"),
    ),
    row(
        "images, sound or video from vLLM's Rust front end",
        **_everywhere(
            "only the Python front end's patch points see that an image bears another one's name", f"Unset {_RUST}"
        ),
        asked=_images_from_rust,
    ),
    row(
        "LoRA",
        short="LoRA",
        cpu=served(_CPU_LORA, why="on linear layers, embeddings and the head; vLLM runs it in eager mode"),
        cuda=(
            refused("bi_patch has patch points for newer releases only", todo="Use vLLM 0.33", releases="<0.33"),
            served(
                _H200_LORA,
                _H200_LORA_COMPILED,
                why="on linear layers",
            ),
        ),
        ascend=refused("its products split K by the number of rows"),
        asked=_given("lora_config", "LoRA"),
        details="Adapters of several ranks side by side, and more adapters than `max_loras`. A request without an "
        "adapter has the bits of an engine without LoRA. Each adapter needs a number (`lora_int_id`) of its own.",
    ),
    row(
        "LoRA adapters of embeddings and of the head",
        cpu=served(_CPU_LORA),
        cuda=(
            refused(
                "bi_patch has patch points for newer releases only",
                by="features.cuda",
                todo="Use vLLM 0.33",
                releases="<0.33",
            ),
            served(
                "invariance-2026-11-30-h200-expert-lora-vllm-0.33.0.json",
                "invariance-2026-11-30-h200-expert-lora-vllm-0.33.0-2.json",
                why="two layers of Qwen3-30B-A3B with 32 experts, in eager mode and compiled",
            ),
        ),
        ascend=refused("its products split K by the number of rows", by="features.ascend"),
        details="The head's adapter of each row is that of the row's own token, also for prompt logprobs and drafts.",
    ),
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
        asked=_compiled(
            _speculative(
                lambda s: _method(s) in (*_DRAFTING, "suffix", "mtp"), "drafts of a model, heads or suffixes, compiled"
            )
        ),
    ),
    row(
        "speculative decoding with other drafts: ngram_gpu, MTP of other models, Medusa, DFlash, ...",
        **_everywhere(_VERIFIED, _OTHER_DRAFTS)
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
        **_everywhere("nobody has compared it with an engine without speculation", "Leave it out"),
        asked=_beside_drafts,
    ),
    row(
        "speculative decoding that accepts drafts by another rule (rejection_sample_method synthetic, fly, block)",
        **_everywhere("it accepts drafts that the model did not draw", "Leave rejection_sample_method out"),
        asked=_speculative(_other_rule, "another rule of acceptance"),
    ),
    row(
        "KV offload to the engine's own memory (OffloadingConnector, SimpleCPUOffloadConnector)",
        cpu=refused("vLLM offloads from GPUs only"),
        cuda=(
            refused("prompt logprobs of offloaded positions are lost", releases="<0.32"),
            untried("copies have equal bits"),
        ),
        ascend=refused(_NO_SEAM),
        asked=_transfer(True),
    ),
    row(
        "KV transfer between engines, and stores outside of the engine (NIXL, LMCache, Mooncake, files)",
        **_everywhere(
            "the keys of its store tell neither which code computed the keys and values nor from which weights",
            "Use OffloadingConnector without tiers",
        ),
        asked=_transfer(False),
    ),
    row(
        "pooling: embeddings",
        short="embeddings",
        cpu=served(_CPU_POOLING[1], why="tiny models of each kind"),
        cuda=(
            refused("nobody tried it with these releases", todo="Use vLLM 0.33", releases="<0.33"),
            served(_H200_POOLING, why="an embedding model in eager mode; the cost is not measured"),
        ),
        ascend=refused(_NO_SEAM, todo="Use a generating model"),
        asked=_of_model(lambda m: m.runner_type == "pooling", "pooling models"),
        details="Embeddings of any length. Refused by name: poolers outside of a list, late interaction, late "
        "chunking, and new weights for such an engine.",
    ),
    row(
        "pooling: classifiers, rerankers and rewards made from decoders",
        cpu=served(_CPU_POOLING[1], why="tiny models of each kind"),
        cuda=(
            refused("nobody tried it with these releases", todo="Use vLLM 0.33", releases="<0.33"),
            untried("all patch points are those of embeddings"),
        ),
        ascend=refused(_NO_SEAM, todo="Use a generating model"),
        asked=_of_model(_scores, "classifiers, rerankers and rewards"),
        details="One number or more for each prompt or token, from a head that the model has. Heads of encoders "
        "have a row of their own.",
    ),
    row(
        "pooling models, compiled",
        cpu=untried("one of the kinds was compared, with an engine in eager mode"),
        cuda=served(_H200_ENCODERS_COMPILED, why="shapes of BERT large and ModernBERT base"),
        ascend=refused(_NO_SEAM, todo="Use a generating model"),
        asked=_compiled(_of_model(lambda m: m.runner_type == "pooling", "compiled pooling models")),
    ),
    row(
        "encoders with attention in both directions (BERT, XLM-R, ModernBERT)",
        cpu=served(*_CPU_POOLING, why="tiny models of each kind, in bf16"),
        cuda=(
            refused("nobody tried it with these releases", todo="Use vLLM 0.33", releases="<0.33"),
            served(_H200_ENCODERS, why="shapes of BERT large, XLM-R base and ModernBERT base, in bf16"),
        ),
        ascend=refused(_NO_SEAM, todo="Use a model with causal attention"),
        asked=_of_model(lambda m: getattr(m, "attn_type", "") == "encoder_only", "attention in both directions"),
    ),
    row(
        "embeddings of images, sound or video (--enable-mm-embeds)",
        **_everywhere("such a request brings rows that no patch point computed", "Leave --enable-mm-embeds out"),
        asked=_of_model(_embeddings, "multimodal embeddings"),
    ),
    row(
        "multimodal models as text models (--language-model-only)",
        cpu=served(_CPU_TEXT),
        cuda=untried(),
        ascend=refused(_NO_SEAM, todo="Use a text model"),
        asked=_of_model(lambda m: m.is_multimodal_model and not _images(m), "multimodal models"),
    ),
    row(
        "encoder-decoder models",
        **_everywhere(_NO_SEAM)
        | {
            "cpu": refused(
                "the bundled CPU attention has none over an encoder's keys: a tiny Whisper stopped when vLLM made it",
                todo="Use a decoder",
            )
        },
        asked=_of_model(lambda m: m.is_encoder_decoder, "encoder-decoder models"),
    ),
    row(
        "diffusion language models",
        **_everywhere("their code is compiled separately for a batch of one", "Use another model"),
        asked=_of_model(lambda m: getattr(m, "is_diffusion", False), "diffusion language models"),
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
        asked=_of_model(lambda m: m.use_mla, "MLA"),
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
        asked=_compiled(_of_model(lambda m: m.use_mla, "compiled MLA")),
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
        asked=_compiled(_of_model(lambda m: one_form() and m.use_mla, "compiled MLA in one form")),
    ),
    row(
        "sparse MLA: an indexer that chooses tokens (DeepSeek V3.2, GLM-5)",
        **_everywhere("nothing fixes the order of the tokens that the indexer chooses, and which of two tied ones"),
        asked=_of_model(
            lambda m: m.use_mla and hasattr(getattr(m, "hf_text_config", None), "index_topk"), "sparse MLA"
        ),
    ),
    row(
        "FP8 KV cache (e4m3, static scales)",
        **_everywhere("bi_patch has no certificate for its attention", "Use --kv-cache-dtype auto")
        | {
            "cuda": (
                served(
                    "invariance-2026-11-29-h200-quantized-vllm-0.33.0-2.json",
                    why="two layers of Qwen3-8B's sizes, compiled and in eager mode; Triton attention",
                    releases=">=0.33",
                ),
                refused("bi_patch has no certificate for its attention", todo="Use --kv-cache-dtype auto"),
            )
        },
        asked=_eighth_cache,
    ),
    row(
        "other quantized KV caches",
        **_everywhere("bi_patch has no certificate for its attention", "Use --kv-cache-dtype auto"),
        asked=_quantized_cache,
    ),
    row(
        "fp32 KV cache",
        cpu=served(_CPU),
        cuda=refused("no attention kernel serves it", todo="Use --kv-cache-dtype auto"),
        ascend=refused("no attention kernel serves it", todo="Use --kv-cache-dtype auto"),
        asked=_fp32_cache,
    ),
    row(
        "KV cache pages whose number of tokens is no power of two (--block-size)",
        cpu=untried(),
        cuda=refused(
            "the longest query may decide FlashAttention 3's KV tile",
            todo="Use a power of two",
            by="attention.cuda_pages",
        ),
        ascend=refused(
            "the kernels need pages of a multiple of 128 tokens",
            todo="Use --block-size 128",
            by="attention.ascend_block_size",
        ),
    ),
    row(
        "norms over ranks (MiniMax-M2 with tensor parallelism)",
        **_everywhere("the norm is a sum over ranks")
        | {
            "cuda": (
                refused("the norm is a sum over ranks", todo="Use vLLM 0.33", releases="<0.33"),
                served(_H200_PARTS, why="two layers of MiniMax-M2's sizes, two ranks, in eager mode"),
            )
        },
        asked=_norms_over_ranks,
        details="Ranks add their sums of squares in rank order, in fp32.",
    ),
    row(
        "norms over ranks (MiniMax-M2 with tensor parallelism), compiled",
        **_everywhere("the norm is a sum over ranks")
        | {
            "cuda": (
                refused("the norm is a sum over ranks", todo="Use vLLM 0.33", releases="<0.33"),
                served(_H200_MORE_RANKS, why="two layers of MiniMax-M2's sizes, two ranks"),
            )
        },
        asked=_compiled(_norms_over_ranks),
    ),
)
