"""Features that a user turns on: requests, options, LoRA. Rows of other topics have files of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bi_patch.platforms.features import configs, variables
from bi_patch.platforms.features.caches import CACHES
from bi_patch.platforms.features.distributed import DISTRIBUTED
from bi_patch.platforms.features.model import Feature, absent, refused, row, served, untried
from bi_patch.platforms.features.model_kinds import MODEL_KINDS
from bi_patch.platforms.features.questions import NO_NPU, everywhere, of_model, takes_images, when_compiled
from bi_patch.platforms.features.ranks import size
from bi_patch.platforms.features.speculation import DRAFTS
from bi_patch.platforms.features.trainers import TRAINERS

_CPU = "invariance-2026-11-22-cpu-vllm-0.32.0.json"
_FAMILIES = "invariance-2026-11-28-cpu-families-vllm-0.32.0.json"
_H200_WEIGHTS = "invariance-2026-11-29-h200-weights-vllm-0.33.0.json"
_H200_WEIGHTS_GRAPHS = "invariance-2026-11-29-h200-weights-vllm-0.33.0-2.json"
_H200_WEIGHTS_OLDER = "invariance-2026-11-29-h200-weights-vllm-0.26.0.json"
_H200_WEIGHTS_OLDER_GRAPHS = "invariance-2026-11-30-h200-weights-vllm-0.26.0.json"
_H200_WEIGHTS_OLDER_EXPERTS = "invariance-2026-11-30-h200-weights-vllm-0.26.0-2.json"
_CPU_WEIGHTS = "invariance-2026-11-28-cpu-weights-vllm-0.32.0.json"
# Of INT8, compressed-tensors W4A16 without and with zero points, AWQ and GPTQ.
_CPU_WEIGHTS_QUANTIZED = tuple(
    f"invariance-2026-11-30-cpu-weights-vllm-0.32.0{number}.json" for number in ("", "-2", "-3", "-4", "-5")
)
_CPU_WEIGHTS_MORE = "invariance-2026-11-29-cpu-amx-weights-vllm-0.32.0.json"
_H200_PARITY_GRPO = "parity-2026-11-29-h200-grpo-vllm-0.33.0-4.json"
_CPU_LORA = "invariance-2026-11-28-cpu-amx-lora-vllm-0.32.0.json"
_H200_LORA = "invariance-2026-11-29-h200-lora-vllm-0.33.0.json"
_H200_LORA_COMPILED = "invariance-2026-11-29-h200-lora-vllm-0.33.0-2.json"
_H200_SHAPES = "invariance-2026-11-30-h200-families-vllm-0.33.0-2.json"
_H200_SHAPES_3 = "invariance-2026-11-30-h200-families-vllm-0.33.0-3.json"
_CPU_HALF = "invariance-2026-11-30-cpu-families-vllm-0.32.0.json"
_CPU_QUICK = "invariance-2026-11-29-cpu-amx-quick-vllm-0.32.0.json"
_CPU_REQUESTS = "invariance-2026-11-29-cpu-amx-requests-vllm-0.32.0.json"
_CPU_REQUESTS_COMPILED = "invariance-2026-11-30-cpu-requests-vllm-0.32.0-3.json"
_CPU_STREAMED = "invariance-2026-11-30-cpu-requests-vllm-0.32.0-2.json"
_H200_PAIRS = "invariance-2026-11-30-h200-pairs-vllm-0.33.0.json"
_H200_FEATURES = "invariance-2026-11-30-h200-features-vllm-0.33.0.json"
_H100 = "invariance-2026-11-22-h100-vllm-0.33.0.json"
_H100_AXES = "invariance-2026-11-28-h100-vllm-0.33.0.json"
_H100_NEWEST = "invariance-2026-11-22-h100-seams-vllm-0.33.0.json"
_WINDOW = "invariance-2026-11-22-h100-seams-vllm-0.26.0.json"
_WINDOW_H200 = "invariance-2026-11-28-h200-vllm-0.26.0.json"
_LAYERS = "invariance-2026-11-28-h100-families-vllm-0.33.0.json"
_ALIBI = "invariance-2026-11-28-h100-alibi-vllm-0.33.0.json"
_OUTSIDE = "bi_patch has patch points for vLLM's own code only"
_OWN_GRAPHS = "Set it for your own graphs only, with torch.compile(..., options={...})"
_VOUCH = "Name the code in BI_PATCH_ALLOW_CODE if you know that its results do not depend on the batch"


def _weights(dtype: str) -> Callable[[Any], str]:
    """The words for weights of a torch dtype's name."""
    return of_model(lambda model: str(getattr(model, "dtype", "")) == f"torch.{dtype}", f"{dtype} weights")


