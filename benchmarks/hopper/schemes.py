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
    "MXFP4": ("gpt-oss-20b", _MXFP4),
    "NVFP4": ("Qwen3-8B", _NVFP4),
}


def label(scheme: str, layers: int) -> str:
    """The model's name in result files."""
    return f"{SCHEMES[scheme][0].partition(',')[0]} {scheme.removesuffix(' MLA')}, {layers} layers"


def config(scheme: str, layers: int) -> dict[str, object]:
    """The model's config.json."""
    from bi_patch.tools.models import shapes

    shape, quantization = SCHEMES[scheme]
    held = shapes.SHAPES[shape] | {"num_hidden_layers": layers}
    if "layer_types" in held:
        held["layer_types"] = held["layer_types"][:layers]
    return held if quantization is None else held | {"quantization_config": quantization}


# Arguments of vllm.LLM, by the scheme's name.
_ARGUMENTS: dict[str, dict[str, object]] = {
    "FP8 while loading": {"quantization": "fp8"},
    "FP8 channel while loading": {"quantization": "fp8_per_channel"},
    "FP8 block while loading": {"quantization": "fp8_per_block"},
    "FP8 KV cache": {"kv_cache_dtype": "fp8"},
    "FP8 block and KV cache": {"kv_cache_dtype": "fp8"},
}


def arguments(scheme: str) -> dict[str, object]:
    """Arguments of vllm.LLM for the scheme."""
    return _ARGUMENTS.get(scheme, {})
