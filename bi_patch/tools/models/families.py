"""One tiny model of each family as config.json: real layers, two of each kind, and random weights.

`model_type` picks the class of the configuration. A family whose class is not in transformers takes Llama's, because
the architecture alone picks vLLM's model.
"""

from __future__ import annotations

from pathlib import Path

from bi_patch.tools.models import shapes

_WINDOW = 96  # shorter than verify's middle prompts
_TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_NARROW = {"head_dim": 32}  # of models whose heads share the hidden size
# vLLM's MLA on CPU takes latents of 512 + 64 only.
_LATENT = {
    "num_key_value_heads": 8,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 40.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
    "num_nextn_predict_layers": 0,
}
_SIGMOID = {
    "q_lora_rank": 96,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
_EVERY_OTHER = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": _WINDOW}


def _as(architecture: str, model_type: str, *parts: dict[str, object], **own: object) -> dict[str, object]:
    made: dict[str, object] = dict(_TINY)
    for part in parts:
        made |= part
    return made | own | {"architectures": [architecture], "model_type": model_type}


def _without_groups(*given: object, **own: object) -> dict[str, object]:
    """A shape as `_as` makes it, whose configuration has neither groups of heads nor a size of heads."""
    return {k: v for k, v in _as(*given, **own).items() if k not in ("num_key_value_heads", "head_dim")}


FAMILIES: dict[str, dict[str, object]] = {
    "Qwen2.5": _as("Qwen2ForCausalLM", "qwen2", _NARROW),
    "Mistral": _as("MistralForCausalLM", "mistral", sliding_window=_WINDOW),
    "Mixtral": _as("MixtralForCausalLM", "mixtral", num_local_experts=8, num_experts_per_tok=2, sliding_window=None),
    "Qwen2-MoE": _as(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        _EXPERTS,
        _NARROW,
        shared_expert_intermediate_size=256,
        decoder_sparse_step=1,
        norm_topk_prob=False,
        mlp_only_layers=[],
    ),
    "Gemma 1": _as("GemmaForCausalLM", "gemma", hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True),
    "Gemma 2": _as(
        "Gemma2ForCausalLM",
        "gemma2",
        _EVERY_OTHER,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=64,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
    ),
    "Gemma 3": _as(
        "Gemma3ForCausalLM",
        "gemma3_text",
        _EVERY_OTHER,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=64,
        tie_word_embeddings=True,
    ),
    "Phi-3": _as("Phi3ForCausalLM", "phi3", _NARROW),
    "GLM-4.5": _as(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.5,
        norm_topk_prob=True,
        first_k_dense_replace=1,
        use_qk_norm=True,
        attention_bias=True,
        partial_rotary_factor=0.5,
        num_nextn_predict_layers=0,
    ),
    "GLM-4": _as("Glm4ForCausalLM", "glm4", partial_rotary_factor=0.5, attention_bias=True),
    "Command R7B": _as(
        "Cohere2ForCausalLM",
        "cohere2",
        _EVERY_OTHER,
        _NARROW,
        layer_norm_eps=1e-5,
        logit_scale=0.25,
        tie_word_embeddings=True,
    ),
    "Command R": _as(
        "CohereForCausalLM",
        "cohere",
        _NARROW,
        layer_norm_eps=1e-5,
        logit_scale=0.25,
        use_qk_norm=True,
        tie_word_embeddings=True,
    ),
    "Granite": _as(
        "GraniteForCausalLM",
        "granite",
        _NARROW,
        embedding_multiplier=12.0,
        logits_scaling=8.0,
        residual_multiplier=0.22,
        attention_multiplier=0.0156,
    ),
    "Granite MoE": _as(
        "GraniteMoeForCausalLM",
        "granitemoe",
        _NARROW,
        num_local_experts=8,
        num_experts_per_tok=2,
        embedding_multiplier=12.0,
        logits_scaling=6.0,
        residual_multiplier=0.22,
        attention_multiplier=0.0156,
    ),
    "OLMo 2": _as("Olmo2ForCausalLM", "olmo2", _NARROW),
    "OLMo 3": _as("Olmo3ForCausalLM", "olmo3", _EVERY_OTHER, _NARROW),
    "OLMo 1": _as("OlmoForCausalLM", "olmo", _NARROW, clip_qkv=None),
    "OLMoE": _as(
        "OlmoeForCausalLM",
        "olmoe",
        _NARROW,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        intermediate_size=128,
    ),
    "EXAONE 4": _as("Exaone4ForCausalLM", "exaone4", _EVERY_OTHER, _NARROW, sliding_window_pattern=2),
    "ERNIE 4.5": _as("Ernie4_5ForCausalLM", "ernie4_5", use_bias=False),
    "ERNIE 4.5 MoE": _as(
        "Ernie4_5_MoeForCausalLM",
        "ernie4_5_moe",
        use_bias=False,
        moe_num_experts=8,
        moe_k=2,
        moe_intermediate_size=128,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=1,
        moe_layer_interval=1,
    ),
    "SmolLM3": _as("SmolLM3ForCausalLM", "smollm3", _NARROW, no_rope_layers=[1, 0]),
    "SeedOss": _as("SeedOssForCausalLM", "seed_oss", attention_bias=True, attention_out_bias=False),
    "PhiMoE": _as(
        "PhiMoEForCausalLM",
        "phimoe",
        _NARROW,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=None,
        attention_bias=True,
        lm_head_bias=True,
    ),
    "DeepSeek-MoE": _as(
        "DeepseekForCausalLM",
        "llama",
        _NARROW,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        first_k_dense_replace=1,
        moe_layer_freq=1,
        norm_topk_prob=False,
    ),
    "DeepSeek V2": _as(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        _LATENT,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
    ),
    "DeepSeek V3": _as("DeepseekV3ForCausalLM", "deepseek_v3", _LATENT, _SIGMOID, n_group=4, topk_group=2),
    "Kimi K2": _as("DeepseekV3ForCausalLM", "deepseek_v3", _LATENT, _SIGMOID),  # vLLM reads kimi_k2 as deepseek_v3
    "GLM-4.7-Flash": _as(
        "Glm4MoeLiteForCausalLM", "glm4_moe_lite", _LATENT, _SIGMOID, rope_scaling=None, v_head_dim=64
    ),
    "MiniCPM3": _as(
        "MiniCPM3ForCausalLM",
        "minicpm3",
        num_key_value_heads=8,
        q_lora_rank=96,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        scale_emb=12,
        scale_depth=1.4,
        dim_model_base=256,
    ),
    "OPT": _without_groups(
        "OPTForCausalLM",
        "opt",
        ffn_dim=512,
        do_layer_norm_before=True,
        word_embed_proj_dim=256,
        activation_function="relu",
        layerdrop=0.0,
        tie_word_embeddings=True,
    ),
    "GPT-2": _without_groups(
        "GPT2LMHeadModel",
        "gpt2",
        n_embd=256,
        n_layer=2,
        n_head=4,
        n_positions=4096,
        n_inner=512,
        activation_function="gelu_new",
        tie_word_embeddings=True,
    ),
    "GPT-NeoX": _without_groups(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        num_attention_heads=4,
        rotary_pct=0.25,
        hidden_act="gelu",
        use_parallel_residual=True,
    ),
    "Falcon": _without_groups(
        "FalconForCausalLM",
        "falcon",
        num_attention_heads=4,
        multi_query=True,
        parallel_attn=True,
        bias=False,
        alibi=False,
        new_decoder_architecture=False,
        tie_word_embeddings=True,
    ),
    "StableLM": _as("StableLmForCausalLM", "stablelm", _NARROW, partial_rotary_factor=0.25, layer_norm_eps=1e-5),
    "Starcoder2": _as(
        "Starcoder2ForCausalLM",
        "starcoder2",
        _NARROW,
        hidden_act="gelu_pytorch_tanh",
        use_bias=True,
        sliding_window=None,
    ),
    "Nemotron": _as(
        "NemotronForCausalLM", "nemotron", _NARROW, hidden_act="relu2", norm_eps=1e-5, partial_rotary_factor=0.5
    ),
    "InternLM 2": _as("InternLM2ForCausalLM", "llama", _NARROW, bias=False),
    "InternLM 3": _as("InternLM3ForCausalLM", "llama", qkv_bias=False, bias=False),
    "Solar": _as(
        "SolarForCausalLM", "llama", _NARROW, bskcn_1=[1], bskcn_2=[1], bskcn_3=[1], bskcn_4=[1], bskcn_tv=[0.9, 0.8]
    ),
    "MiMo": _as("MiMoForCausalLM", "qwen2", _NARROW),
    "Bailing": _as(
        "BailingMoeForCausalLM",
        "llama",
        _NARROW,
        _EXPERTS,
        num_shared_experts=1,
        first_k_dense_replace=0,
        norm_topk_prob=True,
        use_bias=False,
        use_qkv_bias=False,
        norm_head=False,
        embedding_dropout=0.0,
        output_dropout=0.0,
    ),
    "Ling 2": _as(
        "BailingMoeV2ForCausalLM",
        "llama",
        _EXPERTS,
        num_shared_experts=1,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        use_bias=False,
        use_qkv_bias=False,
        use_qk_norm=True,
        norm_head=False,
        embedding_dropout=0.0,
        output_dropout=0.0,
        score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        partial_rotary_factor=0.5,
    ),
    "HunYuan": _as(
        "HunYuanDenseV1ForCausalLM",
        "hunyuan_v1_dense",
        use_qk_norm=True,
        use_cla=False,
        rope_theta=10000.0,
        rope_scaling={
            "type": "dynamic",
            "rope_type": "dynamic",
            "alpha": 1000.0,
            "factor": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    ),
    "PLaMo 3": _as(
        "Plamo3ForCausalLM",
        "llama",
        _EVERY_OTHER,
        window_size=_WINDOW,
        interleaved_sliding_window=[_WINDOW, None],
        rope_local_theta=10000.0,
    ),
    "Granite SWA": _as(
        "GraniteSWAForCausalLM",
        "granite_swa",
        _EVERY_OTHER,
        _NARROW,
        embedding_multiplier=12.0,
        logits_scaling=8.0,
        residual_multiplier=0.22,
        attention_multiplier=0.0156,
    ),
    "Gemma 3n (text)": _as(
        "Gemma3nForCausalLM",
        "gemma3n_text",
        hidden_activation="gelu_pytorch_tanh",
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        sliding_window=_WINDOW,
        intermediate_size=[512] * 4,
        activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0],
        vocab_size_per_layer_input=2048,
        hidden_size_per_layer_input=64,
        altup_num_inputs=4,
        altup_active_idx=0,
        laurel_rank=16,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
    ),
    "MiniCPM": _as("MiniCPMForCausalLM", "llama", _NARROW, scale_emb=12, scale_depth=1.4, dim_model_base=256),
}


def write(name: str, root: str | Path) -> str:
    """Write the config.json of a family in FAMILIES into a folder below `root`. Returns the folder.

    Raises KeyError for a name that is not in FAMILIES.
    """
    return shapes.save(name, FAMILIES[name], root)