def _given(name: str, words: str) -> Callable[[Any], str]:
    return lambda config: words if getattr(config, name, None) is not None else ""


def _embeds(model: Any) -> bool:
    return getattr(model, "enable_prompt_embeds", False)


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
    taken = config.model_config is not None and takes_images(config.model_config)
    return "images from the Rust front end" if taken and variables.switched(_RUST) else ""


def _cores_of_rust(config: Any) -> str:
    several = size(config, "data_parallel_size") > 1 and variables.switched(_RUST)
    return "several engine cores of the Rust front end" if several else ""


_RUST = "VLLM_USE_RUST_FRONTEND"

FEATURES: tuple[Feature, ...] = (
    row(
        "bf16 weights",
        short="bf16 models",
        cpu=served(_CPU),
        cuda=served(_H100, _H100_NEWEST),
        ascend=untried(NO_NPU),
        asked=_weights("bfloat16"),
    ),
    row(
        "fp16 weights",
        cpu=served(_CPU_HALF, why="tiny models with random weights, without AMX; three of them compiled, too"),
        cuda=(
            untried(releases="<0.33"),
            served(
                _H200_SHAPES, why="four layers of Llama, Qwen3-MoE and Qwen2.5 in eager mode, of Qwen3-MoE compiled"
            ),
        ),
        ascend=untried(NO_NPU),
        asked=_weights("float16"),
    ),
    row(
        "fp32 weights",
        cpu=served(_CPU),
        cuda=(
            untried(releases="<0.33"),
            served(
                _H200_SHAPES,
                _H200_SHAPES_3,
                why="four layers of Llama and Qwen3-MoE in eager mode, of Llama compiled",
            ),
        ),
        ascend=untried(NO_NPU),
        asked=_weights("float32"),
    ),
    row(
        "greedy and seeded sampling, logprobs, prompt logprobs",
        cpu=served(_CPU),
        cuda=served(_H100, _H100_NEWEST),
        ascend=untried(NO_NPU),
        details="A sampled request without a seed gets a seed of its own, and the answer names the seed.",
    ),
    row(
        "prefix caching, chunked prefill, preemption",
        short="prefix caching, chunked prefill, preemption",
        cpu=served(_CPU),
        cuda=served(_H100, _H100_NEWEST),
        ascend=untried(NO_NPU),
    ),
    row(
        "torch.compile",
        short="torch.compile",
        cpu=served(_CPU),
        cuda=served(_H100, _H100_NEWEST),
        ascend=untried(NO_NPU),
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
            *_CPU_WEIGHTS_QUANTIZED,
            why="by reload_weights and model.load_weights; also of a model with MLA, of a hybrid, and of INT8 and "
            "4-bit weights without AMX",
        ),
        cuda=served(
            _H200_WEIGHTS,
            _H200_WEIGHTS_GRAPHS,
            _H200_WEIGHTS_OLDER,
            _H200_WEIGHTS_OLDER_GRAPHS,
            _H200_WEIGHTS_OLDER_EXPERTS,
            _H200_PARITY_GRPO,
            why="by reload_weights, on vLLM 0.26, too, eager and with CUDA graphs; 200 syncs of a trainer",
        ),
        ascend=untried(NO_NPU),
        details="An engine that gets weights answers as an engine that was started with them. Writes of your own need "
        "`bi_patch.weights_changed()`.",
    ),
    row(
        "structured output",
        cpu=served(_CPU_QUICK, why="SmolLM2-135M, and a tiny Qwen3 compiled"),
        cuda=served(_H200_PAIRS, why="a small Qwen3, in eager mode and compiled"),
        ascend=untried(NO_NPU),
        details="Each request is served by the grammar library that it chooses itself, beside requests of others.",
    ),
    row(
        "processed logprobs and logits (--logprobs-mode)",
        cpu=served(_FAMILIES, why="measured in the mode processed_logprobs, on tiny models"),
        cuda=served(_H100_AXES, why="measured in the mode processed_logprobs, on an MoE model"),
        ascend=untried(NO_NPU),
    ),
    *TRAINERS,
    row(
        "custom logits processors",
        cpu=served(_CPU_STREAMED, why="processors of bi-patch verify, a tiny Qwen3, in eager mode and compiled"),
        cuda=served(_H200_PAIRS, why="processors of bi-patch verify, a small Qwen3 in eager mode"),
        ascend=untried(NO_NPU),
        details="The class must say `batch_invariant = True`: its result for a row depends only on the request's "
        "parameters, prompt, generated tokens and logits. Other classes are refused (`plugins.logits_processors`).",
    ),
    row(
        "prompt embeddings (enable_prompt_embeds)",
        cpu=served(_CPU_REQUESTS, why="a tiny Qwen3 in eager mode, in bf16 and fp32"),
        cuda=served(_H200_FEATURES, why="a small Qwen3 in eager mode"),
        ascend=untried(NO_NPU),
        asked=of_model(_embeds, "prompt embeddings"),
    ),
    row(
        "prompt embeddings, compiled",
        cpu=served(_CPU_REQUESTS_COMPILED, why="a tiny Qwen3, in bf16 and fp32"),
        cuda=served(_H200_FEATURES, why="a small Qwen3"),
        ascend=untried(NO_NPU),
        asked=when_compiled(of_model(_embeds, "compiled prompt embeddings")),
    ),
    row(
        "n, beam search, bias with allowed tokens, min_tokens, priorities, a reset of running requests",
        cpu=served(
            _CPU_REQUESTS, _CPU_REQUESTS_COMPILED, why="a tiny Qwen3, in eager mode and compiled, in bf16 and fp32"
        ),
        cuda=served(_H200_FEATURES, why="a small Qwen3, in eager mode and compiled"),
        ascend=untried(NO_NPU),
        details="`reset_prefix_cache(reset_running_requests=True)` is refused where it would drop tokens that a "
        "sampled request has drawn: with asynchronous scheduling on model runner V1.",
    ),
    row(
        "streamed inputs (prompts in parts)",
        cpu=served(
            _CPU_STREAMED,
            why="a tiny Qwen3, eager and compiled; models with MLA, windows or recurrent layers in eager mode",
        ),
        cuda=(
            untried("with --no-async-scheduling; vLLM 0.32 and later take it without", releases="<0.32"),
            served(_H200_PAIRS, _H200_FEATURES, why="a small Qwen3, in eager mode and compiled"),
        ),
        ascend=untried(NO_NPU),
        details="Refused are parts that change what vLLM reads from the first part alone (`streamed.parts`), streamed "
        "inputs beside speculative decoding (`requests.core`), and where MLA has two forms (`mla.cuda_forms`).",
    ),
    row(
        "pauses (sleep level 0, pause_generation)",
        cpu=served(_CPU_STREAMED, why="running requests kept their keys and values, or were computed again"),
        cuda=served(_H200_PAIRS, why="a small Qwen3, in eager mode and compiled"),
        ascend=untried(NO_NPU),
        details="Requests that are kept go on with the same bits. Where a pause clears the cache and would drop tokens "
        "that a sampled request has drawn, it is refused (`scheduler.reset_running`).",
    ),
    row(
        "sleep and wake (--enable-sleep-mode)",
        cpu=absent("vLLM for CPU keeps its memory"),
        cuda=served(
            _H200_WEIGHTS, _H200_WEIGHTS_GRAPHS, why="at levels 1 and 2, each followed by a reload of the weights"
        ),
        ascend=untried(NO_NPU),
        asked=of_model(lambda model: getattr(model, "enable_sleep_mode", False), "sleep mode"),
    ),
    row(
        "watermarks (--watermark-config)",
        **everywhere("nobody has compared an engine's bits", "Leave it out"),
        asked=_given("watermark_config", "watermarks"),
    ),
    row(
        "weights in the host's memory (--cpu-offload-gb, --offload-group-size)",
        cpu=absent("the weights are in the host's memory in any case"),
        cuda=served(
            _H200_FEATURES,
            _H200_PAIRS,
            why="a small Qwen3, in eager mode and compiled; in eager mode also against weights on the GPU",
        ),
        ascend=untried(NO_NPU),
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
        ascend=untried(NO_NPU),
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
    *DISTRIBUTED,
    row(
        "every other option of vLLM's configuration that may choose a kernel or a rule, and that nobody has examined "
        "(use_fp64_gumbel, use_inductor_graph_partition, mla_prefill_backend, ...)",
        **everywhere("nobody has examined it", "Leave it out"),
        asked=_other_options,
        details="Also an option that a later vLLM brings.",
    ),
    row(
        "environment variables of vLLM, of PyTorch's compiler and of OpenMP that may choose a kernel or its threads, "
        "and that nobody has examined (VLLM_MOE_ROUTING_SIMULATION_STRATEGY, TORCHINDUCTOR_MAX_AUTOTUNE, "
        "OMP_DYNAMIC, ...)",
        **everywhere("nobody has examined it", "Unset it"),
        asked=_variables,
        details="Variables of paths, logs, limits and timeouts are free, and so are those that a patch point covers.",
    ),
    row(
        "options of Inductor that a program sets in its process (`torch._inductor.config`)",
        **{
            platform: refused("nobody has examined it", todo=_OWN_GRAPHS, by="compilation.options")
            for platform in ("cpu", "cuda")
        },
        ascend=absent("vLLM-Ascend's own compiler makes the graphs; the backend inductor is refused"),
        details="Checked with the configuration, in each worker, and again where a compilation starts. Caches, logs, "
        "assertions and profiles are free. On CUDA Inductor stays deterministic, also after "
        "`torch.use_deterministic_algorithms(False)`.",
    ),
    row(
        "breakable CUDA graphs (VLLM_USE_BREAKABLE_CUDAGRAPH=1)",
        cpu=absent(),
        cuda=served(_H200_PAIRS, why="a small Qwen3; vLLM then compiles no model"),
        ascend=untried(NO_NPU),
        asked=_switched("VLLM_USE_BREAKABLE_CUDAGRAPH", "breakable CUDA graphs"),
    ),
    row(
        "vLLM's Rust front end (VLLM_USE_RUST_FRONTEND=1)",
        cpu=untried("the engine core checks each request"),
        cuda=untried("the engine core checks each request"),
        ascend=untried(NO_NPU),
        asked=_switched(_RUST, "the Rust front end"),
    ),
    row(
        "images, sound or video from vLLM's Rust front end",
        **everywhere(
            "only the Python front end's patch points see that an image bears another one's name", f"Unset {_RUST}"
        ),
        asked=_images_from_rust,
    ),
    row(
        "data parallelism behind vLLM's Rust front end",
        **everywhere(
            "only the Python front end compares what decides the bits of its engine cores, any of which may serve a "
            "request",
            f"Unset {_RUST}",
        ),
        asked=_cores_of_rust,
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
    *DRAFTS,
    *CACHES,
    *MODEL_KINDS,
)
