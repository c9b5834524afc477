"""The engines in which faults are planted: their models and options."""

from __future__ import annotations

import json
from pathlib import Path

from bi_patch import settings
from bi_patch.tools.verify.engine import Options

# 3 layers with the experts of Qwen3-30B-A3B and the width of Qwen3-8B: an engine that starts in seconds. In rows of
# more than 2048 elements, vLLM's RMSNorm kernel sums in the same order with both of its block sizes.
_SHAPE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "head_dim": 128,
    "num_key_value_heads": 4,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
    "tie_word_embeddings": False,
}
_HYBRID = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "hidden_size": 256,
    "vocab_size": 2048,
    "num_hidden_layers": 4,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 4096,
}


def options(platform: str, folder: str, dtype: str = "") -> Options:
    """The options of the engine in which faults are planted: a MoE model, tied routers and head, eager for traces.

    dtype: by default fp32 on CPU, where every change of order shows in the bits, and bf16 on CUDA.
    """
    if platform == "cpu":
        from bi_patch.tools.models import recipes

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
        _model(folder, "qwen3-moe", _SHAPE),
        dtype=dtype or "bfloat16",
        max_model_len=2048,
        chunk=2048,
        tied=True,
        digests=True,
        tokenizer=False,
        random_weights=7,
        extra={"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 8 << 30},
    )


def few_blocks(given: Options, block: int) -> Options:
    """These options with a KV cache for one request of full length, so that a batch is preempted."""
    short = given.but(max_model_len=min(given.max_model_len, 1024))
    return short.but(kv_blocks=-(-short.max_model_len // block) + 1)


def recurrent(folder: str) -> Options:
    """The options of a small model with gated delta nets, whose chunks vLLM's kernels start at the engine step."""
    return Options(
        _model(folder, "hybrid", _HYBRID),
        max_model_len=1024,
        chunk=512,
        tokenizer=False,
        random_weights=1,
        prefix_caching=False,
    )


def _model(folder: str, name: str, config: dict) -> str:
    path = Path(folder) / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)
