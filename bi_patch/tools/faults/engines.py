"""The engines in which faults are planted: their models and options."""

from __future__ import annotations

from pathlib import Path

from bi_patch import settings
from bi_patch.tools.faults import latent
from bi_patch.tools.models import families, pooling, recipes, shapes, vision
from bi_patch.tools.verify import checkpoint
from bi_patch.tools.verify.engine import Options
from bi_patch.tools.verify.probes import adapters as lora

_BF16 = ("Qwen3-Next",)  # families with recurrent layers, which run in bf16 only
# On CUDA: a part of the memory, states in fp32, and vLLM's kernels for gated delta nets that need no further package.
_ON_CUDA = {
    "gpu_memory_utilization": 0.15,
    "kv_cache_memory_bytes": 1 << 30,
    "block_size": 128,
    "mamba_ssm_cache_dtype": "float32",
    "additional_config": {"gdn_prefill_backend": "triton"},
}


def options(platform: str, folder: str, dtype: str = "") -> Options:
    """The options of the engine in which faults are planted: a MoE model, tied routers and head, eager for traces.

    dtype: by default fp32 on CPU, where every change of order shows in the bits, and bf16 on CUDA.
    """
    if platform == "cpu":
        return Options(
            str(recipes.path(recipes.MOE, cache=settings.read().cache)),
            dtype=dtype or "float32",
            max_model_len=1024,
            chunk=512,
            tied=True,
            digests=True,
            extra={"hf_overrides": {"num_experts_per_tok": 4}},
        )
    return Options(
        shapes.write(shapes.WIDE_MOE, folder),
        dtype=dtype or "bfloat16",
        max_model_len=2048,
        chunk=2048,
        tied=True,
        digests=True,
        tokenizer=False,
        random_weights=7,
        extra={"gpu_memory_utilization": 0.15, "kv_cache_memory_bytes": 8 << 30},
    )


# On Hopper, vLLM has kernels of MLA for these sizes only.
_MLA_ON_CUDA = {"hidden_size": 1024, "num_attention_heads": 16, "qk_nope_head_dim": 128, "v_head_dim": 128}


def of_family(name: str, folder: str, dtype: str = "", platform: str = "cpu") -> Options:
    """The options of an engine with the tiny model of a family, for faults of layers that only it has. A recipe of a
    quantized model has weights, and keeps its type.
    """
    if name in recipes.QUANTIZED:
        made = str(recipes.path(name, cache=settings.read().cache))
        return Options(made, max_model_len=1024, chunk=512, digests=True)
    if platform == "cuda" and name == latent.MODEL:
        return Options(
            shapes.save(f"{name} on a GPU", families.FAMILIES[name] | _MLA_ON_CUDA, folder),
            dtype=dtype or "bfloat16",
            max_model_len=2048,
            chunk=2048,
            tokenizer=False,
            random_weights=7,
            digests=True,
            extra={"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30},
        )
    return Options(
        families.write(name, folder),
        dtype="bfloat16" if name in _BF16 else dtype or "bfloat16",
        max_model_len=1024,
        chunk=512,
        tokenizer=False,
        random_weights=7,
        digests=True,
        extra={} if platform == "cpu" else _ON_CUDA,
    )


def few_blocks(given: Options, block: int) -> Options:
    """These options with a KV cache for one request of full length, so that a batch is preempted."""
    short = given.but(max_model_len=min(given.max_model_len, 1024))
    return short.but(kv_blocks=-(-short.max_model_len // block) + 1)


def small() -> Options:
    """The options of a small model with a tokenizer, in bf16."""
    return Options(
        str(recipes.path(recipes.QWEN3_100M, cache=settings.read().cache)),
        max_model_len=1024,
        chunk=512,
        digests=True,
        extra={"gpu_memory_utilization": 0.15, "kv_cache_memory_bytes": 1 << 30},
    )


def speculating(given: Options) -> Options:
    """These options with drafts from n-grams. vLLM has no custom logits processors beside speculation."""
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    return given.but(digests=False, extra={**given.extra, "speculative_config": drafts})


def updated(platform: str, folder: str, dtype: str = "") -> Options:
    """The options of an engine for updates: a small model with weights in a folder, whose head is its embedding."""
    name = recipes.MOE if platform == "cpu" else recipes.QWEN3_100M
    source = recipes.path(name, cache=settings.read().cache)
    on_gpu = {"enable_sleep_mode": True, "gpu_memory_utilization": 0.15, "kv_cache_memory_bytes": 1 << 30}
    return Options(
        str(checkpoint.write(str(source), 3, Path(folder) / "weights", tied=True)),
        dtype=dtype or ("float32" if platform == "cpu" else "bfloat16"),
        max_model_len=1024,
        chunk=512,
        extra={} if platform == "cpu" else on_gpu,
    )


def pooled(folder: str, dtype: str = "float32") -> Options:
    """The options of a small encoder that returns the mean of a prompt's rows."""
    name = "BERT, mean"
    return Options(
        pooling.write(name, folder),
        dtype=dtype,
        max_model_len=510,
        chunk=1024,
        random_weights=7,
        extra=pooling.ARGUMENTS[name],
    )


def images(folder: str, dtype: str = "") -> Options:
    """The options of an engine with a small model that takes images."""
    return Options(
        vision.write("Idefics3", folder),
        dtype=dtype or "float32",
        max_model_len=1024,
        chunk=512,
        random_weights=7,
        digests=True,
    )


def adapters(dtype: str = "", platform: str = "cpu") -> Options:
    """The options of an engine with LoRA: a small dense model, whose embeddings and head take adapters, too, on CPU."""
    on_cpu = platform == "cpu"
    base = Options(
        str(recipes.path(recipes.LLAMA if on_cpu else recipes.LLAMA_100M, cache=settings.read().cache)),
        dtype=dtype or ("float32" if on_cpu else "bfloat16"),
        max_model_len=1024,
        chunk=512,
        extra={} if on_cpu else {"gpu_memory_utilization": 0.15, "kv_cache_memory_bytes": 1 << 30},
    )
    return base.but(**lora.options(base))


def quantized(given: Options, folder: str) -> Options:
    """These options with another model: three dense layers, whose weights vLLM quantizes to FP8 while it loads them."""
    config = shapes.SHAPES["Qwen3-1.7B"] | {"num_hidden_layers": 3}
    model = shapes.save("Qwen3-1.7B, 3 layers", config, folder)
    return given.but(model=model, extra=given.extra | {"quantization": "fp8"})


_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def packed(given: Options, folder: str) -> Options:
    """These options with another model: three dense layers with weights of 4 bits, as AWQ packs them."""
    config = shapes.SHAPES["Qwen3-1.7B"] | {"num_hidden_layers": 3, "quantization_config": _AWQ}
    return given.but(model=shapes.save("Qwen3-1.7B AWQ, 3 layers", config, folder))


def packed_experts(given: Options, folder: str) -> Options:
    """These options with another model: the same shape, with experts and linears of 4 bits, as AWQ packs them."""
    config = shapes.SHAPES[shapes.WIDE_MOE] | {"quantization_config": _AWQ | {"modules_to_not_convert": ["mlp.gate"]}}
    return given.but(model=shapes.save(f"{shapes.WIDE_MOE} AWQ", config, folder))
