"""Models with quantized weights for the measurements on a Hopper host: shapes, few layers, and the scheme's config."""

from __future__ import annotations

_FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}
_CHANNEL = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _FLOAT | {"strategy": "channel", "dynamic": False},
            "input_activations": _FLOAT | {"strategy": "token", "dynamic": True},
        }
    },
}
_EIGHT = {"num_bits": 8, "type": "int", "symmetric": True}
_INT8 = _CHANNEL | {
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _EIGHT | {"strategy": "channel", "dynamic": False},
            "input_activations": _EIGHT | {"strategy": "token", "dynamic": True},
        }
    },
}
_FIXED = {"strategy": "tensor", "dynamic": False}  # one scale of activations, from the checkpoint
_INT8_STATIC = _INT8 | {
    "config_groups": {
        "group_0": _INT8["config_groups"]["group_0"] | {"input_activations": _EIGHT | _FIXED},
    }
}
_CHANNEL_STATIC = _CHANNEL | {
    "config_groups": {
        f"group_{number}": {
            "targets": [target],
            "weights": _FLOAT | {"strategy": strategy, "dynamic": False},
            "input_activations": _FLOAT | _FIXED,
        }
        for number, (target, strategy) in enumerate((("re:.*self_attn.*", "channel"), ("re:.*mlp.*", "tensor")))
    }
}
_STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
_BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
_MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "lm_head": False}


def _packed(bits: int, group: int | None) -> dict:
    """Weights alone in compressed-tensors: groups of a size, or None for one scale a row."""
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


_NVFP4 = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "float",
                "strategy": "tensor_group",
                "group_size": 16,
                "symmetric": True,
                "dynamic": False,
            },
        }
    },
}

_NVFP4_ROWS = _NVFP4 | {
    "config_groups": {
        "group_0": _NVFP4["config_groups"]["group_0"]
        | {"input_activations": _NVFP4["config_groups"]["group_0"]["weights"] | {"dynamic": "local"}}
    }
}
_GATE = {"ignore": ["lm_head", "re:.*mlp.gate$"]}
_ZEROS = {
    "group_0": _packed(4, 128)["config_groups"]["group_0"]
    | {"weights": _packed(4, 128)["config_groups"]["group_0"]["weights"] | {"symmetric": False}}
}
_DYNAMIC = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_ROUND = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "data_type": "int",
    "packing_format": "auto_round:auto_gptq",
    "autoround_version": "0.9.0",
}
_MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"], "producer": {"name": "modelopt"}}
_MODELOPT_FOUR = _MODELOPT | {"quant_algo": "W4A16_NVFP4", "group_size": 16}
_MODELOPT_ROWS = _MODELOPT_FOUR | {"quant_algo": "NVFP4"}
_QUARK_TENSOR = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "symmetric": True}
_QUARK = {
    "quant_method": "quark",
    "global_quant_config": {
        "weight": _QUARK_TENSOR,
        "input_tensors": _QUARK_TENSOR,
        "output_tensors": None,
        "bias": None,
    },
    "layer_quant_config": {},
    "layer_type_quant_config": {},
    "exclude": ["lm_head"],
    "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
    "quant_mode": "eager_mode",
}
_OF_GROUPS = {"dtype": "fp4", "qscheme": "per_group", "group_size": 16, "is_dynamic": False, "symmetric": True}
_QUARK_ROWS = _QUARK | {
    "global_quant_config": _QUARK["global_quant_config"]
    | {
        "weight": [_OF_GROUPS, _QUARK_TENSOR],
        "input_tensors": [_OF_GROUPS | {"is_dynamic": True}, _QUARK_TENSOR],
    }
}

