"""The contracts of the engines that this process knows. Arming keeps them, and a trainer in this process reads them."""

from __future__ import annotations

from typing import Any

# What each contract says; see bi_patch.arming.contract.
FIELDS = (
    "instance",
    "platform",
    "vllm",
    "torch",
    "digest",
    "kernels",
    "device",
    "dtype",
    "quantization",
    "lora",
    "kv_cache_dtype",
    "tensor_parallel_size",
    "rank_sums",
    "attention",
    "mla",
    "logprobs_mode",
    "runner",
    "compiled",
    "model",
)
# Values of a model's configuration that decide bits. A configuration without a value has None.
MODEL = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts_per_tok",
    "norm_topk_prob",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention_bias",
)

# By vLLM's name of the engine (VllmConfig.instance_id); see bi_patch.arming.contract.
contracts: dict[str, dict[str, Any]] = {}


def keep(contract: dict[str, Any]) -> None:
    """Keep an engine's contract, if it has one."""
    if contract:
        contracts[contract["instance"]] = contract
