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
_BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}

# By the scheme's name: the model's shape, and the checkpoint's quantization_config, None if vLLM quantizes by itself.
SCHEMES: dict[str, tuple[str, dict | None]] = {
    "FP8 while loading": ("Qwen3-8B", None),
    "FP8 channel": ("Qwen3-8B", _CHANNEL),
    "FP8 block": ("Qwen3-8B", _BLOCK),
    "FP8 block experts": ("Qwen3-30B-A3B", _BLOCK),
}


def label(scheme: str, layers: int) -> str:
    """The model's name in result files."""
    return f"{SCHEMES[scheme][0]} {scheme}, {layers} layers"


def config(scheme: str, layers: int) -> dict[str, object]:
    """The model's config.json."""
    from bi_patch.tools.models import shapes

    shape, quantization = SCHEMES[scheme]
    held = shapes.SHAPES[shape] | {"num_hidden_layers": layers}
    return held if quantization is None else held | {"quantization_config": quantization}


def arguments(scheme: str) -> dict[str, object]:
    """Arguments of vllm.LLM for the scheme."""
    return {"quantization": "fp8"} if SCHEMES[scheme][1] is None else {}