# By the scheme's name: the model's shape, and the checkpoint's quantization_config, None if vLLM quantizes by itself.
SCHEMES: dict[str, tuple[str, dict | None]] = {
    "FP8 while loading": ("Qwen3-8B", None),
    "FP8 channel while loading": ("Qwen3-8B", None),
    "FP8 block while loading": ("Qwen3-8B", None),
    "FP8 channel": ("Qwen3-8B", _CHANNEL),
    "FP8 static": ("Qwen3-8B", _STATIC),
    "FP8 static, compressed-tensors": ("Qwen3-8B", _CHANNEL_STATIC),
    "FP8 block": ("Qwen3-8B", _BLOCK),
    "FP8 block and KV cache": ("Qwen3-8B", _BLOCK),
    "FP8 KV cache": ("Qwen3-8B", None),
    "FP8 channel and KV cache": ("Qwen3-8B", _CHANNEL | {"kv_cache_scheme": _FLOAT | {"strategy": "tensor"}}),
    "FP8 channel and KV cache per head": (
        "Qwen3-8B",
        _CHANNEL | {"kv_cache_scheme": _FLOAT | {"strategy": "attn_head"}},
    ),
    "FP8 block experts": ("Qwen3-30B-A3B", _BLOCK),
    "FP8 block MLA": ("DeepSeek-V3, 4 layers", _BLOCK),
    "FP8 block ue8m0 MLA": ("DeepSeek-V3, 4 layers", _BLOCK | {"scale_fmt": "ue8m0"}),  # as DeepSeek V3.1
    "INT8": ("Qwen3-8B", _INT8),
    "INT8 static": ("Qwen3-8B", _INT8_STATIC),
    "AWQ": ("Qwen3-8B", _AWQ),
    "GPTQ": ("Qwen3-8B", _GPTQ),
    "W4A16": ("Qwen3-8B", _packed(4, 64)),
    "W8A16": ("Qwen3-8B", _packed(8, None)),
    "W4A16 experts": ("Qwen3-30B-A3B", _packed(4, 128) | {"ignore": ["lm_head", "re:.*mlp.gate$"]}),
    "GPTQ experts": ("Qwen3-30B-A3B", _GPTQ | {"dynamic": {"-:.*\\.mlp\\.gate$": {}}}),
    "AWQ experts": ("Qwen3-30B-A3B", _AWQ | {"modules_to_not_convert": ["mlp.gate"]}),
    "AWQ experts by moe_wna16": ("Qwen3-30B-A3B", _AWQ | {"modules_to_not_convert": ["mlp.gate"]}),
    "GPTQ experts by moe_wna16": ("Qwen3-30B-A3B", _GPTQ | {"dynamic": {"-:.*\\.mlp\\.gate$": {}}}),
    "FP8 channel experts": ("Qwen3-30B-A3B", _CHANNEL | _GATE),
    "GLM-4.6 FP8": ("GLM-4.6", _CHANNEL | _GATE),
    "MiniMax-M2 FP8": (
        "MiniMax-M2",
        _BLOCK | {"fmt": "float8_e4m3fn", "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]},
    ),
    "FP8 tensor": ("Qwen3-8B", _DYNAMIC),
    "FP8 tensor experts": ("Qwen3-30B-A3B", _DYNAMIC),
    "FP8 static experts": ("Qwen3-30B-A3B", _STATIC),
    "FP8 channel experts while loading": ("Qwen3-30B-A3B", None),
    "W4A16 experts with zero points": ("Qwen3-30B-A3B", _packed(4, 128) | _GATE | {"config_groups": _ZEROS}),
    "GPTQ 8-bit experts": (
        "Qwen3-30B-A3B",
        _GPTQ | {"bits": 8, "dynamic": {"-:.*\\.mlp\\.gate$": {}}},
    ),
    "GPTQ head": ("Qwen3-8B", _GPTQ | {"lm_head": True}),
    "AutoRound": ("Qwen3-8B", _ROUND),
    "ModelOpt FP8": ("Qwen3-8B", _MODELOPT),
    "ModelOpt NVFP4": ("Qwen3-8B", _MODELOPT_FOUR),
    "NVFP4 W4A4": ("Qwen3-8B", _NVFP4_ROWS),
    "ModelOpt NVFP4 W4A4": ("Qwen3-8B", _MODELOPT_ROWS),
    "ModelOpt NVFP4 W4A4 and KV cache": (
        "Qwen3-8B",
        _MODELOPT_ROWS | {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}},
    ),
    "Quark NVFP4 W4A4": ("Qwen3-8B", _QUARK_ROWS),
    "Quark FP8": ("Qwen3-8B", _QUARK),
    "MXFP4": ("gpt-oss-20b", _MXFP4),
    "NVFP4": ("Qwen3-8B", _NVFP4),
    "NVFP4 experts": ("Qwen3-30B-A3B", _NVFP4 | _GATE),
    "NVFP4 W4A4 experts": ("Qwen3-30B-A3B", _NVFP4_ROWS | _GATE),
    "ModelOpt NVFP4 experts": ("Qwen3-30B-A3B", _MODELOPT_FOUR | {"ignore": ["lm_head", "*.mlp.gate"]}),
}


def label(scheme: str, layers: int) -> str:
    """The model's name in result files."""
    shape = SCHEMES[scheme][0].partition(",")[0]
    return f"{shape} {scheme.removesuffix(' MLA').removeprefix(shape).strip()}, {layers} layers"


def config(scheme: str, layers: int) -> dict[str, object]:
    """The model's config.json."""
    from bi_patch.tools.models import shapes

    shape, quantization = SCHEMES[scheme]
    held = shapes.SHAPES[shape] | {"num_hidden_layers": layers}
    if "layer_types" in held:
        held["layer_types"] = held["layer_types"][:layers]
    if "first_k_dense_replace" in held:  # at least the last layer has experts
        held["first_k_dense_replace"] = min(held["first_k_dense_replace"], layers - 1)
    return held if quantization is None else held | {"quantization_config": quantization}


# Arguments of vllm.LLM, by the scheme's name.
_ARGUMENTS: dict[str, dict[str, object]] = {
    "FP8 while loading": {"quantization": "fp8"},
    "FP8 channel while loading": {"quantization": "fp8_per_channel"},
    "FP8 block while loading": {"quantization": "fp8_per_block"},
    "FP8 channel experts while loading": {"quantization": "fp8_per_channel"},
    "AWQ experts by moe_wna16": {"quantization": "moe_wna16"},
    "GPTQ experts by moe_wna16": {"quantization": "moe_wna16"},
    "FP8 KV cache": {"kv_cache_dtype": "fp8"},
    "FP8 block and KV cache": {"kv_cache_dtype": "fp8"},
}


def arguments(scheme: str) -> dict[str, object]:
    """Arguments of vllm.LLM for the scheme."""
    return _ARGUMENTS.get(scheme, {})
