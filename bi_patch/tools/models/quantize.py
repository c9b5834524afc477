"""Quantizes the linears of a checkpoint, round to nearest, in the formats of AWQ, GPTQ and compressed-tensors.

For tests and benchmarks: no calibration. Every integer comes from a weight, so they have a real spread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

INT8, STATIC, AWQ, GPTQ, W4A16, ZEROS = "int8", "int8-static", "awq", "gptq", "w4a16", "w4a16-zeros"
FP8_BLOCKS = "fp8-blocks"
GROUPS = {AWQ: 128, GPTQ: 64, W4A16: 32}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs an int32 of AWQ holds, lowest bits first


def convert(folder: Path, scheme: str, *, left_out: Collection[str] = ()) -> None:
    """Replace the linears in a folder's model.safetensors by quantized ones, and describe them in its config.json.

    scheme: of compressed-tensors INT8 (per-channel weights, dynamic per-token activations), STATIC (INT8 with one scale
    for the weight and a static one for activations), W4A16, ZEROS (W4A16 with zero points and one group); AWQ; GPTQ;
    FP8_BLOCKS (128 x 128, as DeepSeek).
    left_out: names of linears that stay as they are. The head and the embedding always stay.
    Raises KeyError for another scheme.
    """
    from safetensors.torch import load_file, save_file

    quantized, describe = SCHEMES[scheme]
    file = folder / "model.safetensors"
    made: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(file).items():
        layer = name.removesuffix(".weight")
        linear = name.endswith("_proj.weight") and layer not in left_out
        if linear:
            made |= {f"{layer}.{part}": value.contiguous() for part, value in quantized(tensor).items()}
        else:
            made[name] = tensor
    save_file(made, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = describe(["lm_head", *left_out])
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch

    wide = weight.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    return {"weight": (wide / scale).round().to(torch.int8), "weight_scale": scale}


def _static(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch

    wide = weight.float()
    scale = wide.abs().amax().reshape(1) / 127
    return {
        "weight": (wide / scale).round().to(torch.int8),
        "weight_scale": scale,
        "input_scale": torch.tensor([4 / 127]),  # most activations of a random model are below 4
    }


def _fp8_blocks(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch

    n, k = weight.shape
    blocks = weight.float().view(n // 128, 128, k // 128, 128)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    return {
        "weight": (blocks / scale).to(torch.float8_e4m3fn).view(n, k),
        "weight_scale_inv": scale.view(n // 128, k // 128),
    }


def _four_bits(weight: torch.Tensor, group: int, zeros: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers 0 to 15 [N, K], scales [N, K/group] in weight's dtype, zero points [N, K/group]."""
    import torch

    n, k = weight.shape
    wide = weight.float().view(n, k // group, group)
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    if zeros:
        scale = ((high - low) / 15).to(weight.dtype).float()
        zero = (-low / scale).round().clamp(0, 15)
    else:
        scale = (torch.maximum(high, -low) / 7.5).to(weight.dtype).float()
        zero = torch.full_like(scale, 8.0)
    q = (wide / scale + zero).round().clamp(0, 15)
    return q.view(n, k).to(torch.int32), scale.squeeze(-1).to(weight.dtype), zero.squeeze(-1).to(torch.int32)


def _packed(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight 4-bit values of the last dimension in each int32. order: which of the eight stands in which place."""
    import torch

    wide = values.to(torch.int64).unflatten(-1, (-1, 8))[..., list(order)]
    packed = sum(wide[..., i] << (4 * i) for i in range(8))
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def _awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    q, scale, zero = _four_bits(weight, GROUPS[AWQ], True)
    return {"qweight": _packed(q.T, _AWQ_ORDER), "qzeros": _packed(zero.T, _AWQ_ORDER), "scales": scale.T}


def _gptq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch

    q, scale, zero = _four_bits(weight, GROUPS[GPTQ], False)
    return {
        "qweight": _packed(q).T,
        "qzeros": _packed((zero - 1).T),  # the format's first version stores zero points less one
        "scales": scale.T,
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUPS[GPTQ],
    }


def _w4a16(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch

    q, scale, _ = _four_bits(weight, GROUPS[W4A16], False)
    return {
        "weight_packed": _packed(q),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def _zeros(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch

    q, scale, zero = _four_bits(weight, weight.shape[1], True)
    return {
        "weight_packed": _packed(q),
        "weight_scale": scale,
        "weight_zero_point": _packed(zero.T.contiguous()).T,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def _tensors(weights: dict, rows: dict | None, packing: str) -> Callable[[list[str]], dict]:
    group = {"weights": {"symmetric": True, **weights}, "input_activations": rows, "targets": ["Linear"]}
    return lambda left_out: {
        "quant_method": "compressed-tensors",
        "format": packing,
        "quantization_status": "compressed",
        "ignore": left_out,
        "config_groups": {"group_0": group},
    }


_INTEGERS = {"num_bits": 8, "type": "int", "strategy": "channel", "dynamic": False}
_TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
_TENSOR = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}
_CHANNELS = {"num_bits": 4, "type": "int", "strategy": "channel", "dynamic": False, "symmetric": False}
_GROUPED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUPS[W4A16], "dynamic": False}

# By the scheme: what it makes of a weight, and its quantization_config, from the names that it leaves out.
SCHEMES: dict[str, tuple[Callable, Callable[[list[str]], dict]]] = {
    INT8: (_int8, _tensors(_INTEGERS, _TOKENS, "int-quantized")),
    STATIC: (_static, _tensors(_TENSOR, _TENSOR, "int-quantized")),
    FP8_BLOCKS: (
        _fp8_blocks,
        lambda left_out: {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": left_out,
        },
    ),
    ZEROS: (_zeros, _tensors(_CHANNELS, None, "pack-quantized")),
    AWQ: (
        _awq,
        lambda left_out: {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUPS[AWQ],
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": left_out,
        },
    ),
    GPTQ: (
        _gptq,
        lambda left_out: {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUPS[GPTQ],
            "sym": True,
            "desc_act": False,
            "lm_head": False,
            "dynamic": {f"-:{name}": {} for name in left_out if name != "lm_head"},
        },
    ),
    W4A16: (_w4a16, _tensors(_GROUPED, None, "pack-quantized")),
}
